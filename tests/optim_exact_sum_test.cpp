// Sums without rounding: any order, any split, one rounding.
#include "optim/exact_sum.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

namespace weft::optim {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

double exact(const std::vector<double>& terms) {
  ExactSum sum;
  for (const double x : terms) sum.add(x);
  return sum.value();
}

TEST(ExactSum, OneTermComesBackAsItIs) {
  std::mt19937_64 bits(1);
  for (int i = 0; i < 200000; ++i) {
    const double x = std::bit_cast<double>(bits());
    if (!std::isfinite(x)) continue;
    EXPECT_EQ(exact({x}), x);
  }
  for (const double x : {0.0, 1.0, -1.0, std::numeric_limits<double>::max(), std::numeric_limits<double>::lowest(),
                         std::numeric_limits<double>::denorm_min(), std::numeric_limits<double>::min()}) {
    EXPECT_EQ(exact({x}), x);
  }
}

TEST(ExactSum, TwoTermsAreRoundedAsTheProcessorRoundsThem) {
  std::mt19937_64 bits(2);
  for (int i = 0; i < 200000; ++i) {
    const double x = std::bit_cast<double>(bits());
    // Exponents near each other, and any.
    const double y = i % 2 == 0
                         ? std::bit_cast<double>(bits())
                         : x * std::ldexp(static_cast<double>(bits() >> 11), static_cast<int>(bits() % 120) - 113);
    if (!std::isfinite(x) || !std::isfinite(y)) continue;
    EXPECT_EQ(exact({x, y}), x + y) << x << " + " << y;
  }
}

TEST(ExactSum, NothingIsLostBetweenFarApartTerms) {
  EXPECT_EQ(exact({1e300, 1, -1e300}), 1);
  EXPECT_EQ(exact({1e300, 1e-320, -1e300, 1e-320}), 2e-320);
  EXPECT_EQ(exact({1, std::ldexp(1.0, -53)}), 1);                                                 // half to even
  EXPECT_EQ(exact({1, std::ldexp(1.0, -53), std::ldexp(1.0, -1000)}), 1 + std::ldexp(1.0, -52));  // just above half
  EXPECT_EQ(exact({-1, -std::ldexp(1.0, -53), -std::ldexp(1.0, -1000)}), -1 - std::ldexp(1.0, -52));
  EXPECT_EQ(exact({3, -3}), 0);
}

TEST(ExactSum, AnyOrderAndAnySplitGiveTheSameBits) {
  std::mt19937_64 random(3);
  std::vector<double> terms;
  for (int i = 0; i < 5000; ++i) {
    terms.push_back(std::ldexp(static_cast<double>(random() >> 11), static_cast<int>(random() % 400) - 253));
  }
  const double all = exact(terms);
  for (int round = 0; round < 20; ++round) {
    std::shuffle(terms.begin(), terms.end(), random);
    EXPECT_EQ(exact(terms), all);
    ExactSum parts[3], whole;
    for (const double x : terms) parts[random() % 3].add(x);
    for (const ExactSum& part : parts) whole.add(part);
    EXPECT_EQ(whole.value(), all);
  }
  double plain = 0;
  for (const double x : terms) plain += x;
  EXPECT_NEAR(all / plain, 1, 1e-12);
}

TEST(ExactSum, ManyTermsAreAsExactAsFew) {
  ExactSum sum;
  for (int i = 0; i < 3'000'000; ++i) sum.add(0.1);
  EXPECT_EQ(sum.value(), 0.1 * 3'000'000.0);  // a product is rounded once as well
}

TEST(ExactSum, InfinitiesAndNaNAreKept) {
  EXPECT_EQ(exact({1, kInfinity}), kInfinity);
  EXPECT_EQ(exact({1, -kInfinity}), -kInfinity);
  EXPECT_TRUE(std::isnan(exact({kInfinity, -kInfinity})));
  EXPECT_TRUE(std::isnan(exact({1, std::numeric_limits<double>::quiet_NaN()})));
  EXPECT_EQ(exact({std::numeric_limits<double>::max(), std::numeric_limits<double>::max()}), kInfinity);
  EXPECT_EQ(exact({std::numeric_limits<double>::max(), std::numeric_limits<double>::max(),
                   std::numeric_limits<double>::lowest()}),
            std::numeric_limits<double>::max());
}

}  // namespace
}  // namespace weft::optim
