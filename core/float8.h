#pragma once
#include "core/float_types.h"

namespace weft {

/// The two 8-bit formats of Micikevicius et al. 2022, table 1 (OCP OFP8): a bias as in IEEE 754, subnormals, and a
/// largest finite value of 1.75 times a power of two.
template <class Float8>
struct Float8Format;
template <>
struct Float8Format<Float8E4M3> {
  static constexpr int kMantissa = 3, kBias = 7;
  static constexpr int kLargestExponent = 8;  ///< 448 = 1.75 * 2^8
  static constexpr float kLargest = 448;
  static constexpr uint32_t kLargestBits = 0x7e, kNaNBits = 0x7f;
};
template <>
struct Float8Format<Float8E5M2> {
  static constexpr int kMantissa = 2, kBias = 15;
  static constexpr int kLargestExponent = 15;  ///< 57,344 = 1.75 * 2^15
  static constexpr float kLargest = 57344;
  static constexpr uint32_t kLargestBits = 0x7b, kNaNBits = 0x7e;
};

/// The nearest finite value, ties to even: magnitudes beyond the largest, infinities included, become the largest. NaN
/// stays NaN. (The formats' constructors do not saturate: they give infinity or NaN.) Without a branch.
template <class Float8>
WEFT_HD inline Float8 saturating_cast(float x) {
  using Format = Float8Format<Float8>;
  constexpr int kDropped = 23 - Format::kMantissa;
  constexpr uint32_t kSmallestNormal = static_cast<uint32_t>(128 - Format::kBias) << 23;
  // A float whose last bit is worth the format's smallest step: an addition rounds to such steps.
  constexpr uint32_t kStepBits = static_cast<uint32_t>(127 + 1 - Format::kBias + kDropped) << 23;
  const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  const uint32_t below = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + std::bit_cast<float>(kStepBits));
  const uint32_t half = (1u << (kDropped - 1)) - 1 + (magnitude >> kDropped & 1);
  const uint32_t normal = ((magnitude + half) >> kDropped) - ((127u - Format::kBias) << Format::kMantissa);
  uint32_t code = magnitude < kSmallestNormal ? below - kStepBits : normal;
  code = code < Format::kLargestBits ? code : Format::kLargestBits;
  code = magnitude > 0x7f800000u ? Format::kNaNBits : code;
  Float8 result;
  result.bits = static_cast<uint8_t>(code | bits >> 31 << 7);
  return result;
}

}  // namespace weft
