#pragma once
#include <cstdint>
#include <span>

#include "core/dtype.h"
#include "ops/kernel_device.h"

// Kernels of the optimizers. Each takes all tensors of a step at once: a model has hundreds, most of them small. Sums
// are added in an order that depends on the sizes alone.

namespace weft::optim {

// ---- norms ----

/// The elements of a contiguous float tensor.
struct TensorData {
  void* data = nullptr;
  int64_t count = 0;
  DType dtype = DType::f32;
};

/// Partial sums of a tensor: what sum_squares wants room for, of all its tensors together.
int64_t square_partials(Cpu, const TensorData& tensor);
int64_t square_partials(Cuda, const TensorData& tensor);

/// sums[i] = sum of x^2 over tensors[i]. Squares are added in f32 (f64 for f64) over short runs, in f64 over runs whose
/// squares overflow or underflow f32, and the runs' sums in f64: NaN or infinite only if an element is (or, in f64, its
/// square). `partials` and `sums` lie on the device.
void sum_squares(Cpu, std::span<const TensorData> tensors, double* partials, double* sums);
void sum_squares(Cuda, std::span<const TensorData> tensors, double* partials, double* sums);

/// x *= factor, in f32 (f64 for f64), rounded once.
void scale(Cpu, std::span<const TensorData> tensors, double factor);
void scale(Cuda, std::span<const TensorData> tensors, double factor);

// ---- Adam ----

/// What one step has in common for all tensors, in the state's type.
template <class T>
struct AdamConstants {
  T grad_scale;  ///< clip factor
  T beta1, beta2;
  T rest1, rest2;   ///< 1 - beta1 and 1 - beta2, subtracted before rounding to T
  T inverse_bias1;  ///< 1 / (1 - beta1^t)
  T inverse_bias2;  ///< 1 / (1 - beta2^t)
  T eps;
};

/// Each number rounded once to the state's type.
template <class T>
AdamConstants<T> rounded(const AdamConstants<double>& c) {
  return {static_cast<T>(c.grad_scale),    static_cast<T>(c.beta1), static_cast<T>(c.beta2),
          static_cast<T>(c.rest1),         static_cast<T>(c.rest2), static_cast<T>(c.inverse_bias1),
          static_cast<T>(c.inverse_bias2), static_cast<T>(c.eps)};
}

/// One tensor of a step, contiguous. The state's type is f64 for f64 and f32 for all others.
struct AdamTensor {
  DType dtype = DType::f32;   ///< of parameter and gradient
  int64_t count = 0;          ///< elements
  void* parameter = nullptr;  ///< takes the weight, rounded
  void* weight = nullptr;     ///< in the state's type: the parameter itself, or its master
  const void* gradient = nullptr;
  void* exp_avg = nullptr;  ///< in the state's type, as exp_avg_sq
  void* exp_avg_sq = nullptr;
  double weight_decay = 0;
  double lr = 0;  ///< times the trust ratio
};

/// The whole rule in one pass: 28 bytes moved per element of f32, and of bf16 and f16 with their masters.
void adam_update(Cpu, std::span<const AdamTensor> tensors, const AdamConstants<double>& constants);
void adam_update(Cuda, std::span<const AdamTensor> tensors, const AdamConstants<double>& constants);

/// Partial sums of a tensor, of weights and of updates each.
int64_t adam_partials(Cpu, const AdamTensor& tensor);
int64_t adam_partials(Cuda, const AdamTensor& tensor);

/// The first pass with a trust ratio: the means, and the squares that the ratio needs. For tensors[i] of n:
/// sums[i] = sum of w^2, sums[n + i] = sum of u^2. `partials` has room for both kinds.
void adam_moments(Cpu, std::span<const AdamTensor> tensors, const AdamConstants<double>& constants, double* partials,
                  double* sums);
void adam_moments(Cuda, std::span<const AdamTensor> tensors, const AdamConstants<double>& constants, double* partials,
                  double* sums);

/// The second: the weights.
void adam_apply(Cpu, std::span<const AdamTensor> tensors, const AdamConstants<double>& constants);
void adam_apply(Cuda, std::span<const AdamTensor> tensors, const AdamConstants<double>& constants);

/// Masters take the parameters' values wherever a parameter is not its master rounded. The master keeps what rounding
/// took from the parameter, so that equal values after rounding mean: nothing happened.
void adam_follow(Cpu, std::span<const AdamTensor> tensors);
void adam_follow(Cuda, std::span<const AdamTensor> tensors);

}  // namespace weft::optim
