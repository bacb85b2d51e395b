#pragma once
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "dist/threads.h"
#include "models/parallel_gpt.h"
#include "optim/adam.h"

// Training runs whose every number is kept, for comparing one layout with another (models/verify/verify.h).

namespace weft::models {

/// A training run without its layout: model, made-up data and optimizer. All of it is a function of these numbers.
struct TrainingProblem {
  GptConfig config;
  uint64_t seed = 0;  ///< of weights, dropout and data
  DType dtype = DType::f32;
  bool fp8 = false;           ///< with bf16: the blocks' linear layers multiply in fp8
  int64_t rows = 2;           ///< of a micro-batch, each of config.context tokens
  int64_t micro_batches = 4;  ///< of a step, on all ranks together
  double lr = 1e-2;
  optim::AdamOptions adam = {};

  /// Micro-batch j of a step. Rows have different numbers of targets that count: some all, some none.
  MicroBatch micro_batch(int64_t step, int64_t j) const;
  /// Targets of a step that count; at least one.
  int64_t valid_tokens(int64_t step) const;
};

/// A part of a named tensor, as a rank holds it.
struct HeldPart {
  std::string name;
  TensorPart part;
  Tensor values;
};

/// The output of a function that a forward pass called.
struct SeenOutput {
  int64_t micro_batch = 0;  ///< its number in the step
  /// "h.2.attn.qkv: linear": the module whose parameters were used last, and the function, with a number behind it if
  /// it is not the first of that name since.
  std::string place;
  Tensor values;
  /// Rows of the module's weight, if a rank of tp has some of them: the last dimension of what it makes.
  std::optional<TensorPart> weight = {};
};

/// What a rank had in a step.
struct RankStep {
  std::vector<double> losses;          ///< of all micro-batches of the step, as this rank knows them
  std::vector<int64_t> micro_batches;  ///< that it computed
  std::vector<HeldPart> gradients;     ///< of the whole step, before the update
  /// "gradient norm", "clip factor"; of LAMB each tensor's "trust ratio of h.0.mlp.fc.weight" and the squared norms
  /// that make it.
  std::vector<std::pair<std::string, double>> norms = {};
  std::vector<HeldPart> parameters, state;  ///< after the update
  std::vector<SeenOutput> outputs = {};     ///< if they were to be watched, in order
};

struct TrainingRecord {
  ParallelOptions layout;
  int64_t first_step = 0;
  std::vector<std::vector<RankStep>> steps;  ///< [step - first_step][rank]
};

/// Whole tensors by name: what a run begins with, or ends with.
struct TrainingState {
  NamedTensors parameters, state;  ///< of the model and of its optimizer
};

/// Puts together the parts that ranks hold; where several hold an element, that of the lowest rank is taken.
/// @throws Error kData naming a tensor of which no rank has some element.
NamedTensors put_together(const std::vector<RankStep>& ranks, std::vector<HeldPart> RankStep::* parts);
/// What the ranks had after a step: all that training needs to go on.
TrainingState state_after(const std::vector<RankStep>& ranks);

/// Points of a run at which a rank can be interfered with.
enum class TrainingMoment : uint8_t {
  kMade,     ///< model and optimizer are there, and loaded
  kBegun,    ///< a step has begun
  kPassed,   ///< forward and backward passes are done
  kReduced,  ///< gradients are those of the whole step
  kUpdated,  ///< the optimizer has updated what it has
  kGathered  ///< the step has ended
};
struct RankView {
  int rank;
  int64_t step;
  ParallelGpt& parallel;
  optim::Adam& optimizer;
  optim::DelayedScaling* fp8 = nullptr;  ///< of a problem in fp8
};

/// How a recorded run may be interfered with, by whoever wants to see what becomes of it. All may be empty.
struct TrainingHooks {
  /// The arguments with which a rank makes its objects.
  std::function<void(int rank, TrainingProblem& problem, ParallelOptions& layout)> arguments;
  /// What a rank loads; called on the rank's own copy.
  std::function<void(int rank, TrainingState& start)> loaded;
  /// What moves a rank's data.
  std::function<std::shared_ptr<dist::Engine>(std::shared_ptr<dist::Engine> engine)> engine;
  /// What adds up a rank's norms.
  std::function<std::shared_ptr<optim::NormReducer>(int rank, std::shared_ptr<optim::NormReducer> norms)> norms;
  /// Data and settings of micro-batch j of a step, as a rank is about to compute it.
  std::function<void(int rank, int64_t step, int64_t j, MicroBatch& batch, GptStep& settings)> micro_batch;
  std::function<void(TrainingMoment moment, const RankView& view)> at;
};

/// What of a run is wanted.
struct RecordOptions {
  int64_t first_step = 0, steps = 1;     ///< 0 steps: only makes the objects
  const TrainingState* start = nullptr;  ///< null: begins anew
  bool watch = false;                    ///< outputs of forward passes too; then nothing is recomputed
  const TrainingHooks* hooks = nullptr;
};

/// Trains on the ranks of a mesh, as threads of this process on the CPU, and keeps what they had.
/// @throws Error as ParallelGpt and the ranks do.
TrainingRecord record_training(const TrainingProblem& problem, const ParallelOptions& layout,
                               const RecordOptions& options);

}  // namespace weft::models
