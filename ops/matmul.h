#pragma once
#include "core/autograd.h"
#include "core/tensor.h"

namespace weft {

/// Matrix product over the last two dimensions, batched over the others.
///
///   y[..., i, j] = sum_k a[..., i, k] * b[..., k, j]
///
/// @param a  [..., M, K], f32, f64, f16 or bf16; any strides (a transposed view is not copied)
/// @param b  [..., K, N], dtype of a; leading dimensions broadcast against those of a
/// @return   [..., M, N]. Sums are kept in f32 (f64 for f64) and rounded once.
/// @throws Error  kShape if a dimension is missing or K differs; kDType if dtypes differ or are not float.
/// Differentiable any number of times. Saved for backward: a, b.
Tensor matmul(const Tensor& a, const Tensor& b);

/// Affine map over the last dimension: the weight is stored as [out, in], as in PyTorch and GPT-2's papers.
///
///   y[..., o] = sum_i x[..., i] * weight[o, i] + bias[o]
///
/// @param x       [..., in], f32, f64, f16 or bf16
/// @param weight  [out, in], dtype of x
/// @param bias    [out], dtype of x, or undefined for none
/// @return        [..., out]; the bias is added before the one rounding.
/// @throws Error  kShape naming the sizes that do not fit; kDType if dtypes differ.
/// Saved for backward: x, weight. Gradients of weight and bias are written where the leaf keeps them.
Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& bias = {});

/// GELU and the affine map behind it: what a transformer's MLP does after its first product.
///
///   y[..., o] = sum_i gelu(x[..., i]) * weight[o, i] + bias[o]
///
/// The forward pass is linear(gelu(x), weight, bias), bit for bit. On CUDA the backward pass multiplies by gelu'(x)
/// where the product that gives the gradient of gelu(x) is summed, so that this gradient is neither rounded nor
/// written.
///
/// @param x, weight, bias  as of linear()
/// @param keep  with Keep::kRecipe, gelu(x) is made again in the backward pass instead of kept; same bits
/// @throws Error  as linear().
/// Saved for backward: x, weight, and gelu(x).
Tensor gelu_linear(const Tensor& x, const Tensor& weight, const Tensor& bias = {},
                   autograd::Keep keep = autograd::Keep::kValue);

/// While it lives, f32 products that this thread starts may be done in TF32 by a device that has it: operands are
/// rounded to 10 bits of mantissa, sums stay f32. On the CPU nothing changes.
class AllowTf32 {
 public:
  AllowTf32();
  ~AllowTf32();
  AllowTf32(const AllowTf32&) = delete;
  AllowTf32& operator=(const AllowTf32&) = delete;
  static bool active();

 private:
  bool previous_;
};

}  // namespace weft
