#pragma once
#include "optim/norm.h"

namespace weft::optim {

/// What a step did.
struct StepReport {
  double loss = 0;         ///< sum of the losses that queue() was given; if it is not finite, nothing was changed
  double grad_norm = 0;    ///< of the gradients times GradientScale::factor, before clipping
  double clip_factor = 1;  ///< by which gradients were multiplied beside that
  bool skipped = false;    ///< gradients overflowed, and nothing was changed
};

/// What the gradients were multiplied by on their way (optim/loss_scale.h), and what that means for a step.
struct GradientScale {
  double factor = 1;           ///< gradients are multiplied by it before anything else: 1 over the loss scale
  bool skip_overflow = false;  ///< gradients that are not finite skip the step instead of throwing
};

/// Changes parameters by their gradients. Its whole state is a set of named tensors, so that it is stored, resumed and
/// sharded like parameters.
class Optimizer {
 public:
  virtual ~Optimizer() = default;
  /// One update with this learning rate. Gradients stay; parameters without one are left as they are.
  /// @throws Error kValue, before anything is changed (steps() included), if a gradient is NaN or infinite: it names
  /// the first such tensor.
  StepReport step(double lr, const GradientScale& scale = {});

  // The same in three parts, so that a device takes the decisions of a step and the host waits once, at its end.
  // queue() is then work of the device alone, which can be recorded with the passes before it and run again (Graph,
  // core/backend.h): whatever changes from step to step is read from where prepare() has put it.

  /// Sends this step's numbers to the device. @throws Error kValue for a learning rate that is not finite and >= 0.
  virtual void prepare(double lr, const GradientScale& scale = {}) = 0;
  /// Queues the update by the gradients that are there. It changes nothing where one of them or one of `losses`
  /// (f32 or f64 [n], on the parameters' device; may be undefined) is not finite.
  virtual void queue(const Tensor& losses = {}) = 0;
  /// Waits for the update and tells what it did. @throws Error as step(); the gradients must be those that queue() saw.
  virtual StepReport finish() = 0;
  /// What in queue() needs the host, or "" if nothing does.
  virtual std::string host_work() const = 0;

  /// Forgets the gradients; their memory goes back to the allocator.
  void zero_grad();
  /// Steps taken so far.
  int64_t steps() const { return steps_; }
  const Parameters& parameters() const { return parameters_; }

  /// "<parameter>.<name of the state>" tensors that share memory with the state, and "steps" (i64 [1]).
  NamedTensors state() const;
  /// Copies values into the state. @throws Error kData, before anything is changed, if a tensor is missing, unknown,
  /// given twice or of another shape or dtype.
  void load_state(const NamedTensors& tensors);

 protected:
  explicit Optimizer(Parameters parameters);
  virtual NamedTensors state_tensors() const = 0;

  Parameters parameters_;
  int64_t steps_ = 0;
};

}  // namespace weft::optim
