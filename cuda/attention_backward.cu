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
// sum is one thread's, in an order that the shape alone decides. FLOPs: 7 * 2 * D for each visible pair of query and key.
#include "cuda/attention_simt.cuh"

namespace weft {
namespace {

using cuda::divide_up;
using cuda::kFull;
using cuda::kLog2E;
using cuda::Pack;
using cuda::row_at;
using cuda::Simt;
using cuda::Unit;
using cuda::Visibility;

// ---- delta ----

/// Eight lanes to a row, each with every eighth pack of 16 bytes, whether or not packs can be loaded as such. Reads dout
/// and out once, writes one number to a row.
constexpr int kDeltaLanes = 8, kDeltaThreads = 256, kDeltaRows = kDeltaThreads / kDeltaLanes;
template <class T>
__global__ void __launch_bounds__(kDeltaThreads) sum_delta(AttentionBackward<T> a, bool packed) {
  using A = Accumulate<T>;
  constexpr int kCount = kFull<T>;
  const int lane = static_cast<int>(threadIdx.x) % kDeltaLanes;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kDeltaRows + threadIdx.x / kDeltaLanes;  // of [B, Tq, H]
  const int64_t head = row % a.shape.heads, query = row / a.shape.heads % a.shape.queries, b = row / a.shape.heads / a.shape.queries;
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
        for (int64_t e = c; e < c + kCount && e < a.shape.head_size; ++e) sum = fma(cuda::widen(dout[e]), cuda::widen(out[e]), sum);
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
__device__ void all_dots(typename S::Scores& s, typename S::A* tile_a, typename S::A* tile_b, const T* a, int64_t a_stride, int64_t a_rows,
                         const T* b, int64_t b_stride, int64_t b_rows, int64_t head_size, int chunks, bool packed) {
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
__global__ void __launch_bounds__(Simt<T, kChunk>::kThreads, Simt<T, kChunk>::kBlocks) backward_keys_simt(AttentionBackward<T> a, int chunks, bool packed) {
  using S = Simt<T, kChunk>;
  using A = Accumulate<T>;
  constexpr int kTile = S::kTile, kPer = S::kPer;
  A* const tile_a = cuda::dynamic_shared<A>();
  A* const tile_b = tile_a + S::kRowsSize;
  A* const scores = tile_b + S::kRowsSize;

  const Unit unit(a.shape.kv_heads, a.shape.batch, chunks);
  const Visibility visible(a.shape);
  const int64_t first = unit.block * kTile, keys = min(a.shape.keys - first, static_cast<int64_t>(kTile));
  const int64_t group = a.shape.heads / a.shape.kv_heads, head_size = a.shape.head_size;
  const A scale = static_cast<A>(a.shape.scale * kLog2E);
  const int own_columns = S::columns_of(unit.chunk, head_size);
  const int64_t own_column = static_cast<int64_t>(unit.chunk) * kChunk;
  const T* const k = row_at(a.k, unit.b, unit.head, first);
  const T* const v = row_at(a.v, unit.b, unit.head, first);

  typename S::Sums dk, dv;
  S::clear(dk);
  S::clear(dv);
  const int64_t begin = visible.first_query(first) / kTile * kTile;
  for (int64_t head = unit.head * group; head < (unit.head + 1) * group; ++head) {
    const int64_t numbers = (unit.b * a.shape.heads + head) * a.shape.queries;
    for (int64_t query = begin; query < a.shape.queries; query += kTile) {
      const int64_t queries = min(a.shape.queries - query, static_cast<int64_t>(kTile));
      const T* const q = row_at(a.q, unit.b, head, query);
      const T* const dout = row_at(a.dout, unit.b, head, query);
      typename S::Scores p, ds;
      all_dots<S>(p, tile_a, tile_b, k, a.k.token, keys, q, a.q.token, queries, head_size, chunks, packed);
      all_dots<S>(ds, tile_a, tile_b, v, a.v.token, keys, dout, a.dout.token, queries, head_size, chunks, packed);
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        const int64_t i = query + S::score_column(j);
        const bool exists = i < a.shape.queries;
        const A lse = exists ? a.lse[numbers + i] * static_cast<A>(kLog2E) : 0, delta = exists ? a.workspace[numbers + i] : 0;
        const int64_t seen = exists ? visible.keys_of(i) - first : 0;
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
  S::store(row_at(a.dk, unit.b, unit.head, first) + own_column, a.dk.token, keys, own_columns, dk, scales);
  S::store(row_at(a.dv, unit.b, unit.head, first) + own_column, a.dv.token, keys, own_columns, dv, one);
}

template <class T, int kChunk>
__global__ void __launch_bounds__(Simt<T, kChunk>::kThreads, Simt<T, kChunk>::kBlocks) backward_queries_simt(AttentionBackward<T> a, int chunks, bool packed) {
  using S = Simt<T, kChunk>;
  using A = Accumulate<T>;
  constexpr int kTile = S::kTile, kPer = S::kPer;
  A* const tile_a = cuda::dynamic_shared<A>();
  A* const tile_b = tile_a + S::kRowsSize;
  A* const scores = tile_b + S::kRowsSize;

  const Unit unit(a.shape.heads, a.shape.batch, chunks);
  const Visibility visible(a.shape);
  const int64_t blocks = (a.shape.queries + kTile - 1) / kTile, first = (blocks - 1 - unit.block) * kTile;
  const int64_t queries = min(a.shape.queries - first, static_cast<int64_t>(kTile));
  const int64_t kv_head = unit.head / (a.shape.heads / a.shape.kv_heads), head_size = a.shape.head_size;
  const int64_t keys = visible.keys_of(first + queries - 1);
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
  for (int64_t key = 0; key < keys; key += kTile) {
    const int64_t rows = min(keys - key, static_cast<int64_t>(kTile));
    const T* const k = row_at(a.k, unit.b, kv_head, key);
    typename S::Scores s, ds;
    all_dots<S>(s, tile_a, tile_b, q, a.q.token, queries, k, a.k.token, rows, head_size, chunks, packed);
    all_dots<S>(ds, tile_a, tile_b, dout, a.dout.token, queries, row_at(a.v, unit.b, kv_head, key), a.v.token, rows, head_size, chunks, packed);
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const int64_t seen = visible.keys_of(first + S::row(i)) - key;
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
  S::store(row_at(a.dq, unit.b, unit.head, first) + own_column, a.dq.token, queries, own_columns, dq, scales);
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

}  // namespace

int64_t attention_workspace(Cuda, const AttentionShape& s) { return s.batch * s.heads * s.queries; }

template <class T>
void attention_backward(Cuda device, const AttentionBackward<T>& a) {
  if (a.shape.batch * a.shape.heads * a.shape.queries > 0) start_delta(device, a);
  if constexpr (std::is_same_v<T, double>) {
    start_backward_simt<T, 32>(device, a);
  } else if constexpr (std::is_same_v<T, float>) {
    a.shape.head_size <= 64 ? start_backward_simt<T, 64>(device, a) : start_backward_simt<T, 128>(device, a);
  } else {
    start_backward_simt<T, 128>(device, a);
  }
}

template void attention_backward(Cuda, const AttentionBackward<float>&);
template void attention_backward(Cuda, const AttentionBackward<double>&);
template void attention_backward(Cuda, const AttentionBackward<Half>&);
template void attention_backward(Cuda, const AttentionBackward<BFloat16>&);

}  // namespace weft
