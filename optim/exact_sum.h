#pragma once
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace weft::optim {

/// Elements whose squares optimizers add up in the tensor's own precision before the sums go on without rounding.
/// Whoever cuts tensors does so at multiples of it, and then no cut changes a bit of their norms.
inline constexpr int64_t kSquareBlock = 1024;

/// A sum of doubles without rounding: a fixed-point number wide enough for all of them (Kulisch 1981), in digits of 32
/// bits that are carried at the end only. Adding is exact, so any order and any split over threads and processes gives
/// the same bits: two sums are added by adding their words as integers. Room for 2^31 terms.
class ExactSum {
 public:
  static constexpr int kDigits = 68;
  /// What a group of processes adds up as integers: the digits, and how often +inf, -inf and NaN came.
  std::array<int64_t, kDigits + 3> words{};

  void add(double x) {
    const auto bits = std::bit_cast<uint64_t>(x);
    const bool negative = (bits >> 63) != 0;
    const auto exponent = static_cast<int>(bits >> 52 & 0x7ff);
    uint64_t mantissa = bits & ((uint64_t{1} << 52) - 1);
    if (exponent == 0x7ff) {
      ++words[kDigits + (mantissa != 0 ? 2 : negative ? 1 : 0)];
      return;
    }
    if (exponent != 0) mantissa |= uint64_t{1} << 52;
    const int position = (exponent == 0 ? 1 : exponent) - 1075 - kLowest, shift = position % 32;
    const uint64_t digits[3] = {mantissa << shift & kMask, mantissa >> (32 - shift) & kMask,
                                shift == 0 ? 0 : mantissa >> (64 - shift)};
    for (int i = 0; i < 3; ++i) {
      int64_t& word = words[static_cast<size_t>(position / 32 + i)];
      word += negative ? -static_cast<int64_t>(digits[i]) : static_cast<int64_t>(digits[i]);
    }
  }

  void add(const ExactSum& other) {
    for (size_t i = 0; i < words.size(); ++i) words[i] += other.words[i];
  }

  /// The sum, rounded once to nearest even.
  double value() const {
    if (words[kDigits + 2] != 0 || (words[kDigits] != 0 && words[kDigits + 1] != 0))
      return std::numeric_limits<double>::quiet_NaN();
    if (words[kDigits] != 0) return std::numeric_limits<double>::infinity();
    if (words[kDigits + 1] != 0) return -std::numeric_limits<double>::infinity();
    std::array<int64_t, kDigits> digits;
    const auto carry = [&](int64_t sign) {
      int64_t over = 0;
      for (size_t i = 0; i < kDigits; ++i) {
        const int64_t digit = sign * words[i] + over;
        over = digit >> 32;
        digits[i] = digit & static_cast<int64_t>(kMask);
      }
      return over;  // -1 for a negative number
    };
    const bool negative = carry(1) < 0;
    if (negative) carry(-1);
    int top = kDigits - 1;
    while (top > 0 && digits[static_cast<size_t>(top)] == 0) --top;
    // The highest 64 bits, and whether any bit below is set.
    uint64_t high = 0;
    bool rest = false;
    for (int i = 0; i <= top; ++i) {
      const auto digit = static_cast<uint64_t>(digits[static_cast<size_t>(i)]);
      if (i < top - 1) {
        rest = rest || digit != 0;
      } else {
        high |= digit << (32 * (i - top + 1));
      }
    }
    if (high == 0) return 0;
    int exponent = kLowest + 32 * (top - 1);
    const int leading = std::countl_zero(high);
    // Up to 31 bits come up from the third digit.
    if (leading > 0 && top >= 2) {
      const auto third = static_cast<uint64_t>(digits[static_cast<size_t>(top - 2)]);
      high = high << leading | third >> (32 - leading);
      exponent -= leading;
      rest = (third << leading & kMask) != 0;
      for (int i = 0; i < top - 2; ++i) rest = rest || digits[static_cast<size_t>(i)] != 0;
    } else {
      high <<= leading;
      exponent -= leading;
    }
    const uint64_t cut = high & 0x7ff;  // below the 53 bits of a double
    uint64_t mantissa = high >> 11;
    if (cut > 0x400 || (cut == 0x400 && (rest || (mantissa & 1) != 0))) ++mantissa;
    const double value = std::ldexp(static_cast<double>(mantissa), exponent + 11);
    return negative ? -value : value;
  }

 private:
  static constexpr int kLowest = -1088;  ///< weight of the lowest bit: 2^-1088
  static constexpr uint64_t kMask = 0xffffffff;
};

}  // namespace weft::optim
