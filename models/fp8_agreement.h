#pragma once
#include "dist/group.h"
#include "optim/delayed_scaling.h"

namespace weft::models {

/// Makes what each rank has seen of fp8 tensors in a step (optim/delayed_scaling.h) that of all ranks: the largest amax
/// of a tensor over its parts, copies and micro-batches, and the numbers of its elements, each counted once
/// (Fp8Layer::counts). Integers, whose maxima and sums have no order. With L linear layers in the model a rank sends
/// two all-reduces: maxima of 24 L bytes and sums of 48 L.
///
/// @param scaling  of this rank's layers, named "h.<block>.<layer>", the same ones in each block
/// @param blocks   of the whole model
/// @param ranks    all that have parts of the model or of the step; they make the same call
/// @return the counts of the whole model
/// @throws Error kValue, on all ranks, naming the first tensor of the model in which an infinity or NaN was seen.
optim::DelayedScaling::Counts agree_on_fp8(optim::DelayedScaling& scaling, int64_t blocks, dist::Group& ranks);

}  // namespace weft::models
