#pragma once
#include <cstdint>

#include "core/dtype.h"
#include "core/shape.h"
#include "ops/kernel_device.h"

namespace weft {

/// The first index of [0, count) at which ids[i] is not in [0, limit), or -1.
int64_t first_outside(Cpu, const int64_t* ids, int64_t count, int64_t limit);
/// Reports it (core/backend.h) if there is one; `what` is a string literal.
void report_outside(Cuda, const char* what, const int64_t* ids, int64_t count, int64_t limit);

/// local[i] = ids[i] - first where that is in [0, rows), else -1.
void local_ids(Cpu, const int64_t* ids, int64_t count, int64_t first, int64_t rows, int64_t* local);
void local_ids(Cuda, const int64_t* ids, int64_t count, int64_t first, int64_t rows, int64_t* local);

/// y[i] = table[ids[i]], or 0 where ids[i] is -1; rows of `bytes` bytes. CUDA writes 0 for every id that is not in
/// [0, vocabulary).
void embedding_forward(Cpu, const int64_t* ids, int64_t count, const void* table, int64_t vocabulary, int64_t bytes,
                       void* y);
void embedding_forward(Cuda, const int64_t* ids, int64_t count, const void* table, int64_t vocabulary, int64_t bytes,
                       void* y);

/// Gradient of a table [vocabulary, columns]. The order of the sums is a function of the ids alone. Rows whose id is
/// -1, on CUDA all whose id is not in [0, vocabulary), are left out.
template <class T>
struct EmbeddingBackward {
  const T* dy;         ///< [count, columns]
  const int64_t* ids;  ///< [count], each in [0, vocabulary) or -1
  T* dtable;           ///< [vocabulary, columns]
  int64_t* workspace;  ///< embedding_workspace<T>() elements
  int64_t count, vocabulary, columns;
  bool accumulate;  ///< add to dtable instead of overwriting it
};
template <class T>
int64_t embedding_workspace(Cpu, int64_t count, int64_t vocabulary, int64_t columns);
template <class T>
int64_t embedding_workspace(Cuda, int64_t count, int64_t vocabulary, int64_t columns);
template <class T>
void embedding_backward(Cpu, const EmbeddingBackward<T>& arguments);
template <class T>
void embedding_backward(Cuda, const EmbeddingBackward<T>& arguments);

/// A row-major array x and an index of the same rank, seen as [outer, count, inner] around dimension `dim`; lines run
/// along it.
struct GatherLines {
  const int64_t* index;
  int64_t outer, count, inner;
  int64_t length;  ///< size of x along dim
  int64_t stride;  ///< of x along dim
  int rank, dim;
  int64_t sizes[kMaxRank];    ///< of the index
  int64_t strides[kMaxRank];  ///< of x

  /// Offset in x of element 0 of the line that belongs to [o, ., i].
  WEFT_HD int64_t line_start(int64_t o, int64_t i) const {
    int64_t start = 0;
    for (int d = rank - 1; d >= 0; --d) {
      if (d == dim) continue;
      int64_t& rest = d > dim ? i : o;
      start += rest % sizes[d] * strides[d];
      rest /= sizes[d];
    }
    return start;
  }
};
/// y[o, j, i] = x[line_start(o, i) + index[o, j, i] * stride]; elements of `size` bytes: 1, 2, 4 or 8. CUDA leaves out,
/// here and below, the elements whose index is not in [0, length).
void gather_forward(Cpu, const GatherLines& lines, const void* x, int size, void* y);
void gather_forward(Cuda, const GatherLines& lines, const void* x, int size, void* y);
/// dx[...] += dy, a line at a time in order; A is f32 or f64.
template <class T>
void gather_backward(Cpu, const GatherLines& lines, const T* dy, Accumulate<T>* dx);
template <class T>
void gather_backward(Cuda, const GatherLines& lines, const T* dy, Accumulate<T>* dx);

}  // namespace weft
