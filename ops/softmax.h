#pragma once
#include "core/tensor.h"

namespace weft {

/// Softmax along one dimension.
///
///   y_i = exp(x_i - m) / sum_j exp(x_j - m),  m = max_j x_j
///
/// @param x    f32, f64, f16 or bf16; any strides. Fastest along a contiguous last dimension.
/// @param dim  negative counts from the end
/// @return     shape and dtype of x. f64 is computed in f64, the rest in f32 (the sum as in ops/reduce.h), rounded
/// once.
///             A row that is -inf throughout, or holds +inf or NaN, gives NaN.
/// @throws Error  kDType for other dtypes; kIndex for a dimension that is not there.
/// Differentiable any number of times. Saved for backward: y.
Tensor softmax(const Tensor& x, int64_t dim = -1);

/// Logarithm of softmax(x), without the loss of accuracy that taking ln() of it would have.
///
///   y_i = x_i - m - ln(sum_j exp(x_j - m))
///
/// All else as softmax.
Tensor log_softmax(const Tensor& x, int64_t dim = -1);

}  // namespace weft
