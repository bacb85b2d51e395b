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

// Tokens are counted in int in kernels: with work that grows with their square, more of them are out of reach.

/// Query i sees keys [0, keys_of(i)); every query sees as many keys as the one before it or one more.
struct Visibility {
  int first, keys;  ///< how many keys query 0 sees, if there are enough; all keys

  __device__ Visibility(int first_, int keys_) : first(first_), keys(keys_) {}
  __device__ explicit Visibility(const AttentionShape& s)
      : first(static_cast<int>(!s.causal ? s.keys : (s.query_offset < s.keys ? s.query_offset : s.keys) + 1)),
        keys(static_cast<int>(s.keys)) {}
  __device__ int keys_of(int query) const { return first + query < keys ? first + query : keys; }
  /// The same with queries and keys counted from these on.
  __device__ Visibility from(int query, int key) const { return {first + query - key, keys - key}; }
  /// The first query that sees `key`.
  __device__ int first_query(int key) const { return key < first ? 0 : key - first + 1; }
};

/// What one block of a grid works on: a block of rows of a head, and (where a head is wider than a block's sums) some
/// of its columns. Heads come fastest, so that blocks that run together take about the same time.
struct Unit {
  int b, head, block, chunk;

  __device__ Unit(int64_t heads, int64_t batch, int chunks) {
    unsigned rest = blockIdx.x;
    chunk = static_cast<int>(rest % static_cast<unsigned>(chunks));
    rest /= static_cast<unsigned>(chunks);
    head = static_cast<int>(rest % static_cast<unsigned>(heads));
    rest /= static_cast<unsigned>(heads);
    b = static_cast<int>(rest % static_cast<unsigned>(batch));
    block = static_cast<int>(rest / static_cast<unsigned>(batch));
  }
};

}  // namespace weft::cuda
