#include "core/dtype.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "tests/error_of.h"

namespace weft {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// What the tests know of a format, independent of how it is coded: the widths of its fields and its special values.
struct Format {
  int exponent, mantissa;
  bool infinity;

  uint32_t codes() const { return 2u << (exponent + mantissa); }
  uint32_t sign() const { return 1u << (exponent + mantissa); }
  /// By the definition of the format; NaN for NaN.
  double value(uint32_t code) const {
    const uint32_t field = code >> mantissa & ((1u << exponent) - 1), fraction = code & ((1u << mantissa) - 1);
    const int bias = (1 << (exponent - 1)) - 1;
    const double factor = code & sign() ? -1 : 1;
    if (field == (1u << exponent) - 1) {
      if (infinity) return fraction ? std::nan("") : factor * kInfinity;
      if (fraction == (1u << mantissa) - 1) return std::nan("");
    }
    const double steps = field == 0 ? fraction : fraction + (1u << mantissa);
    return factor * std::ldexp(steps, static_cast<int>(field == 0 ? 1 : field) - bias - mantissa);
  }
  /// The code of the largest finite value.
  uint32_t largest() const { return infinity ? (((1u << exponent) - 1) << mantissa) - 1 : sign() - 2; }
};

template <class T>
Format format_of();
template <>
Format format_of<Half>() {
  return {5, 10, true};
}
template <>
Format format_of<BFloat16>() {
  return {8, 7, true};
}
template <>
Format format_of<Float8E4M3>() {
  return {4, 3, false};
}
template <>
Format format_of<Float8E5M2>() {
  return {5, 2, true};
}

template <class T>
T with_bits(uint32_t bits) {
  T x;
  x.bits = static_cast<decltype(x.bits)>(bits);
  return x;
}

template <class T>
class SmallFloat : public ::testing::Test {};
using SmallFloats = ::testing::Types<Half, BFloat16, Float8E4M3, Float8E5M2>;
TYPED_TEST_SUITE(SmallFloat, SmallFloats);

TYPED_TEST(SmallFloat, DecodesEveryPatternByTheDefinition) {
  const Format format = format_of<TypeParam>();
  for (uint32_t code = 0; code < format.codes(); ++code) {
    const double want = format.value(code);
    const TypeParam x = with_bits<TypeParam>(code);
    if (std::isnan(want)) {
      ASSERT_TRUE(std::isnan(static_cast<float>(x))) << code;
      ASSERT_TRUE(std::isnan(static_cast<double>(x))) << code;
    } else {
      ASSERT_EQ(static_cast<double>(x), want) << code;
      ASSERT_EQ(static_cast<double>(static_cast<float>(x)), want) << code;
    }
    ASSERT_EQ(std::signbit(static_cast<float>(x)), code >= format.sign()) << code;
  }
}

TYPED_TEST(SmallFloat, EveryPatternRoundTripsThroughFloatAndDouble) {
  const Format format = format_of<TypeParam>();
  for (uint32_t code = 0; code < format.codes(); ++code) {
    const TypeParam x = with_bits<TypeParam>(code), f(static_cast<float>(x)), d(static_cast<double>(x));
    if (std::isnan(format.value(code))) {
      // A NaN stays a NaN with its sign; its payload may not fit.
      ASSERT_TRUE(std::isnan(static_cast<float>(f)) && std::isnan(static_cast<float>(d))) << code;
      ASSERT_EQ(f.bits & format.sign(), code & format.sign()) << code;
      ASSERT_EQ(d.bits & format.sign(), code & format.sign()) << code;
    } else {
      ASSERT_EQ(f.bits, code);
      ASSERT_EQ(d.bits, code);
    }
  }
}

TYPED_TEST(SmallFloat, RoundsToNearestEvenAtEveryHalfWayPoint) {
  const Format format = format_of<TypeParam>();
  for (uint32_t code = 0; code < format.largest(); ++code) {
    for (const double sign : {1.0, -1.0}) {
      const uint32_t bit = sign < 0 ? format.sign() : 0;
      // Exact in double: neighbours differ by one unit of a format with at most 11 significant bits.
      const double low = format.value(code), high = format.value(code + 1), middle = (low + high) / 2;
      const uint32_t even = (code % 2 ? code + 1 : code) | bit;
      ASSERT_EQ(TypeParam(sign * middle).bits, even) << middle;
      ASSERT_EQ(TypeParam(sign * std::nextafter(middle, 0.0)).bits, code | bit) << middle;
      ASSERT_EQ(TypeParam(sign * std::nextafter(middle, kInfinity)).bits, (code + 1) | bit) << middle;
      // The same from float, where the half-way point is one (bf16's smallest need subnormal floats, which have it).
      const float near = static_cast<float>(middle);
      ASSERT_EQ(static_cast<double>(near), middle);
      ASSERT_EQ(TypeParam(static_cast<float>(sign) * near).bits, even) << middle;
      ASSERT_EQ(TypeParam(static_cast<float>(sign) * std::nextafter(near, 0.0f)).bits, code | bit) << middle;
      ASSERT_EQ(TypeParam(static_cast<float>(sign) * std::nextafter(near, HUGE_VALF)).bits, (code + 1) | bit) << middle;
    }
  }
}

TYPED_TEST(SmallFloat, DoublesAreRoundedOnceAndNotThroughFloat) {
  const Format format = format_of<TypeParam>();
  for (uint32_t code = 0; code < format.largest(); ++code) {
    const double middle = (format.value(code) + format.value(code + 1)) / 2;
    const double above = std::nextafter(middle, kInfinity), below = std::nextafter(middle, 0.0);
    // Rounded to float first, both would land on the half-way point and then go to the even neighbour.
    ASSERT_EQ(static_cast<double>(static_cast<float>(above)), middle);
    ASSERT_EQ(TypeParam(above).bits, code + 1);
    ASSERT_EQ(TypeParam(below).bits, code);
  }
}

TYPED_TEST(SmallFloat, OverflowGivesInfinityOrNaNFromHalfAStepBeyondTheLargest) {
  const Format format = format_of<TypeParam>();
  const uint32_t largest = format.largest();
  const double top = format.value(largest), step = top - format.value(largest - 1), edge = top + step / 2;
  for (const double sign : {1.0, -1.0}) {
    const uint32_t bit = sign < 0 ? format.sign() : 0;
    EXPECT_EQ(TypeParam(sign * std::nextafter(edge, 0.0)).bits, largest | bit);
    const bool stays = largest % 2 == 0;  // e4m3: the largest is the even one
    EXPECT_EQ(TypeParam(sign * edge).bits, (stays ? largest : largest + 1) | bit);
    for (const double x : {std::nextafter(edge, kInfinity), 1e300, kInfinity}) {
      EXPECT_EQ(TypeParam(sign * x).bits, (largest + 1) | bit) << x;
      EXPECT_EQ(TypeParam(static_cast<float>(sign * (x > 3e38 ? kInfinity : x))).bits | 0u,
                TypeParam(static_cast<double>(static_cast<float>(sign * (x > 3e38 ? kInfinity : x)))).bits | 0u);
    }
    EXPECT_EQ(std::isinf(static_cast<float>(TypeParam(sign * 1e300))), format.infinity);
    EXPECT_EQ(std::isnan(static_cast<float>(TypeParam(sign * 1e300))), !format.infinity);
  }
}

TYPED_TEST(SmallFloat, TinyValuesGoToZeroWithTheirSign) {
  for (const double x : {0.0, 5e-324, 1e-310, 1e-300, 1e-60}) {
    EXPECT_EQ(TypeParam(x).bits, 0u) << x;
    EXPECT_EQ(TypeParam(-x).bits, format_of<TypeParam>().sign()) << x;
  }
}

TYPED_TEST(SmallFloat, EveryNaNOfFloatAndDoubleStaysOne) {
  for (const uint32_t bits :
       {0x7f800001u, 0x7fbfffffu, 0x7fc00000u, 0x7fffffffu, 0xff800001u, 0xffffffffu, 0x7f80ffffu, 0x7f808000u}) {
    EXPECT_TRUE(std::isnan(static_cast<float>(TypeParam(std::bit_cast<float>(bits))))) << std::hex << bits;
  }
  for (const uint64_t bits : {0x7ff0000000000001u, 0x7ff8000000000000u, 0xfff0000000000001u, 0x7fffffffffffffffu}) {
    EXPECT_TRUE(std::isnan(static_cast<float>(TypeParam(std::bit_cast<double>(bits))))) << std::hex << bits;
  }
}

TEST(BFloat16, EveryFloatOfABinadeAgreesWithTheDefinition) {
  // All 2^16 lower halves above two upper halves of either parity.
  for (const uint32_t upper : {0x3f80u, 0x3f81u}) {
    for (uint32_t lower = 0; lower < 0x10000; ++lower) {
      const bool up = lower > 0x8000 || (lower == 0x8000 && upper % 2);
      ASSERT_EQ(BFloat16(std::bit_cast<float>(upper << 16 | lower)).bits, upper + up);
    }
  }
}

TEST(BFloat16, WholeNumbersAreRoundedOnce) {
  // Spacing of bf16 at 2^62 is 2^55. One above the half-way point is lost in a double, and must not be.
  const int64_t base = int64_t{1} << 62, half = int64_t{1} << 54;
  const uint16_t code = BFloat16(static_cast<double>(base)).bits;
  EXPECT_EQ(BFloat16(base + half).bits, code) << "ties to even";
  EXPECT_EQ(BFloat16(base + half + 1).bits, code + 1);
  EXPECT_EQ(BFloat16(base + half - 1).bits, code);
  EXPECT_EQ(BFloat16(base + 3 * half).bits, code + 2) << "ties to even";
  EXPECT_EQ(BFloat16(base + 3 * half - 1).bits, code + 1);
  EXPECT_EQ(BFloat16(-(base + half)).bits, code | 0x8000);
  EXPECT_EQ(BFloat16(-(base + half + 1)).bits, (code + 1) | 0x8000);
  EXPECT_EQ(BFloat16(-(base + half - 1)).bits, code | 0x8000);
  EXPECT_EQ(BFloat16(-(base + 3 * half - 1)).bits, (code + 1) | 0x8000);
  for (int64_t x = -300; x <= 300; ++x) EXPECT_EQ(BFloat16(x).bits, BFloat16(static_cast<double>(x)).bits);
  EXPECT_EQ(static_cast<float>(BFloat16(std::numeric_limits<int64_t>::min())), -0x1p63f);
  EXPECT_EQ(static_cast<float>(BFloat16(std::numeric_limits<int64_t>::max())), 0x1p63f);
}

TEST(BFloat16, FloatsCloseToTheLargestRoundToInfinity) {
  EXPECT_EQ(BFloat16(std::numeric_limits<float>::max()).bits, 0x7f80);
  EXPECT_EQ(BFloat16(std::bit_cast<float>(0x7f7f7fffu)).bits, 0x7f7f);
  EXPECT_EQ(BFloat16(std::bit_cast<float>(0x7f7f8000u)).bits, 0x7f80);
}

TEST(DType, NamesParseBackAndAreDistinct) {
  std::set<std::string> names;
  for (int i = 0; i < kDTypeCount; ++i) {
    const auto dtype = static_cast<DType>(i);
    EXPECT_EQ(parse_dtype(name(dtype)), dtype);
    names.insert(name(dtype));
    std::ostringstream out;
    out << dtype;
    EXPECT_EQ(out.str(), name(dtype));
  }
  EXPECT_EQ(names.size(), static_cast<size_t>(kDTypeCount));
}

TEST(DType, UnknownNameListsTheChoices) {
  EXPECT_ERROR(ErrorKind::kDType, "\"float16\" is not an element type", parse_dtype("float16"));
  EXPECT_ERROR(ErrorKind::kDType, "f32, f64, f16, bf16, i32, i64, u8, bool, i8, f8e4m3, f8e5m2", parse_dtype(""));
}

TEST(DType, SizesAreThoseOfTheTypes) {
  const int64_t sizes[] = {4, 8, 2, 2, 4, 8, 1, 1, 1, 1, 1};
  for (int i = 0; i < kDTypeCount; ++i)
    EXPECT_EQ(size_of(static_cast<DType>(i)), sizes[i]) << name(static_cast<DType>(i));
}

TEST(DType, DispatchGivesTheTypeOfTheDType) {
  for (int i = 0; i < kDTypeCount; ++i) {
    const auto dtype = static_cast<DType>(i);
    EXPECT_EQ(dispatch_all(dtype, []<class T>() { return DTypeOf<T>::value; }), dtype);
    const bool takes = dtype == DType::f32 || dtype == DType::f64 || dtype == DType::f16 || dtype == DType::bf16;
    const auto get = [&] { return dispatch_float(dtype, "gelu", []<class T>() { return DTypeOf<T>::value; }); };
    if (takes) {
      EXPECT_EQ(get(), dtype);
    } else {
      EXPECT_ERROR(ErrorKind::kDType, concat("[gelu] takes f32, f64, f16 or bf16, got ", dtype), get());
    }
  }
  EXPECT_ERROR(ErrorKind::kDType, "not an element type: 11",
               dispatch_all(static_cast<DType>(11), []<class T>() { return 0; }));
}

TEST(DType, FloatsAreTheSixFloatTypes) {
  const std::set<DType> floats = {DType::f32, DType::f64, DType::f16, DType::bf16, DType::f8e4m3, DType::f8e5m2};
  for (int i = 0; i < kDTypeCount; ++i)
    EXPECT_EQ(is_float(static_cast<DType>(i)), floats.contains(static_cast<DType>(i)));
}

bool eight_bit_float(DType dtype) { return dtype == DType::f8e4m3 || dtype == DType::f8e5m2; }

/// The documented rule, written again: bool < u8, i8 < i32 < i64 < f16, bf16 < f32 < f64, and the least type above two
/// that are on one level.
DType promoted(DType a, DType b) {
  const auto level = [](DType dtype) {
    switch (dtype) {
      case DType::boolean:
        return 0;
      case DType::u8:
      case DType::i8:
        return 1;
      case DType::i32:
        return 2;
      case DType::i64:
        return 3;
      case DType::f16:
      case DType::bf16:
        return 4;
      case DType::f32:
        return 5;
      default:
        return 6;
    }
  };
  if (a == b) return a;
  if (level(a) != level(b)) return level(a) > level(b) ? a : b;
  return level(a) == 1 ? DType::i32 : DType::f32;
}

TEST(Promote, FollowsTheRuleForEveryPairAndIsSymmetricAndIdempotent) {
  for (int i = 0; i < kDTypeCount; ++i) {
    for (int j = 0; j < kDTypeCount; ++j) {
      const auto a = static_cast<DType>(i), b = static_cast<DType>(j);
      if (a != b && (eight_bit_float(a) || eight_bit_float(b))) {
        EXPECT_ERROR(ErrorKind::kDType, concat("[promote] no operation mixes ", a, " and ", b), promote(a, b));
        continue;
      }
      EXPECT_EQ(promote(a, b), promoted(a, b)) << a << ' ' << b;
      EXPECT_EQ(promote(a, b), promote(b, a)) << a << ' ' << b;
      EXPECT_EQ(promote(a, a), a);
    }
  }
}

TEST(Promote, DoesNotDependOnTheOrderInWhichThreeTypesMeet) {
  for (int i = 0; i < 9; ++i) {
    for (int j = 0; j < 9; ++j) {
      for (int k = 0; k < 9; ++k) {
        const auto a = static_cast<DType>(i), b = static_cast<DType>(j), c = static_cast<DType>(k);
        // u8 with i8 gives i32, which a wider third type absorbs in either order: the table is a lattice.
        EXPECT_EQ(promote(promote(a, b), c), promote(a, promote(b, c))) << a << ' ' << b << ' ' << c;
      }
    }
  }
}

}  // namespace
}  // namespace weft
