#pragma once
#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

#include "core/dtype.h"
#include "core/float_types.h"
#include "ops/kernel_device.h"
#include "optim/exact_sum.h"

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

/// The sums of sum_squares(Cpu) before they are rounded: over blocks of 1,024 elements as there, and the blocks' sums
/// without rounding. Where a tensor is cut at multiples of 1,024, the sums of its parts add up to that of the whole.
std::vector<ExactSum> exact_squares(std::span<const TensorData> tensors);

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
WEFT_HD inline AdamConstants<T> rounded(const AdamConstants<double>& c) {
  return {static_cast<T>(c.grad_scale),    static_cast<T>(c.beta1), static_cast<T>(c.beta2),
          static_cast<T>(c.rest1),         static_cast<T>(c.rest2), static_cast<T>(c.inverse_bias1),
          static_cast<T>(c.inverse_bias2), static_cast<T>(c.eps)};
}

/// What the host knows of a step before it begins. It lies on the device, so that a recorded step reads the numbers of
/// the step that runs.
struct AdamInput {
  AdamConstants<double> constants;  ///< grad_scale: without the clip factor
  double lr;
  double clip_norm;     ///< largest norm of gradients; 0: any
  double largest_norm;  ///< beyond it squares do not fit into the state
};

/// What the device decides from gradients and losses, and the numbers that the update then takes.
struct AdamDecision {
  enum Verdict : int32_t { kTake, kNotFinite, kTooLarge };
  AdamConstants<double> wide;
  AdamConstants<float> narrow;
  double lr;
  double loss;         ///< sum of the losses
  double grad_norm;    ///< of the gradients times AdamInput's grad_scale; 0 if it is not finite
  double clip_factor;  ///< by which they are multiplied beside that
  Verdict verdict;     ///< but for kTake, every kernel that is given the decision changes nothing

  template <class T>
  WEFT_HD const AdamConstants<T>& constants() const {
    if constexpr (sizeof(T) == sizeof(double))
      return wide;
    else
      return narrow;
  }
};

/// One step's decision, on every device with the same bits. Clipping: min(1, clip_norm / norm).
WEFT_HD inline AdamDecision decide(const AdamInput& in, double squares, double loss) {
  AdamDecision d{};
  d.loss = loss;
  d.lr = in.lr;
  d.clip_factor = 1;
  d.verdict = AdamDecision::kNotFinite;
  if (!(squares - squares == 0) || !(loss - loss == 0)) return d;
  d.grad_norm = std::sqrt(squares) * in.constants.grad_scale;
  if (in.clip_norm > 0 && d.grad_norm > in.clip_norm) d.clip_factor = in.clip_norm / d.grad_norm;
  d.verdict = d.grad_norm * d.clip_factor > in.largest_norm ? AdamDecision::kTooLarge : AdamDecision::kTake;
  d.wide = in.constants;
  d.wide.grad_scale = in.constants.grad_scale * d.clip_factor;
  d.narrow = rounded<float>(d.wide);
  return d;
}

/// *decision = decide(*input, the sum of squares[0 .. count), the sum of the losses), both added in order in f64.
/// `losses` is f32 or f64; none sum up to 0.
void adam_decide(Cpu, const AdamInput* input, const double* squares, int64_t count, const TensorData& losses,
                 AdamDecision* decision);
void adam_decide(Cuda, const AdamInput* input, const double* squares, int64_t count, const TensorData& losses,
                 AdamDecision* decision);

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
  const double* lr = nullptr;  ///< times the trust ratio; on the device
  int64_t number = 0;          ///< of the parameter, for its sums
};

/// The whole rule in one pass: 28 bytes moved per element of f32, and of bf16 and f16 with their masters.
void adam_update(Cpu, std::span<const AdamTensor> tensors, const AdamDecision* decision);
void adam_update(Cuda, std::span<const AdamTensor> tensors, const AdamDecision* decision);

/// Partial sums of a tensor, of weights and of updates each.
int64_t adam_partials(Cpu, const AdamTensor& tensor);
int64_t adam_partials(Cuda, const AdamTensor& tensor);

/// The first pass with a trust ratio: the means, and the squares that the ratio needs. For each tensor, of `parameters`
/// in all: sums[number] = sum of w^2, sums[parameters + number] = sum of u^2. `partials` has room for both kinds.
void adam_moments(Cpu, std::span<const AdamTensor> tensors, const AdamDecision* decision, double* partials,
                  double* sums, int64_t parameters);
void adam_moments(Cuda, std::span<const AdamTensor> tensors, const AdamDecision* decision, double* partials,
                  double* sums, int64_t parameters);

/// The same with the sums before they are rounded, as exact_squares() has them.
std::vector<ExactSum> exact_moments(std::span<const AdamTensor> tensors, const AdamDecision* decision,
                                    int64_t parameters);

/// lr ||w|| / ||u|| of a parameter, or lr if either norm is 0.
WEFT_HD inline double trusted_rate(double lr, double weight_squares, double update_squares) {
  const double weight = std::sqrt(weight_squares), update = std::sqrt(update_squares);
  return weight > 0 && update > 0 ? lr * (weight / update) : lr;
}

/// rates[i] = trusted_rate of parameter i, from the sums that adam_moments gives.
void adam_rates(Cpu, const double* sums, int64_t parameters, const AdamDecision* decision, double* rates);
void adam_rates(Cuda, const double* sums, int64_t parameters, const AdamDecision* decision, double* rates);

/// The second: the weights.
void adam_apply(Cpu, std::span<const AdamTensor> tensors, const AdamDecision* decision);
void adam_apply(Cuda, std::span<const AdamTensor> tensors, const AdamDecision* decision);

/// Masters take the parameters' values wherever a parameter is not its master rounded. The master keeps what rounding
/// took from the parameter, so that equal values after rounding mean: nothing happened.
void adam_follow(Cpu, std::span<const AdamTensor> tensors);
void adam_follow(Cuda, std::span<const AdamTensor> tensors);

}  // namespace weft::optim
