#pragma once
#include "ops/loss.h"
#include "ops/loss_kernels.h"

// What the losses share: the checks of targets and options.

namespace weft {

/// Targets as the kernels take them: i64, row-major. `x` is [..., columns] and has their shape but for the last
/// dimension.
/// @throws Error kShape, kDType, kDevice; kValue for bad options.
Tensor checked_targets(const char* op, const Tensor& x, const Tensor& targets, const CrossEntropyOptions& options);

/// What the sum of the rows' losses is divided by. Reads the targets.
/// @throws Error kIndex for a target that is no class; kValue for a mean over no valid token.
double loss_denominator(const char* op, const LossTargets& targets, const CrossEntropyOptions& options);

/// Sum of the rows' losses, in order, over the denominator.
double reduce_losses(const double* losses, int64_t rows, double denominator);

}  // namespace weft
