#pragma once
#include <cstdint>
#include <string>

namespace weft::optim {

/// Dynamic loss scaling (Micikevicius et al. 2018, section 3.2): the loss is multiplied before the backward pass, so
/// that small gradients do not round to 0 in f16, and gradients are divided again in the optimizer. A step whose
/// gradients overflow is skipped, and the factor halved; after `interval` steps in a row without one it is doubled.
class LossScale {
 public:
  struct Options {
    double initial = 65536;     ///< > 0, finite
    double growth = 2;          ///< > 1
    double backoff = 0.5;       ///< in (0, 1)
    int64_t interval = 2000;    ///< >= 1
    double largest = 16777216;  ///< growth stops here
  };
  /// @throws Error kValue for options outside their range.
  explicit LossScale(const Options& options);
  LossScale() : LossScale(Options()) {}

  double value() const { return value_; }
  int64_t skipped() const { return skipped_; }
  /// Learns how a step went. @throws Error kValue if the factor would fall below 2^-24: then not the factor is at
  /// fault.
  void update(bool overflowed);

  /// "65536 17 2": value, steps since the last change, steps skipped; for a checkpoint. Values are exact.
  std::string state() const;
  /// @throws Error kData for a text that state() does not give.
  void load_state(const std::string& text);

 private:
  Options options_;
  double value_;
  int64_t good_ = 0, skipped_ = 0;
};

}  // namespace weft::optim
