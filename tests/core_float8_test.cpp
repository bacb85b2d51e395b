// The saturating conversion to 8-bit floats, against the formats' definition.
#include "core/float8.h"

#include <gtest/gtest.h>

#include "tests/fp8_reference.h"

namespace weft {
namespace {

using testing::Float8Reference;
using testing::kE4M3Reference;
using testing::kE5M2Reference;

/// Conversions that differ from the reference, over all bf16 and over the numbers on and beside every half-way point.
template <class Convert>
int64_t differences(const Float8Reference& format, Convert&& convert) {
  int64_t count = 0;
  const auto look = [&](float x) { count += convert(x) != format.code(static_cast<double>(x)); };
  for (uint32_t bits = 0; bits < 0x10000; ++bits) look(std::bit_cast<float>(bits << 16));
  for (unsigned code = 0; code <= format.largest_code; ++code) {
    const auto half = static_cast<float>((format.value(code) + format.value(code + 1)) / 2);
    for (const float x : {half, std::nextafter(half, 0.0f), std::nextafter(half, 1e30f)}) look(x), look(-x);
  }
  for (const float x : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::max(),
                        std::numeric_limits<float>::denorm_min(), std::numeric_limits<float>::quiet_NaN()})
    look(x), look(-x);
  return count;
}

template <class Float8>
uint8_t bits_of(float x) {
  return saturating_cast<Float8>(x).bits;
}

TEST(SaturatingCast, EveryBf16AndEveryTieGoToTheNearestEvenFiniteValue) {
  EXPECT_EQ(differences(kE4M3Reference, bits_of<Float8E4M3>), 0);
  EXPECT_EQ(differences(kE5M2Reference, bits_of<Float8E5M2>), 0);
}

TEST(SaturatingCast, TheComparisonRejectsWrongConversions) {
  // The constructors overflow to NaN and infinity; a truncation is off by less than a step.
  EXPECT_GT(differences(kE4M3Reference, [](float x) { return Float8E4M3(x).bits; }), 0);
  EXPECT_GT(differences(kE5M2Reference, [](float x) { return Float8E5M2(x).bits; }), 0);
  EXPECT_GT(differences(kE4M3Reference,
                        [](float x) {
                          const float cut = std::bit_cast<float>(std::bit_cast<uint32_t>(x) & 0xfff00000u);
                          return bits_of<Float8E4M3>(std::isnan(x) ? x : cut);
                        }),
            0);
}

TEST(SaturatingCast, TheLargestValuesAre448And57344) {
  for (const float beyond : {449.0f, 1e9f, std::numeric_limits<float>::infinity()}) {
    EXPECT_EQ(static_cast<float>(saturating_cast<Float8E4M3>(beyond)), 448);
    EXPECT_EQ(static_cast<float>(saturating_cast<Float8E4M3>(-beyond)), -448);
  }
  EXPECT_EQ(static_cast<float>(saturating_cast<Float8E5M2>(1e9f)), 57344);
  EXPECT_TRUE(std::isnan(static_cast<float>(saturating_cast<Float8E4M3>(std::nanf("")))));
  EXPECT_TRUE(std::isnan(static_cast<float>(saturating_cast<Float8E5M2>(-std::nanf("")))));
  EXPECT_EQ(Float8Format<Float8E4M3>::kLargest, kE4M3Reference.largest());
  EXPECT_EQ(Float8Format<Float8E5M2>::kLargest, kE5M2Reference.largest());
}

TEST(SaturatingCast, AgreesWithTheConstructorsWhereTheyDoNotOverflow) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float x = std::bit_cast<float>(bits << 16);
    if (!(std::abs(x) <= 448)) continue;
    ASSERT_EQ(bits_of<Float8E4M3>(x), Float8E4M3(x).bits) << x;
    ASSERT_EQ(bits_of<Float8E5M2>(x), Float8E5M2(x).bits) << x;
  }
}

}  // namespace
}  // namespace weft
