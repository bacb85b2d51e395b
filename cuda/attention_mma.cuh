#pragma once
// Tiles of attention in shared memory, multiplied by the tensor cores: for f16 and bf16 with heads of up to 128
// columns. A block is four warps, each of which has rows of its own; only the tiles that it multiplies with are shared.
// Sums are f32; weights and their gradients are rounded to T before they are multiplied on, each with a relative error
// of half a unit in T's last place.
#include "cuda/attention_tiles.cuh"
#include "cuda/mma.cuh"

namespace weft::cuda {

inline constexpr int kMmaWarps = 4, kMmaThreads = kMmaWarps * kWarp;

/// Rows of kWidth elements, padded to 16 bytes more: 8 rows that are loaded as a matrix lie in different banks.
template <int kWidth>
inline constexpr int kRowStride = kWidth + 8;

/// Starts to bring kRows rows into shared memory, zeros beyond `rows` and beyond `columns`. `packed`: 16 bytes at a
/// time, and `columns` is a multiple of 8; else element by element. Wait and meet at a barrier before they are used.
template <int kRows, int kWidth, class T>
__device__ inline void load_tile(T* to, const T* from, int64_t stride, int rows, int columns, bool packed) {
  constexpr int kCount = kFull<T>, kLanes = kWidth <= 32 ? 4 : kWidth <= 64 ? 8 : 16, kStep = kMmaThreads / kLanes;
  static_assert(kWidth <= kLanes * kCount && kRows % kStep == 0);
  const int column = static_cast<int>(threadIdx.x) % kLanes * kCount;
  if (kWidth < kLanes * kCount && column >= kWidth) return;
  const int first = static_cast<int>(threadIdx.x) / kLanes;
  const int valid = column < columns ? rows - first : 0;
  const T* source = from + first * stride + column;
  T* at = to + first * kRowStride<kWidth> + column;
  if (packed) {
#pragma unroll
    for (int row = 0; row < kRows; row += kStep) {
      load_async<16>(at + row * kRowStride<kWidth>, source, row < valid);
      source += kStep * stride;
    }
  } else {
    // Rare, and not worth the registers that it would take to be fast.
#pragma unroll 1
    for (int row = 0; row < kRows; row += kStep) {
#pragma unroll 1
      for (int e = 0; e < kCount; ++e)
        at[row * kRowStride<kWidth> + e] = row < valid && column + e < columns ? source[e] : T(0.0f);
      source += kStep * stride;
    }
  }
}

/// Starts to bring kCount numbers into shared memory, zeros beyond `count`.
template <int kCount>
__device__ inline void load_numbers(float* to, const float* from, int count) {
  static_assert(kCount <= kMmaThreads);
  const int i = static_cast<int>(threadIdx.x);
  if (i < kCount) load_async<4>(to + i, from + i, i < count);
}

__device__ inline int lane_of_warp() { return static_cast<int>(threadIdx.x) % kWarp; }

// Where value e of a lane's fragment (m, n) lies in a matrix that a warp holds in Registers.
__device__ inline int register_row(int m, int e) { return 16 * m + lane_of_warp() / 4 + e / 2 * 8; }
__device__ inline int register_column(int n, int e) { return 8 * n + lane_of_warp() % 4 * 2 + e % 2; }

/// A warp's matrix of 16 kM x 8 kN, as fragments of C.
template <int kM, int kN>
struct Registers {
  float at[kM][kN][4];

  /// Every value x of the lane becomes f(row, column, x).
  template <class F>
  __device__ void update(F f) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) at[m][n][e] = f(register_row(m, e), register_column(n, e), at[m][n][e]);
      }
    }
  }
  __device__ void clear() {
    update([](int, int, float) { return 0.0f; });
  }
  /// Times the values of another matrix, each in its place.
  __device__ void multiply(const Registers& other) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) at[m][n][e] *= other.at[m][n][e];
      }
    }
  }
};

/// s += a b^T: the warp's 16 kM rows of `a` and 8 kN rows of `b`, kWidth columns. With kUnroll steps at a time, more
/// loads come early and take more registers.
template <int kWidth, int kUnroll, class T, int kM, int kN>
__device__ inline void add_dots(Registers<kM, kN>& s, const T* a, const T* b) {
  static_assert(kN % 2 == 0);
  constexpr int kStride = kRowStride<kWidth>;
  const int lane = lane_of_warp();
  a += lane % 16 * kStride + lane / 16 * 8;
  b += (lane % 8 + lane / 16 * 8) * kStride + lane / 8 % 2 * 8;
#pragma unroll kUnroll
  for (int k = 0; k < kWidth; k += 16) {
    uint32_t left[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) load_matrices(left[m], a + 16 * m * kStride + k);
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t right[4];
      load_matrices(right, b + 8 * n * kStride + k);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma<T>(s.at[m][n], left[m], right[0], right[1]);
        mma<T>(s.at[m][n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

/// sums += p b: p rounded to T, 8 kK rows of `b` of kWidth columns.
template <int kWidth, class T, int kM, int kK>
__device__ inline void add_products(Registers<kM, kWidth / 8>& sums, const Registers<kM, kK>& p, const T* b) {
  static_assert(kK % 2 == 0 && kWidth % 16 == 0);
  constexpr int kStride = kRowStride<kWidth>;
  const int lane = lane_of_warp();
  b += lane % 16 * kStride + lane / 16 * 8;
#pragma unroll
  for (int k = 0; k < kK; k += 2) {
    uint32_t left[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        left[m][i] = narrow_pair<T>(p.at[m][k + i / 2][i % 2 * 2], p.at[m][k + i / 2][i % 2 * 2 + 1]);
    }
#pragma unroll
    for (int n = 0; n < kWidth / 8; n += 2) {
      uint32_t right[4];
      load_matrices_transposed(right, b + 8 * k * kStride + 8 * n);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma<T>(sums.at[m][n], left[m], right[0], right[1]);
        mma<T>(sums.at[m][n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

/// Rounds a warp's sums, times a factor for each row, and writes `rows` rows of `columns` columns. They pass through
/// `scratch`, rows of shared memory that no other warp touches, to be written as whole packs.
template <int kWidth, class T, int kM>
__device__ inline void store_tile(T* to, int64_t stride, int rows, int columns, bool packed,
                                  const Registers<kM, kWidth / 8>& sums, const float (&factor)[kM][2], T* scratch) {
  constexpr int kStride = kRowStride<kWidth>, kCount = kFull<T>, kPacks = kWidth / kCount;
  __syncwarp();
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        *reinterpret_cast<uint32_t*>(scratch + register_row(m, e) * kStride + register_column(n, e)) =
            narrow_pair<T>(factor[m][e / 2] * sums.at[m][n][e], factor[m][e / 2] * sums.at[m][n][e + 1]);
      }
    }
  }
  __syncwarp();
  for (int i = lane_of_warp(); i < 16 * kM * kPacks; i += kWarp) {
    const int row = i / kPacks, column = i % kPacks * kCount;
    if (row >= rows || column >= columns) continue;
    const Pack<T, kCount> pack = load_pack<kCount>(scratch + row * kStride + column);
    T* const at = to + row * stride + column;
    if (packed) {
      store_pack(at, pack);
    } else {
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        if (column + e < columns) at[e] = pack.at[e];
      }
    }
  }
}

/// Writes a warp's sums, times a factor for each row, not rounded, or adds them: `rows` rows of `columns` columns.
template <bool kAdd, int kM, int kN>
__device__ inline void store_sums(float* to, int64_t stride, int rows, int columns, const Registers<kM, kN>& sums,
                                  const float (&factor)[kM][2]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = register_row(m, e), column = register_column(n, e);
        if (row >= rows || column >= columns) continue;
        float& at = to[row * stride + column];
        at = kAdd ? at + factor[m][e / 2] * sums.at[m][n][e] : factor[m][e / 2] * sums.at[m][n][e];
      }
    }
  }
}

/// Calls f.operator()<kWidth>() with the smallest width of the tensor core kernels that holds `head_size` columns.
template <class F>
void with_width(int64_t head_size, F&& f) {
  if (head_size <= 32) return f.template operator()<32>();
  if (head_size <= 64) return f.template operator()<64>();
  if (head_size <= 96) return f.template operator()<96>();
  f.template operator()<128>();
}
inline constexpr int64_t kWidestMma = 128;

}  // namespace weft::cuda
