#pragma once
// Tiles of attention in shared memory, multiplied without tensor cores: for f32 and f64, and for heads that are wider
// than the tensor core kernels hold. A block is 16 x 16 threads; a head is worked on in chunks of columns, so that its
// size has no limit.
#include "cuda/attention_tiles.cuh"

namespace weft::cuda {

/// Sizes of the tiles for elements of T with kChunk columns of a head at a time.
template <class T, int kChunk_>
struct Simt {
  using A = Accumulate<T>;
  static constexpr int kSide = 16, kThreads = kSide * kSide;
  static constexpr int kTile = sizeof(A) == 8 ? 32 : 64;  ///< queries and keys of a tile
  static constexpr int kPer = kTile / kSide;              ///< rows of a thread, and its columns of scores
  static constexpr int kChunk = kChunk_;
  static constexpr int kBlocks = sizeof(A) == 4 && kChunk <= 64 ? 2 : 1;  ///< on a multiprocessor: what registers allow
  static constexpr int kPack = kFull<A>;
  static constexpr int kPacks = kChunk / kSide / kPack;  ///< of a thread in a row of sums
  static constexpr int kStride = kChunk + kPack;         ///< of rows in shared memory: rows start in different banks
  static constexpr int kScoreStride = kTile + kPack;
  static constexpr int kRowsSize = kTile * kStride, kScoresSize = kTile * kScoreStride;

  using Scores = A[kPer][kPer];
  using Sums = Pack<A, kPack>[kPer][kPacks];

  static int chunks(int64_t head_size) { return static_cast<int>(divide_up(head_size, kChunk)); }

  // Thread (y, x) has rows y * kPer + i, scores of columns x + 16 j, and sums of columns (x + 16 w) * kPack + e.
  static __device__ int x() { return static_cast<int>(threadIdx.x) % kSide; }
  static __device__ int row(int i) { return static_cast<int>(threadIdx.x) / kSide * kPer + i; }
  static __device__ int score_column(int j) { return x() + kSide * j; }
  static __device__ int sum_column(int w) { return (x() + kSide * w) * kPack; }

  static __device__ void clear(Scores& s) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
#pragma unroll
      for (int j = 0; j < kPer; ++j) s[i][j] = 0;
    }
  }
  static __device__ void clear(Sums& sums) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
#pragma unroll
      for (int w = 0; w < kPacks; ++w) {
#pragma unroll
        for (int e = 0; e < kPack; ++e) sums[i][w].at[e] = 0;
      }
    }
  }

  /// Columns of chunk `chunk`, and the same rounded up to what load() fills with zeros.
  static __device__ int columns_of(int chunk, int64_t head_size) {
    const int64_t rest = head_size - static_cast<int64_t>(chunk) * kChunk;
    return rest < kChunk ? static_cast<int>(rest) : kChunk;
  }
  static __device__ int depth_of(int columns) { return (columns + 15) / 16 * 16; }

  /// `rows` rows and `columns` columns from `from` on into shared memory; zeros to the end of the tile.
  static __device__ void load(A* to, const T* from, int64_t stride, int rows, int columns, bool packed) {
    constexpr int kCount = kFull<T>;
    const int packs = depth_of(columns) / kCount;
    for (int i = static_cast<int>(threadIdx.x); i < kTile * packs; i += kThreads) {
      const int row = i / packs, column = i % packs * kCount;
      const T* at = from + row * stride + column;
      Pack<T, kCount> pack;
      if (packed && row < rows && column + kCount <= columns) {
        pack = load_pack<kCount>(at);
      } else {
#pragma unroll
        for (int e = 0; e < kCount; ++e) pack.at[e] = row < rows && column + e < columns ? at[e] : T(0.0f);
      }
#pragma unroll
      for (int e = 0; e < kCount; ++e) to[row * kStride + column + e] = widen(pack.at[e]);
    }
  }

  /// s += a b^T over `depth` columns, both as load() left them.
  static __device__ void add_dots(Scores& s, const A* a, const A* b, int depth) {
    for (int c = 0; c < depth; c += kPack) {
      Pack<A, kPack> left[kPer], right[kPer];
#pragma unroll
      for (int i = 0; i < kPer; ++i) left[i] = load_pack<kPack>(a + row(i) * kStride + c);
#pragma unroll
      for (int j = 0; j < kPer; ++j) right[j] = load_pack<kPack>(b + score_column(j) * kStride + c);
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
#pragma unroll
        for (int i = 0; i < kPer; ++i) {
#pragma unroll
          for (int j = 0; j < kPer; ++j) s[i][j] += left[i].at[e] * right[j].at[e];
        }
      }
    }
  }

  /// Writes scores (weights, their gradients) where add_products() reads them.
  static __device__ void store_scores(A* to, const Scores& s) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
#pragma unroll
      for (int j = 0; j < kPer; ++j) to[row(i) * kScoreStride + score_column(j)] = s[i][j];
    }
  }

  /// sums += p rows: p as store_scores() left it, rows as load() did.
  static __device__ void add_products(Sums& sums, const A* p, const A* rows) {
    for (int k = 0; k < kTile; k += kPack) {
      Pack<A, kPack> left[kPer];
#pragma unroll
      for (int i = 0; i < kPer; ++i) left[i] = load_pack<kPack>(p + row(i) * kScoreStride + k);
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
#pragma unroll
        for (int w = 0; w < kPacks; ++w) {
          const Pack<A, kPack> right = load_pack<kPack>(rows + (k + e) * kStride + sum_column(w));
#pragma unroll
          for (int i = 0; i < kPer; ++i) {
#pragma unroll
            for (int c = 0; c < kPack; ++c) sums[i][w].at[c] += left[i].at[e] * right.at[c];
          }
        }
      }
    }
  }

  /// sums[i] = from[i]; `rows` rows and `columns` columns.
  static __device__ void load_sums(Sums& sums, const A* from, int64_t stride, int rows, int columns) {
    each_sum(sums, rows, columns, [&](int row, int, int column, A& sum) { sum = from[row * stride + column]; });
  }

  /// to[i] = factor[i] * sums[i], not rounded, or added to it.
  template <bool kAdd>
  static __device__ void store_sums(A* to, int64_t stride, int rows, int columns, Sums& sums, const A (&factor)[kPer]) {
    each_sum(sums, rows, columns, [&](int row, int i, int column, A& sum) {
      A& at = to[row * stride + column];
      at = kAdd ? at + factor[i] * sum : factor[i] * sum;
    });
  }

  /// f(row, i, column, sum) for the thread's sums in `rows` rows and `columns` columns.
  template <class F>
  static __device__ void each_sum(Sums& sums, int rows, int columns, F f) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      if (row(i) >= rows) continue;
#pragma unroll
      for (int w = 0; w < kPacks; ++w) {
#pragma unroll
        for (int e = 0; e < kPack; ++e) {
          if (sum_column(w) + e < columns) f(row(i), i, sum_column(w) + e, sums[i][w].at[e]);
        }
      }
    }
  }

  /// to[i] = factor[i] * sums[i], rounded once; `rows` rows and `columns` columns.
  static __device__ void store(T* to, int64_t stride, int rows, int columns, const Sums& sums,
                               const A (&factor)[kPer]) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      if (row(i) >= rows) continue;
#pragma unroll
      for (int w = 0; w < kPacks; ++w) {
#pragma unroll
        for (int e = 0; e < kPack; ++e) {
          if (sum_column(w) + e < columns)
            to[row(i) * stride + sum_column(w) + e] = narrow<T>(factor[i] * sums[i][w].at[e]);
        }
      }
    }
  }
};

}  // namespace weft::cuda
