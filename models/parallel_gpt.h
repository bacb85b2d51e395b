#pragma once
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "dist/data_parallel.h"
#include "dist/mesh.h"
#include "dist/pipeline/executor.h"
#include "models/gpt.h"

namespace weft::models {

/// Rows of a training step that are computed at once: i32 [B, T] each.
struct MicroBatch {
  Tensor inputs, targets;
};

/// How a model and its training step are spread over ranks.
struct ParallelOptions {
  dist::Mesh mesh;  ///< of all ranks
  dist::Zero zero = dist::Zero::kNone;
  /// Hybrid sharding: neighbouring copies (dp and cp ranks) in groups of so many share out the states among them, and
  /// every group has all of them; 0: all copies are one group. Must divide their number; not with Zero::kGradients.
  int shard_ranks = 0;
  int64_t bucket_bytes = dist::DataParallelOptions().bucket_bytes;
  dist::PipelineKind schedule = dist::PipelineKind::k1F1B;  ///< with pp > 1
  int chunks = 1;                                           ///< stages a rank; kInterleaved has several
  /// Layers of each stage, pp * chunks of them; empty: as even as can be, by the FLOPs of layers and head.
  std::vector<int64_t> stage_layers = {};
  bool sequence = false;  ///< with tp > 1: its ranks share the rows of activations too (GptPart::sequence)
};

/// First layer of each stage, and the number of layers. @throws Error kValue for options that do not fit the model.
std::vector<int64_t> pipeline_stages(const ParallelOptions& options, const GptConfig& config);

/// The layer of the whole model that a parameter belongs to: -1 for embeddings, the number of layers for the final
/// norm.
int64_t layer_of(const std::string& parameter, const GptConfig& config);

/// A GPT on the ranks of a mesh: this rank's part of the model, the groups that it exchanges with, and a training step
/// on them; all ranks of a data rank are given the same whole sequences. With one rank it is the model with its
/// gradients added up in the canonical order, whose bits every mesh of dp and pp has, with any `zero` and schedule
/// (docs/parallelism).
///
///   ParallelGpt parallel(world, {.mesh = Mesh::parse("dp=2,pp=2", 4)}, config, device);
///   optim::Adam optimizer(parallel.parameters(), {}, parallel.norms());
///   parallel.begin_step(micro_batches);       // of all ranks
///   losses = parallel.run(batches, settings); // forward and backward passes
///   parallel.reduce();                        // gradients of the whole step
///   optimizer.step(lr);
///   parallel.gather();                        // weights that other ranks have updated; whoever reads one waits for it
class ParallelGpt {
 public:
  /// `world` must outlive this; all its ranks make one with equal arguments.
  /// @throws Error kValue for options that do not fit each other, the mesh or the model.
  ParallelGpt(dist::Group& world, const ParallelOptions& options, const GptConfig& config, Device device,
              uint64_t seed = 0, DType dtype = DType::f32);
  ~ParallelGpt();

  /// This rank's part of the model.
  Gpt& gpt() { return gpt_; }
  /// Whether this rank has all of it and of every sequence.
  bool whole() const { return pipeline_.size() * tensor_.size() * context_.size() == 1 && !sharded(); }
  const ParallelOptions& options() const { return options_; }
  Device device() const { return device_; }
  /// All ranks of the mesh.
  dist::Group& world() { return world_; }
  /// Whether weights are shared out too, and whole only while they are used.
  bool sharded() const { return options_.zero == dist::Zero::kParameters; }
  /// First layer of each stage, and the number of layers.
  std::vector<int64_t> stages() const { return pipeline_stages(options_, gpt_.config()); }

  /// What this rank's optimizer updates, under the model's names.
  const Parameters& parameters() const { return data_parallel_->parameters(); }
  /// Which part of the model's tensor each of parameters() is.
  std::vector<TensorPart> parts() const { return data_parallel_->parts(); }
  /// For an optimizer over parameters().
  std::shared_ptr<optim::NormReducer> norms() const { return norms_; }
  const dist::DataParallel& data_parallel() const { return *data_parallel_; }
  /// Ranks that add up their gradients.
  const dist::Group& gradient_group() const { return shards_; }

  /// Of a step's micro-batches, the ranks with one of data_ranks() have the same.
  int data_rank() const { return data_.rank(); }
  int data_ranks() const { return data_.size(); }

  /// Whether a data rank's micro-batches follow each other in the step, or are every data_ranks()-th.
  bool consecutive() const { return options_.zero != dist::Zero::kGradients; }
  /// Sums over the data ranks.
  std::pair<int64_t, int64_t> token_counts(int64_t tokens, int64_t valid);

  /// How many of a step's micro-batches each data rank has. @throws Error kValue if there are fewer than data ranks, or
  /// with Zero::kGradients no multiple of their number.
  std::vector<int64_t> shares(int64_t micro_batches) const;
  /// Begins a step of `micro_batches` on all ranks together.
  void begin_step(int64_t micro_batches);
  /// The number in the whole step of this rank's i-th micro-batch.
  int64_t micro_batch(int64_t i) const;
  /// Forward and backward passes of this rank's micro-batches. @param settings  of each
  /// @return the losses of all micro-batches of the step in their order, without loss_scale; the same on all ranks
  Tensor run(std::span<const MicroBatch> batches, const std::function<GptStep(size_t)>& settings,
             double loss_scale = 1);
  /// The forward passes of run() once more, one after the other, for those who watch their functions
  /// (autograd::RecordObserver). All ranks call it, in a step.
  /// @param entering  told the micro-batch's number in the step and the first layer of what runs next
  void forward_again(std::span<const MicroBatch> batches, const std::function<GptStep(size_t)>& settings,
                     const std::function<void(int64_t micro_batch, int64_t layer)>& entering);
  /// From now on the model multiplies in fp8 (Gpt::use_fp8()), with scales that are those of one process: after
  /// reduce() all ranks call fp8_counts(), which makes what each has seen of a tensor that of the whole step
  /// (models/fp8_agreement.h), and after the update DelayedScaling::update(). All ranks call this.
  std::shared_ptr<optim::DelayedScaling> use_fp8();
  /// The step's elements of the whole model. @throws Error kValue as DelayedScaling::counts(), on all ranks; kState
  /// without use_fp8().
  optim::DelayedScaling::Counts fp8_counts();
  void reduce() { data_parallel_->reduce(); }
  void gather() { data_parallel_->gather(); }

  /// Sums of the losses of the tokens of batch(i) = {rows, valid targets} for each i < count, without gradients. Data
  /// ranks share the batches out; all ranks have the result.
  std::vector<double> loss_sums(int64_t count, const std::function<std::pair<MicroBatch, int64_t>(int64_t)>& batch);

  /// Gpt::next_logits() by all ranks together, each with its layers and a cache of its own, and with the same ids.
  /// Sequences are not shared out for it.
  /// @return  [B, V] on the ranks of the last stage, undefined on the others
  Tensor next_logits(const Tensor& ids, KvCache& cache);
  /// Whether this is the one rank, of those with logits, that chooses a token for all.
  bool chooses() const { return world_.rank() == chooser_; }
  /// What that rank has chosen, on every rank.
  int32_t chosen(int32_t token);

 private:
  /// This rank's tokens of a micro-batch, and what it is told of them.
  struct OwnTokens {
    MicroBatch batch;
    GptStep step;
  };
  OwnTokens own_tokens(const MicroBatch& batch, GptStep step);
  int chunks() const { return static_cast<int>(cuts_.size() - 1) / pipeline_.size(); }
  /// Whether stages are units of weights, each of which is whole only while it runs.
  bool runs_units() const { return sharded() && pipeline_.size() == 1; }
  /// Whether a rank's sharded weights are one unit, which is gathered for all of a step's micro-batches.
  bool gathers_all_at_once() const { return sharded() && !runs_units(); }
  /// What goes through the stages in a forward pass without a schedule.
  struct Passage {
    Shape ids;
    std::function<GptStream()> begin;
    std::function<GptStream(GptStream stream, int64_t first, int64_t end)> blocks;
    std::function<Tensor(const GptStream& stream)> finish;
  };
  /// What comes out of the last stage, on its ranks, from this rank's stages one after the other. Of none, the weights
  /// come and go all the same.
  Tensor forward(const std::optional<Passage>& passage);
  /// With the loss of a micro-batch at its end.
  Passage loss_passage(const OwnTokens& own) const;
  void prepare_pipeline();
  /// A unit has run, or all have: where weights are shared out, those in 8 bits go with them.
  void end_unit(size_t unit, dist::Pass pass);

  dist::Group& world_;
  ParallelOptions options_;
  int chooser_;  ///< the rank that chooses tokens
  Device device_;
  DType dtype_;
  dist::Group data_, pipeline_, tensor_, context_;
  dist::Group gradients_;                ///< ranks whose gradients of the same parameters are added up
  dist::Group shards_;                   ///< those of them that share out states, and
  std::optional<dist::Group> replicas_;  ///< those that have this rank's place in other such groups, if there are any
  std::optional<dist::Group> ends_;      ///< first and last stage, which both have the token embedding
  /// First layer of each stage, and the number of layers. Where a rank runs units of weights, they are its stages: each
  /// block, and the final norm with the head, which is a stage without layers.
  std::vector<int64_t> cuts_;
  Gpt gpt_;
  std::unique_ptr<dist::DataParallel> data_parallel_;
  std::shared_ptr<optim::NormReducer> norms_;
  std::shared_ptr<optim::DelayedScaling> fp8_;
  std::vector<int64_t> shares_;  ///< of the present step
  // of the pipeline's present step
  std::optional<dist::PipelineExecutor> executor_;
  std::string executor_for_;  ///< shapes and number of micro-batches
  std::span<const OwnTokens> own_;
};

}  // namespace weft::models
