#pragma once
#include <cstdint>

#include "core/dtype.h"
#include "ops/launch.h"

namespace weft {

/// The first index of [0, count) at which ids[i] is not in [0, limit), or -1.
int64_t first_outside(Cpu, const int64_t* ids, int64_t count, int64_t limit);

/// y[i] = table[ids[i]]; rows of `bytes` bytes.
void embedding_forward(Cpu, const int64_t* ids, int64_t count, const void* table, int64_t bytes, void* y);

/// Gradient of a table [vocabulary, columns].
template <class T>
struct EmbeddingBackward {
  const T* dy;         ///< [count, columns]
  const int64_t* ids;  ///< [count], each in [0, vocabulary)
  int64_t* starts;     ///< scratch [vocabulary + 1]
  int64_t* order;      ///< scratch [count]
  T* dtable;           ///< [vocabulary, columns]
  int64_t count, vocabulary, columns;
  bool accumulate;  ///< add to dtable instead of overwriting it
};
template <class T>
void embedding_backward(Cpu, const EmbeddingBackward<T>& arguments);

/// An array [outer, length, inner] and an index [.., count, ..] over its middle. `outer` and `inner` run over the
/// index's own sizes; `line` maps a line of the index to where its line of x starts.
struct GatherLines {
  const int64_t* index;        ///< row-major [outer, count, inner]
  const int64_t* line_starts;  ///< [outer, inner]: offset in x of index 0 along dim
  int64_t outer, count, inner;
  int64_t stride;  ///< in x, along dim
};
/// y[o, j, i] = x[line_starts[o, i] + index[o, j, i] * stride]; elements of `size` bytes: 1, 2, 4 or 8.
void gather_forward(Cpu, const GatherLines& lines, const void* x, int size, void* y);
/// dx[...] += dy, a line at a time in order; A is f32 or f64.
template <class T>
void gather_backward(Cpu, const GatherLines& lines, const T* dy, Accumulate<T>* dx);

}  // namespace weft
