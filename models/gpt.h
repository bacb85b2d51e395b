#pragma once
#include <memory>
#include <optional>
#include <vector>

#include "dist/sequence_layout.h"
#include "models/layers.h"
#include "optim/delayed_scaling.h"

namespace weft::models {

/// What a training step computes a second time in its backward pass instead of keeping it; same numbers. The parts of a
/// block compose with the block.
struct Recompute {
  bool block = false;       ///< each block, from its input
  bool norm = false;        ///< outputs of layer norms, from the residual stream
  bool activation = false;  ///< outputs of GELU, from their inputs
  bool attention = false;   ///< outputs of attention, from queries, keys and values
  bool operator==(const Recompute&) const = default;
};

/// GPT-2's shape (Radford et al. 2019).
struct GptConfig {
  int64_t layers = 4;
  int64_t heads = 4;     ///< must divide width
  int64_t width = 128;   ///< C
  int64_t context = 64;  ///< T, the most positions a sequence may have
  int64_t vocab = 0;     ///< V; must be given
  double dropout = 0;    ///< in [0, 1): after the embeddings and at the end of each branch
  double norm_eps = 1e-5;
  Recompute recompute = {};
  /// Tensors of at least this many bytes that blocks save for their backward pass wait for it in the host's memory
  /// (core/offload.h); not given: none does. CUDA only.
  std::optional<int64_t> offload_from = {};

  /// @throws Error kValue naming the field that makes no sense.
  void check() const;
  /// Trained numbers, without making the model.
  int64_t parameter_count() const;
  /// Floating-point operations of a training step per token by the formulas of docs/speed-of-light.md: products
  /// 6 (12 L C^2 + V C) and causal attention 7 L C T executed.
  double flops_per_token() const;
};

/// Whether ranks that share the blocks' matrices have parts of sizes that fp8 products take: multiples of 16.
bool fp8_fits(const GptConfig& config, int tensor_ranks);
inline constexpr const char* kFp8Parts =
    "fp8 products need parts of matrices whose sizes are multiples of 16: a number of tp ranks that divides "
    "width / 4, and heads whose channels on each rank are such a multiple";

/// Keys and values of the positions that a generation has seen, of the layers and heads that a process holds.
class KvCache {
 public:
  KvCache() = default;
  int64_t positions() const { return positions_; }
  /// When the new positions have been through all layers here.
  void advance(int64_t positions) { positions_ += positions; }

 private:
  friend class Gpt;
  struct Layer {
    Tensor keys, values;  ///< [B, context, C], or the heads here in place of C; filled up to positions_
  };
  std::vector<Layer> layers_;  // all of them, undefined where they are not here
  int64_t positions_ = 0;
};

/// What a training step adds to a forward pass.
struct GptStep {
  uint64_t step = 0;        ///< which dropout masks to draw
  int64_t first_row = 0;    ///< place of the first row in the step's whole batch: a row's mask depends on that alone
  double valid_tokens = 0;  ///< divide the loss by this instead of the number of valid targets, if > 0
  /// If defined, f64 [1] on the model's device, which stand for `step` and `valid_tokens`: recorded work
  /// (core/backend.h) reads there those of the step that runs.
  Tensor step_at = {}, valid_tokens_at = {};
  /// With GptPart::context: which tokens of the whole sequences each of its ranks has.
  std::optional<dist::SequenceLayout> layout = {};
};

/// What goes from block to block, each of the shape that Gpt::stream_shape() says: the residual stream, and the branch
/// that is yet to be added to it (undefined before the first block).
struct GptStream {
  Tensor x, branch;
  Shape ids = {};  ///< [B, T]: must be said where the tensors have some rows of it only (GptPart::sequence)
};

/// Which part of a model a process holds. The default is all of it.
struct GptPart {
  /// Blocks, as ranges that increase; none: all. With the first block go the embeddings, with the last one the final
  /// norm and the head, for which a process without the first block has a copy of the token embedding.
  std::vector<IndexRange> layers = {};
  /// Gives the head's use of the token embedding a gradient of its own: see Gpt::head().
  bool separate_head = false;
  /// Ranks that share each layer (models/split.h, docs/parallelism/tensor.md): heads, hidden channels and words are cut
  /// over them as evenly as can be. They make the same calls with equal arguments, and each has the whole loss; when a
  /// backward pass ends, the gradients of what a rank holds are complete. Must outlive the model and its graphs.
  dist::Group* tensor = nullptr;
  /// Whether they also share the rows of the activations between those layers.
  bool sequence = false;
  /// Ranks that share each sequence out (docs/parallelism/context.md); a group of one rank is as none. A rank is given
  /// ids and targets of its own tokens, [B, GptStep::layout->count(rank)], and its loss and its gradients are its
  /// tokens' shares of those of the whole sequences: they add up over the ranks. Must outlive the model and its graphs.
  dist::Group* context = nullptr;
  /// false: parameters have no memory until somebody gives it to them (DataParallel with Zero::kParameters); what they
  /// begin with is drawn into its shards by Module::draw().
  bool values = true;
};

/// Decoder-only transformer with GPT-2's architecture: learned positions, pre-layer-norm blocks, tanh GELU, the head
/// tied to the token embedding; and its initialisation: normal with deviation 0.02, 0.02 / sqrt(2 L) for the
/// projections that end a residual branch, biases 0.
class Gpt : public Module {
 public:
  /// @throws Error kValue for a field of the configuration or of the part that makes no sense, or if there are fewer
  /// heads or words than ranks that share them.
  Gpt(const GptConfig& config, Device device, uint64_t seed = 0, DType dtype = DType::f32, const GptPart& part = {});
  ~Gpt() override;

  /// Logits [B, T, V] of ids [B, T] (i32 or i64), T <= context. As for generation, layers must not be cut nor sequences
  /// shared out.
  Tensor logits(const Tensor& ids) const;

  /// Mean cross-entropy in nats over the targets that are not -1. The logits are never held whole (ops/loss.h).
  /// @param ids, targets  [B, T], i32 or i64
  /// @throws Error kValue if sequences are shared out and the step does not say how, or not how many valid tokens all
  /// ranks have together.
  Tensor loss(const Tensor& ids, const Tensor& targets, const GptStep& step = {}) const;

  /// loss() in pieces, for those who hold or run a part of the model: embeddings, blocks [first, end), final norm and
  /// head. @throws Error kState if this process does not hold what is asked for.
  GptStream begin(const Tensor& ids, const GptStep& step = {}) const;
  GptStream blocks(GptStream stream, int64_t first, int64_t end, const GptStep& step = {}) const;
  Tensor finish(const GptStream& stream, const Tensor& targets, const GptStep& step = {}) const;

  /// Shape of a stream's tensors for ids [B, T], on every stage of a pipeline: [B, T, C], or with sequence parallelism
  /// [this rank's share of the B T rows, C]. Their dtype is dtype().
  Shape stream_shape(const Shape& ids) const;
  DType dtype() const { return dtype_; }

  /// A model in units that run one after the other, with a GptStream between them: unit 0 is begin() and block 0, unit
  /// i block i, and unit `layers` is finish(). These are the parameters of each by name; the token embedding is in the
  /// first and the last. @throws Error kState unless this process holds the whole model.
  std::vector<std::vector<std::string>> units() const;

  bool embeds() const { return wpe_ != nullptr; }
  bool has_head() const { return ln_f_ != nullptr; }
  const GptPart& part() const { return part_; }
  /// What the head multiplies with: the token embedding, or with separate_head a leaf of its own that shares its
  /// memory. Gradients of the two uses of the table are then added up apart, each over all micro-batches, which is
  /// the one order that every layout can have: their ranks may be different ones.
  const Tensor& head() const { return head_; }

  /// Logits [B, V] of the last of the new positions `ids` [B, n], which follow those in `cache`; adds them to it. No
  /// gradients. @throws Error kShape when the context is full.
  Tensor next_logits(const Tensor& ids, KvCache& cache) const;

  /// next_logits() in pieces, as those of loss(): embeddings, blocks [first, end), and the rest, whose `ids` are the
  /// shape of the new positions' [B, n]. Ranks that share layers have the whole logits each; those that share sequences
  /// out take part each for itself, with all positions. The caller advances the cache.
  GptStream begin_next(const Tensor& ids, const KvCache& cache) const;
  GptStream extend(GptStream stream, int64_t first, int64_t end, KvCache& cache) const;
  Tensor finish_next(const GptStream& stream) const;

  /// From now on the blocks' linear layers (qkv, proj, fc, mlp.proj) multiply in fp8 in training steps; evaluation and
  /// generation stay as they are. Give the result to the trainer. Ranks that share layers or sequences agree in the
  /// first step on the scale of each tensor of which they have parts; how they do after a step: ParallelGpt::use_fp8().
  /// @throws Error kDType unless the weights are bf16; kValue unless the width, and the sizes of the parts of matrices
  /// where ranks share them, are multiples of 16; kDevice on a device without such products.
  std::shared_ptr<optim::DelayedScaling> use_fp8();

  const GptConfig& config() const { return config_; }

 private:
  class Block;
  Tensor embed(const Tensor& ids, int64_t first_position, const dist::SequenceLayout& layout) const;
  void require_whole(const char* what) const;
  void require_uncut(const char* what) const;
  const Block& block(int64_t i) const;

  GptConfig config_;
  GptPart part_;
  Split split_;
  uint64_t seed_;
  DType dtype_;
  std::unique_ptr<Embedding> wte_, wpe_;        // where this process has them
  std::vector<std::unique_ptr<Block>> blocks_;  // [layer], null where it has not
  std::unique_ptr<LayerNorm> ln_f_;
  Tensor head_;
};

}  // namespace weft::models
