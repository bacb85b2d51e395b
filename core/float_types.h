#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#if defined(__CUDACC__)
#define WEFT_HD __host__ __device__
#else
#define WEFT_HD
#endif

namespace weft {

/// Rounds `x` to the nearest value of a small binary float (ties to even) and returns its bits.
/// kExponent and kMantissa are field widths; the bias is 2^(kExponent-1) - 1. With kInfinity the format has infinities
/// and NaNs as IEEE 754 has them and overflow gives infinity; without it (OCP 8-bit e4m3) the all-ones pattern alone
/// is NaN and overflow gives NaN. A NaN stays a NaN. Going through double makes the rounding single for every source.
template <int kExponent, int kMantissa, bool kInfinity>
WEFT_HD constexpr uint32_t encode_float(double x) {
  constexpr int kBias = (1 << (kExponent - 1)) - 1;
  constexpr uint32_t kNaN = kInfinity ? (((1u << kExponent) - 1) << kMantissa) | (1u << (kMantissa - 1))
                                      : (1u << (kExponent + kMantissa)) - 1;
  constexpr uint32_t kOverflow = kInfinity ? ((1u << kExponent) - 1) << kMantissa : kNaN;
  const uint64_t bits = std::bit_cast<uint64_t>(x);
  const uint32_t sign = static_cast<uint32_t>(bits >> 63) << (kExponent + kMantissa);
  const int field = static_cast<int>(bits >> 52) & 0x7ff;
  const uint64_t fraction = bits & ((uint64_t{1} << 52) - 1);
  if (field == 0x7ff && fraction != 0) return sign | kNaN;
  if (field == 0x7ff) return sign | kOverflow;
  if (field == 0) return sign;  // below the smallest double normal: far below every small float
  const int exponent = field - 1023, smallest = 1 - kBias;
  const int below = exponent < smallest ? smallest - exponent : 0;
  const int shift = 52 - kMantissa + below;
  if (shift > 54) return sign;
  const uint64_t significand = fraction | (uint64_t{1} << 52);
  const uint64_t half = uint64_t{1} << (shift - 1), rest = significand & ((half << 1) - 1);
  uint64_t rounded = significand >> shift;
  rounded += rest > half || (rest == half && (rounded & 1));
  // A carry out of the significand runs into the exponent field, which is what rounding up to the next binade means.
  const uint64_t result = below > 0 ? rounded : (static_cast<uint64_t>(exponent - smallest) << kMantissa) + rounded;
  return sign | (result >= kOverflow ? kOverflow : static_cast<uint32_t>(result));
}

/// The value of the bits written by encode_float: exact.
template <int kExponent, int kMantissa, bool kInfinity>
WEFT_HD constexpr float decode_float(uint32_t bits) {
  constexpr int kBias = (1 << (kExponent - 1)) - 1;
  constexpr uint32_t kField = (1u << kExponent) - 1, kFraction = (1u << kMantissa) - 1;
  const uint32_t sign = (bits >> (kExponent + kMantissa) & 1) << 31;
  const uint32_t field = bits >> kMantissa & kField, fraction = bits & kFraction;
  if (kInfinity && field == kField) {
    return std::bit_cast<float>(sign | 0x7f800000u | (fraction ? 0x400000u | fraction << (23 - kMantissa) : 0));
  }
  if (!kInfinity && field == kField && fraction == kFraction) return std::bit_cast<float>(sign | 0x7fc00000u);
  if (field == 0) {
    constexpr float kStep = std::bit_cast<float>(static_cast<uint32_t>(127 + 1 - kBias - kMantissa) << 23);
    const float magnitude = static_cast<float>(fraction) * kStep;
    return sign ? -magnitude : magnitude;
  }
  return std::bit_cast<float>(sign | (field + 127 - kBias) << 23 | fraction << (23 - kMantissa));
}

/// bfloat16: the upper half of a float. Storage only; arithmetic happens in float.
struct BFloat16 {
  uint16_t bits = 0;
  BFloat16() = default;
  WEFT_HD explicit BFloat16(float x) {
    const uint32_t u = std::bit_cast<uint32_t>(x);
    bits = (u & 0x7fffffffu) > 0x7f800000u ? static_cast<uint16_t>(u >> 16 | 0x40)
                                           : static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
  WEFT_HD explicit BFloat16(double x) : bits(static_cast<uint16_t>(from_double(x))) {}
  template <class Integer>
  WEFT_HD explicit BFloat16(Integer x) : BFloat16(to_double(x)) {}
  WEFT_HD explicit operator float() const { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
  WEFT_HD explicit operator double() const { return static_cast<float>(*this); }

 private:
  /// As a double that rounds to the same bfloat16: beyond 2^53 the low bits, which a double has no room for, are made
  /// sticky ("round to odd"), so that a value just above a half-way point stays above it.
  template <class Integer>
  WEFT_HD static double to_double(Integer x) {
    if constexpr (sizeof(Integer) == 8) {
      constexpr Integer kLimit = Integer{1} << 53;
      if (x > kLimit || (std::is_signed_v<Integer> && x < -kLimit)) {
        const Integer low = x & 0x7ff;
        return static_cast<double>(low == 0 ? x : ((x - low) | 0x800));
      }
    }
    return static_cast<double>(x);
  }
  /// Rounds once from double: to float with the last bit made sticky ("round to odd"), then to nearest even.
  WEFT_HD static uint16_t from_double(double x) {
    float f = static_cast<float>(x);
    if (static_cast<double>(f) != x && x == x) {
      uint32_t u = std::bit_cast<uint32_t>(f);
      const bool away = (x < 0 ? -static_cast<double>(f) > -x : static_cast<double>(f) > x);
      if (away) u -= 1;
      f = std::bit_cast<float>(u | 1);
    }
    return BFloat16(f).bits;
  }
};

namespace detail {
/// IEEE binary16 and the OCP 8-bit formats share everything but their field widths.
template <class Bits, int kExponent, int kMantissa, bool kInfinity>
struct SmallFloat {
  Bits bits = 0;
  SmallFloat() = default;
  template <class Number>
  WEFT_HD explicit SmallFloat(Number x)
      : bits(static_cast<Bits>(encode_float<kExponent, kMantissa, kInfinity>(static_cast<double>(x)))) {}
  WEFT_HD explicit operator float() const { return decode_float<kExponent, kMantissa, kInfinity>(bits); }
  WEFT_HD explicit operator double() const { return decode_float<kExponent, kMantissa, kInfinity>(bits); }
};
}  // namespace detail

using Half = detail::SmallFloat<uint16_t, 5, 10, true>;
using Float8E4M3 = detail::SmallFloat<uint8_t, 4, 3, false>;
using Float8E5M2 = detail::SmallFloat<uint8_t, 5, 2, true>;

}  // namespace weft
