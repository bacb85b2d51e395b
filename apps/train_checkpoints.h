#pragma once
#include <map>
#include <optional>
#include <string>

#include "apps/train_options.h"
#include "apps/train_resume.h"
#include "apps/world.h"
#include "models/checkpoint/saver.h"
#include "models/text/loader.h"
#include "models/trainer.h"

namespace weft::apps {

/// What of a training run goes on changing and is in its checkpoints, besides what the trainer has.
struct TrainedParts {
  models::ParallelGpt* parallel = nullptr;  ///< null: this process trains alone
  models::Gpt& gpt;
  optim::Adam& optimizer;
  text::Loader& loader;
};

/// The checkpoints of a training run, which its ranks save and load together: each what it holds of the model and the
/// optimizer, rank 0 all else.
class TrainCheckpoints {
 public:
  /// @param text_files  that each of them has beside the tensors. All arguments must outlive this.
  TrainCheckpoints(const TrainOptions& options, World& world, TrainedParts parts,
                   std::map<std::string, std::string> text_files);

  struct Loaded {
    CheckpointInfo info;
    std::optional<optim::LossScale> scale;  ///< of a run in f16
  };
  /// Takes over what a checkpoint has of the model, the optimizer, the scales of fp8 (null: another precision) and the
  /// data; of tensors each rank reads what it holds. @throws Error kUsage if it is of a run with more steps, or in
  /// another precision.
  Loaded load(const ResumePoint& from, optim::DelayedScaling* fp8);

  /// Saves the run as it is after the trainer's last step; in the background if the options say so, and then nothing is
  /// returned. @throws Error kState unless the save before is finished.
  std::optional<std::string> save(const models::Trainer& trainer);
  /// Whether the last save, or load, was after this step.
  bool has(int64_t step) const { return last_step_ == step; }

  /// As CheckpointSaver has them.
  bool writing() const { return saver_.writing(); }
  std::optional<std::string> poll(bool writing_anywhere) { return saver_.poll(writing_anywhere); }
  std::optional<std::string> finish() { return saver_.finish(); }

 private:
  /// The other ranks; null: there are none.
  dist::Group* others() const { return world_.size() > 1 ? &world_.group() : nullptr; }
  /// What the optimizer updates, with what it is of whole tensors.
  Parameters own_parameters() const;
  /// What this rank holds of the model.
  Parameters held_parameters() const;
  /// A checkpoint has scales of fp8 if the run does.
  void check_fp8(const CheckpointTensors& from) const;
  std::optional<optim::LossScale> loss_scale(const CheckpointInfo& from) const;

  const TrainOptions& o_;
  World& world_;
  const TrainedParts parts_;
  const std::map<std::string, std::string> text_files_;
  std::string run_id_;
  CheckpointSaver saver_;
  int64_t last_step_ = -1;
};

}  // namespace weft::apps
