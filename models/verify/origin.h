#pragma once
#include "models/verify/verify.h"

namespace weft::models {

/// Runs the step of a difference once more with all functions of the forward passes watched, and puts the first one
/// into the difference, in the order of one rank, of which a rank of the layout has another output. With tp and cp
/// ranks have slices of most outputs, or parts of sums: each is compared with the slice of the whole tensor that it
/// should be, or added up first, within the yardstick's bound of the whole tensor.
void find_origin(const Verification& verification, const TrainingState& before, const TrainingHooks* hooks,
                 Difference& difference);

}  // namespace weft::models
