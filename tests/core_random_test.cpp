#include "core/random.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <set>
#include <vector>

#include "core/thread_pool.h"
#include "tests/error_of.h"

namespace weft {
namespace {

using Words = std::array<uint32_t, 4>;

/// Known answers of the Random123 distribution (kat_vectors, philox4x32 10).
TEST(Philox, GivesTheKnownAnswers) {
  EXPECT_EQ(philox(0, 0, 0), (Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox(~uint64_t{0}, ~uint64_t{0}, ~uint64_t{0}), (Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  // Words are little end first: counter 243f6a88 85a308d3 13198a2e 03707344, key a4093822 299f31d0.
  EXPECT_EQ(philox(0x299f31d0a4093822, 0x85a308d3243f6a88, 0x0370734413198a2e),
            (Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(RandomStream, IsAFunctionOfSeedNameStepAndIndex) {
  const RandomStream a(7, "init"), same(7, "init"), seed(8, "init"), name(7, "data");
  const RandomStream step = a.at_step(1);
  EXPECT_EQ(a.key(), same.key());
  EXPECT_EQ(step.step(), 1u);
  EXPECT_EQ(step.key(), a.key());
  int equal = 0;
  for (uint64_t i = 0; i < 1000; ++i) {
    EXPECT_EQ(a.bits(i), same.bits(i));
    equal += (a.bits(i) == seed.bits(i)) + (a.bits(i) == name.bits(i)) + (a.bits(i) == step.bits(i));
  }
  EXPECT_LE(equal, 1) << "3,000 comparisons of 32 bits agree by chance once in 1.4 million runs";
  EXPECT_EQ(step.at_step(0).bits(5), a.bits(5));
}

TEST(RandomStream, KeysArePinnedSoThatRunsRepeatAcrossVersions) {
  // splitmix64(splitmix64(0) ^ fnv1a("")): the first is the published first output of splitmix64 seeded with 0.
  const auto splitmix = [](uint64_t x) {
    x += 0x9E3779B97F4A7C15;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
    return x ^ (x >> 31);
  };
  ASSERT_EQ(splitmix(0), 0xE220A8397B1DCDAFu);
  EXPECT_EQ(RandomStream(0, "").key(), splitmix(0xE220A8397B1DCDAFu ^ 0xcbf29ce484222325u));
  EXPECT_EQ(RandomStream(0, "a").key(), splitmix(0xE220A8397B1DCDAFu ^ 0xaf63dc4c8601ec8cu))
      << "fnv1a(\"a\") is published";
}

TEST(RandomStream, BlocksAreFourConsecutiveWords) {
  const RandomStream stream(3, "x");
  for (uint64_t block = 0; block < 100; ++block) {
    const Words words = stream.block(block);
    for (uint64_t i = 0; i < 4; ++i) EXPECT_EQ(words[i], stream.bits(4 * block + i));
  }
}

TEST(RandomStream, UniformNumbersAreTheUpperBitsAndStayBelowOne) {
  const RandomStream stream(11, "u");
  for (uint64_t i = 0; i < 20000; ++i) {
    const float f = stream.uniform(i);
    EXPECT_EQ(f, static_cast<float>(stream.bits(i) >> 8) / 16777216.0f);
    const double d = stream.uniform_f64(i);
    const uint64_t bits = uint64_t{stream.bits(2 * i)} << 32 | stream.bits(2 * i + 1);
    EXPECT_EQ(d, static_cast<double>(bits >> 11) / 9007199254740992.0);
    ASSERT_TRUE(f >= 0 && f < 1 && d >= 0 && d < 1);
  }
}

/// Mean, variance, third and fourth standardised moments.
std::array<double, 4> moments(const std::vector<double>& x) {
  const double n = static_cast<double>(x.size());
  double mean = 0;
  for (const double v : x) mean += v / n;
  double m2 = 0, m3 = 0, m4 = 0;
  for (const double v : x) {
    const double d = v - mean;
    m2 += d * d / n, m3 += d * d * d / n, m4 += d * d * d * d / n;
  }
  return {mean, m2, m3 / std::pow(m2, 1.5), m4 / (m2 * m2)};
}

constexpr int64_t kDraws = 1 << 20;

TEST(RandomStream, UniformNumbersHaveTheMomentsAndTheSpreadOfUniformOnes) {
  const Tensor x = Tensor::empty({kDraws}, DType::f64);
  fill_uniform(x, RandomStream(1, "uniform"), -1, 3);
  const std::vector<double> values = x.to_vector<double>();
  const auto [mean, variance, skew, kurtosis] = moments(values);
  // Five standard errors of 2^20 draws each.
  EXPECT_NEAR(mean, 1, 5 * std::sqrt(16.0 / 12 / kDraws));
  EXPECT_NEAR(variance, 16.0 / 12, 5 * 16 * std::sqrt(1.0 / 180 / kDraws));
  EXPECT_NEAR(skew, 0, 0.01);
  EXPECT_NEAR(kurtosis, 1.8, 0.01);
  std::array<int, 16> bins{};
  for (const double v : values) {
    ASSERT_TRUE(v >= -1 && v < 3);
    ++bins[static_cast<size_t>((v + 1) * 4)];
  }
  double chi = 0;
  for (const int count : bins) chi += std::pow(count - kDraws / 16.0, 2) / (kDraws / 16.0);
  EXPECT_LT(chi, 44.3) << "15 degrees of freedom: exceeded once in 10,000";
}

TEST(RandomStream, NormalNumbersHaveTheMomentsAndTailsOfNormalOnes) {
  const Tensor x = Tensor::empty({kDraws}, DType::f64);
  fill_normal(x, RandomStream(1, "normal"), 2, 0.5);
  std::vector<double> values = x.to_vector<double>();
  const auto [mean, variance, skew, kurtosis] = moments(values);
  const double n = kDraws;
  EXPECT_NEAR(mean, 2, 5 * 0.5 / std::sqrt(n));
  EXPECT_NEAR(variance, 0.25, 5 * 0.25 * std::sqrt(2 / n));
  EXPECT_NEAR(skew, 0, 5 * std::sqrt(6 / n));
  EXPECT_NEAR(kurtosis, 3, 5 * std::sqrt(24 / n));
  for (const double z : {0.5, 1.0, 2.0, 3.0, 4.0}) {
    const double p = std::erfc(z / std::sqrt(2.0)) / 2;
    const auto beyond = std::count_if(values.begin(), values.end(), [&](double v) { return (v - 2) / 0.5 > z; });
    EXPECT_NEAR(static_cast<double>(beyond), n * p, 5 * std::sqrt(n * p)) << z;
  }
}

double correlation(const std::vector<double>& a, const std::vector<double>& b) {
  const auto ma = moments(a), mb = moments(b);
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += (a[i] - ma[0]) * (b[i] - mb[0]);
  return sum / static_cast<double>(a.size()) / std::sqrt(ma[1] * mb[1]);
}

TEST(RandomStream, StreamsStepsAndNeighboursAreUncorrelated) {
  const auto draw = [](const RandomStream& stream, uint64_t shift) {
    std::vector<double> values;
    for (uint64_t i = 0; i < 100000; ++i) values.push_back(stream.normal(i + shift));
    return values;
  };
  const RandomStream stream(5, "a");
  const std::vector<double> base = draw(stream, 0);
  const double limit = 5 / std::sqrt(100000.0);  // five standard errors
  EXPECT_LT(std::abs(correlation(base, draw(RandomStream(5, "b"), 0))), limit);
  EXPECT_LT(std::abs(correlation(base, draw(RandomStream(6, "a"), 0))), limit);
  EXPECT_LT(std::abs(correlation(base, draw(stream.at_step(1), 0))), limit);
  EXPECT_LT(std::abs(correlation(base, draw(stream, 1))), limit) << "the two halves of a Box-Muller pair";
  EXPECT_LT(std::abs(correlation(base, draw(stream, 2))), limit);
}

TEST(RandomStream, BelowIsUniformOnWholeNumbers) {
  const RandomStream stream(9, "shuffle");
  for (const uint64_t bound : {1ul, 2ul, 7ul, 10ul}) {
    std::vector<int> counts(bound);
    for (uint64_t i = 0; i < 70000; ++i) {
      const uint64_t x = stream.below(i, bound);
      ASSERT_LT(x, bound);
      ++counts[x];
    }
    const double want = 70000.0 / static_cast<double>(bound);
    for (const int count : counts) EXPECT_NEAR(count, want, 5 * std::sqrt(want)) << bound;
  }
  const uint64_t huge = ~uint64_t{0};
  double mean = 0;
  for (uint64_t i = 0; i < 1000; ++i) mean += static_cast<double>(stream.below(i, huge)) / 1000;
  EXPECT_NEAR(mean / 0x1p64, 0.5, 5 * std::sqrt(1.0 / 12 / 1000));
}

TEST(Fill, DoesNotDependOnTheNumberOfThreads) {
  const int before = num_threads();
  std::vector<std::vector<double>> runs;
  for (const int threads : {1, 2, 3, 7}) {
    set_num_threads(threads);
    const Tensor x = Tensor::empty({100, 333}, DType::f64), y = Tensor::empty({100, 333}, DType::f32);
    fill_normal(x, RandomStream(1, "x"), 0, 1);
    fill_uniform(y, RandomStream(1, "y"), 0, 1);
    std::vector<double> values = x.to_vector<double>();
    const std::vector<double> more = y.to_vector<double>();
    values.insert(values.end(), more.begin(), more.end());
    runs.push_back(values);
  }
  set_num_threads(before);
  for (const auto& run : runs) EXPECT_EQ(run, runs[0]);
}

TEST(Fill, RoundsEachElementOnceToTheDType) {
  const RandomStream stream(2, "z");
  const Tensor f = Tensor::empty({1000}), h = Tensor::empty({1000}, DType::f16), b = Tensor::empty({1000}, DType::bf16);
  for (const Tensor& tensor : {f, h, b}) fill_normal(tensor, stream, 0.1, 0.02);
  for (uint64_t i = 0; i < 1000; ++i) {
    const double want = 0.1 + 0.02 * stream.normal(i);
    EXPECT_EQ(f.data<float>()[i], static_cast<float>(want));
    EXPECT_EQ(h.data<Half>()[i].bits, Half(want).bits);
    EXPECT_EQ(b.data<BFloat16>()[i].bits, BFloat16(want).bits);
  }
}

TEST(Fill, RefusesWhatItCannotFill) {
  const RandomStream stream(2, "z");
  EXPECT_ERROR(ErrorKind::kDType, "[fill_normal] takes f32, f64, f16 or bf16, got i64",
               fill_normal(Tensor::zeros({3}, DType::i64), stream, 0, 1));
  EXPECT_ERROR(ErrorKind::kValue, "[fill_uniform] fills contiguous tensors",
               fill_uniform(Tensor::zeros({3, 2}).transpose(0, 1), stream, 0, 1));
  Tensor leaf = Tensor::zeros({3});
  leaf.requires_grad_();
  EXPECT_ERROR(ErrorKind::kState, "[fill_normal] would change in place a tensor", fill_normal(leaf, stream, 0, 1));
  fill_normal(Tensor::zeros({0}), stream, 0, 1);
}

}  // namespace
}  // namespace weft
