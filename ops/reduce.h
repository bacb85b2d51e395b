#pragma once
#include "core/tensor.h"

// Sums and extremes over some dimensions of a tensor, or over all of them.
//
// `dims` names dimensions, each once, negative ones from the end: sum(x, {-1}), mean(x, {0, 2}). An empty list reduces
// nothing. A reduced dimension goes away, or stays with size 1 under `keepdim`. Any strides; f32, f64, f16 or bf16.
// The order of additions is fixed by the shape, the strides and the instruction set, never by the number of threads.
// f64 is added in f64. Everything else is added in f32 over short stretches, whose totals are added in f64, and rounded
// once: the error stays below 70 * 2^-24 of the sum of magnitudes, whatever the number of terms.
//
// @throws Error  kDType for other dtypes; kIndex for a dimension that is not there; kShape for one named twice.

namespace weft {

/// Sum of all elements, shape []. Differentiable any number of times; so are the others with a gradient.
Tensor sum(const Tensor& x);
Tensor sum(const Tensor& x, const Dims& dims, bool keepdim = false);

/// Sum over count; NaN over no elements.
Tensor mean(const Tensor& x);
Tensor mean(const Tensor& x, const Dims& dims, bool keepdim = false);

/// Largest element; NaN if there is one. The gradient goes to the first that is largest, in row-major order.
/// @throws Error kShape over no elements.
Tensor max(const Tensor& x);
Tensor max(const Tensor& x, const Dims& dims, bool keepdim = false);

/// Smallest element; else as max.
Tensor min(const Tensor& x);
Tensor min(const Tensor& x, const Dims& dims, bool keepdim = false);

/// Index along `dim` of the first element that is largest (the first NaN, if there is one), i64. Not differentiable.
/// @throws Error kShape over no elements.
Tensor argmax(const Tensor& x, int64_t dim = -1, bool keepdim = false);

}  // namespace weft
