#pragma once
#include <array>
#include <functional>
#include <memory>

#include "core/tensor.h"
#include "ops/fp8_kernels.h"

namespace weft {

/// A tensor in 8 bits, in the layouts that products want.
struct Fp8Operand {
  Tensor values;      ///< [rows, columns]
  Tensor transposed;  ///< [columns, rows up to a multiple of 16]
  Tensor scale;       ///< f32 [4], an Fp8Scale
};

/// One linear layer's part of a delayed scaling (optim/delayed_scaling.h), which owns what its tensors are views of.
struct Fp8Layer {
  Tensor scales;             ///< f32 [3, 4], an Fp8Scale for each Fp8Role
  Tensor stats;              ///< i64 [3, 3], an Fp8Stats for each, of the step that is being taken
  bool has_history = false;  ///< else a tensor is scaled by its own amax, for which it is read a second time
  Fp8Operand weight;         ///< as it was last converted ...
  std::weak_ptr<Storage> weight_source;             ///< ... from this storage ...
  uint64_t weight_version = 0, scales_version = 0;  ///< ... at this version, with this one of the scales
  /// By Fp8Role, where other processes have other elements of the tensor: raises the amax in its stats (i64 [3]) to
  /// that of all. Called where a tensor is scaled by its own amax, so that each of them has the scale of the whole.
  std::array<std::function<void(const Tensor& stats)>, kFp8Roles> raise_amax;
  /// By Fp8Role: whether this process counts what it converts. Of those that have the same elements, one does.
  std::array<bool, kFp8Roles> counts = {true, true, true};
};

/// linear() in fp8 (Micikevicius et al. 2022), forward and backward:
///
///   y = x W^T + bias        dx = g W        dW = g^T x        dbias = sum of g over the rows
///
/// x and W are converted to e4m3, the incoming gradient g to e5m2, each times its tensor's scale, to the nearest with
/// saturation (core/float8.h); all three products multiply what was converted, sum in f32, divide by the scales and
/// round once to bf16. dbias is summed from g as it came.
///
/// @param x       [..., in], bf16
/// @param weight  [out, in], bf16; converted once for each version of it and of the scales. in and out are multiples of
///                16, the layout of 8-bit products on a GPU, on every device
/// @param bias    [out], bf16, or undefined for none
/// @param layer   scales to use; amaxes and counts of what is converted are added to its stats, but by a second run
///                under autograd::checkpoint, which converts the same again
/// @throws Error  kDType unless bf16; kShape naming the sizes that do not fit.
/// Saved for backward: x and W in 8 bits, transposed, and their scales.
Tensor linear_fp8(const Tensor& x, const Tensor& weight, const Tensor& bias, const std::shared_ptr<Fp8Layer>& layer);

}  // namespace weft
