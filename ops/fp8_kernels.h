#pragma once
#include <cstdint>

#include "core/float8.h"
#include "ops/kernel_device.h"

// What linear_fp8 (ops/matmul_fp8.h) is made of: conversion with a scale, the product of converted matrices, and the
// rule by which scales follow what was seen (optim/delayed_scaling.h).

namespace weft {

enum class Fp8Format : uint8_t { kE4M3, kE5M2 };

/// What a tensor is to a linear layer. Values and weights need precision, gradients range.
enum class Fp8Role : uint8_t { kInput, kWeight, kGradient };
inline constexpr int kFp8Roles = 3;
WEFT_HD constexpr Fp8Format fp8_format(Fp8Role role) {
  return role == Fp8Role::kGradient ? Fp8Format::kE5M2 : Fp8Format::kE4M3;
}
/// f.operator()<Float8>() with the element type of a format.
template <class F>
WEFT_HD decltype(auto) dispatch_fp8(Fp8Format format, F&& f) {
  return format == Fp8Format::kE4M3 ? f.template operator()<Float8E4M3>() : f.template operator()<Float8E5M2>();
}

/// A tensor is multiplied by `scale` before it is converted and by `inverse` after; both are powers of two, so that
/// neither rounds. 16 bytes, as cuBLASLt may want them aligned.
struct alignas(16) Fp8Scale {
  float inverse = 1;
  float scale = 1;
  float unused[2] = {};
};
inline constexpr int64_t kFp8ScaleFloats = sizeof(Fp8Scale) / sizeof(float);

/// What was seen of a tensor. Integers, which add up and compare to the same in any order.
struct Fp8Stats {
  unsigned long long amax = 0;       ///< bits of the largest magnitude as an f32; a NaN is above infinity
  unsigned long long saturated = 0;  ///< elements whose scaled magnitude was above the largest finite value
  unsigned long long converted = 0;  ///< elements
};
inline constexpr int64_t kFp8StatsWords = sizeof(Fp8Stats) / sizeof(int64_t);

/// Bits of headroom: a tensor may grow by 2^kFp8Margin over its history before it saturates.
inline constexpr int kFp8Margin = 1;
/// Scales are kept from 2^-63 to 2^63: the product of two inverses is then a normal f32.
inline constexpr int kFp8LargestPower = 63;

/// 2^-kFp8Margin of the largest power of two by which `amax` can be multiplied without passing the largest finite value
/// of the format; `otherwise` where amax is 0 or not finite.
WEFT_HD inline float fp8_scale_for(float amax, Fp8Format format, float otherwise) {
  const uint32_t bits = std::bit_cast<uint32_t>(amax);
  if (bits == 0 || bits >= 0x7f800000u) return otherwise;
  constexpr uint32_t kLargestFraction = 0x600000;  // of 1.75, the significand of both largest values
  const int largest = format == Fp8Format::kE4M3 ? Float8Format<Float8E4M3>::kLargestExponent
                                                 : Float8Format<Float8E5M2>::kLargestExponent;
  int power =
      largest - (static_cast<int>(bits >> 23) - 127) - kFp8Margin - ((bits & 0x7fffffu) > kLargestFraction ? 1 : 0);
  power = power > kFp8LargestPower ? kFp8LargestPower : power < -kFp8LargestPower ? -kFp8LargestPower : power;
  return std::bit_cast<float>(static_cast<uint32_t>(power + 127) << 23);
}

/// Converts a bf16 matrix, in one pass over it:
///
///   y[r, c] = saturating_cast(x[r, c] * scale)        transposed[c, r] = y[r, c],  0 from r = rows to transposed_ld
///
/// and adds to `stats`. With neither y nor transposed, only stats->amax is found.
struct Fp8Quantise {
  const BFloat16* x = nullptr;  ///< [rows, columns], contiguous
  int64_t rows = 0;
  int64_t columns = 0;  ///< a multiple of 16
  Fp8Format format = Fp8Format::kE4M3;
  const Fp8Scale* scale = nullptr;  ///< null where nothing is converted
  uint8_t* y = nullptr;             ///< [rows, columns] or null; 16-byte aligned
  uint8_t* transposed = nullptr;    ///< [columns, transposed_ld] or null; 16-byte aligned
  int64_t transposed_ld = 0;        ///< at least rows and a multiple of 16
  Fp8Stats* stats = nullptr;        ///< or null
};
void fp8_quantise(Cpu, const Fp8Quantise& arguments);
void fp8_quantise(Cuda, const Fp8Quantise& arguments);

/// A row-major matrix of converted numbers whose rows run along the summed dimension.
struct Fp8Matrix {
  const uint8_t* data = nullptr;
  int64_t ld = 0;  ///< bytes from row to row, a multiple of 16
  Fp8Format format = Fp8Format::kE4M3;
  const Fp8Scale* scale = nullptr;
};

/// c[m, n] = inverse_a inverse_b sum_k a[m, k] b[n, k] + bias[n] (+ c), in bf16, rounded once. Products are exact; sums
/// are kept in f32, in an order that the sizes alone determine. Not both matrices may be e5m2.
struct Fp8Gemm {
  int64_t m = 0, n = 0, k = 0;  ///< n and k multiples of 16
  Fp8Matrix a, b;
  uint16_t* c = nullptr;           ///< bf16 [m, n], contiguous
  const uint16_t* bias = nullptr;  ///< bf16 [n] or null
  bool accumulate = false;
  void* workspace = nullptr;  ///< of fp8_gemm_workspace() bytes
};
/// The CPU has no such product: it multiplies the same numbers as bf16, which holds them exactly.
void fp8_gemm(Cpu, const Fp8Gemm& product);
/// cuBLASLt's product of 8-bit floats, with full-precision accumulation.
void fp8_gemm(Cuda, const Fp8Gemm& product);
int64_t fp8_gemm_workspace(Cpu, int64_t m, int64_t n, int64_t k);
inline int64_t fp8_gemm_workspace(Cuda, int64_t, int64_t, int64_t) { return 0; }

/// @throws Error kDevice, naming what to use instead, on a device that does not multiply 8-bit floats.
inline void fp8_check_device(Cpu) {}
void fp8_check_device(Cuda);

/// One step of delayed scaling for `count` tensors, of which number i has the role (first_role + i) % 3: history[i]
/// moves on by one and takes the amax in stats[i], and the scale becomes that for the largest of the history. A tensor
/// that was not seen keeps both; one whose history is all 0 or has an infinity or NaN keeps its scale.
struct Fp8Update {
  const Fp8Stats* stats = nullptr;  ///< [count]
  float* history = nullptr;         ///< [count, length], newest first
  Fp8Scale* scales = nullptr;       ///< [count]
  int64_t count = 0, length = 0;
  int first_role = 0;
};
void fp8_update(Cpu, const Fp8Update& arguments);
void fp8_update(Cuda, const Fp8Update& arguments);

/// verdict = 0, or NaN if one of `count` amaxes is an infinity or NaN.
struct Fp8Verdict {
  const Fp8Stats* stats = nullptr;  ///< [count]
  int64_t count = 0;
  float* verdict = nullptr;
};
void fp8_verdict(Cpu, const Fp8Verdict& arguments);
void fp8_verdict(Cuda, const Fp8Verdict& arguments);

/// What an amax of those bits means for the verdict.
WEFT_HD inline float fp8_verdict_of(unsigned long long amax) {
  return amax >= 0x7f800000u ? std::bit_cast<float>(0x7fc00000u) : 0.0f;
}

/// Tensor `i` of an update.
WEFT_HD inline void fp8_update_one(const Fp8Update& u, int64_t i) {
  const Fp8Stats& stats = u.stats[i];
  if (stats.converted == 0 && stats.amax == 0) return;
  float* history = u.history + i * u.length;
  uint32_t most = static_cast<uint32_t>(stats.amax);
  for (int64_t age = u.length - 1; age > 0; --age) {
    history[age] = history[age - 1];
    const uint32_t bits = std::bit_cast<uint32_t>(history[age]);
    most = bits > most ? bits : most;
  }
  history[0] = std::bit_cast<float>(static_cast<uint32_t>(stats.amax));
  const auto role = static_cast<Fp8Role>((u.first_role + i) % kFp8Roles);
  const float scale = fp8_scale_for(std::bit_cast<float>(most), fp8_format(role), u.scales[i].scale);
  u.scales[i].scale = scale;
  u.scales[i].inverse = 1 / scale;
}

}  // namespace weft
