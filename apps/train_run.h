#pragma once
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "apps/data_directory.h"
#include "apps/train_checkpoints.h"
#include "apps/train_options.h"
#include "apps/train_report.h"
#include "apps/train_resume.h"
#include "apps/world.h"
#include "models/trainer.h"

namespace weft::apps {

/// A training run: everything that lives from the first step to the last. All ranks make one and train alike.
class TrainRun {
 public:
  /// @param world  connected
  TrainRun(const TrainOptions& options, Device device, World& world, const dist::Mesh& mesh,
           const std::string& config_text, DataDirectory data, const std::optional<ResumePoint>& from);

  /// Trains to the last step or to the first signal on any rank, with checkpoints, evaluations and samples on the way,
  /// and says what it does. Returns whether the run is complete.
  bool train();

 private:
  /// Micro-batches of a step that this rank computes.
  int64_t micro_batches() const;
  /// Ranks have ranges of a step; where each micro-batch is reduced by itself, those of all ranks follow each other.
  std::vector<int64_t> loader_shares() const;
  std::unique_ptr<models::ParallelGpt> make_parallel(const dist::Mesh& mesh) const;
  std::unique_ptr<models::Gpt> make_alone() const;

  /// Whether any rank wants to stop: all do so after the same step. In passing the ranks learn whether all have written
  /// what they have of a checkpoint, which then appears.
  bool agree_to_stop(bool wish, TrainReport& report);
  void save(TrainReport& report);
  /// All ranks of a run take part.
  HeldOutLoss held_out() const;
  /// Written by all ranks where none has the whole model, else by the one that speaks; "" on the others.
  std::string sample_text(int64_t done);

  const TrainOptions o_;
  const Device device_;
  World& world_;
  const DataDirectory data_;
  const std::unique_ptr<models::ParallelGpt> parallel_;
  const std::unique_ptr<models::Gpt> alone_;  ///< if no others take part
  models::Gpt& gpt_;
  optim::Adam optimizer_;
  text::Loader loader_;
  TrainCheckpoints checkpoints_;
  std::optional<models::Trainer> trainer_;
  std::string graph_reason_;
};

}  // namespace weft::apps
