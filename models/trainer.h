#pragma once
#include <functional>
#include <optional>

#include "models/not_finite.h"
#include "models/step_graph.h"
#include "models/text/loader.h"
#include "optim/delayed_scaling.h"
#include "optim/loss_scale.h"
#include "optim/optimizer.h"
#include "optim/schedule.h"

namespace weft::models {

/// Seconds of a step by what they were spent on. A device that works by itself is waited for once, at the end of a
/// step: the host's clock cannot tell its forward and backward pass and its optimizer apart, and they are one number.
struct StepTimes {
  double data = 0;
  double forward = 0, backward = 0, optimizer = 0;  ///< on a CPU
  double passes = 0;  ///< in place of forward and backward, where several ranks train: schedules mix them
  double device = 0;  ///< of all three, elsewhere
  double total() const { return data + forward + backward + passes + optimizer + device; }
};

/// What one training step did.
struct StepMetrics {
  int64_t step = 0;  ///< from 0
  double loss = 0;   ///< nats per valid token, before the update
  double grad_norm = 0;
  double clip_factor = 1;
  double lr = 0;
  double loss_scale = 1;              ///< by which the loss was multiplied for the backward pass
  bool skipped = false;               ///< gradients overflowed at that scale: no weight was changed
  int64_t tokens = 0;                 ///< inputs read
  int64_t valid = 0;                  ///< targets that counted
  optim::DelayedScaling::Counts fp8;  ///< elements converted to fp8, and those of them that saturated
  StepTimes times;
};

/// Runs training steps: `accumulate` micro-batches of the loader are one step, and the loss of each is divided by the
/// valid targets of all of them, so that a step is the same whatever the number of micro-batches it is cut into.
class Trainer {
 public:
  /// The objects must outlive the trainer. `step` is the number of steps already taken.
  Trainer(Gpt& gpt, optim::Optimizer& optimizer, text::Loader& loader, const optim::CosineSchedule& schedule,
          int64_t accumulate, int64_t step = 0);

  /// From now on losses are scaled: for f16 (optim/loss_scale.h).
  void scale_loss(const optim::LossScale& scale) { loss_scale_ = scale; }
  const std::optional<optim::LossScale>& loss_scale() const { return loss_scale_; }

  /// From now on keeps these scales, which Gpt::use_fp8() made, or where several ranks train ParallelGpt::use_fp8()
  /// (optim/delayed_scaling.h).
  void scale_fp8(std::shared_ptr<optim::DelayedScaling> scaling) { fp8_ = std::move(scaling); }
  const std::shared_ptr<optim::DelayedScaling>& fp8() const { return fp8_; }

  /// From now on trains together with the other ranks of `parallel`, whose gpt() this trainer's model is: a step has
  /// `micro_batches`, of which parallel.shares() gives this rank `accumulate`; the optimizer is over
  /// parallel.parameters(), and the loader gives this rank the micro-batches of its data rank (ranges of a step, or
  /// with Zero::kGradients every n-th). Metrics are of all ranks. It must outlive the trainer.
  void parallelize(ParallelGpt& parallel, int64_t micro_batches);

  /// From now on steps are recorded as graphs where that is possible (docs/cuda.md): same bits.
  /// @returns why they will not be, or "". @throws Error kUsage for GraphUse::on if they cannot.
  std::string use_graph(GraphUse use);
  const StepGraph& graph() const { return graph_; }

  /// One step. @throws Error kValue, before any weight changes, if the loss or a gradient is NaN or infinite; it names
  /// the first tensor that has one, on whatever rank (models/not_finite.h).
  StepMetrics step();

  /// Steps taken.
  int64_t steps() const { return step_; }

 private:
  /// Which rows of the step of all ranks these are, and its numbers of tokens.
  void begin_step(const std::vector<text::Batch>& batches, StepMetrics& metrics);
  void send(const std::vector<text::Batch>& batches, const StepMetrics& metrics);
  /// Forward and backward passes and the update, as device work that reads batch and numbers where send() puts them.
  void compute(const StepMetrics& metrics, StepTimes& times);
  /// Micro-batch i's part of what a forward pass is told.
  GptStep settings(size_t i) const;
  /// What in compute() needs the host, or "".
  std::string host_work() const;
  /// optimizer_.finish(), with the gradient that is not finite named by all ranks alike.
  optim::StepReport finish_update();
  /// For those who look for what is not finite in it.
  FailedStep failed_step() const;

  Gpt& gpt_;
  optim::Optimizer& optimizer_;
  text::Loader& loader_;
  optim::CosineSchedule schedule_;
  int64_t accumulate_;
  int64_t step_;
  std::optional<optim::LossScale> loss_scale_;
  std::shared_ptr<optim::DelayedScaling> fp8_;
  ParallelGpt* parallel_ = nullptr;
  int64_t micro_batches_ = 0;        // of a step of all ranks
  std::vector<int64_t> first_rows_;  // of each micro-batch, in the step of all ranks
  Parameters parameters_;
  Device device_;
  StepGraph graph_;
  std::string shapes_;  // of the micro-batches, in words
  Tensor tokens_;       // i32: all inputs and targets
  /// The step's micro-batches on the device, as views of one tensor that stays where it is while shapes are the same.
  std::vector<MicroBatch> batches_;
  Tensor numbers_;  // f64: step, valid tokens, loss scale
  Tensor losses_;   // one a micro-batch
  optim::DelayedScaling::Counts fp8_counts_;
};

}  // namespace weft::models
