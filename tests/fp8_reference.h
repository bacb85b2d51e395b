#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "ops/matmul_fp8.h"

// 8-bit floats by their definition (Micikevicius et al. 2022, table 1), for tests: no bit of core/ is used.

namespace weft::testing {

struct Float8Reference {
  int mantissa, bias;
  unsigned largest_code, nan_code;

  double value(unsigned code) const {
    const double sign = (code & 0x80) != 0 ? -1 : 1;
    const unsigned exponent = (code & 0x7f) >> mantissa, fraction = code & ((1u << mantissa) - 1);
    const double part = static_cast<double>(fraction) / static_cast<double>(1 << mantissa);
    return sign *
           (exponent == 0 ? std::ldexp(part, 1 - bias) : std::ldexp(1 + part, static_cast<int>(exponent) - bias));
  }
  double largest() const { return value(largest_code); }

  /// The code whose value is nearest, the even one of two, never beyond the largest.
  uint8_t code(double x) const {
    const unsigned sign = std::signbit(x) ? 0x80 : 0;
    if (std::isnan(x)) return static_cast<uint8_t>(sign | nan_code);
    const double magnitude = std::abs(x);
    unsigned low = 0, high = largest_code;  // the last value that is not above, and the one behind it
    while (high - low > 1) {
      const unsigned middle = (low + high) / 2;
      (value(middle) <= magnitude ? low : high) = middle;
    }
    if (magnitude >= value(high)) return static_cast<uint8_t>(sign | high);
    const double to_low = magnitude - value(low), to_high = value(high) - magnitude;
    const bool up = to_high < to_low || (to_high == to_low && low % 2 == 1);
    return static_cast<uint8_t>(sign | (up ? high : low));
  }
  /// What x becomes on its way through 8 bits with a scale.
  double rounded(double x, double scale) const { return value(code(x * scale)) / scale; }
};

inline constexpr Float8Reference kE4M3Reference{3, 7, 0x7e, 0x7f}, kE5M2Reference{2, 15, 0x7b, 0x7e};
inline const Float8Reference& reference_of(Fp8Format format) {
  return format == Fp8Format::kE4M3 ? kE4M3Reference : kE5M2Reference;
}

/// The largest power of two, from 2^-63 to 2^63, that keeps twice amax within the format.
inline double reference_scale(double amax, Fp8Format format) {
  int power = 63;
  while (power > -63 && 2 * amax * std::ldexp(1.0, power) > reference_of(format).largest()) --power;
  return std::ldexp(1.0, power);
}

/// A layer by itself, with these scales for input, weight and gradient; without a history if there are none.
inline std::shared_ptr<Fp8Layer> make_layer(const std::vector<float>& scales, Device device = Device::cpu()) {
  auto layer = std::make_shared<Fp8Layer>();
  std::vector<float> values;
  for (int role = 0; role < kFp8Roles; ++role) {
    const float scale = scales.empty() ? 1.0f : scales[static_cast<size_t>(role)];
    values.insert(values.end(), {1 / scale, scale, 0, 0});
  }
  layer->scales = Tensor::from(values, {kFp8Roles, kFp8ScaleFloats}, device);
  layer->stats = Tensor::zeros({kFp8Roles, kFp8StatsWords}, DType::i64, device);
  layer->has_history = !scales.empty();
  return layer;
}

}  // namespace weft::testing
