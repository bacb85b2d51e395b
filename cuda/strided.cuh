#pragma once
#include <cstdint>

#include "core/float_types.h"
#include "core/shape.h"

namespace weft::cuda {

/// N arrays of one shape, walked by a flat index in row-major order; neighbouring dimensions are merged where all
/// arrays allow it, and sizes of 1 dropped. Passed to kernels by value.
template <int N>
struct Strided {
  int64_t count = 1;
  int rank = 0;
  int64_t sizes[kMaxRank] = {};
  int64_t strides[N][kMaxRank] = {};

  Strided(const Shape& shape, const Strides* const (&arrays)[N]) {
    for (int d = 0; d < shape.rank(); ++d) {
      count *= shape[d];
      if (shape[d] == 1) continue;
      bool merge = rank > 0;
      for (int a = 0; a < N && merge; ++a) merge = strides[a][rank - 1] == (*arrays[a])[d] * shape[d];
      if (!merge) ++rank;
      sizes[rank - 1] = merge ? sizes[rank - 1] * shape[d] : shape[d];
      for (int a = 0; a < N; ++a) strides[a][rank - 1] = (*arrays[a])[d];
    }
  }

  /// Whether array `a` is simply its elements in order.
  bool is_flat(int a) const { return rank == 0 || (rank == 1 && strides[a][0] == 1); }

  /// Where element `index` lies in every array.
  WEFT_HD void offsets(int64_t index, int64_t (&out)[N]) const {
    for (int a = 0; a < N; ++a) out[a] = 0;
    const bool narrow = count <= int64_t{1} << 31;  // 32-bit division is several times cheaper
    for (int d = rank - 1; d >= 0; --d) {
      const int64_t next = d == 0   ? 0
                           : narrow ? static_cast<uint32_t>(index) / static_cast<uint32_t>(sizes[d])
                                    : index / sizes[d];
      const int64_t digit = index - next * sizes[d];
      for (int a = 0; a < N; ++a) out[a] += digit * strides[a][d];
      index = next;
    }
  }
};

}  // namespace weft::cuda
