#pragma once
#include "core/tensor.h"

namespace weft {

/// Layer normalisation over the last dimension (Ba, Kiros & Hinton 2016).
///
///   mean[...] = sum_c(x) / C,  var[...] = sum_c((x - mean)^2) / C
///   y[..., c] = (x[..., c] - mean) / sqrt(var + eps) * weight[c] + bias[c]
///
/// @param x       [..., C], C >= 1, any float dtype
/// @param weight  [C], same dtype as x
/// @param bias    [C], same dtype as x, or undefined for none
/// @param eps     added to the variance; > 0
/// @return        [..., C], dtype of x. Mean and variance in two passes, accumulated in f32 (f64 for f64).
/// @throws Error  kShape if weight or bias is not [C] or C is 0; kDType if dtypes differ; kValue for eps.
/// Saved for backward: x, weight, mean and 1/sqrt(var + eps) per row (f32; f64 for f64). The gradients of weight and
/// bias are summed over blocks of rows in an order that depends on the shape alone.
Tensor layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps = 1e-5);

struct ResidualNorm {
  Tensor sum;     ///< x + residual
  Tensor normed;  ///< layer_norm(sum)
};

/// The step between two blocks of a pre-norm transformer, in one pass over memory forwards and one backwards:
///
///   sum = x + residual,  normed = layer_norm(sum, weight, bias, eps)
///
/// @param x         [..., C]
/// @param residual  same shape and dtype as x; nothing is broadcast
/// Others as for layer_norm(). Same bits as the sum followed by layer_norm(): the sum is rounded to the dtype first.
/// @throws Error  kShape, kDType, kValue.
/// Saved for backward: sum, weight, mean, 1/sqrt(var + eps). Both inputs have one gradient: that of the norm plus that
/// of `sum`; either output may be unused.
ResidualNorm residual_layer_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& bias,
                                 double eps = 1e-5);

/// Root-mean-square layer normalisation over the last dimension (Zhang & Sennrich 2019, eq. 4).
///
///   y[..., c] = x[..., c] / sqrt(mean_c(x^2) + eps) * weight[c]
///
/// @param x       [..., C], C >= 1, any float dtype
/// @param weight  [C], same dtype as x
/// @param eps     added to the mean square; > 0
/// @return        [..., C], dtype of x. Sums are accumulated in f32 (f64 for f64).
/// @throws Error  kShape if weight is not [C] or C is 0; kDType if dtypes differ; kValue for eps.
/// Saved for backward: x, weight and 1/rms per row (f32; f64 for f64).
Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps = 1e-5);

}  // namespace weft
