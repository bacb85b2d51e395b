#include "optim/loss_scale.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "core/error.h"

namespace weft::optim {

LossScale::LossScale(const Options& options) : options_(options), value_(options.initial) {
  const auto require = [](bool holds, const char* name, double value, const char* rule) {
    if (!holds) fail(ErrorKind::kValue, "loss_scale", name, " must be ", rule, ", got ", value);
  };
  require(options.initial > 0 && std::isfinite(options.initial), "initial", options.initial, "positive and finite");
  require(options.growth > 1 && std::isfinite(options.growth), "growth", options.growth, "above 1");
  require(options.backoff > 0 && options.backoff < 1, "backoff", options.backoff, "in (0, 1)");
  require(options.interval >= 1, "interval", static_cast<double>(options.interval), "at least 1");
  require(options.largest >= options.initial && std::isfinite(options.largest), "largest", options.largest,
          "at least `initial`");
}

void LossScale::update(bool overflowed) {
  if (overflowed) {
    constexpr double kSmallest = 0x1p-24;
    ++skipped_;
    good_ = 0;
    if (value_ * options_.backoff < kSmallest) {
      fail(ErrorKind::kValue, "loss_scale", "gradients overflow f16 even at a loss scale of ", value_,
           ". Hint: a lower learning rate or clipping; bf16 has the range of f32");
    }
    value_ *= options_.backoff;
  } else if (++good_ >= options_.interval) {
    value_ = std::min(value_ * options_.growth, options_.largest);
    good_ = 0;
  }
}

std::string LossScale::state() const {
  char text[96];
  std::snprintf(text, sizeof text, "%.17g %lld %lld", value_, static_cast<long long>(good_),
                static_cast<long long>(skipped_));
  return text;
}

void LossScale::load_state(const std::string& text) {
  double value = 0;
  long long good = -1, skipped = -1;
  int end = 0;
  const bool read = std::sscanf(text.c_str(), "%lf %lld %lld%n", &value, &good, &skipped, &end) == 3 &&
                    end == static_cast<int>(text.size());
  if (!read || !(value > 0) || !std::isfinite(value) || good < 0 || skipped < 0) {
    fail(ErrorKind::kData, "loss_scale", "not a state of it: ", quoted(text), "; expected \"VALUE STEPS SKIPPED\"");
  }
  value_ = value, good_ = good, skipped_ = skipped;
}

}  // namespace weft::optim
