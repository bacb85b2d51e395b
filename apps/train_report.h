#pragma once
#include <cstdint>
#include <optional>
#include <string>

#include "apps/held_out.h"
#include "apps/metrics_file.h"
#include "apps/progress.h"
#include "apps/train_options.h"
#include "apps/world.h"
#include "models/trainer.h"

namespace weft::apps {

/// What a training run tells on its way: progress and events on standard error, metrics.jsonl in its directory, a
/// summary on standard output at the end. Every rank has one and makes the same calls; only that of the rank that
/// speaks (World::speaks) prints and writes, so that the loop around it is one on all ranks.
class TrainReport {
 public:
  /// @param trainer       that makes the steps; must outlive this
  /// @param graph_reason  why steps are not recorded as graphs, or ""
  TrainReport(const TrainOptions& options, const World& world, Device device, const models::GptConfig& model,
              const models::Trainer& trainer, std::string graph_reason);

  void step(const models::StepMetrics& metrics);
  /// After `done` steps.
  void held_out(int64_t done, const HeldOutLoss& loss);
  void sample(int64_t done, const std::string& text);
  void saved(const std::string& checkpoint);
  /// The run has ended before its last step. @param signal  that asked this rank for it, or ""
  void stopped(const char* signal);
  /// The run has taken its last step.
  void finished();
  void summary() const;

 private:
  const TrainOptions& o_;
  const Device device_;
  const models::Trainer& trainer_;
  const std::string graph_reason_;
  const bool speaks_;
  std::string last_checkpoint_ = "no checkpoint";
  // of the rank that speaks
  std::optional<MetricsFile> metrics_;
  std::optional<Progress> progress_;
  double bound_ = 0;    ///< seconds: a step at the speed of light
  std::string fields_;  ///< of the last progress line
  int64_t tokens_ = 0;  ///< of the steps of this process
  double seconds_ = 0;  ///< for them
  optim::DelayedScaling::Counts fp8_;
};

}  // namespace weft::apps
