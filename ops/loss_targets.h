#pragma once
#include "ops/loss.h"
#include "ops/loss_kernels.h"

// What the losses share: the checks of targets and options.

namespace weft {

/// Targets as the kernels take them: i64, row-major. `x` is [..., columns] and has their shape but for the last
/// dimension.
/// @throws Error kShape, kDType, kDevice; kValue for bad options.
Tensor checked_targets(const char* op, const Tensor& x, const Tensor& targets, const CrossEntropyOptions& options);

/// What is known of the denominator without a look at the targets: 1 for a sum, valid_tokens, or 0 for nothing.
KnownDenominator known_denominator(const CrossEntropyOptions& options);

}  // namespace weft
