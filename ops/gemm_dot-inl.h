// Products with few rows: every element of C is a dot product along k, B is read once and in place. Included once per
// instruction set.
#if defined(WEFT_OPS_GEMM_DOT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef WEFT_OPS_GEMM_DOT_INL_H_
#undef WEFT_OPS_GEMM_DOT_INL_H_
#else
#define WEFT_OPS_GEMM_DOT_INL_H_
#endif

#include <algorithm>
#include <cstdint>

#include "ops/gemm_pack-inl.h"

HWY_BEFORE_NAMESPACE();
namespace weft::detail {
namespace HWY_NAMESPACE {

/// The sums of the lanes of four vectors, in four neighbours of memory: a transpose within 128-bit blocks, then the
/// blocks.
template <class T, class V>
HWY_INLINE void store_sums_of_lanes(V s0, V s1, V s2, V s3, T* out) {
  const Tag<T> d;
#if HWY_TARGET != HWY_SCALAR
  if constexpr (sizeof(T) == 4) {
    const hn::Repartition<double, Tag<T>> wide;
    const V s01 = hn::Add(hn::InterleaveLower(d, s0, s1), hn::InterleaveUpper(d, s0, s1));
    const V s23 = hn::Add(hn::InterleaveLower(d, s2, s3), hn::InterleaveUpper(d, s2, s3));
    const auto low = hn::InterleaveLower(wide, hn::BitCast(wide, s01), hn::BitCast(wide, s23));
    const auto up = hn::InterleaveUpper(wide, hn::BitCast(wide, s01), hn::BitCast(wide, s23));
    const V sum = hn::Add(hn::BitCast(d, low), hn::BitCast(d, up));
    if constexpr (kLanes<T> == 16) {
      const hn::Half<Tag<T>> d8;
      const hn::Half<decltype(d8)> d4;
      const auto half = hn::Add(hn::LowerHalf(d8, sum), hn::UpperHalf(d8, sum));
      hn::StoreU(hn::Add(hn::LowerHalf(d4, half), hn::UpperHalf(d4, half)), d4, out);
      return;
    } else if constexpr (kLanes<T> == 8) {
      const hn::Half<Tag<T>> d4;
      hn::StoreU(hn::Add(hn::LowerHalf(d4, sum), hn::UpperHalf(d4, sum)), d4, out);
      return;
    }
  }
#endif
  const V sums[4] = {s0, s1, s2, s3};
  for (int j = 0; j < 4; ++j) out[j] = hn::GetLane(hn::SumOfLanes(d, sums[j]));
}

// Rows of A that share one pass over four columns of B: 4 x 4 sums and the vectors that meet, in 32 registers.
inline constexpr int kDotRows = HWY_TARGET <= HWY_AVX3 ? 4 : 2;

/// Adds what is left of k, less than a vector, to `lanes`. Apart from the main loop, because GCC keeps the sums of that
/// loop in memory if they share a function.
template <class T, class S>
HWY_NOINLINE void dot_tail(const T* a, int64_t lda, int64_t rows, const S* const* b, int64_t k, T* lanes) {
  const Tag<T> d;
  constexpr int64_t n = kLanes<T>;
  for (int64_t j = 0; j < 4; ++j) {
    const auto bv = Source<T, S>::load_n(d, b[j], static_cast<size_t>(k));
    for (int64_t i = 0; i < rows; ++i) {
      T* to = lanes + (4 * i + j) * n;
      hn::Store(hn::MulAdd(Source<T, T>::load_n(d, a + i * lda, static_cast<size_t>(k)), bv, hn::Load(d, to)), d, to);
    }
  }
}

/// One row of A and one column of B, whole vectors of k: four sums, added into the vector `lanes`. With one row the
/// product waits for memory, and columns that follow one another are one stream.
template <class T, class S>
HWY_NOINLINE void dot_column(const T* HWY_RESTRICT a, const S* HWY_RESTRICT b, int64_t k, T* HWY_RESTRICT lanes) {
  const Tag<T> d;
  using V = hn::Vec<Tag<T>>;
  constexpr int64_t n = kLanes<T>;
  V sum[4];
  unroll<4>([&](auto u) WEFT_UNROLLED { sum[u] = hn::Zero(d); });
  int64_t p = 0;
  for (; p + 4 * n <= k; p += 4 * n) {
    unroll<4>([&](auto u) WEFT_UNROLLED {
      multiply_add<T>(hn::LoadU(d, a + p + u * n), Source<T, S>::load(d, b + p + u * n), sum[u]);
    });
  }
  for (; p + n <= k; p += n) multiply_add<T>(hn::LoadU(d, a + p), Source<T, S>::load(d, b + p), sum[0]);
  hn::Store(hn::Add(hn::Add(sum[0], sum[1]), hn::Add(sum[2], sum[3])), d, lanes);
}

/// Four columns of B against kRows rows of A, whole vectors of k: a vector of partial sums for each in
/// lanes[row][column]. Sums of few rows are split in two, for they would wait for one another.
template <class T, class S, int kRows>
HWY_NOINLINE void dot_block(const T* HWY_RESTRICT a, int64_t lda, const S* const* columns, const S* next, int64_t k,
                            T* HWY_RESTRICT lanes) {
  const Tag<T> d;
  using V = hn::Vec<Tag<T>>;
  constexpr int64_t n = kLanes<T>;
  constexpr int kParts = kRows <= kDotRows / 2 ? 2 : 1;
  V sum[kRows * kParts][4];
  unroll<kRows * kParts>([&](auto i)
                             WEFT_UNROLLED { unroll<4>([&](auto j) WEFT_UNROLLED { sum[i][j] = hn::Zero(d); }); });
  const S *b0 = columns[0], *b1 = columns[1], *b2 = columns[2], *b3 = columns[3];
  const auto step = [&](int64_t p, auto part) WEFT_UNROLLED {
    // The next four columns, as they lie in memory: the processor reads one stream ahead at twice the speed of four.
    constexpr int64_t line = 64 / sizeof(S);
    unroll<(4 * n + line - 1) / line>([&](auto i) WEFT_UNROLLED { __builtin_prefetch(next + 4 * p + i * line); });
    const V bv[4] = {Source<T, S>::load(d, b0 + p), Source<T, S>::load(d, b1 + p), Source<T, S>::load(d, b2 + p),
                     Source<T, S>::load(d, b3 + p)};
    unroll<kRows>([&](auto i) WEFT_UNROLLED {
      const V av = hn::LoadU(d, a + i * lda + p);
      unroll<4>([&](auto j) WEFT_UNROLLED { multiply_add<T>(av, bv[j], sum[i * kParts + part][j]); });
    });
  };
  int64_t p = 0;
  for (; p + kParts * n <= k; p += kParts * n) {
    step(p, std::integral_constant<int, 0>());
    if constexpr (kParts == 2) step(p + n, std::integral_constant<int, 1>());
  }
  if constexpr (kParts == 2) {
    if (p + n <= k) step(p, std::integral_constant<int, 0>());
  }
  unroll<kRows>([&](auto i) WEFT_UNROLLED {
    unroll<4>([&](auto j) WEFT_UNROLLED {
      V total = sum[i * kParts][j];
      if constexpr (kParts == 2) total = hn::Add(total, sum[i * kParts + 1][j]);
      hn::Store(total, d, lanes + (4 * i + j) * n);
    });
  });
}

/// out[i][j] = sum over p of a[i][p] * b[j][p], j < min(cols, 4). Sums of every vector of p (every second one if rows
/// are few), then their lanes: the bits of an element depend on its row, its column, k and the number of rows.
template <class T, class S, int kRows>
void dot_kernel(const T* a, int64_t lda, const S* b, int64_t ldb, int64_t cols, int64_t k, T* out, int64_t ldout) {
  const Tag<T> d;
  constexpr int64_t n = kLanes<T>;
  HWY_ALIGN T lanes[kRows * 4 * n];
  const S* columns[4];
  for (int64_t j = 0; j < 4; ++j) columns[j] = b + std::min(j, cols - 1) * ldb;
  if constexpr (kRows == 1) {
    for (int64_t j = 0; j < 4; ++j) dot_column<T, S>(a, columns[j], k, lanes + j * n);
  } else {
    dot_block<T, S, kRows>(a, lda, columns, b + 4 * ldb, k, lanes);
  }
  if (const int64_t whole = k / n * n; whole < k) {
    for (const S*& column : columns) column += whole;
    dot_tail<T, S>(a + whole, lda, kRows, columns, k - whole, lanes);
  }
  for (int64_t i = 0; i < kRows; ++i) {
    const T* of_row = lanes + 4 * i * n;
    T sums[4];
    store_sums_of_lanes<T>(hn::Load(d, of_row), hn::Load(d, of_row + n), hn::Load(d, of_row + 2 * n),
                           hn::Load(d, of_row + 3 * n), sums);
    for (int64_t j = 0; j < std::min<int64_t>(cols, 4); ++j) out[i * ldout + j] = sums[j];
  }
}

/// All rows against columns of B: out[rows][cols].
template <class T, class S>
void dots(const T* a, int64_t lda, int64_t rows, const S* b, int64_t ldb, int64_t cols, int64_t k, T* out,
          int64_t ldout) {
  for (int64_t j = 0; j < cols; j += 4) {
    const auto block = [&]<int kRows>(int64_t i, std::integral_constant<int, kRows>) {
      dot_kernel<T, S, kRows>(a + i * lda, lda, b + j * ldb, ldb, cols - j, k, out + i * ldout + j, ldout);
    };
    int64_t i = 0;
    for (; i + kDotRows <= rows; i += kDotRows) block(i, std::integral_constant<int, kDotRows>());
    if (rows - i == 3) block(i, std::integral_constant<int, 3>());
    if (rows - i == 2) block(i, std::integral_constant<int, 2>());
    if (rows - i == 1) block(i, std::integral_constant<int, 1>());
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace weft::detail
HWY_AFTER_NAMESPACE();
#endif
