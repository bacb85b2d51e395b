#include "models/gpt.h"

#include <algorithm>
#include <cmath>

#include "core/autograd.h"
#include "core/offload.h"
#include "dist/collective_ops.h"
#include "dist/group.h"
#include "dist/ring_attention.h"
#include "ops/attention.h"
#include "ops/dropout.h"
#include "ops/elementwise.h"
#include "ops/loss.h"
#include "ops/matmul.h"

namespace weft::models {
namespace {

constexpr double kDeviation = 0.02;

double residual_deviation(const GptConfig& config) {
  return kDeviation / std::sqrt(2.0 * static_cast<double>(config.layers));
}

autograd::Keep keep(bool recompute) { return recompute ? autograd::Keep::kRecipe : autograd::Keep::kValue; }

bool shares_sequences(const GptPart& part) { return part.context != nullptr && part.context->size() > 1; }

/// Which tokens of the sequences a forward pass has: all, or those of one rank of a context group.
struct Tokens {
  Shape ids;  ///< [B, T] of those that are here
  dist::SequenceLayout layout;
  dist::Group* context = nullptr;  ///< null: all are here
  int rank = 0;                    ///< of the layout
};

/// @throws Error unless the step says which tokens these are, and they are as many.
Tokens tokens_of(const Shape& ids, const GptPart& part, const GptStep& step) {
  if (ids.rank() != 2) fail(ErrorKind::kShape, "gpt", "ids must be [B, T], got ", ids);
  const bool shared = shares_sequences(part);
  const int ranks = shared ? part.context->size() : 1, rank = shared ? part.context->rank() : 0;
  if (shared && !step.layout) {
    fail(ErrorKind::kValue, "gpt", "sequences are shared out over ", ranks,
         " ranks, and the step does not say how. Hint: GptStep::layout");
  }
  const dist::SequenceLayout layout = step.layout.value_or(dist::SequenceLayout(ids[1], ranks));
  if (layout.ranks() != ranks) {
    fail(ErrorKind::kValue, "gpt", "the step's layout is for ", layout.ranks(), " ranks, and ", ranks,
         " share the model's sequences");
  }
  if (ids[1] != layout.count(rank)) {
    fail(ErrorKind::kShape, "gpt", "rank ", rank, " of ", ranks, " has ", layout.count(rank), " of a sequence's ",
         layout.tokens(), " tokens, got ids ", ids);
  }
  return {ids, layout, shared ? part.context : nullptr, rank};
}

/// Dropout on the stream of a step's rows of ids, or this rank's share of it: a mask depends on the row's place in the
/// batch, the token's in the sequence, and the channel.
Tensor apply_dropout(const Tensor& x, double p, const RandomStream& stream, bool training, const GptStep& step,
                     const Tokens& tokens, const Split& split) {
  const int64_t batch = tokens.ids[0], here = tokens.ids[1], channels = x.size(-1);
  const IndexRange rows = split.sequence() ? split.share(batch * here) : IndexRange{0, batch * here};
  std::vector<StreamRun> runs;
  int64_t row = 0;  // of the tokens that are here
  for (int64_t b = 0; b < batch; ++b) {
    for (const IndexRange& range : tokens.layout.ranges(tokens.rank)) {
      const int64_t begin = std::max(row, rows.begin), count = std::min(row + range.count(), rows.end) - begin;
      const int64_t place = (step.first_row + b) * tokens.layout.tokens() + range.begin + begin - row;
      row += range.count();
      if (count <= 0) continue;
      const auto first = static_cast<uint64_t>(place * channels);
      if (!runs.empty() && runs.back().first + static_cast<uint64_t>(runs.back().count) == first) {
        runs.back().count += count * channels;
      } else {
        runs.push_back({count * channels, first});
      }
    }
  }
  return dropout(x, p, stream.at_step(step.step), training, runs, step.step_at);
}

/// Of the queries, keys and values [3 C] of all heads those of some.
std::vector<IndexRange> outputs_of_heads(const IndexRange& heads, const GptConfig& config) {
  const int64_t size = config.width / config.heads;
  std::vector<IndexRange> outputs;
  for (const int64_t first : {int64_t{0}, config.width, 2 * config.width})
    outputs.push_back({first + heads.begin * size, first + heads.end * size});
  return outputs;
}

IndexRange inputs_of_heads(const IndexRange& heads, const GptConfig& config) {
  return outputs_of_heads(heads, config).front();
}

class Attention : public Module {
 public:
  Attention(const GptConfig& config, const Init& init, const Split& split)
      : split_(split),
        heads_(split.share(config.heads)),
        keep_(keep(config.recompute.attention)),
        qkv_(config.width, 3 * config.width, outputs_of_heads(heads_, config), kDeviation, init.at("qkv"), split),
        proj_(config.width, config.width, inputs_of_heads(heads_, config), residual_deviation(config), init.at("proj"),
              split) {
    add("qkv", qkv_);
    add("proj", proj_);
  }

  /// @param tokens  what x belongs to
  Tensor operator()(const Tensor& x, const Tokens& tokens) const {
    const Shape& ids = tokens.ids;
    const Tensor qkv = qkv_(x, ids[0] * ids[1]);
    if (!split_.sequence()) return proj_(attend(qkv, tokens));
    const Tensor y = attend(qkv.reshape({ids[0], ids[1], qkv.size(-1)}), tokens);
    return proj_(y.reshape({ids[0] * ids[1], y.size(-1)}));
  }

  /// The same for positions `ids` [B, n] that follow the `seen` first ones of `keys` and `values` [B, T, C of the heads
  /// here], which are filled.
  Tensor extend(const Tensor& x, const Shape& ids, int64_t seen, const Tensor& keys, const Tensor& values) const {
    const Tensor all = qkv_(x, ids[0] * ids[1]).reshape({ids[0], ids[1], 3 * keys.size(-1)});
    const std::vector<Tensor> qkv = all.split(keys.size(-1), -1);
    keys.narrow(1, seen, ids[1]).copy_(qkv[1]);
    values.narrow(1, seen, ids[1]).copy_(qkv[2]);
    AttentionOptions options;
    options.heads = heads_.count();
    options.query_offset = seen;
    const int64_t length = seen + ids[1];
    const Tensor y = attention(qkv[0], keys.narrow(1, 0, length), values.narrow(1, 0, length), options);
    return proj_(split_.sequence() ? y.reshape({ids[0] * ids[1], y.size(-1)}) : y);
  }

 private:
  Tensor attend(const Tensor& qkv, const Tokens& tokens) const {
    if (tokens.context == nullptr) return causal_attention(qkv, heads_.count(), keep_);
    const std::vector<Tensor> parts = qkv.split(qkv.size(-1) / 3, -1);
    AttentionOptions options;
    options.heads = heads_.count();
    return ring_attention(parts[0], parts[1], parts[2], options, *tokens.context, tokens.layout, keep_);
  }

  Split split_;
  IndexRange heads_;
  autograd::Keep keep_;
  ColumnLinear qkv_;
  RowLinear proj_;
};

class Mlp : public Module {
 public:
  Mlp(const GptConfig& config, const Init& init, const Split& split)
      : keep_(keep(config.recompute.activation)),
        fc_(config.width, 4 * config.width, {split.share(4 * config.width)}, kDeviation, init.at("fc"), split),
        proj_(4 * config.width, config.width, split.share(4 * config.width), residual_deviation(config),
              init.at("proj"), split) {
    add("fc", fc_);
    add("proj", proj_);
  }
  /// @param ids  [B, T]: what x belongs to
  Tensor operator()(const Tensor& x, const Shape& ids) const {
    return proj_.after_gelu(fc_(x, ids[0] * ids[1]), keep_);
  }

 private:
  autograd::Keep keep_;
  ColumnLinear fc_;
  RowLinear proj_;
};

}  // namespace

void GptConfig::check() const {
  const auto require = [](bool holds, const char* name, auto value, const char* rule) {
    if (!holds) fail(ErrorKind::kValue, "gpt", name, " must be ", rule, ", got ", value);
  };
  constexpr int64_t kMost = int64_t{1} << 24;
  require(layers >= 1 && layers <= 10000, "layers", layers, "from 1 to 10,000");
  require(heads >= 1 && heads <= kMost, "heads", heads, "at least 1");
  require(width >= 1 && width <= kMost, "width", width, "from 1 to 2^24");
  require(context >= 1 && context <= kMost, "context", context, "from 1 to 2^24");
  require(vocab >= 1 && vocab <= (int64_t{1} << 31), "vocab", vocab, "from 1 to 2^31");
  require(dropout >= 0 && dropout < 1, "dropout", dropout, "in [0, 1)");
  require(norm_eps > 0 && std::isfinite(norm_eps), "norm_eps", norm_eps, "positive");
  if (width % heads != 0)
    fail(ErrorKind::kValue, "gpt", "heads must divide width, got ", heads, " heads and width ", width);
}

int64_t GptConfig::parameter_count() const {
  const int64_t block = 12 * width * width + 13 * width;  // products 3+1+4+4 C^2, their biases 9 C, two norms 4 C
  return vocab * width + context * width + layers * block + 2 * width;
}

double GptConfig::flops_per_token() const {
  const double l = static_cast<double>(layers), c = static_cast<double>(width);
  return 6 * (12 * l * c * c + static_cast<double>(vocab) * c) + 7 * l * c * static_cast<double>(context);
}

bool fp8_fits(const GptConfig& config, int tensor_ranks) {
  const int64_t head = config.width / config.heads;
  for (const int64_t heads : dist::even_counts(config.heads, tensor_ranks)) {
    if (heads * head % 16 != 0) return false;
  }
  for (const int64_t channels : dist::even_counts(4 * config.width, tensor_ranks)) {
    if (channels % 16 != 0) return false;
  }
  return true;
}

/// One transformer block. Its input is the residual stream and the branch that is yet to be added to it, so that every
/// addition is fused with the norm behind it.
class Gpt::Block : public Module {
 public:
  Block(const GptConfig& config, uint64_t seed, const Init& init, const Split& split)
      : split_(split),
        dropout_(config.dropout),
        keep_norm_(keep(config.recompute.norm)),
        attention_stream_(seed, "dropout/" + init.path + ".attn"),
        mlp_stream_(seed, "dropout/" + init.path + ".mlp"),
        ln_1_(config.width, config.norm_eps, init.at("ln_1"), split),
        attn_(config, init.at("attn"), split),
        ln_2_(config.width, config.norm_eps, init.at("ln_2"), split),
        mlp_(config, init.at("mlp"), split) {
    add("ln_1", ln_1_);
    add("attn", attn_);
    add("ln_2", ln_2_);
    add("mlp", mlp_);
  }

  /// {residual stream, MLP branch}.
  std::pair<Tensor, Tensor> operator()(const Tensor& x, const Tensor& branch, const Tokens& tokens,
                                       const GptStep& step) const {
    const auto [before, normed] = ln_1_.add_and_norm(x, branch, keep_norm_);
    const Tensor attended = drop(attn_(normed, tokens), attention_stream_, tokens, step);
    const auto [after, normed_again] = ln_2_.add_and_norm(before, attended, keep_norm_);
    return {after, drop(mlp_(normed_again, tokens.ids), mlp_stream_, tokens, step)};
  }

  std::pair<Tensor, Tensor> extend(const GptStream& stream, int64_t seen, const Tensor& keys,
                                   const Tensor& values) const {
    const auto [before, normed] = ln_1_.add_and_norm(stream.x, stream.branch);
    const auto [after, normed_again] = ln_2_.add_and_norm(before, attn_.extend(normed, stream.ids, seen, keys, values));
    return {after, mlp_(normed_again, stream.ids)};
  }

 private:
  Tensor drop(const Tensor& x, const RandomStream& stream, const Tokens& tokens, const GptStep& step) const {
    return apply_dropout(x, dropout_, stream, is_training(), step, tokens, split_);
  }

  Split split_;
  double dropout_;
  autograd::Keep keep_norm_;
  RandomStream attention_stream_, mlp_stream_;
  LayerNorm ln_1_;
  Attention attn_;
  LayerNorm ln_2_;
  Mlp mlp_;
};

Gpt::Gpt(const GptConfig& config, Device device, uint64_t seed, DType dtype, const GptPart& part)
    : config_((config.check(), config)),
      part_(part),
      split_(part.tensor, part.sequence),
      seed_(seed),
      dtype_(dtype),
      blocks_(static_cast<size_t>(config.layers)) {
  if (config.heads < split_.ranks() || config.vocab < split_.ranks()) {
    fail(ErrorKind::kValue, "gpt", "each of the ranks that share a layer needs a head and a word; there are ",
         split_.ranks(), " ranks, ", config.heads, " heads and ", config.vocab, " words");
  }
  if (part.sequence && part.tensor == nullptr)
    fail(ErrorKind::kValue, "gpt",
         "sequence parallelism is a part of tensor parallelism, and no group is given for that");
  if (config.offload_from && device.kind == DeviceKind::cpu) {
    fail(ErrorKind::kValue, "gpt", "offload_from is for models on a CUDA device; on ", device,
         " the memory is the host's already");
  }
  if (part_.layers.empty()) part_.layers = {{0, config.layers}};
  int64_t before = 0;
  for (const IndexRange& range : part_.layers) {
    if (range.begin < before || range.end <= range.begin || range.end > config.layers) {
      fail(ErrorKind::kValue, "gpt",
           "a part's ranges of layers must increase, have at least one layer each and lie in ", config.layers,
           " layers, got ", range.begin, " to ", range.end);
    }
    before = range.end;
  }
  const bool embeds = part_.layers.front().begin == 0, has_head = part_.layers.back().end == config.layers;
  const Init init{.seed = seed, .dtype = dtype, .device = device, .values = part_.values};
  if (embeds || has_head) {
    wte_ = std::make_unique<Embedding>(config.vocab, config.width, kDeviation, init.at("wte"), split_);
    add("wte", *wte_);
  }
  if (embeds) {
    wpe_ = std::make_unique<Embedding>(config.context, config.width, kDeviation, init.at("wpe"));
    add("wpe", *wpe_);
  }
  for (const IndexRange& range : part_.layers) {
    for (int64_t i = range.begin; i < range.end; ++i) {
      const std::string name = "h." + std::to_string(i);
      std::unique_ptr<Block>& block = blocks_[static_cast<size_t>(i)];
      block = std::make_unique<Block>(config, seed, init.at(name), split_);
      add(name, *block);
    }
  }
  if (!has_head) return;
  ln_f_ = std::make_unique<LayerNorm>(config.width, config.norm_eps, init.at("ln_f"), split_);
  add("ln_f", *ln_f_);
  head_ = wte_->weight();
  if (part_.separate_head && embeds) head_ = head_.detach().requires_grad_();
}

Gpt::~Gpt() = default;

std::shared_ptr<optim::DelayedScaling> Gpt::use_fp8() {
  const Tensor table = parameters().front().tensor;
  if (table.dtype() != DType::bf16) {
    fail(ErrorKind::kDType, "gpt", "fp8 products are of bf16 weights and activations, got ", table.dtype());
  }
  if (config_.width % 16 != 0) {
    fail(ErrorKind::kValue, "gpt", "fp8 products need a width that is a multiple of 16, got ", config_.width);
  }
  if (!fp8_fits(config_, split_.ranks())) {
    fail(ErrorKind::kValue, "gpt", kFp8Parts, "; got width ", config_.width, " and ", config_.heads, " heads for ",
         split_.ranks(), " ranks");
  }
  std::vector<std::string> names;
  std::vector<Linear*> linears;
  visit([&](const std::string& name, Module& module) {
    if (auto* found = dynamic_cast<Linear*>(&module)) names.push_back(name), linears.push_back(found);
  });
  auto scaling = std::make_shared<optim::DelayedScaling>(std::move(names), table.device());
  dist::Group* const context = shares_sequences(part_) ? part_.context : nullptr;
  for (size_t i = 0; i < linears.size(); ++i) {
    for (const Fp8Role role : {Fp8Role::kInput, Fp8Role::kWeight, Fp8Role::kGradient}) {
      // Ranks of a context group have other tokens and the same weights.
      dist::Group* const slices = linears[i]->cuts(role) ? part_.tensor : nullptr;
      dist::Group* const tokens = role == Fp8Role::kWeight ? nullptr : context;
      const bool copy = (slices == nullptr && split_.active() && part_.tensor->rank() > 0) ||
                        (tokens == nullptr && context != nullptr && context->rank() > 0);
      const auto at = static_cast<size_t>(role);
      scaling->layer(i)->counts[at] = !copy;
      if (slices == nullptr && tokens == nullptr) continue;
      scaling->layer(i)->raise_amax[at] = [slices, tokens](const Tensor& stats) {
        for (dist::Group* group : {slices, tokens}) {
          if (group != nullptr) group->all_reduce_(stats, dist::Reduction::max);
        }
      };
    }
    linears[i]->use_fp8(scaling->layer(i));
  }
  return scaling;
}

Tensor Gpt::embed(const Tensor& ids, int64_t first_position, const dist::SequenceLayout& layout) const {
  const int64_t tokens = layout.tokens();
  if (ids.rank() != 2 || tokens < 1 || first_position + tokens > config_.context) {
    fail(ErrorKind::kShape, "gpt", "ids must be [B, T] with 1 <= T <= context; got ", ids.describe(), " from position ",
         first_position, layout.ranks() > 1 ? concat(" of ", tokens, " tokens") : "", ", and context is ",
         config_.context);
  }
  const int64_t count = ids.size(1);
  if (split_.sequence() && count == 0) {
    fail(ErrorKind::kShape, "gpt", "sequence parallelism needs a token on every rank of a context group, got ",
         ids.describe());
  }
  const Tensor& table = wpe_->weight();
  Tensor positions = tokens == config_.context ? table : table.narrow(0, first_position, tokens);
  if (layout.ranks() > 1) positions = layout.take(positions, 0, part_.context->rank());
  positions = split_.shared(positions);
  if (!split_.sequence()) return (*wte_)(ids) + positions;
  // Those of the sequences that this rank has rows of.
  const IndexRange rows = split_.share(ids.numel());
  const int64_t first = rows.begin / count, sequences = (rows.end + count - 1) / count - first;
  const Tensor repeated =
      positions.expand({sequences, count, config_.width}).reshape({sequences * count, config_.width});
  return (*wte_)(ids) + repeated.narrow(0, rows.begin - first * count, rows.count());
}

Shape Gpt::stream_shape(const Shape& ids) const {
  if (ids.rank() != 2) fail(ErrorKind::kShape, "gpt", "ids must be [B, T], got ", ids);
  if (!split_.sequence()) return {ids[0], ids[1], config_.width};
  return {split_.share(ids[0] * ids[1]).count(), config_.width};
}

void Gpt::require_uncut(const char* what) const {
  if (split_.active()) {
    fail(ErrorKind::kState, "gpt", what, " needs whole layers; those of this model are cut over ", split_.ranks(),
         " ranks");
  }
  if (shares_sequences(part_)) {
    fail(ErrorKind::kState, "gpt", what, " needs whole sequences; those of this model are shared out over ",
         part_.context->size(), " ranks");
  }
}

void Gpt::require_whole(const char* what) const {
  if (part_.layers != std::vector<IndexRange>{{0, config_.layers}}) {
    fail(ErrorKind::kState, "gpt", what, " needs the whole model; this process holds ", parameters().size(),
         " of its parameters");
  }
}

std::vector<std::vector<std::string>> Gpt::units() const {
  require_whole("a list of units");
  std::vector<std::vector<std::string>> units(blocks_.size() + 1);
  units.back().push_back("wte.weight");
  for (const Parameter& parameter : parameters()) {
    const std::string& name = parameter.name;
    const size_t unit = name.starts_with("h.")     ? std::stoul(name.substr(2))
                        : name.starts_with("ln_f") ? blocks_.size()
                                                   : 0;
    units[unit].push_back(name);
  }
  return units;
}

const Gpt::Block& Gpt::block(int64_t i) const {
  if (i < 0 || i >= config_.layers || blocks_[static_cast<size_t>(i)] == nullptr)
    fail(ErrorKind::kState, "gpt", "this process does not hold block ", i, " of ", config_.layers);
  return *blocks_[static_cast<size_t>(i)];
}

GptStream Gpt::begin(const Tensor& ids, const GptStep& step) const {
  if (!embeds()) fail(ErrorKind::kState, "gpt", "this process does not hold the embeddings");
  const RandomStream stream(seed_, "dropout/embedding");
  const Tokens tokens = tokens_of(ids.shape(), part_, step);
  const Tensor x = embed(ids, 0, tokens.layout);
  return {apply_dropout(x, config_.dropout, stream, is_training(), step, tokens, split_), {}, ids.shape()};
}

GptStream Gpt::blocks(GptStream stream, int64_t first, int64_t end, const GptStep& step) const {
  const bool training = autograd::grad_mode();
  if (!split_.sequence()) stream.ids = {stream.x.size(0), stream.x.size(1)};
  if (!(stream.x.shape() == stream_shape(stream.ids))) {
    fail(ErrorKind::kShape, "gpt", "the stream of ids ", stream.ids, " has tensors ", stream_shape(stream.ids),
         " here, got ", stream.x.describe());
  }
  const Tokens tokens = tokens_of(stream.ids, part_, step);
  autograd::Offload offload(config_.offload_from.value_or(0));
  for (int64_t i = first; i < end; ++i) {
    const Block& block = this->block(i);
    std::optional<autograd::Offload::Group> group;
    if (config_.offload_from && training) group.emplace(offload, i + 2 < config_.layers);
    if (!config_.recompute.block || !training) {
      std::tie(stream.x, stream.branch) = block(stream.x, stream.branch, tokens, step);
      continue;
    }
    const auto run = [&block, step, tokens](const std::vector<Tensor>& inputs) {
      const auto [sum, next] = block(inputs[0], inputs.size() > 1 ? inputs[1] : Tensor(), tokens, step);
      return std::vector<Tensor>{sum, next};
    };
    std::vector<Tensor> inputs = {stream.x};
    if (stream.branch.defined()) inputs.push_back(stream.branch);
    const std::vector<Tensor> outputs = autograd::checkpoint(run, inputs);
    stream.x = outputs[0], stream.branch = outputs[1];
  }
  return stream;
}

Tensor Gpt::finish(const GptStream& stream, const Tensor& targets, const GptStep& step) const {
  if (!has_head()) fail(ErrorKind::kState, "gpt", "this process does not hold the head");
  if (tokens_of(targets.shape(), part_, step).context != nullptr && !(step.valid_tokens > 0) &&
      !step.valid_tokens_at.defined()) {
    fail(ErrorKind::kValue, "gpt", "the loss of a part of the tokens is divided by the valid tokens of all ranks, and ",
         "the step does not give their number. Hint: GptStep::valid_tokens");
  }
  const Tensor x = ln_f_->add_and_norm(stream.x, stream.branch, keep(config_.recompute.norm)).normed;
  LinearCrossEntropyOptions options;
  options.ignore_index = -1;
  options.valid_tokens = step.valid_tokens;
  options.valid_tokens_at = step.valid_tokens_at;
  const int64_t rows = targets.numel();
  if (split_.active()) {
    const auto gather = [group = part_.tensor](const Tensor& parts) { return group->all_gather(parts); };
    options.slice = {split_.share(config_.vocab).begin, config_.vocab,
                     (config_.vocab + split_.ranks() - 1) / split_.ranks(), gather};
  }
  const Tensor all = split_.enter(split_.sequence() ? x : x.reshape({rows, config_.width}), rows);
  return linear_cross_entropy(all, head_, targets.reshape({rows}), options);
}

Tensor Gpt::logits(const Tensor& ids) const {
  require_whole("logits");
  require_uncut("logits");
  const GptStream stream = blocks(begin(ids), 0, config_.layers);
  return linear(ln_f_->add_and_norm(stream.x, stream.branch, keep(config_.recompute.norm)).normed, head_);
}

Tensor Gpt::loss(const Tensor& ids, const Tensor& targets, const GptStep& step) const {
  if (!(targets.shape() == ids.shape())) {
    fail(ErrorKind::kShape, "gpt", "targets must have the shape of ids, got ", targets.describe(), " and ",
         ids.describe());
  }
  require_whole("a loss");
  return finish(blocks(begin(ids, step), 0, config_.layers, step), targets, step);
}

Tensor Gpt::next_logits(const Tensor& ids, KvCache& cache) const {
  require_whole("generation");
  require_uncut("generation");
  const Tensor logits = finish_next(extend(begin_next(ids, cache), 0, config_.layers, cache));
  cache.advance(ids.size(1));
  return logits;
}

GptStream Gpt::begin_next(const Tensor& ids, const KvCache& cache) const {
  if (!embeds()) fail(ErrorKind::kState, "gpt", "this process does not hold the embeddings");
  const autograd::NoGrad no_grad;
  return {embed(ids, cache.positions_, dist::SequenceLayout(ids.size(1), 1)), {}, ids.shape()};
}

GptStream Gpt::extend(GptStream stream, int64_t first, int64_t end, KvCache& cache) const {
  const autograd::NoGrad no_grad;
  const int64_t channels = split_.share(config_.heads).count() * (config_.width / config_.heads);
  cache.layers_.resize(blocks_.size());
  for (int64_t i = first; i < end; ++i) {
    const Block& block = this->block(i);
    auto& [keys, values] = cache.layers_[static_cast<size_t>(i)];
    if (!keys.defined()) {
      const Shape shape = {stream.ids[0], config_.context, channels};
      keys = Tensor::empty(shape, stream.x.dtype(), stream.x.device());
      values = Tensor::empty(shape, stream.x.dtype(), stream.x.device());
    }
    std::tie(stream.x, stream.branch) = block.extend(stream, cache.positions_, keys, values);
  }
  return stream;
}

Tensor Gpt::finish_next(const GptStream& stream) const {
  if (!has_head()) fail(ErrorKind::kState, "gpt", "this process does not hold the head");
  const autograd::NoGrad no_grad;
  const int64_t rows = stream.ids[0], count = stream.ids[1];
  Tensor x = ln_f_->add_and_norm(stream.x, stream.branch).normed;
  if (split_.sequence()) x = split_.enter(x, rows * count).reshape({rows, count, config_.width});
  const Tensor logits = linear(x.select(1, count - 1), head_);
  if (!split_.active()) return logits;
  // The words of all ranks, one after the other.
  const dist::Counts words = dist::even_counts(config_.vocab, split_.ranks());
  return part_.tensor->all_gather(logits.transpose(0, 1).contiguous(), words).transpose(0, 1).contiguous();
}

}  // namespace weft::models
