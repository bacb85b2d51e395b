#include "optim/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "core/error.h"

namespace weft::optim {

double CosineSchedule::at(int64_t step) const {
  if (!(peak >= 0) || !(floor >= 0) || !(floor <= peak) || !std::isfinite(peak)) {
    fail(ErrorKind::kValue, "schedule", "needs 0 <= floor <= peak, got floor ", floor, " and peak ", peak);
  }
  if (warmup < 0 || total < 1 || warmup >= total + (total == 1)) {
    fail(ErrorKind::kValue, "schedule", "needs 0 <= warmup < total, got warmup ", warmup, " and total ", total,
         " steps");
  }
  if (step < 0) fail(ErrorKind::kValue, "schedule", "steps count from 0, got ", step);
  if (step < warmup) return peak * static_cast<double>(step + 1) / static_cast<double>(warmup);
  const double progress =
      std::min(1.0, static_cast<double>(step - warmup) / static_cast<double>(std::max<int64_t>(1, total - warmup)));
  return floor + (peak - floor) * 0.5 * (1 + std::cos(std::numbers::pi * progress));
}

}  // namespace weft::optim
