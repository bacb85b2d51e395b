// The forward pass of attention: softmax over tiles of keys as they come (Milakov & Gimelshein 2018; Dao 2023,
// "FlashAttention-2"). A block of threads has a block of queries of one head and goes once over the keys they see.
#include <limits>

#include "cuda/attention_library.h"
#include "cuda/attention_mma.cuh"
#include "cuda/attention_simt.cuh"

namespace weft {
namespace {

using cuda::kFull;
using cuda::kLn2;
using cuda::kLog2E;
using cuda::Registers;
using cuda::row_at;
using cuda::Simt;
using cuda::Unit;
using cuda::Visibility;

// ---- without tensor cores ----

template <class T, int kChunk>
__global__ void __launch_bounds__(Simt<T, kChunk>::kThreads, Simt<T, kChunk>::kBlocks)
    forward_simt(AttentionForward<T> a, int chunks, bool packed) {
  using S = Simt<T, kChunk>;
  using A = Accumulate<T>;
  constexpr int kTile = S::kTile, kPer = S::kPer;
  A* const q = cuda::dynamic_shared<A>();
  A* const kv = q + S::kRowsSize;
  A* const p = kv + S::kRowsSize;

  const Unit unit(a.shape.heads, a.shape.batch, chunks);
  const Visibility visible(a.shape);
  // The last queries see the most keys: they come first.
  const int all_queries = static_cast<int>(a.shape.queries), first = ((all_queries - 1) / kTile - unit.block) * kTile;
  const int queries = min(all_queries - first, kTile), keys = visible.keys_of(first + queries - 1);
  const int64_t kv_head = unit.head / (a.shape.heads / a.shape.kv_heads), head_size = a.shape.head_size;
  const A scale = static_cast<A>(a.shape.scale * kLog2E);
  const int own_columns = S::columns_of(unit.chunk, head_size);

  typename S::Sums out;
  S::clear(out);
  A high[kPer], sum[kPer];
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    high[i] = -std::numeric_limits<A>::infinity();
    sum[i] = 0;
  }
  if (a.lse_before != nullptr) {  // as if the parts before were one key with their lse as its score
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      if (S::row(i) >= queries) continue;
      high[i] = a.lse_before[(unit.b * a.shape.heads + unit.head) * a.shape.queries + first + S::row(i)] *
                static_cast<A>(kLog2E);
      sum[i] = S::x() == 0 ? 1 : 0;
    }
    S::load_sums(out, row_at(a.so_far, unit.b, unit.head, first) + static_cast<int64_t>(unit.chunk) * kChunk,
                 a.so_far.token, queries, own_columns);
  }
  for (int key = 0; key < keys; key += kTile) {
    const int rows = min(keys - key, kTile);
    typename S::Scores s;
    S::clear(s);
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int columns = S::columns_of(chunk, head_size);
      const int64_t column = static_cast<int64_t>(chunk) * kChunk;
      if (chunks > 1 || key == 0)
        S::load(q, row_at(a.q, unit.b, unit.head, first) + column, a.q.token, queries, columns, packed);
      S::load(kv, row_at(a.k, unit.b, kv_head, key) + column, a.k.token, rows, columns, packed);
      __syncthreads();
      S::add_dots(s, q, kv, S::depth_of(columns));
      __syncthreads();
    }
    S::load(kv, row_at(a.v, unit.b, kv_head, key) + static_cast<int64_t>(unit.chunk) * kChunk, a.v.token, rows,
            own_columns, packed);
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const int seen = visible.keys_of(first + S::row(i)) - key;
      A highest = high[i];
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        s[i][j] = S::score_column(j) < seen ? s[i][j] * scale : -std::numeric_limits<A>::infinity();
        highest = max(highest, s[i][j]);
      }
      highest = cuda::warp_reduce<S::kSide>(highest, cuda::Max{});
      const A factor = exp2(high[i] - highest);
      high[i] = highest;
      sum[i] *= factor;
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        s[i][j] = exp2(s[i][j] - highest);
        sum[i] += s[i][j];
      }
#pragma unroll
      for (auto& pack : out[i]) {
#pragma unroll
        for (A& value : pack.at) value *= factor;
      }
    }
    S::store_scores(p, s);
    __syncthreads();
    S::add_products(out, p, kv);
    __syncthreads();
  }

  A inverse[kPer];
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const A total = cuda::warp_reduce<S::kSide>(sum[i], cuda::Sum{});
    inverse[i] = 1 / total;
    if (unit.chunk == 0 && S::x() == 0 && S::row(i) < queries) {
      a.lse[(unit.b * a.shape.heads + unit.head) * a.shape.queries + first + S::row(i)] =
          high[i] * static_cast<A>(kLn2) + log(total);
    }
  }
  const int64_t own_column = static_cast<int64_t>(unit.chunk) * kChunk;
  if (a.so_far.data != nullptr) {
    S::template store_sums<false>(row_at(a.so_far, unit.b, unit.head, first) + own_column, a.so_far.token, queries,
                                  own_columns, out, inverse);
  } else {
    S::store(row_at(a.out, unit.b, unit.head, first) + own_column, a.out.token, queries, own_columns, out, inverse);
  }
}

template <class T, int kChunk>
void start_forward_simt(Cuda device, const AttentionForward<T>& a) {
  using S = Simt<T, kChunk>;
  const int chunks = S::chunks(a.shape.head_size);
  const int64_t blocks = a.shape.batch * a.shape.heads * cuda::divide_up(a.shape.queries, S::kTile) * chunks;
  const size_t shared = (2 * S::kRowsSize + S::kScoresSize) * sizeof(typename S::A);
  const bool packed = cuda::packs_fit(a.q) && cuda::packs_fit(a.k) && cuda::packs_fit(a.v);
  cuda::allow_shared(forward_simt<T, kChunk>, shared);
  cuda::start(device, {static_cast<unsigned>(blocks), S::kThreads, shared}, forward_simt<T, kChunk>, a, chunks, packed);
}

// ---- with tensor cores ----

/// Four warps, each with 32 queries; 64 keys at a time, the next tile on its way while one is worked on. At a head size
/// of 64 a warp does 128 matrix products of 16 x 8 x 16 on a tile for 40 loads of fragments.
template <class T, int kWidth>
struct ForwardTiles {
  static constexpr int kM = 2, kWarpQueries = 16 * kM, kQueries = cuda::kMmaWarps * kWarpQueries;
  // What the registers, which hold out and the scores of a tile, have room for.
  static constexpr int kKeys = kWidth <= 96 ? 64 : 48, kUnroll = kWidth <= 64 ? 4 : 1;
  static constexpr int kStride = cuda::kRowStride<kWidth>, kKeyRows = kKeys * kStride;
  static constexpr size_t kShared = (kQueries * kStride + 4 * kKeyRows) * sizeof(T);
};

/// Takes a tile of scores into the running softmax of its rows: s becomes 2^(scale s - high); high and sum go on (a
/// lane has its own part of the sums), and out shrinks with the sums. `visible`: rows and keys of the tile.
template <bool kMasked, int kM, int kN, int kColumns>
__device__ void softmax_tile(Registers<kM, kN>& s, float scale, float (&high)[kM][2], float (&sum)[kM][2],
                             Registers<kM, kColumns>& out, const Visibility& visible) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int seen = kMasked ? visible.keys_of(cuda::register_row(m, 2 * half)) : 8 * kN;
      float highest = high[m][half];
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          float& x = s.at[m][n][e];
          x = !kMasked || cuda::register_column(n, e) < seen ? x * scale : -std::numeric_limits<float>::infinity();
          highest = max(highest, x);
        }
      }
      highest = cuda::warp_reduce<4>(highest, cuda::Max{});
      const float factor = cuda::exp2_fast(high[m][half] - highest);
      high[m][half] = highest;
      sum[m][half] *= factor;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          float& x = s.at[m][n][e];
          x = cuda::exp2_fast(x - highest);
          sum[m][half] += x;
        }
      }
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        out.at[m][n][2 * half] *= factor;
        out.at[m][n][2 * half + 1] *= factor;
      }
    }
  }
}

template <class T, int kWidth>
__global__ void __launch_bounds__(cuda::kMmaThreads, 2)
    forward_mma(AttentionForward<T> a, bool packed, bool out_packed) {
  using Tiles = ForwardTiles<T, kWidth>;
  constexpr int kM = Tiles::kM, kKeys = Tiles::kKeys, kKeyRows = Tiles::kKeyRows;
  T* const q = cuda::dynamic_shared<T>();
  T* const kv = q + Tiles::kQueries * Tiles::kStride;  // two stages of k and v

  const Unit unit(a.shape.heads, a.shape.batch, 1);
  const Visibility visible(a.shape);
  // The last queries see the most keys: they come first.
  const int all_queries = static_cast<int>(a.shape.queries),
            first = ((all_queries - 1) / Tiles::kQueries - unit.block) * Tiles::kQueries;
  const int queries = min(all_queries - first, Tiles::kQueries), keys = visible.keys_of(first + queries - 1);
  const int columns = static_cast<int>(a.shape.head_size);
  const float scale = static_cast<float>(a.shape.scale * kLog2E);
  // The warp's own queries, and the keys that the last of them sees.
  const int warp_row = static_cast<int>(threadIdx.x) / cuda::kWarp * Tiles::kWarpQueries;
  const int warp_first = first + warp_row, warp_queries = min(queries - warp_row, Tiles::kWarpQueries);
  const int warp_keys = warp_queries > 0 ? visible.keys_of(warp_first + warp_queries - 1) : 0;

  const int64_t kv_head = unit.head / (a.shape.heads / a.shape.kv_heads);
  const T* const all_k = row_at(a.k, unit.b, kv_head, 0);
  const T* const all_v = row_at(a.v, unit.b, kv_head, 0);
  const auto load_keys = [&](int key, int stage) {
    T* const to = kv + stage * 2 * kKeyRows;
    cuda::load_tile<kKeys, kWidth>(to, all_k + key * a.k.token, a.k.token, keys - key, columns, packed);
    cuda::load_tile<kKeys, kWidth>(to + kKeyRows, all_v + key * a.v.token, a.v.token, keys - key, columns, packed);
  };
  cuda::load_tile<Tiles::kQueries, kWidth>(q, row_at(a.q, unit.b, unit.head, first), a.q.token, queries, columns,
                                           packed);
  load_keys(0, 0);

  Registers<kM, kWidth / 8> out;
  out.clear();
  float high[kM][2], sum[kM][2];
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      high[m][half] = -std::numeric_limits<float>::infinity();
      sum[m][half] = 0;
    }
  }
  float* const so_far = row_at(a.so_far, unit.b, unit.head, warp_first);
  if (a.lse_before != nullptr) {  // as if the parts before were one key with their lse as its score
    const float* const before = a.lse_before + (unit.b * a.shape.heads + unit.head) * a.shape.queries + warp_first;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = cuda::register_row(m, 2 * half);
        if (row >= warp_queries) continue;
        high[m][half] = before[row] * static_cast<float>(kLog2E);
        sum[m][half] = cuda::lane_of_warp() % 4 == 0 ? 1.0f : 0.0f;
      }
    }
    out.update([&](int row, int column, float) {
      return row < warp_queries && column < columns ? so_far[row * a.so_far.token + column] : 0.0f;
    });
  }
  int stage = 0;
  for (int key = 0; key < keys; key += kKeys, stage ^= 1) {
    cuda::wait_for_loads();
    __syncthreads();  // the tile is there, and nobody needs the one before it
    if (key + kKeys < keys) load_keys(key + kKeys, stage ^ 1);
    if (key >= warp_keys) continue;
    const T* const k = kv + stage * 2 * kKeyRows;
    Registers<kM, kKeys / 8> s;
    s.clear();
    cuda::add_dots<kWidth, Tiles::kUnroll>(s, q + warp_row * Tiles::kStride, k);
    const Visibility in_tile = visible.from(warp_first, key);
    if (in_tile.keys_of(0) >= kKeys) {
      softmax_tile<false>(s, scale, high, sum, out, in_tile);
    } else {
      softmax_tile<true>(s, scale, high, sum, out, in_tile);
    }
    cuda::add_products<kWidth>(out, s, k + kKeyRows);
  }

  float inverse[kM][2];
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = cuda::warp_reduce<4>(sum[m][half], cuda::Sum{});
      inverse[m][half] = 1 / total;
      const int row = cuda::register_row(m, 2 * half);
      if (cuda::lane_of_warp() % 4 == 0 && row < warp_queries) {
        a.lse[(unit.b * a.shape.heads + unit.head) * a.shape.queries + warp_first + row] =
            high[m][half] * static_cast<float>(kLn2) + log(total);
      }
    }
  }
  if (a.so_far.data != nullptr) {
    cuda::store_sums<false>(so_far, a.so_far.token, warp_queries, columns, out, inverse);
  } else {
    cuda::store_tile<kWidth>(row_at(a.out, unit.b, unit.head, warp_first), a.out.token, warp_queries, columns,
                             out_packed, out, inverse, q + warp_row * Tiles::kStride);
  }
}

template <class T>
void start_forward_mma(Cuda device, const AttentionForward<T>& a) {
  cuda::with_width(a.shape.head_size, [&]<int kWidth>() {
    using Tiles = ForwardTiles<T, kWidth>;
    const bool whole = a.shape.head_size % kFull<T> == 0;
    const bool packed = whole && cuda::packs_fit(a.q) && cuda::packs_fit(a.k) && cuda::packs_fit(a.v);
    const int64_t blocks = a.shape.batch * a.shape.heads * cuda::divide_up(a.shape.queries, Tiles::kQueries);
    cuda::allow_shared(forward_mma<T, kWidth>, Tiles::kShared);
    cuda::start(device, {static_cast<unsigned>(blocks), cuda::kMmaThreads, Tiles::kShared}, forward_mma<T, kWidth>, a,
                packed, whole && cuda::packs_fit(a.out));
  });
}

}  // namespace

template <class T>
void attention_forward(Cuda device, const AttentionForward<T>& a) {
  if (a.shape.batch * a.shape.heads * a.shape.queries == 0 || cuda::library_attention(device, a)) return;
  if constexpr (std::is_same_v<T, double>) {
    start_forward_simt<T, 32>(device, a);
  } else if constexpr (std::is_same_v<T, float>) {
    a.shape.head_size <= 64 ? start_forward_simt<T, 64>(device, a) : start_forward_simt<T, 128>(device, a);
  } else {
    a.shape.head_size <= cuda::kWidestMma ? start_forward_mma(device, a) : start_forward_simt<T, 128>(device, a);
  }
}

template void attention_forward(Cuda, const AttentionForward<float>&);
template void attention_forward(Cuda, const AttentionForward<double>&);
template void attention_forward(Cuda, const AttentionForward<Half>&);
template void attention_forward(Cuda, const AttentionForward<BFloat16>&);

}  // namespace weft
