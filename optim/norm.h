#pragma once
#include <span>
#include <vector>

#include "optim/exact_sum.h"
#include "optim/parameter.h"

namespace weft::optim {

/// Turns sums of squares of what this process holds into sums over whole tensors. The parallel layer supplies one that
/// adds the parts of split tensors and leaves replicated ones alone; a tied tensor is listed, and counted, once.
class NormReducer {
 public:
  virtual ~NormReducer() = default;
  /// squares[i] belongs to parameters[i].
  virtual void reduce(std::span<double> squares, const Parameters& parameters) = 0;
  /// Whether the squares of gradients on the CPU should come as exact sums: then parts that are cut at multiples of
  /// 1,024 elements give the bits of the whole.
  virtual bool exact() const { return false; }
  virtual void reduce(std::span<ExactSum> squares, const Parameters& parameters);
  /// Makes of the reduced squares of this process's parameters those of all parameters of the model, in its order:
  /// what a norm over the whole model adds up where other processes have other layers.
  virtual void complete(std::vector<double>&, const Parameters&) {}
  /// Whether queue() does the same as reduce() without the host: only then can a step be recorded as a whole.
  virtual bool on_device() const { return false; }
  /// reduce(), in place and as work queued on the device that `squares` (f64, one a parameter) is on.
  virtual void queue(const Tensor& squares, const Parameters& parameters);
};

/// Everything is held here: nothing to do. @throws Error kState for a parameter of which other processes have parts.
class LocalNorms final : public NormReducer {
 public:
  using NormReducer::reduce;
  void reduce(std::span<double> squares, const Parameters& parameters) override;
  bool on_device() const override { return true; }
  void queue(const Tensor& squares, const Parameters& parameters) override;
};

/// Whether the reducer gets exact sums: on the CPU, outside of dry runs, if it takes them.
bool takes_exact(const Parameters& parameters, const NormReducer& reducer);

/// Where a parameter has a gradient, its sum of squares as f64, else 0: one a parameter of the model, on their device;
/// reduced and completed, by the host if the reducer needs it. Device work alone if not.
Tensor reduced_squares(const Parameters& parameters, NormReducer& reducer);
/// Reduces sums that lie on a device: there, or through the host if the reducer needs it.
void reduce_on(const Tensor& squares, const Parameters& parameters, NormReducer& reducer);

/// The device of all parameters; the CPU if there are none. @throws Error kDevice naming two that are on different
/// ones.
Device device_of(const char* op, const Parameters& parameters);

/// ||g||_2 over the gradients of all parameters; those without a gradient count as 0. Squares are added in f64, in an
/// order that does not depend on the number of threads. The reducer is asked even if a gradient is not finite, so that
/// every process of a group learns of it. On CUDA the host waits for the sums, one number per parameter.
/// @throws Error kValue, naming the first tensor with a gradient that is NaN or infinite and where in it, or one whose
/// sum of squares is beyond f64; kDevice unless all parameters are on one device.
double grad_norm(const Parameters& parameters, NormReducer& reducer);
double grad_norm(const Parameters& parameters);

/// min(1, max_norm / norm): the factor that clips a gradient of this norm. @throws Error kValue unless max_norm > 0.
double clip_factor(double norm, double max_norm);

/// Scales all gradients in place so that their global norm is at most max_norm (Pascanu et al. 2013); returns the norm
/// before. Nothing is changed if a gradient is not finite (as in grad_norm) or not contiguous. Optimizers do the same
/// without the extra pass: see AdamOptions::clip_norm.
double clip_grad_norm(const Parameters& parameters, double max_norm, NormReducer& reducer);
double clip_grad_norm(const Parameters& parameters, double max_norm);

}  // namespace weft::optim
