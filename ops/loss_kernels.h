#pragma once
#include <cmath>
#include <cstdint>

#include "core/dtype.h"
#include "ops/kernel_device.h"

namespace weft {

/// Rows of logits, row-major [rows, classes] without gaps, and their targets.
struct LossTargets {
  const int64_t* targets;  ///< [rows], each a class or `ignored`
  int64_t rows, classes;
  int64_t ignored;
};

/// What a row's gradient is multiplied by, where the device keeps it: gradient / denominator.
template <class A>
struct LossScale {
  const double* denominator;
  const A* gradient = nullptr;  ///< null: 1
};

/// What a loss is divided by, where that is known: *at if there is one, else `value`; not positive: it is not known.
struct KnownDenominator {
  double value;
  const double* at = nullptr;  ///< on the device
};

/// What one row's classes come to.
struct LossParts {
  double lse = 0;    ///< ln(sum of exp(logits))
  double logit = 0;  ///< of the target
};
/// The parts of a row, [slices] pairs that are `stride` numbers apart, in their order.
WEFT_HD inline LossParts join(const double* parts, int64_t slices, int64_t stride) {
  LossParts joined = {parts[0], parts[1]};
  for (int64_t s = 1; s < slices; ++s) {
    // ln(e^a + e^b), taken from the larger; of two that are -inf it is -inf, and a NaN on either side stays.
    const double a = joined.lse, b = parts[s * stride], most = a > b || a != a ? a : b;
    const double least = a > b || a != a ? b : a;
    joined.lse = least == most ? most + std::log(2.0) : most + std::log1p(std::exp(least - most));
    joined.logit += parts[s * stride + 1];
  }
  return joined;
}

/// *denominator = the known one, or else the number of targets that are not ignored. CPU: @throws Error kIndex for a
/// target that is no class; kValue for a mean over no valid target; CUDA: reports them (core/backend.h).
void loss_denominator(Cpu, const char* op, const LossTargets& targets, const KnownDenominator& known,
                      double* denominator);
void loss_denominator(Cuda, const char* op, const LossTargets& targets, const KnownDenominator& known,
                      double* denominator);

/// *out = the sum of the rows' losses, in f64 in a fixed order, over the denominator.
template <class A>
void reduce_losses(Cpu, const double* losses, int64_t rows, const double* denominator, A* out);
template <class A>
void reduce_losses(Cuda, const double* losses, int64_t rows, const double* denominator, A* out);

/// lse[n] = ln(sum_v exp(logits[n, v])), loss[n] = lse[n] - logits[n, target]; both 0 for ignored rows. lse may be
/// null. A NaN among the logits gives NaN.
template <class T>
void loss_forward(Cpu, const LossTargets& targets, const T* logits, Accumulate<T>* lse, double* loss);
template <class T>
void loss_forward(Cuda, const LossTargets& targets, const T* logits, Accumulate<T>* lse, double* loss);

/// dlogits[n, v] = (exp(logits[n, v] - lse[n]) - [v = target]) * scale; 0 for ignored rows.
template <class T>
void loss_backward(Cpu, const LossTargets& targets, const T* logits, const Accumulate<T>* lse,
                   const LossScale<Accumulate<T>>& scale, T* dlogits);
template <class T>
void loss_backward(Cuda, const LossTargets& targets, const T* logits, const Accumulate<T>* lse,
                   const LossScale<Accumulate<T>>& scale, T* dlogits);

/// Both in one, in place: f32 or f64 logits are overwritten with their gradient as elements of T, which is as wide or
/// narrower: row n starts where the logits' row n does.
template <class T>
void loss_in_place(Cpu, const LossTargets& targets, Accumulate<T>* logits, const LossScale<Accumulate<T>>& scale,
                   double* loss);
template <class T>
void loss_in_place(Cuda, const LossTargets& targets, Accumulate<T>* logits, const LossScale<Accumulate<T>>& scale,
                   double* loss);

/// Of logits [rows, classes] of the classes [first, first + classes) among more, with targets among all of them:
/// parts[2 n] = ln(sum_v exp(logits[n, v])), parts[2 n + 1] = logits[n, target - first] if that is one of these
/// classes, else 0; both 0 for ignored rows.
template <class A>
void loss_parts(Cpu, const LossTargets& targets, int64_t first, const A* logits, double* parts);
template <class A>
void loss_parts(Cuda, const LossTargets& targets, int64_t first, const A* logits, double* parts);

/// The parts [slices, rows, 2] of all classes, put together in their order: lse[n] and loss[n] as loss_forward() gives
/// them; 0 for ignored rows.
template <class A>
void join_loss_parts(Cpu, const LossTargets& targets, int64_t slices, const double* parts, A* lse, double* loss);
template <class A>
void join_loss_parts(Cuda, const LossTargets& targets, int64_t slices, const double* parts, A* lse, double* loss);

/// The gradient of loss_backward() for the classes [first, first + classes) among more, in place as in
/// loss_in_place(). `loss` as join_loss_parts() gives it.
template <class T>
void loss_slice_in_place(Cpu, const LossTargets& targets, int64_t first, const Accumulate<T>* lse, const double* loss,
                         Accumulate<T>* logits, const LossScale<Accumulate<T>>& scale);
template <class T>
void loss_slice_in_place(Cuda, const LossTargets& targets, int64_t first, const Accumulate<T>* lse, const double* loss,
                         Accumulate<T>* logits, const LossScale<Accumulate<T>>& scale);

/// out = *scale * x (+ out), rounded once.
template <class T>
void scale_to(Cpu, const Accumulate<T>* x, int64_t count, const Accumulate<T>* scale, T* out, bool accumulate);
template <class T>
void scale_to(Cuda, const Accumulate<T>* x, int64_t count, const Accumulate<T>* scale, T* out, bool accumulate);

}  // namespace weft
