#pragma once
#include <memory>
#include <optional>

#include "optim/optimizer.h"
#include "optim/state_stream.h"

namespace weft::optim {

struct AdamTensor;

struct AdamOptions {
  double beta1 = 0.9;         ///< [0, 1): decay of the mean of gradients
  double beta2 = 0.999;       ///< [0, 1): decay of the mean of squared gradients
  double eps = 1e-8;          ///< added to the root; at least 1.2e-38, the smallest that is not 0 in f32
  double weight_decay = 0.0;  ///< >= 0, for parameters whose role is weight; norms, biases and embeddings are spared
  double clip_norm = 0.0;     ///< global gradient norm allowed; 0 means no clipping
  bool trust_ratio = false;   ///< LAMB
  bool offload = false;       ///< keeps the state in pinned host memory (optim/state_stream.h); CUDA only, same bits
  int64_t offload_piece = int64_t{1} << 21;  ///< elements of the state that are on the device at a time, times three
};

/// AdamW (Loshchilov & Hutter 2019) and LAMB (You et al. 2020, algorithm 2) as one rule, per element of a tensor w:
///
///   g  = clip_factor * gradient
///   m  = beta1 m + (1 - beta1) g             v = beta2 v + (1 - beta2) g^2
///   u  = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay w
///   w -= lr * r * u,   r = ||w|| / ||u|| per tensor with the trust ratio (1 if either norm is 0), else 1
///
/// t counts the steps of the optimizer, also for a parameter that had no gradient in some. The ratio is for tensors of
/// role weight and embedding; biases and norms keep r = 1, as You et al. exclude them. State per parameter: exp_avg,
/// exp_avg_sq (f32; f64 for f64) and, for bf16 and f16 parameters, master (f32), which is what is updated: the
/// parameter is the master rounded. Where a parameter was changed by someone else since, the master takes its values.
/// Computed in the state's type; no bit depends on the number of threads. CUDA takes the same operations, rounded the
/// same, so that its steps are the CPU's bit for bit (of a CPU that fuses multiply and add), but for the sums of
/// squares behind clip_factor and r, which it adds in another fixed order. The host waits once, at the end of a step:
/// norm, clip factor and trust ratios are the device's own business, unless the reducer needs the host. With offload it
/// also waits before and at the end of the update, for the decision and for the last copy; the trust ratio then keeps
/// the state of a tensor in one piece, because its squares are added up, and reads it twice.
class Adam final : public Optimizer {
 public:
  /// @throws Error kValue for options outside their range or a missing reducer; kDevice unless all parameters are on
  /// one device, and with offload one of CUDA; kDType for offload of states of two types.
  Adam(Parameters parameters, const AdamOptions& options,
       std::shared_ptr<NormReducer> norms = std::make_shared<LocalNorms>());
  /// @throws Error kValue, before anything is changed, for a learning rate that is not finite and >= 0.
  void prepare(double lr, const GradientScale& scale = {}) override;
  void queue(const Tensor& losses = {}) override;
  /// @throws Error kValue for gradients that are not finite or whose squares do not fit in an f32 state: nothing was
  /// changed.
  StepReport finish() override;
  std::string host_work() const override;

 protected:
  NamedTensors state_tensors() const override;

 private:
  struct Slot {
    Tensor exp_avg, exp_avg_sq, master;
    uint64_t version = 0;  ///< of the parameter's storage when the master was last written to it
  };
  void make_stream(DType dtype);
  /// Parameter p with its state, without gradient and rate.
  AdamTensor tensor_of(size_t p) const;

  AdamOptions options_;
  Device device_;
  std::shared_ptr<NormReducer> norms_;
  std::optional<StateStream> stream_;  ///< with offload
  std::vector<Slot> slots_;
  Tensor input_, decision_;      // an AdamInput and an AdamDecision
  std::vector<size_t> updated_;  // parameters that the last queue() updates
  std::vector<bool> changed_;    // with offload: parameters that someone else changed since their last update
  bool skip_overflow_ = false;
};

/// Adam without and with the trust ratio, under their usual names.
inline std::unique_ptr<Adam> adamw(Parameters parameters, AdamOptions options) {
  options.trust_ratio = false;
  return std::make_unique<Adam>(std::move(parameters), options);
}
inline std::unique_ptr<Adam> lamb(Parameters parameters, AdamOptions options) {
  options.trust_ratio = true;
  return std::make_unique<Adam>(std::move(parameters), options);
}

}  // namespace weft::optim
