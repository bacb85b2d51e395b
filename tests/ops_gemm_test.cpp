#include "ops/gemm.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "core/error.h"
#include "core/thread_pool.h"

namespace weft {
namespace {

uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (std::isnan(value)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
double to_double(uint16_t value) {
  const uint32_t bits = uint32_t{value} << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}
double to_double(float value) { return value; }
double to_double(double value) { return value; }

template <class T>
T from_double(double value) {
  if constexpr (std::is_same_v<T, uint16_t>) {
    return to_bf16(static_cast<float>(value));
  } else {
    return static_cast<T>(value);
  }
}

/// Rounding unit of a type: half the distance from 1 to the next number.
template <class T>
double unit() {
  if constexpr (std::is_same_v<T, uint16_t>) {
    return std::ldexp(1.0, -8);
  } else {
    return std::numeric_limits<T>::epsilon() / 2;
  }
}

double gelu(double x) { return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))); }
double gelu_grad(double x) {
  const double c = std::sqrt(2 / M_PI), t = std::tanh(c * (x + 0.044715 * x * x * x));
  return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x);
}

template <class T>
std::vector<T> random_values(size_t count, unsigned seed) {
  std::mt19937 engine(seed);
  std::uniform_real_distribution<double> uniform(-1, 1);
  std::vector<T> out(count);
  for (T& value : out) value = from_double<T>(uniform(engine));
  return out;
}

/// Everything one comparison needs to know.
struct Case {
  bool trans_a = false, trans_b = false;
  int64_t m = 1, n = 1, k = 1;
  double alpha = 1, beta = 0;
  bool bias = false;
  GemmActivation activation = GemmActivation::kNone;
  int64_t padding = 3;  ///< elements between the rows of every matrix
  bool serial = false;
};

std::string to_string(const Case& c) {
  return concat(gemm_isa(), " m=", c.m, " n=", c.n, " k=", c.k, c.trans_a ? " A^T" : " A", c.trans_b ? " B^T" : " B",
                " alpha=", c.alpha, " beta=", c.beta, c.bias ? " bias" : "",
                " activation=", static_cast<int>(c.activation), c.serial ? " serial" : "");
}

template <class TC>
constexpr double kGuard = 77;

/// Runs a case and compares every element with sums in double.
///
/// Bound: a sum of k products in any order errs by at most (k + 4) u sum|a||b| to first order (Higham, Accuracy and
/// Stability, 3.1), u the unit of the type of the sums; the factor 4 covers alpha, beta, the bias and their additions.
/// Storing adds half a unit of C's type. GELU and gelu' have slopes below 1.13 and their own errors are a few u.
template <class TA, class TB, class TC>
void expect_product(const Case& c) {
  using Sum = typename Gemm<TA, TB, TC>::Sum;
  SCOPED_TRACE(to_string(c));
  const int64_t lda = (c.trans_a ? c.m : c.k) + c.padding, ldb = (c.trans_b ? c.k : c.n) + c.padding,
                ldc = c.n + c.padding;
  // Exactly as long as needed: an overrun of a source is seen by AddressSanitizer.
  const auto size = [](int64_t rows, int64_t cols, int64_t ld) {
    return static_cast<size_t>(rows == 0 || cols == 0 ? 0 : (rows - 1) * ld + cols);
  };
  const auto a = random_values<TA>(c.trans_a ? size(c.k, c.m, lda) : size(c.m, c.k, lda), 1);
  const auto b = random_values<TB>(c.trans_b ? size(c.n, c.k, ldb) : size(c.k, c.n, ldb), 2);
  const auto bias = random_values<Sum>(static_cast<size_t>(c.n), 3);
  const auto aux = random_values<TC>(static_cast<size_t>(c.m * ldc), 4);
  const auto before = random_values<TC>(static_cast<size_t>(c.m * ldc), 5);
  std::vector<TC> out(static_cast<size_t>(c.m * ldc), from_double<TC>(kGuard<TC>)), second = out;
  for (int64_t i = 0; i < c.m; ++i) {
    for (int64_t j = 0; j < c.n; ++j) {
      const size_t at = static_cast<size_t>(i * ldc + j);
      out[at] = c.beta == 0 ? from_double<TC>(std::numeric_limits<double>::quiet_NaN()) : before[at];
    }
  }
  auto product = make_gemm<TA, TB, TC>(c.trans_a, c.trans_b, c.m, c.n, c.k, a.data(), lda, b.data(), ldb, out.data(),
                                       ldc, static_cast<Sum>(c.alpha), static_cast<Sum>(c.beta));
  if (c.bias) product.bias = bias.data();
  product.activation = c.activation;
  if (c.activation == GemmActivation::kGelu) product.d = second.data(), product.ldd = ldc;
  if (c.activation == GemmActivation::kGeluGrad) product.aux = aux.data(), product.ldaux = ldc;
  c.serial ? gemm_serial(product) : gemm(product);

  int wrong = 0;
  for (int64_t i = 0; i < c.m && wrong < 3; ++i) {
    for (int64_t j = 0; j < ldc; ++j) {
      const size_t at = static_cast<size_t>(i * ldc + j);
      if (j >= c.n) {
        ASSERT_EQ(to_double(out[at]), kGuard<TC>) << "C written beyond its columns at " << i << ", " << j;
        ASSERT_EQ(to_double(second[at]), kGuard<TC>) << "D written beyond its columns at " << i << ", " << j;
        continue;
      }
      double sum = 0, magnitude = 0;
      for (int64_t p = 0; p < c.k; ++p) {
        const double x = to_double(a[static_cast<size_t>(c.trans_a ? p * lda + i : i * lda + p)]);
        const double y = to_double(b[static_cast<size_t>(c.trans_b ? j * ldb + p : p * ldb + j)]);
        sum += x * y, magnitude += std::abs(x * y);
      }
      double want = c.alpha * sum;
      magnitude *= std::abs(c.alpha);
      if (c.beta != 0) want += c.beta * to_double(before[at]), magnitude += std::abs(c.beta * to_double(before[at]));
      if (c.bias)
        want += to_double(bias[static_cast<size_t>(j)]), magnitude += std::abs(to_double(bias[static_cast<size_t>(j)]));
      double bound = (static_cast<double>(c.k) + 4) * unit<Sum>() * magnitude;
      if (c.activation == GemmActivation::kGeluGrad) {
        want *= gelu_grad(to_double(aux[at]));
        bound = 1.13 * bound + 16 * unit<Sum>() * std::abs(want);
      }
      if (c.activation == GemmActivation::kGelu) {
        const double error = std::abs(to_double(second[at]) - gelu(want));
        const double allowed =
            1.13 * bound + 16 * unit<Sum>() * (std::abs(want) + 1e-3) + unit<TC>() * std::abs(gelu(want));
        if (!(error <= allowed))
          ++wrong,
              ADD_FAILURE() << "D[" << i << ", " << j << "] = " << to_double(second[at]) << ", want " << gelu(want);
      }
      bound += unit<TC>() * (std::abs(want) + bound);
      if (!(std::abs(to_double(out[at]) - want) <= bound)) {
        ++wrong, ADD_FAILURE() << "C[" << i << ", " << j << "] = " << to_double(out[at]) << ", want " << want
                               << " within " << bound;
      }
    }
  }
}

/// Every instruction set of this machine, each forced in turn.
class GemmOnEveryIsa : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    threads_ = num_threads();
    if (!set_gemm_isa(GetParam())) GTEST_SKIP() << "this machine or build has no " << GetParam();
    ASSERT_STREQ(gemm_isa(), GetParam());
  }
  void TearDown() override {
    set_gemm_isa("");
    set_num_threads(threads_);
  }
  int threads_ = 1;
};
INSTANTIATE_TEST_SUITE_P(Isa, GemmOnEveryIsa, testing::Values("avx512bf16", "avx512", "avx2", "portable"),
                         [](const auto& info) { return std::string(info.param); });

template <class TA, class TB, class TC>
void expect_all_layouts(Case c) {
  for (const bool trans_a : {false, true}) {
    for (const bool trans_b : {false, true}) {
      c.trans_a = trans_a, c.trans_b = trans_b;
      expect_product<TA, TB, TC>(c);
    }
  }
}

TEST_P(GemmOnEveryIsa, MatchesSumsInDoubleForPrimeSizesInEveryLayout) {
  for (const int64_t m : {1, 2, 13, 31, 61}) {
    for (const int64_t n : {1, 17, 47, 101}) {
      for (const int64_t k : {1, 3, 37, 61}) {
        expect_all_layouts<float, float, float>({.m = m, .n = n, .k = k});
        expect_all_layouts<double, double, double>({.m = m, .n = n, .k = k});
      }
    }
  }
}

TEST_P(GemmOnEveryIsa, MatchesForEveryHeightOfATileAndEveryWidth) {
  for (int64_t m = 1; m <= 30; ++m) expect_all_layouts<float, float, float>({.m = m, .n = 33, .k = 40});
  for (int64_t n = 1; n <= 66; ++n) expect_all_layouts<float, float, float>({.m = 15, .n = n, .k = 33});
}

TEST_P(GemmOnEveryIsa, MatchesWhenKAndColumnsNeedSeveralBlocks) {
  expect_all_layouts<float, float, float>({.m = 45, .n = 300, .k = 769});
  expect_all_layouts<float, float, float>({.m = 130, .n = 259, .k = 1153, .alpha = 0.5, .beta = 2, .bias = true});
  expect_all_layouts<double, double, double>({.m = 45, .n = 270, .k = 401});
  expect_all_layouts<float, float, float>({.m = 45, .n = 300, .k = 769, .padding = 0, .serial = true});
}

TEST_P(GemmOnEveryIsa, AppliesAlphaBetaBiasAndActivationInTheStatedOrder) {
  for (const double alpha : {1.0, -0.5, 0.0}) {
    for (const double beta : {0.0, 1.0, 0.25}) {
      for (const bool bias : {false, true}) {
        for (const auto activation : {GemmActivation::kNone, GemmActivation::kGelu, GemmActivation::kGeluGrad}) {
          for (const int64_t m : {3, 29}) {
            const Case c = {
                .m = m, .n = 67, .k = 41, .alpha = alpha, .beta = beta, .bias = bias, .activation = activation};
            expect_all_layouts<float, float, float>(c);
            expect_all_layouts<double, double, double>(c);
            expect_all_layouts<uint16_t, uint16_t, uint16_t>(c);
          }
        }
      }
    }
  }
}

TEST_P(GemmOnEveryIsa, TakesBfloat16WithSumsInFloat) {
  for (const int64_t m : {1, 5, 31}) {
    for (const int64_t n : {1, 16, 65, 300}) {
      for (const int64_t k : {1, 31, 64, 401}) {
        expect_all_layouts<uint16_t, uint16_t, float>({.m = m, .n = n, .k = k});
        expect_all_layouts<uint16_t, uint16_t, uint16_t>({.m = m, .n = n, .k = k, .beta = 1});
        expect_all_layouts<float, uint16_t, float>({.m = m, .n = n, .k = k, .bias = true});
      }
    }
  }
  expect_all_layouts<uint16_t, uint16_t, uint16_t>({.m = 301, .n = 20, .k = 30, .beta = 0.5});
}

TEST_P(GemmOnEveryIsa, TakesBfloat16OfEveryHeightWidthAndDepthOfATile) {
  // Odd and even k and strides: pairs along k are read in place, copied, or end in half a pair.
  for (int64_t m = 1; m <= 30; ++m) {
    expect_all_layouts<uint16_t, uint16_t, float>({.m = m, .n = 33, .k = 40, .padding = m % 3});
  }
  for (int64_t n = 1; n <= 66; ++n) {
    expect_all_layouts<uint16_t, uint16_t, uint16_t>({.m = 15, .n = n, .k = 33, .padding = n % 2});
  }
  for (int64_t k = 1; k <= 70; ++k) {
    expect_all_layouts<uint16_t, uint16_t, float>({.m = 17, .n = 35, .k = k, .padding = 0});
    expect_all_layouts<uint16_t, uint16_t, uint16_t>({.m = 9, .n = 16, .k = k, .padding = 1, .serial = true});
  }
}

TEST_P(GemmOnEveryIsa, TakesBfloat16WhenKAndColumnsNeedSeveralBlocks) {
  for (const int64_t k : {768, 769, 1600}) {
    expect_all_layouts<uint16_t, uint16_t, float>({.m = 45, .n = 300, .k = k, .padding = 0});
    expect_all_layouts<uint16_t, uint16_t, uint16_t>(
        {.m = 31, .n = 270, .k = k, .alpha = 0.5, .beta = 2, .bias = true});
  }
  expect_all_layouts<uint16_t, uint16_t, uint16_t>({.m = 300, .n = 520, .k = 40, .beta = 1});
  // Rows of A 4 KiB apart.
  expect_product<uint16_t, uint16_t, float>({.m = 29, .n = 40, .k = 2048, .padding = 0});
}

TEST_P(GemmOnEveryIsa, TakesEmptySizes) {
  for (const bool serial : {false, true}) {
    expect_all_layouts<float, float, float>({.m = 0, .n = 5, .k = 4, .serial = serial});
    expect_all_layouts<float, float, float>({.m = 5, .n = 0, .k = 4, .serial = serial});
    for (const double beta : {0.0, 0.5}) {
      expect_all_layouts<float, float, float>({.m = 19, .n = 35, .k = 0, .beta = beta, .bias = true, .serial = serial});
      expect_all_layouts<uint16_t, uint16_t, uint16_t>({.m = 19, .n = 35, .k = 0, .beta = beta, .serial = serial});
    }
  }
}

TEST_P(GemmOnEveryIsa, ReadsNeitherOperandWhenAlphaOrKIsZero) {
  for (const int64_t m : {1, 20}) {
    std::vector<float> c(static_cast<size_t>(m * 40), 2.0f);
    auto product =
        make_gemm<float, float, float>(false, true, m, 40, 64, nullptr, 64, nullptr, 64, c.data(), 40, 0.0f, 0.5f);
    gemm(product);
    EXPECT_EQ(c, std::vector<float>(c.size(), 1.0f));
    product.k = 0, product.alpha = 1;
    gemm(product);
    EXPECT_EQ(c, std::vector<float>(c.size(), 0.5f));
  }
}

TEST_P(GemmOnEveryIsa, ReadsOperandsOfAnyAlignmentAndStride) {
  // Rows that are a power of two apart, and unaligned ones, take other ways through the packing.
  constexpr int64_t kSize = 48;
  for (const int64_t stride : {kSize, int64_t{49}, int64_t{512}, int64_t{1024}, int64_t{16384}}) {
    const Case c = {.m = kSize, .n = kSize, .k = kSize, .padding = stride - kSize};
    expect_all_layouts<float, float, float>(c);
    expect_all_layouts<double, double, double>(c);
  }
  // k = 1,024 in blocks, rows of A 4 KiB apart.
  expect_product<float, float, float>({.m = 29, .n = 40, .k = 1024, .padding = 0});
}

template <class TA, class TC>
void expect_same_bits_on_any_threads() {
  struct Shape {
    int64_t m, n, k;
  };
  for (const Shape s :
       {Shape{256, 257, 130}, {768, 65, 128}, {100, 500, 800}, {1, 700, 256}, {7, 300, 64}, {300, 33, 33}}) {
    for (const bool trans_a : {false, true}) {
      for (const bool trans_b : {false, true}) {
        const auto a = random_values<TA>(static_cast<size_t>(s.m * s.k), 1),
                   b = random_values<TA>(static_cast<size_t>(s.k * s.n), 2);
        std::vector<TC> first;
        for (const int threads : {1, 2, 3, 0}) {
          std::vector<TC> c(static_cast<size_t>(s.m * s.n), from_double<TC>(1));
          const auto product = make_gemm<TA, TA, TC>(trans_a, trans_b, s.m, s.n, s.k, a.data(), trans_a ? s.m : s.k,
                                                     b.data(), trans_b ? s.k : s.n, c.data(), s.n, 1.0f, 1.0f);
          if (threads == 0) {
            gemm_serial(product);
          } else {
            set_num_threads(threads);
            gemm(product);
          }
          if (first.empty()) first = c;
          ASSERT_EQ(std::memcmp(first.data(), c.data(), c.size() * sizeof(TC)), 0)
              << "threads " << threads << " m=" << s.m << " n=" << s.n;
        }
      }
    }
  }
}

TEST_P(GemmOnEveryIsa, GivesTheSameBitsOnOneTwoAndThreeThreadsAndSerially) {
  expect_same_bits_on_any_threads<float, float>();
  expect_same_bits_on_any_threads<uint16_t, float>();
  expect_same_bits_on_any_threads<uint16_t, uint16_t>();
}

template <class TA, class TC>
void expect_a_batch_has_the_bits_of_its_products() {
  constexpr int64_t kCount = 5, m = 70, n = 40, k = 51;
  for (const int64_t rows : {m, int64_t{1}}) {
    const auto a = random_values<TA>(kCount * m * k, 1), b = random_values<TA>(n * k, 2);
    std::vector<TC> together(kCount * m * n, 0), alone = together;
    auto product = make_gemm<TA, TA, TC>(false, true, rows, n, k, a.data(), k, b.data(), k, together.data(), n);
    gemm_batched(product, {.count = kCount, .a = m * k, .b = 0, .c = m * n});
    for (int64_t i = 0; i < kCount; ++i) {
      product.a.data = a.data() + i * m * k;
      product.c = alone.data() + i * m * n;
      gemm_serial(product);
    }
    EXPECT_EQ(std::memcmp(together.data(), alone.data(), alone.size() * sizeof(TC)), 0);
  }
}

TEST_P(GemmOnEveryIsa, ABatchHasTheBitsOfItsProductsAlone) {
  expect_a_batch_has_the_bits_of_its_products<float, float>();
  expect_a_batch_has_the_bits_of_its_products<uint16_t, float>();
  expect_a_batch_has_the_bits_of_its_products<uint16_t, uint16_t>();
}

/// NaN in row 4 of A and infinity in row 9, in the last column of an odd k and elsewhere; a GELU follows.
template <class T>
void expect_nan_and_infinity_pass() {
  constexpr int64_t m = 20, n = 40, k = 33;
  for (const bool trans_a : {false, true}) {
    for (const int64_t column : {1, 7, 32}) {
      auto a = random_values<T>(m * k, 1);
      const auto b = random_values<T>(k * n, 2);
      const auto at = [&](int64_t i, int64_t p) -> T& {
        return a[static_cast<size_t>(trans_a ? p * m + i : i * k + p)];
      };
      at(4, column) = from_double<T>(std::numeric_limits<double>::quiet_NaN());
      at(9, column) = from_double<T>(std::numeric_limits<double>::infinity());
      std::vector<T> c(m * n), d(m * n);
      auto product = make_gemm<T, T, T>(trans_a, false, m, n, k, a.data(), trans_a ? m : k, b.data(), n, c.data(), n);
      product.activation = GemmActivation::kGelu, product.d = d.data(), product.ldd = n;
      gemm(product);
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = 0; j < n; ++j) {
          const double x = to_double(c[static_cast<size_t>(i * n + j)]),
                       y = to_double(d[static_cast<size_t>(i * n + j)]);
          EXPECT_EQ(std::isnan(x), i == 4);
          EXPECT_EQ(std::isnan(y), i == 4);
          EXPECT_EQ(std::isinf(x), i == 9);
          if (i == 9) {
            EXPECT_EQ(y, x > 0 ? x : 0.0);
          }
        }
      }
    }
  }
}

TEST_P(GemmOnEveryIsa, PassesNanAndInfinityOn) {
  expect_nan_and_infinity_pass<float>();
  expect_nan_and_infinity_pass<uint16_t>();
}

TEST_P(GemmOnEveryIsa, TakesBelowTheSmallestNormalFloatAsZeroWherePairsAreMultiplied) {
  const bool flushes = GetParam() == std::string("avx512bf16");
  const int64_t m = 20, n = 33, k = 5;
  const auto product_of = [&](double x, double y) {
    const std::vector<uint16_t> a(static_cast<size_t>(m * k), from_double<uint16_t>(x)),
        b(static_cast<size_t>(k * n), from_double<uint16_t>(y));
    std::vector<float> c(static_cast<size_t>(m * n));
    gemm(make_gemm<uint16_t, uint16_t, float>(false, false, m, n, k, a.data(), k, b.data(), n, c.data(), n));
    EXPECT_EQ(c, std::vector<float>(c.size(), c[0]));
    return static_cast<double>(c[0]);
  };
  const double tiny = std::ldexp(1.0, -130);  // an element that is not a normal number
  EXPECT_EQ(product_of(tiny, 1024), flushes ? 0 : 5 * 1024 * tiny);
  EXPECT_EQ(product_of(1024, tiny), flushes ? 0 : 5 * 1024 * tiny);
  EXPECT_EQ(product_of(std::ldexp(1.0, -70), std::ldexp(1.0, -62)), flushes ? 0 : std::ldexp(5.0, -132));  // a sum
  EXPECT_EQ(product_of(std::ldexp(1.0, -63), std::ldexp(1.0, -63)), std::ldexp(5.0, -126));
}

TEST(Gemm, OnlyProductsOfBfloat16DifferWherePairsAreMultiplied) {
  if (!set_gemm_isa("avx512bf16")) GTEST_SKIP() << "this machine or build has no avx512bf16";
  const int64_t m = 40, n = 70, k = 90;
  const auto bits_of = [&]<class TA, class TB, class TC>(TA, TB, TC) {
    const auto a = random_values<TA>(static_cast<size_t>(m * k), 1);
    const auto b = random_values<TB>(static_cast<size_t>(k * n), 2);
    std::vector<TC> c(static_cast<size_t>(m * n));
    gemm(make_gemm<TA, TB, TC>(false, true, m, n, k, a.data(), k, b.data(), k, c.data(), n));
    return c;
  };
  const auto f32 = bits_of(0.0f, 0.0f, 0.0f);
  const auto f64 = bits_of(0.0, 0.0, 0.0);
  const auto mixed = bits_of(0.0f, uint16_t{0}, 0.0f);
  ASSERT_TRUE(set_gemm_isa("avx512"));
  EXPECT_EQ(f32, bits_of(0.0f, 0.0f, 0.0f));
  EXPECT_EQ(f64, bits_of(0.0, 0.0, 0.0));
  EXPECT_EQ(mixed, bits_of(0.0f, uint16_t{0}, 0.0f));
  set_gemm_isa("");
}

TEST_P(GemmOnEveryIsa, GeluKeepsItsBoundsFarFromZero) {
  // k = 1, b = 1: C is A, so that the activation is seen alone.
  const std::vector<float> x = {-3e38f, -1e30f, -1e4f, -100, -31, -30, -29, -13, -10, -9,  -5,   -1e-3f, -1e-30f, 0,
                                1e-30f, 1e-3f,  1,     5,    9,   10,  13,  30,  31,  100, 1e4f, 1e30f,  3e38f};
  const int64_t m = static_cast<int64_t>(x.size());
  const float one = 1;
  std::vector<float> c(x.size()), d(x.size()), grad(x.size());
  auto product = make_gemm<float, float, float>(false, false, m, 1, 1, x.data(), 1, &one, 1, c.data(), 1);
  product.activation = GemmActivation::kGelu, product.d = d.data(), product.ldd = 1;
  gemm(product);
  std::vector<float> ones(x.size(), 1.0f);
  product.a.data = ones.data();
  product.activation = GemmActivation::kGeluGrad, product.aux = x.data(), product.ldaux = 1, product.c = grad.data();
  gemm(product);
  for (size_t i = 0; i < x.size(); ++i) {
    const double large = std::abs(x[i]) > 1e5 ? (x[i] > 0 ? x[i] : 0.0) : gelu(x[i]);
    const double slope = std::abs(x[i]) > 100 ? (x[i] > 0 ? 1.0 : 0.0) : gelu_grad(x[i]);
    // exp errs by 2 units, times 2u <= 20 where it matters.
    EXPECT_NEAR(d[i], large, 1e-6 * std::abs(large) + 1e-6) << x[i];
    EXPECT_NEAR(grad[i], slope, 2e-6) << x[i];
  }
}

TEST(Gemm, RefusesWhatItCannotCompute) {
  const float x[4] = {};
  float y[4] = {};
  const auto kind_of = [](const Gemm<float>& g) -> int {
    try {
      gemm(g);
    } catch (const Error& error) {
      EXPECT_EQ(std::string(error.what()).substr(0, 7), "[gemm] ") << error.what();
      return static_cast<int>(error.kind());
    }
    return -1;
  };
  const auto good = make_gemm<float, float, float>(false, false, 2, 2, 2, x, 2, x, 2, y, 2);
  EXPECT_EQ(kind_of(good), -1);
  auto bad = good;
  bad.m = -1;
  EXPECT_EQ(kind_of(bad), static_cast<int>(ErrorKind::kShape));
  bad = good, bad.ldc = 1;
  EXPECT_EQ(kind_of(bad), static_cast<int>(ErrorKind::kShape));
  bad = good, bad.a.row_stride = 2, bad.a.col_stride = 2;
  EXPECT_EQ(kind_of(bad), static_cast<int>(ErrorKind::kValue));
  bad = good, bad.b.data = nullptr;
  EXPECT_EQ(kind_of(bad), static_cast<int>(ErrorKind::kValue));
  bad = good, bad.activation = GemmActivation::kGelu;
  EXPECT_EQ(kind_of(bad), static_cast<int>(ErrorKind::kValue));
  bad = good, bad.activation = GemmActivation::kGeluGrad;
  EXPECT_EQ(kind_of(bad), static_cast<int>(ErrorKind::kValue));
  EXPECT_FALSE(set_gemm_isa("mmx"));
}

}  // namespace
}  // namespace weft
