#pragma once
#include <memory>
#include <optional>

#include "optim/optimizer.h"
#include "optim/state_stream.h"

namespace weft::optim {

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
/// squares behind clip_factor and r, which it adds in another fixed order. The host waits for the device once in a
/// step, for the squares of the gradients, and with the trust ratio once more, for those of weights and updates. With
/// offload it also waits at the end of the step, for the last copy to it; the trust ratio then keeps the state of a
/// tensor in one piece, because its squares are added up, and reads it twice.
class Adam final : public Optimizer {
 public:
  /// @throws Error kValue for options outside their range or a missing reducer; kDevice unless all parameters are on
  /// one device, and with offload one of CUDA; kDType for offload of states of two types.
  Adam(Parameters parameters, const AdamOptions& options,
       std::shared_ptr<NormReducer> norms = std::make_shared<LocalNorms>());
  /// @throws Error kValue, before anything is changed, for a learning rate that is not finite and >= 0, and for
  /// gradients that are not finite or whose squares do not fit in an f32 state.
  StepReport step(double lr, const GradientScale& scale = {}) override;

 protected:
  NamedTensors state_tensors() const override;

 private:
  struct Slot {
    Tensor exp_avg, exp_avg_sq, master;
    uint64_t version = 0;  ///< of the parameter's storage when the master was last written to it
  };
  void make_stream(DType dtype);

  AdamOptions options_;
  Device device_;
  std::shared_ptr<NormReducer> norms_;
  std::optional<StateStream> stream_;  ///< with offload
  std::vector<Slot> slots_;
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
