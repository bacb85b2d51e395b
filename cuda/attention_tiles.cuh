#pragma once
// What all attention kernels share: who sees what, where rows lie, how the work is dealt out to blocks.
#include "cuda/device.cuh"
#include "cuda/launch.cuh"
#include "ops/attention_kernels.h"

namespace weft::cuda {

inline constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.69314718055994531;

/// Row `token` of a head; the following ones are `x.token` elements apart.
template <class T>
__device__ inline T* row_at(const HeadView<T>& x, int64_t b, int64_t head, int64_t token) {
  return x.data + b * x.batch + head * x.head + token * x.token;
}

/// Whether packs of 16 bytes may be loaded from (and stored to) every row.
template <class T>
bool packs_fit(const HeadView<T>& x) {
  return packs_fit<kFull<T>>(x.data, x.batch) && x.head % kFull<T> == 0 && x.token % kFull<T> == 0;
}

/// Query i sees keys [0, keys_of(i)); every query sees as many keys as the one before it or one more.
struct Visibility {
  int64_t first, keys;  ///< of query 0, if there were enough; all keys

  WEFT_HD explicit Visibility(const AttentionShape& s)
      : first(!s.causal ? s.keys : (s.query_offset < s.keys ? s.query_offset : s.keys) + 1), keys(s.keys) {}
  WEFT_HD int64_t keys_of(int64_t query) const { return first + query < keys ? first + query : keys; }
  /// The first query that sees `key`.
  WEFT_HD int64_t first_query(int64_t key) const { return key < first ? 0 : key - first + 1; }
};

/// What one block of a grid works on: a block of rows of a head, and (where a head is wider than a block's sums) some
/// of its columns. Heads come fastest, so that blocks that run together take about the same time.
struct Unit {
  int64_t b, head, block;
  int chunk;

  __device__ Unit(int64_t heads, int64_t batch, int chunks) {
    int64_t rest = blockIdx.x;
    chunk = static_cast<int>(rest % chunks);
    rest /= chunks;
    head = rest % heads;
    rest /= heads;
    b = rest % batch;
    block = rest / batch;
  }
};

}  // namespace weft::cuda
