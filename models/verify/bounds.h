#pragma once
#include "models/verify/verify.h"

namespace weft::models {

/// How far two computations of the same numbers by other ways may be apart (docs/parallelism/verify.md). The measure is
/// how far one rank is from the same computation in f64: rounding errors of sums grow with their length and their
/// cancellation, and that run has both. So with u the unit roundoff of the precision, of a tensor x
///
///   |x - x_f64| <= 8 max(e, (u + sqrt(n) u_sum) max |x_f64|)     for each element
///
/// e = max |x_one - x_f64| of one rank; for a training in f64, which has no finer one to be compared with, that of an
/// f32 run times u_f64 / u_f32. The second term is for tensors whose e is small by chance: one rounding, and the
/// probable error of a sum of n terms in the precision in which it is added up (Higham & Mary 2019), n the longest sum
/// of a step. In fp8, u is that of e4m3.
class Yardstick {
 public:
  explicit Yardstick(const TrainingProblem& problem);
  /// The precision in which the run besides that in f64 measures e, and what its errors are multiplied by.
  DType measured_in() const { return dtype_ == DType::f64 ? DType::f32 : dtype_; }
  /// @param measured, fine  all of a tensor, in measured_in() and in f64
  double bound(const std::vector<double>& measured, const std::vector<double>& fine) const;

 private:
  DType dtype_;
  double unit_;  ///< u
  double longest_;
};

/// Half the distance from 1 to the next larger number.
double unit_roundoff(DType dtype);

/// Whether what a layout with tp or cp did in a step, beginning at `before`, is what one rank does from there within
/// the bounds: losses and gradients by the yardstick; the update against one rank's, given the same gradients. What
/// ranks have copies of must have the same bits on all of them. Errors and the first difference go into the report.
bool compare_within_bounds(const Verification& verification, size_t layout, int64_t step, const TrainingState& before,
                           const std::vector<RankStep>& ranks, VerifyReport& report);

/// The plainest run of the problem: one rank, nothing recomputed.
TrainingRecord record_alone(TrainingProblem problem, const RecordOptions& options);
/// A step of one rank from that state, cast to the dtype.
RankStep step_alone(TrainingProblem problem, DType dtype, int64_t step, const TrainingState& before, bool watch = false,
                    const TrainingHooks* hooks = nullptr);

}  // namespace weft::models
