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

// Rows of A that share one pass over a column of B, four sums each.
inline constexpr int kDotRows = HWY_TARGET <= HWY_AVX3 ? 4 : 2;

/// Adds what is left of k, less than four vectors, to `lanes`. Apart from the main loop, because GCC keeps the sums of
/// that loop in memory if they share a function.
template <class T, class S>
HWY_NOINLINE void dot_tail(const T* a, int64_t lda, int64_t rows, const S* b, int64_t k, T* lanes) {
  const Tag<T> d;
  constexpr int64_t n = kLanes<T>;
  for (int64_t p = 0; p < k; p += n) {
    const size_t left = static_cast<size_t>(std::min(n, k - p));
    const auto bv = Source<T, S>::load_n(d, b + p, left);
    for (int64_t i = 0; i < rows; ++i) {
      T* to = lanes + 4 * i * n;
      hn::Store(hn::MulAdd(Source<T, T>::load_n(d, a + i * lda + p, left), bv, hn::Load(d, to)), d, to);
    }
  }
}

/// One column of B, `b`, against kRows rows of A: a vector of partial sums for each row, 4 vectors apart in `lanes`.
template <class T, class S, int kRows>
HWY_NOINLINE void dot_column(const T* HWY_RESTRICT a, int64_t lda, const S* HWY_RESTRICT b, int64_t k,
                             T* HWY_RESTRICT lanes) {
  const Tag<T> d;
  using V = hn::Vec<Tag<T>>;
  constexpr int64_t n = kLanes<T>;
  V sum[kRows][4];
  unroll<kRows>([&](auto i) WEFT_UNROLLED { unroll<4>([&](auto u) WEFT_UNROLLED { sum[i][u] = hn::Zero(d); }); });
  int64_t p = 0;
  for (; p + 4 * n <= k; p += 4 * n) {
    unroll<4>([&](auto u) WEFT_UNROLLED {
      const V bv = Source<T, S>::load(d, b + p + u * n);
      unroll<kRows>([&](auto i) WEFT_UNROLLED { multiply_add(hn::LoadU(d, a + i * lda + p + u * n), bv, sum[i][u]); });
    });
  }
  unroll<kRows>([&](auto i) WEFT_UNROLLED {
    hn::Store(hn::Add(hn::Add(sum[i][0], sum[i][1]), hn::Add(sum[i][2], sum[i][3])), d, lanes + 4 * i * n);
  });
  if (p < k) dot_tail<T, S>(a + p, lda, kRows, b + p, k - p, lanes);
}

/// out[i][j] = sum over p of a[i][p] * b[j][p], j < min(cols, 4). Four sums of every fourth vector of p, then these
/// together, then their lanes: the bits of an element depend on its row, its column and k alone. The columns of B (rows
/// of a weight matrix) follow one another as they lie in memory: the hardware reads one stream ahead at twice the speed
/// of four.
template <class T, class S, int kRows>
void dot_kernel(const T* a, int64_t lda, const S* b, int64_t ldb, int64_t cols, int64_t k, T* out, int64_t ldout) {
  const Tag<T> d;
  constexpr int64_t n = kLanes<T>;
  HWY_ALIGN T lanes[kRows * 4 * n];
  for (int64_t j = 0; j < 4; ++j) dot_column<T, S, kRows>(a, lda, b + std::min(j, cols - 1) * ldb, k, lanes + j * n);
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
