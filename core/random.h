#pragma once
#include <array>
#include <cstdint>
#include <string_view>

#include "core/float_types.h"
#include "core/tensor.h"

namespace weft {

/// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): 128 random bits for each counter.
WEFT_HD inline std::array<uint32_t, 4> philox(uint64_t key, uint64_t counter_low, uint64_t counter_high) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  uint32_t c0 = static_cast<uint32_t>(counter_low), c1 = static_cast<uint32_t>(counter_low >> 32);
  uint32_t c2 = static_cast<uint32_t>(counter_high), c3 = static_cast<uint32_t>(counter_high >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c0, p1 = uint64_t{0xCD9E8D57} * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0, n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {c0, c1, c2, c3};
}

/// A source of random numbers that is a pure function: element `index` of step `step` of stream (seed, name) is the
/// same on every device, thread, rank and run. Copy it freely; it has no state that moves.
class RandomStream {
 public:
  /// The key mixes the seed with a 64-bit FNV-1a hash of the name through splitmix64.
  RandomStream(uint64_t seed, std::string_view name);
  WEFT_HD RandomStream(uint64_t key, uint64_t step) : key_(key), step_(step) {}
  /// The same stream at another training step.
  RandomStream at_step(uint64_t step) const { return {key_, step}; }

  /// Random bits number `index`: word index % 4 of Philox block index / 4.
  WEFT_HD uint32_t bits(uint64_t index) const { return philox(key_, index / 4, step_)[index % 4]; }
  /// Four consecutive words: numbers 4*block to 4*block + 3.
  WEFT_HD std::array<uint32_t, 4> block(uint64_t block) const { return philox(key_, block, step_); }
  /// In [0, 1), a multiple of 2^-24.
  WEFT_HD float uniform(uint64_t index) const { return static_cast<float>(bits(index) >> 8) * 0x1p-24f; }
  /// In [0, 1), a multiple of 2^-53; uses numbers 2*index and 2*index + 1.
  double uniform_f64(uint64_t index) const;
  /// Standard normal (Box-Muller in f64 from uniform_f64 numbers of the pair that `index` is in).
  double normal(uint64_t index) const;
  /// A whole number in [0, bound), bound >= 1, without bias that matters: 64 bits are scaled.
  uint64_t below(uint64_t index, uint64_t bound) const;

  WEFT_HD uint64_t key() const { return key_; }
  WEFT_HD uint64_t step() const { return step_; }

 private:
  uint64_t key_;
  uint64_t step_ = 0;
};

/// Fills a contiguous tensor of f32, f64, f16 or bf16 on any device, with the same bits: element i is mean + deviation
/// * stream.normal(first + i) in f64, rounded once. `first` is for a piece of a larger tensor.
void fill_normal(const Tensor& tensor, const RandomStream& stream, double mean, double deviation, uint64_t first = 0);
/// Element i is low + (high - low) * stream.uniform_f64(i) in f64, rounded once (which may give `high`).
void fill_uniform(const Tensor& tensor, const RandomStream& stream, double low, double high);

}  // namespace weft
