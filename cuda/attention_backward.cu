// The backward pass of attention (Dao 2023, "FlashAttention-2", algorithm 2): the weights are computed again from q, k
// and the saved logarithm of their sum.
//
//   p = exp(scale q k^T - lse),  dp = dout v^T,  delta = rowsum(dout * out),  ds = p * (dp - delta)
//   dv = p^T dout,  dk = scale ds^T q,  dq = scale ds k
//
// One kernel has a block of keys and goes over the queries that see them, for dk and dv; another has a block of queries
// and goes over the keys, for dq. That is 7 products of tiles (4 + 3) where one kernel for all three would need 5, but
// that one would add up dq across blocks: with atomics in an order that changes from run to run, or in a fixed order by
// blocks that wait for each other and pass [B, H, Tq, D] of f32 through memory once for every block of keys. Here every
// sum is one thread's, in an order that the shape alone decides. FLOPs: 7 * 2 * D for each visible pair of query and
// key.
#include "cuda/attention_library.h"
#include "cuda/attention_mma.cuh"
#include "cuda/attention_simt.cuh"

namespace weft {
namespace {

using cuda::divide_up;
using cuda::kFull;
using cuda::kLog2E;
using cuda::Pack;
using cuda::Registers;
using cuda::row_at;
using cuda::Simt;
using cuda::Unit;
using cuda::Visibility;

// ---- delta ----

/// Eight lanes to a row, each with every eighth pack of 16 bytes, whether or not packs can be loaded as such. Reads
/// dout and out once, writes one number to a row.
constexpr int kDeltaLanes = 8, kDeltaThreads = 256, kDeltaRows = kDeltaThreads / kDeltaLanes;
template <class T>
__global__ void __launch_bounds__(kDeltaThreads) sum_delta(AttentionBackward<T> a, bool packed) {
  using A = Accumulate<T>;
  constexpr int kCount = kFull<T>;
  const int lane = static_cast<int>(threadIdx.x) % kDeltaLanes;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kDeltaRows + threadIdx.x / kDeltaLanes;  // of [B, Tq, H]
  const int64_t head = row % a.shape.heads, query = row / a.shape.heads % a.shape.queries,
                b = row / a.shape.heads / a.shape.queries;
  const bool exists = b < a.shape.batch;
  A sum = 0;
  if (exists) {
    const T* out = row_at(a.out, b, head, query);
    const T* dout = row_at(a.dout, b, head, query);
    for (int64_t c = lane * kCount; c < a.shape.head_size; c += kDeltaLanes * kCount) {
      if (packed && c + kCount <= a.shape.head_size) {
        const Pack<T, kCount> x = cuda::load_pack<kCount>(out + c), dx = cuda::load_pack<kCount>(dout + c);
#pragma unroll
        for (int e = 0; e < kCount; ++e) sum = fma(cuda::widen(dx.at[e]), cuda::widen(x.at[e]), sum);
      } else {
        for (int64_t e = c; e < c + kCount && e < a.shape.head_size; ++e)
          sum = fma(cuda::widen(dout[e]), cuda::widen(out[e]), sum);
      }
    }
  }
  sum = cuda::warp_reduce<kDeltaLanes>(sum, cuda::Sum{});
  if (exists && lane == 0) a.workspace[(b * a.shape.heads + head) * a.shape.queries + query] = sum;
}

template <class T>
void start_delta(Cuda device, const AttentionBackward<T>& a) {
  const int64_t rows = a.shape.batch * a.shape.heads * a.shape.queries;
  cuda::start(device, {static_cast<unsigned>(divide_up(rows, kDeltaRows)), kDeltaThreads}, sum_delta<T>, a,
              cuda::packs_fit(a.out) && cuda::packs_fit(a.dout));
}

// ---- without tensor cores ----

/// s = a b^T over all columns of a head, chunk by chunk through shared memory; rows of a tile that do not exist are 0.
template <class S, class T>
__device__ void all_dots(typename S::Scores& s, typename S::A* tile_a, typename S::A* tile_b, const T* a,
                         int64_t a_stride, int a_rows, const T* b, int64_t b_stride, int b_rows, int64_t head_size,
                         int chunks, bool packed) {
  S::clear(s);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int columns = S::columns_of(chunk, head_size);
    const int64_t column = static_cast<int64_t>(chunk) * S::kChunk;
    S::load(tile_a, a + column, a_stride, a_rows, columns, packed);
    S::load(tile_b, b + column, b_stride, b_rows, columns, packed);
    __syncthreads();
    S::add_dots(s, tile_a, tile_b, S::depth_of(columns));
    __syncthreads();
  }
}

template <class T, int kChunk>
__global__ void __launch_bounds__(Simt<T, kChunk>::kThreads, Simt<T, kChunk>::kBlocks)
    backward_keys_simt(AttentionBackward<T> a, int chunks, bool packed) {
  using S = Simt<T, kChunk>;
  using A = Accumulate<T>;
  constexpr int kTile = S::kTile, kPer = S::kPer;
  A* const tile_a = cuda::dynamic_shared<A>();
  A* const tile_b = tile_a + S::kRowsSize;
  A* const scores = tile_b + S::kRowsSize;

  const Unit unit(a.shape.kv_heads, a.shape.batch, chunks);
  const Visibility visible(a.shape);
  const int first = unit.block * kTile, keys = min(visible.keys - first, kTile),
            all_queries = static_cast<int>(a.shape.queries);
  const int64_t group = a.shape.heads / a.shape.kv_heads, head_size = a.shape.head_size;
  const A scale = static_cast<A>(a.shape.scale * kLog2E);
  const int own_columns = S::columns_of(unit.chunk, head_size);
  const int64_t own_column = static_cast<int64_t>(unit.chunk) * kChunk;
  const T* const k = row_at(a.k, unit.b, unit.head, first);
  const T* const v = row_at(a.v, unit.b, unit.head, first);

  typename S::Sums dk, dv;
  S::clear(dk);
  S::clear(dv);
  const int begin = visible.first_query(first) / kTile * kTile;
  for (int64_t head = unit.head * group; head < (unit.head + 1) * group; ++head) {
    const int64_t numbers = (unit.b * a.shape.heads + head) * a.shape.queries;
    for (int query = begin; query < all_queries; query += kTile) {
      const int queries = min(all_queries - query, kTile);
      const T* const q = row_at(a.q, unit.b, head, query);
      const T* const dout = row_at(a.dout, unit.b, head, query);
      typename S::Scores p, ds;
      all_dots<S>(p, tile_a, tile_b, k, a.k.token, keys, q, a.q.token, queries, head_size, chunks, packed);
      all_dots<S>(ds, tile_a, tile_b, v, a.v.token, keys, dout, a.dout.token, queries, head_size, chunks, packed);
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        const int i = query + S::score_column(j);
        const bool exists = i < all_queries;
        const A lse = exists ? a.lse[numbers + i] * static_cast<A>(kLog2E) : 0,
                delta = exists ? a.workspace[numbers + i] : 0;
        const int seen = exists ? visible.keys_of(i) - first : 0;
#pragma unroll
        for (int r = 0; r < kPer; ++r) {
          const bool sees = S::row(r) < seen;
          p[r][j] = sees ? exp2(p[r][j] * scale - lse) : 0;
          ds[r][j] = sees ? p[r][j] * (ds[r][j] - delta) : 0;
        }
      }
      S::store_scores(scores, p);
      S::load(tile_b, dout + own_column, a.dout.token, queries, own_columns, packed);
      __syncthreads();
      S::add_products(dv, scores, tile_b);
      __syncthreads();
      S::store_scores(scores, ds);
      S::load(tile_b, q + own_column, a.q.token, queries, own_columns, packed);
      __syncthreads();
      S::add_products(dk, scores, tile_b);
      __syncthreads();
    }
  }
  A one[kPer], scales[kPer];
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    one[i] = 1;
    scales[i] = static_cast<A>(a.shape.scale);
  }
  if (a.dk_sum.data != nullptr) {
    S::template store_sums<true>(row_at(a.dk_sum, unit.b, unit.head, first) + own_column, a.dk_sum.token, keys,
                                 own_columns, dk, scales);
    S::template store_sums<true>(row_at(a.dv_sum, unit.b, unit.head, first) + own_column, a.dv_sum.token, keys,
                                 own_columns, dv, one);
  } else {
    S::store(row_at(a.dk, unit.b, unit.head, first) + own_column, a.dk.token, keys, own_columns, dk, scales);
    S::store(row_at(a.dv, unit.b, unit.head, first) + own_column, a.dv.token, keys, own_columns, dv, one);
  }
}

template <class T, int kChunk>
__global__ void __launch_bounds__(Simt<T, kChunk>::kThreads, Simt<T, kChunk>::kBlocks)
    backward_queries_simt(AttentionBackward<T> a, int chunks, bool packed) {
  using S = Simt<T, kChunk>;
  using A = Accumulate<T>;
  constexpr int kTile = S::kTile, kPer = S::kPer;
  A* const tile_a = cuda::dynamic_shared<A>();
  A* const tile_b = tile_a + S::kRowsSize;
  A* const scores = tile_b + S::kRowsSize;

  const Unit unit(a.shape.heads, a.shape.batch, chunks);
  const Visibility visible(a.shape);
  const int all_queries = static_cast<int>(a.shape.queries), first = ((all_queries - 1) / kTile - unit.block) * kTile;
  const int queries = min(all_queries - first, kTile), keys = visible.keys_of(first + queries - 1);
  const int64_t kv_head = unit.head / (a.shape.heads / a.shape.kv_heads), head_size = a.shape.head_size;
  const A scale = static_cast<A>(a.shape.scale * kLog2E);
  const int own_columns = S::columns_of(unit.chunk, head_size);
  const int64_t own_column = static_cast<int64_t>(unit.chunk) * kChunk;
  const T* const q = row_at(a.q, unit.b, unit.head, first);
  const T* const dout = row_at(a.dout, unit.b, unit.head, first);

  A lse[kPer], delta[kPer], scales[kPer];
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int64_t number = (unit.b * a.shape.heads + unit.head) * a.shape.queries + first + S::row(i);
    lse[i] = S::row(i) < queries ? a.lse[number] * static_cast<A>(kLog2E) : 0;
    delta[i] = S::row(i) < queries ? a.workspace[number] : 0;
    scales[i] = static_cast<A>(a.shape.scale);
  }
  typename S::Sums dq;
  S::clear(dq);
  for (int key = 0; key < keys; key += kTile) {
    const int rows = min(keys - key, kTile);
    const T* const k = row_at(a.k, unit.b, kv_head, key);
    typename S::Scores s, ds;
    all_dots<S>(s, tile_a, tile_b, q, a.q.token, queries, k, a.k.token, rows, head_size, chunks, packed);
    all_dots<S>(ds, tile_a, tile_b, dout, a.dout.token, queries, row_at(a.v, unit.b, kv_head, key), a.v.token, rows,
                head_size, chunks, packed);
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const int seen = visible.keys_of(first + S::row(i)) - key;
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        ds[i][j] = S::score_column(j) < seen ? exp2(s[i][j] * scale - lse[i]) * (ds[i][j] - delta[i]) : 0;
      }
    }
    S::store_scores(scores, ds);
    S::load(tile_b, k + own_column, a.k.token, rows, own_columns, packed);
    __syncthreads();
    S::add_products(dq, scores, tile_b);
    __syncthreads();
  }
  if (a.dq_sum.data != nullptr) {
    S::template store_sums<true>(row_at(a.dq_sum, unit.b, unit.head, first) + own_column, a.dq_sum.token, queries,
                                 own_columns, dq, scales);
  } else {
    S::store(row_at(a.dq, unit.b, unit.head, first) + own_column, a.dq.token, queries, own_columns, dq, scales);
  }
}

template <class T, int kChunk>
void start_backward_simt(Cuda device, const AttentionBackward<T>& a) {
  using S = Simt<T, kChunk>;
  const AttentionShape& s = a.shape;
  const int chunks = S::chunks(s.head_size);
  const size_t shared = (2 * S::kRowsSize + S::kScoresSize) * sizeof(typename S::A);
  const bool packed = cuda::packs_fit(a.q) && cuda::packs_fit(a.k) && cuda::packs_fit(a.v) && cuda::packs_fit(a.dout);
  const auto run = [&](auto kernel, int64_t heads, int64_t rows) {
    const int64_t blocks = s.batch * heads * divide_up(rows, S::kTile) * chunks;
    if (blocks == 0) return;
    cuda::allow_shared(kernel, shared);
    cuda::start(device, {static_cast<unsigned>(blocks), S::kThreads, shared}, kernel, a, chunks, packed);
  };
  run(backward_keys_simt<T, kChunk>, s.kv_heads, s.keys);
  run(backward_queries_simt<T, kChunk>, s.heads, s.queries);
}

// ---- with tensor cores ----

constexpr int kChunkRows =
    32;  // of a tile, that a warp works on at a time: its scores and their gradients in registers

/// dk and dv. A warp has 16 or 32 keys, as rows: scores are held keys by queries, so that weights and their gradients
/// go from the registers where they are made into the products for dv and dk, which add over queries.
template <class T, int kWidth>
struct BackwardKeysTiles {
  // What the registers, which hold dk and dv, have room for.
  static constexpr int kM = kWidth <= 64 ? 2 : 1, kUnroll = kWidth * kM <= 96 ? 4 : 1;
  static constexpr int kWarpKeys = 16 * kM, kKeys = cuda::kMmaWarps * kWarpKeys, kQueries = 64;
  static constexpr int kStride = cuda::kRowStride<kWidth>, kKeyRows = kKeys * kStride, kQueryRows = kQueries * kStride;
  static constexpr size_t kShared = (2 * kKeyRows + 4 * kQueryRows) * sizeof(T) + 4 * kQueries * sizeof(float);
};

template <class T, int kWidth>
__global__ void __launch_bounds__(cuda::kMmaThreads, 2)
    backward_keys_mma(AttentionBackward<T> a, bool packed, bool out_packed) {
  using Tiles = BackwardKeysTiles<T, kWidth>;
  constexpr int kM = Tiles::kM, kQueries = Tiles::kQueries, kQueryRows = Tiles::kQueryRows, kN = kChunkRows / 8;
  T* const k = cuda::dynamic_shared<T>();
  T* const v = k + Tiles::kKeyRows;
  T* const query_rows = v + Tiles::kKeyRows;                                           // two stages of q and dout
  float* const query_numbers = reinterpret_cast<float*>(query_rows + 4 * kQueryRows);  // two stages of lse and delta

  const Unit unit(a.shape.kv_heads, a.shape.batch, 1);
  const Visibility visible(a.shape);
  // The first keys are seen by the most queries: they come first.
  const int first = unit.block * Tiles::kKeys, keys = min(visible.keys - first, Tiles::kKeys),
            columns = static_cast<int>(a.shape.head_size);
  const int warp_row = static_cast<int>(threadIdx.x) / cuda::kWarp * Tiles::kWarpKeys, warp_first = first + warp_row;
  const float scale = static_cast<float>(a.shape.scale * kLog2E);
  // The tiles of queries that see a key of the block, of one head of the group after the other.
  const int all_queries = static_cast<int>(a.shape.queries), begin = visible.first_query(first) / kQueries * kQueries;
  const int group = static_cast<int>(a.shape.heads / a.shape.kv_heads), end_head = (unit.head + 1) * group;

  const auto load_queries = [&](int head, int query, int stage) {
    const int queries = all_queries - query;
    T* const to = query_rows + stage * 2 * kQueryRows;
    cuda::load_tile<kQueries, kWidth>(to, row_at(a.q, unit.b, head, query), a.q.token, queries, columns, packed);
    cuda::load_tile<kQueries, kWidth>(to + kQueryRows, row_at(a.dout, unit.b, head, query), a.dout.token, queries,
                                      columns, packed);
    const int64_t number = (unit.b * a.shape.heads + head) * a.shape.queries + query;
    cuda::load_numbers<kQueries>(query_numbers + stage * 2 * kQueries, a.lse + number, queries);
    cuda::load_numbers<kQueries>(query_numbers + (stage * 2 + 1) * kQueries, a.workspace + number, queries);
  };
  cuda::load_tile<Tiles::kKeys, kWidth>(k, row_at(a.k, unit.b, unit.head, first), a.k.token, keys, columns, packed);
  cuda::load_tile<Tiles::kKeys, kWidth>(v, row_at(a.v, unit.b, unit.head, first), a.v.token, keys, columns, packed);
  int head = begin < all_queries ? unit.head * group : end_head;
  if (head < end_head) load_queries(head, begin, 0);

  Registers<kM, kWidth / 8> dk, dv;
  dk.clear();
  dv.clear();
  for (int tile = begin, stage = 0; head < end_head; stage ^= 1) {
    cuda::wait_for_loads();
    __syncthreads();  // the tile is there, and nobody needs the one before it
    const int tile_first = tile;
    tile += kQueries;
    if (tile >= all_queries) {
      tile = begin;
      ++head;
    }
    if (head < end_head) load_queries(head, tile, stage ^ 1);
    const T* const q = query_rows + stage * 2 * kQueryRows;
    const T* const dout = q + kQueryRows;
    const float* const lse = query_numbers + stage * 2 * kQueries;
    const float* const delta = lse + kQueries;
    // Queries that do not exist have zeros in all of these, and so no part in the sums.
#pragma unroll 1
    for (int chunk = 0; chunk < kQueries; chunk += kChunkRows) {
      const int query = tile_first + chunk;
      const Visibility in_chunk = visible.from(query, warp_first);
      if (query >= all_queries || in_chunk.keys_of(kChunkRows - 1) <= 0) continue;
      Registers<kM, kN> p, ds;
      p.clear();
      cuda::add_dots<kWidth, Tiles::kUnroll>(p, k + warp_row * Tiles::kStride, q + chunk * Tiles::kStride);
      p.update([&](int, int i, float x) {
        return cuda::exp2_fast(fmaf(x, scale, lse[chunk + i] * -static_cast<float>(kLog2E)));
      });
      if (in_chunk.keys_of(0) < Tiles::kWarpKeys)
        p.update([&](int row, int i, float x) { return row < in_chunk.keys_of(i) ? x : 0; });
      cuda::add_products<kWidth>(dv, p, dout + chunk * Tiles::kStride);
      ds.update([&](int, int i, float) { return -delta[chunk + i]; });
      cuda::add_dots<kWidth, Tiles::kUnroll>(ds, v + warp_row * Tiles::kStride, dout + chunk * Tiles::kStride);
      ds.multiply(p);
      cuda::add_products<kWidth>(dk, ds, q + chunk * Tiles::kStride);
    }
  }
  cuda::wait_for_loads();  // of k and v, if no query sees them
  __syncthreads();

  float one[kM][2], scales[kM][2];
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      one[m][half] = 1;
      scales[m][half] = static_cast<float>(a.shape.scale);
    }
  }
  if (a.dk_sum.data != nullptr) {
    cuda::store_sums<true>(row_at(a.dk_sum, unit.b, unit.head, warp_first), a.dk_sum.token, keys - warp_row, columns,
                           dk, scales);
    cuda::store_sums<true>(row_at(a.dv_sum, unit.b, unit.head, warp_first), a.dv_sum.token, keys - warp_row, columns,
                           dv, one);
    return;
  }
  cuda::store_tile<kWidth>(row_at(a.dk, unit.b, unit.head, warp_first), a.dk.token, keys - warp_row, columns,
                           out_packed, dk, scales, k + warp_row * Tiles::kStride);
  cuda::store_tile<kWidth>(row_at(a.dv, unit.b, unit.head, warp_first), a.dv.token, keys - warp_row, columns,
                           out_packed, dv, one, v + warp_row * Tiles::kStride);
}

/// dq. A warp has 32 queries, as rows.
template <class T, int kWidth>
struct BackwardQueriesTiles {
  static constexpr int kM = 2, kWarpQueries = 16 * kM, kQueries = cuda::kMmaWarps * kWarpQueries;
  static constexpr int kKeys = kWidth <= 64 ? 64 : 32;  ///< so that two blocks fit into a multiprocessor
  static constexpr int kUnroll = kWidth <= 64 ? 4 : 1;  ///< what the registers have room for
  static constexpr int kStride = cuda::kRowStride<kWidth>, kKeyRows = kKeys * kStride, kQueryRows = kQueries * kStride;
  static constexpr size_t kShared = (2 * kQueryRows + 4 * kKeyRows) * sizeof(T) + 2 * kQueries * sizeof(float);
};

template <class T, int kWidth>
__global__ void __launch_bounds__(cuda::kMmaThreads, 2)
    backward_queries_mma(AttentionBackward<T> a, bool packed, bool out_packed) {
  using Tiles = BackwardQueriesTiles<T, kWidth>;
  constexpr int kM = Tiles::kM, kKeys = Tiles::kKeys, kKeyRows = Tiles::kKeyRows, kN = kChunkRows / 8;
  T* const q = cuda::dynamic_shared<T>();
  T* const dout = q + Tiles::kQueryRows;
  T* const kv = dout + Tiles::kQueryRows;  // two stages of k and v
  float* const lse = reinterpret_cast<float*>(kv + 4 * kKeyRows);
  float* const delta = lse + Tiles::kQueries;

  const Unit unit(a.shape.heads, a.shape.batch, 1);
  const Visibility visible(a.shape);
  const int all_queries = static_cast<int>(a.shape.queries),
            first = ((all_queries - 1) / Tiles::kQueries - unit.block) * Tiles::kQueries;
  const int queries = min(all_queries - first, Tiles::kQueries), keys = visible.keys_of(first + queries - 1);
  const int columns = static_cast<int>(a.shape.head_size);
  const int warp_row = static_cast<int>(threadIdx.x) / cuda::kWarp * Tiles::kWarpQueries;
  const int warp_first = first + warp_row, warp_queries = min(queries - warp_row, Tiles::kWarpQueries);
  const int warp_keys = warp_queries > 0 ? visible.keys_of(warp_first + warp_queries - 1) : 0;
  const float scale = static_cast<float>(a.shape.scale * kLog2E);

  const int64_t kv_head = unit.head / (a.shape.heads / a.shape.kv_heads);
  const T* next_k = row_at(a.k, unit.b, kv_head, 0);
  const T* next_v = row_at(a.v, unit.b, kv_head, 0);
  const auto load_keys = [&](int key) {
    T* const to = kv + key / kKeys % 2 * 2 * kKeyRows;
    cuda::load_tile<kKeys, kWidth>(to, next_k, a.k.token, visible.keys - key, columns, packed);
    cuda::load_tile<kKeys, kWidth>(to + kKeyRows, next_v, a.v.token, visible.keys - key, columns, packed);
    next_k += kKeys * a.k.token;
    next_v += kKeys * a.v.token;
  };
  cuda::load_tile<Tiles::kQueries, kWidth>(q, row_at(a.q, unit.b, unit.head, first), a.q.token, queries, columns,
                                           packed);
  cuda::load_tile<Tiles::kQueries, kWidth>(dout, row_at(a.dout, unit.b, unit.head, first), a.dout.token, queries,
                                           columns, packed);
  const int64_t number = (unit.b * a.shape.heads + unit.head) * a.shape.queries + first;
  cuda::load_numbers<Tiles::kQueries>(lse, a.lse + number, queries);
  cuda::load_numbers<Tiles::kQueries>(delta, a.workspace + number, queries);
  load_keys(0);

  Registers<kM, kWidth / 8> dq;
  dq.clear();
  for (int key = 0; key < keys; key += kKeys) {
    cuda::wait_for_loads();
    __syncthreads();  // the tile is there, and nobody needs the one before it
    if (key + kKeys < keys) load_keys(key + kKeys);
    const T* const k = kv + key / kKeys % 2 * 2 * kKeyRows;
    const T* const v = k + kKeyRows;
#pragma unroll 1
    for (int chunk = 0; chunk < kKeys && key + chunk < warp_keys; chunk += kChunkRows) {
      const Visibility in_chunk = visible.from(warp_first, key + chunk);
      Registers<kM, kN> p, ds;
      p.clear();
      cuda::add_dots<kWidth, Tiles::kUnroll>(p, q + warp_row * Tiles::kStride, k + chunk * Tiles::kStride);
      p.update([&](int i, int, float x) {
        return cuda::exp2_fast(fmaf(x, scale, lse[warp_row + i] * -static_cast<float>(kLog2E)));
      });
      if (in_chunk.keys_of(0) < kChunkRows)
        p.update([&](int i, int column, float x) { return column < in_chunk.keys_of(i) ? x : 0; });
      ds.update([&](int i, int, float) { return -delta[warp_row + i]; });
      cuda::add_dots<kWidth, Tiles::kUnroll>(ds, dout + warp_row * Tiles::kStride, v + chunk * Tiles::kStride);
      ds.multiply(p);
      cuda::add_products<kWidth>(dq, ds, k + chunk * Tiles::kStride);
    }
  }

  float scales[kM][2];
#pragma unroll
  for (auto& row : scales) row[0] = row[1] = static_cast<float>(a.shape.scale);
  if (a.dq_sum.data != nullptr) {
    cuda::store_sums<true>(row_at(a.dq_sum, unit.b, unit.head, warp_first), a.dq_sum.token, warp_queries, columns, dq,
                           scales);
    return;
  }
  cuda::store_tile<kWidth>(row_at(a.dq, unit.b, unit.head, warp_first), a.dq.token, warp_queries, columns, out_packed,
                           dq, scales, q + warp_row * Tiles::kStride);
}

template <class T>
void start_backward_mma(Cuda device, const AttentionBackward<T>& a) {
  const AttentionShape& s = a.shape;
  const bool whole = s.head_size % kFull<T> == 0;
  const bool packed =
      whole && cuda::packs_fit(a.q) && cuda::packs_fit(a.k) && cuda::packs_fit(a.v) && cuda::packs_fit(a.dout);
  const auto run = [&](auto kernel, int64_t blocks, size_t shared, bool out_packed) {
    if (blocks == 0) return;
    cuda::allow_shared(kernel, shared);
    cuda::start(device, {static_cast<unsigned>(blocks), cuda::kMmaThreads, shared}, kernel, a, packed, out_packed);
  };
  cuda::with_width(s.head_size, [&]<int kWidth>() {
    using Keys = BackwardKeysTiles<T, kWidth>;
    using Queries = BackwardQueriesTiles<T, kWidth>;
    run(backward_keys_mma<T, kWidth>, s.batch * s.kv_heads * divide_up(s.keys, Keys::kKeys), Keys::kShared,
        whole && cuda::packs_fit(a.dk) && cuda::packs_fit(a.dv));
    run(backward_queries_mma<T, kWidth>, s.batch * s.heads * divide_up(s.queries, Queries::kQueries), Queries::kShared,
        whole && cuda::packs_fit(a.dq));
  });
}

}  // namespace

int64_t attention_workspace(Cuda, const AttentionShape& s) { return s.batch * s.heads * s.queries; }

template <class T>
void attention_backward(Cuda device, const AttentionBackward<T>& a) {
  if (cuda::library_attention(device, a)) return;
  if (a.shape.batch * a.shape.heads * a.shape.queries > 0) start_delta(device, a);
  if constexpr (std::is_same_v<T, double>) {
    start_backward_simt<T, 32>(device, a);
  } else if constexpr (std::is_same_v<T, float>) {
    a.shape.head_size <= 64 ? start_backward_simt<T, 64>(device, a) : start_backward_simt<T, 128>(device, a);
  } else {
    a.shape.head_size <= cuda::kWidestMma ? start_backward_mma(device, a) : start_backward_simt<T, 128>(device, a);
  }
}

template void attention_backward(Cuda, const AttentionBackward<float>&);
template void attention_backward(Cuda, const AttentionBackward<double>&);
template void attention_backward(Cuda, const AttentionBackward<Half>&);
template void attention_backward(Cuda, const AttentionBackward<BFloat16>&);

}  // namespace weft
