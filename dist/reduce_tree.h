#pragma once
#include <span>

#include "core/dtype.h"
#include "dist/stamp.h"

namespace weft::dist {

/// Every output = reduction of the inputs, element by element; `n` elements of `dtype` each. An output may be an input.
///
/// The order is the one of all groups: inputs 0 and 1, 2 and 3, ..., then those results in pairs, and so on; a last one
/// without a partner goes up as it is. So the first 2^k inputs are always one branch, whatever follows them. f64 is
/// added in f64, other floats in f32; the result is rounded once. Runs on the pool's threads; no bit depends on them.
void reduce_tree(Reduction reduction, DType dtype, std::span<const void* const> inputs, std::span<void* const> outputs,
                 int64_t n);

}  // namespace weft::dist
