#include "apps/train_checkpoints.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>

#include "core/autograd.h"
#include "models/checkpoint/shared_check.h"
#include "models/gpt_checkpoint.h"

namespace weft::apps {
namespace {

/// Where a checkpoint's state keeps that of the loss scale.
constexpr const char* kLossScale = "loss_scale";

std::string make_run_id() {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  char text[64];
  std::snprintf(text, sizeof text, "%llx-%x",
                static_cast<unsigned long long>(std::chrono::duration_cast<std::chrono::microseconds>(now).count()),
                static_cast<unsigned>(getpid()));
  return text;
}

}  // namespace

TrainCheckpoints::TrainCheckpoints(const TrainOptions& options, World& world, TrainedParts parts,
                                   std::map<std::string, std::string> text_files)
    : o_(options),
      world_(world),
      parts_(parts),
      text_files_(std::move(text_files)),
      run_id_(make_run_id()),
      saver_(options.out.string(), others(), {.keep_n = static_cast<int>(options.keep)}) {}

Parameters TrainCheckpoints::own_parameters() const {
  Parameters own = parts_.optimizer.parameters();
  if (parts_.parallel == nullptr) return own;
  const std::vector<TensorPart> parts = parts_.parallel->parts();
  for (size_t i = 0; i < own.size(); ++i) own[i].part = parts[i];
  return own;
}

Parameters TrainCheckpoints::held_parameters() const {
  return parts_.parallel != nullptr && parts_.parallel->sharded() ? own_parameters() : parts_.gpt.parameters();
}

std::optional<std::string> TrainCheckpoints::save(const models::Trainer& trainer) {
  ShardedContent content;
  content.model = stored_parameters(held_parameters());
  content.optimizer = stored_state(parts_.optimizer.state(), own_parameters());
  content.step = trainer.steps();
  content.run_id = run_id_;
  content.data_cursor = parts_.loader.position();
  content.seed = static_cast<uint64_t>(o_.seed);
  content.state = models::to_state(parts_.gpt.config());
  if (trainer.fp8()) {
    for (StoredTensor& scales : stored_whole(trainer.fp8()->state())) content.optimizer.push_back(std::move(scales));
  }
  if (trainer.loss_scale()) content.state[kLossScale] = trainer.loss_scale()->state();
  content.text_files = text_files_;
  last_step_ = content.step;
  if (!o_.save_async) return saver_.save(content);
  saver_.begin(content);
  return std::nullopt;
}

TrainCheckpoints::Loaded TrainCheckpoints::load(const ResumePoint& point, optim::DelayedScaling* fp8) {
  const OpenCheckpoint from = point.verified      ? open_verified_checkpoint(point.path)
                              : world_.size() > 1 ? open_checkpoint(point.path, world_.group())
                                                  : open_checkpoint(point.path);
  Loaded loaded{from.manifest, {}};
  const int64_t step = loaded.info.step;
  if (step > o_.steps) {
    fail(ErrorKind::kUsage, "train", "steps = ", o_.steps, ": the run has taken ", step,
         " steps already; steps counts those of the whole run");
  }
  const MemoryScope scope(MemoryCategory::workspace);
  check_fp8(from.optimizer);
  const Parameters held = held_parameters();
  const NamedTensors weights = load_stored(from.model, stored_parameters(held), others());
  {
    const autograd::NoGrad no_grad;
    for (size_t i = 0; i < held.size(); ++i) Tensor(held[i].tensor).copy_(weights[i].second);
  }
  std::vector<StoredTensor> wanted = stored_state(parts_.optimizer.state(), own_parameters());
  const auto own = static_cast<std::ptrdiff_t>(wanted.size());
  if (fp8 != nullptr) {
    for (StoredTensor& scales : stored_whole(fp8->state())) wanted.push_back(std::move(scales));
  }
  const NamedTensors state = load_stored(from.optimizer, wanted, others());
  parts_.optimizer.load_state({state.begin(), state.begin() + own});
  if (fp8 != nullptr) fp8->load_state({state.begin() + own, state.end()});
  loaded.scale = loss_scale(loaded.info);
  run_id_ = loaded.info.run_id;
  parts_.loader.seek(loaded.info.data_cursor);
  last_step_ = step;
  return loaded;
}

void TrainCheckpoints::check_fp8(const CheckpointTensors& from) const {
  const bool fp8 = o_.precision == Precision::fp8;
  const bool stored = std::any_of(from.tensors().begin(), from.tensors().end(),
                                  [](const CheckpointTensor& each) { return optim::DelayedScaling::owns(each.name); });
  if (fp8 == stored) return;
  fail(ErrorKind::kUsage, "train",
       fp8 ? "precision = fp8: the checkpoint is of a run that did not multiply in fp8"
           : "the checkpoint is of a run with precision = fp8, and keeps its scales",
       "; a run keeps its precision");
}

std::optional<optim::LossScale> TrainCheckpoints::loss_scale(const CheckpointInfo& from) const {
  if (o_.precision != Precision::f16) return std::nullopt;
  const auto found = from.state.find(kLossScale);
  if (found == from.state.end()) {
    fail(ErrorKind::kUsage, "train",
         "precision = f16: the checkpoint is of a run that did not scale its loss; a run keeps its precision");
  }
  optim::LossScale scale;
  scale.load_state(found->second);
  return scale;
}

}  // namespace weft::apps
