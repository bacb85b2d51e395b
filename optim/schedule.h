#pragma once
#include <cstdint>

namespace weft::optim {

/// Learning rate by step: linear warm-up from peak/warmup to peak over `warmup` steps, then half a cosine down to
/// `floor` at step `total`, and `floor` after it (Loshchilov & Hutter 2017, without restarts).
struct CosineSchedule {
  double peak = 1e-3;
  double floor = 0;
  int64_t warmup = 0;  ///< steps
  int64_t total = 1;   ///< steps, > warmup (or both 1)

  /// The rate of step `step`, counted from 0. @throws Error kValue for a schedule that makes no sense.
  double at(int64_t step) const;
};

}  // namespace weft::optim
