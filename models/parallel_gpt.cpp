#include "models/parallel_gpt.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/autograd.h"
#include "dist/mesh_norms.h"
#include "models/fp8_agreement.h"
#include "models/stage_costs.h"

namespace weft::models {
namespace {

using dist::Axis;
constexpr const char* kWhere = "parallel gpt";
/// What embeds tokens and is the head's matrix too.
constexpr const char* kTable = "wte.weight";

/// What of the model a rank holds: chunk c of its stages is stage c * ranks + rank.
GptPart part_of(const ParallelOptions& options, const GptConfig& config, int rank, dist::Group& tensor,
                dist::Group& context) {
  GptPart part;
  part.separate_head = true, part.tensor = &tensor, part.sequence = options.sequence, part.context = &context;
  part.values = options.zero != dist::Zero::kParameters;
  const std::vector<int64_t> stages = pipeline_stages(options, config);
  const auto ranks = static_cast<size_t>(options.mesh.size(Axis::pp));
  for (auto stage = static_cast<size_t>(rank); stage + 1 < stages.size(); stage += ranks)
    part.layers.push_back({stages[stage], stages[stage + 1]});
  return part;
}

/// ParallelGpt::cuts_.
std::vector<int64_t> cuts_of(const ParallelOptions& options, const GptConfig& config) {
  if (options.zero != dist::Zero::kParameters || options.mesh.size(Axis::pp) > 1)
    return pipeline_stages(options, config);
  std::vector<int64_t> cuts(static_cast<size_t>(config.layers) + 1);
  std::iota(cuts.begin(), cuts.end(), int64_t{0});
  cuts.push_back(config.layers);
  return cuts;
}

const ParallelOptions& checked(const dist::Group& world, const ParallelOptions& options) {
  if (options.mesh.size() != world.size()) {
    fail(ErrorKind::kValue, kWhere, "the mesh ", quoted(options.mesh.to_string()), " is for ", options.mesh.size(),
         " ranks, there are ", world.size());
  }
  return options;
}

/// Of the ranks that add up gradients, this one's neighbours that share out states with it.
dist::Group shard_group(const dist::Group& all, const ParallelOptions& options) {
  const int size = options.shard_ranks == 0 ? all.size() : options.shard_ranks;
  if (size < 1 || all.size() % size != 0)
    fail(ErrorKind::kValue, kWhere, "ranks that share out states must divide the ", all.size(), " copies, got ", size);
  if (size < all.size() && options.zero == dist::Zero::kGradients)
    fail(ErrorKind::kValue, kWhere,
         "groups that share out states are for ZeRO 1 and 3; with 2, which adds up the "
         "micro-batches of all copies one by one, all are one group");
  std::vector<int> ranks(static_cast<size_t>(size));
  std::iota(ranks.begin(), ranks.end(), all.rank() / size * size);
  return all.subgroup(ranks, concat("shards of ", all.name()));
}

/// The ranks with this one's place in all such groups.
dist::Group replica_group(const dist::Group& all, int size) {
  std::vector<int> ranks;
  for (int rank = all.rank() % size; rank < all.size(); rank += size) ranks.push_back(rank);
  return all.subgroup(ranks, concat("replicas of ", all.name()));
}

constexpr std::array kData = {Axis::dp}, kPipeline = {Axis::pp}, kTensor = {Axis::tp}, kContext = {Axis::cp};
constexpr std::array kGradients = {Axis::dp, Axis::cp};

}  // namespace

int64_t layer_of(const std::string& parameter, const GptConfig& config) {
  if (parameter.starts_with("h.")) return std::stoll(parameter.substr(2));
  return parameter.starts_with("ln_f.") ? config.layers : -1;
}

std::vector<int64_t> pipeline_stages(const ParallelOptions& options, const GptConfig& config) {
  config.check();
  const int count = options.mesh.size(Axis::pp) * options.chunks;
  if (count < 1) fail(ErrorKind::kValue, kWhere, "there must be at least one stage a rank, got ", options.chunks);
  if (count > config.layers) {
    fail(ErrorKind::kValue, kWhere, "a pipeline of ", count, " stages needs as many layers at least, got ",
         config.layers);
  }
  if (options.stage_layers.empty()) {
    const std::vector<int> cuts = dist::split_into_stages(counted_layer_costs(config), count);
    return {cuts.begin(), cuts.end()};
  }
  std::vector<int64_t> cuts = {0};
  for (const int64_t layers : options.stage_layers) {
    if (layers < 1) fail(ErrorKind::kValue, kWhere, "every stage needs at least one layer, got ", layers);
    cuts.push_back(cuts.back() + layers);
  }
  if (options.stage_layers.size() != static_cast<size_t>(count) || cuts.back() != config.layers) {
    fail(ErrorKind::kValue, kWhere, "layers of stages must be given for all ", count, " and add up to ", config.layers,
         ", got ", options.stage_layers.size(), " that add up to ", cuts.back());
  }
  return cuts;
}

ParallelGpt::ParallelGpt(dist::Group& world, const ParallelOptions& options, const GptConfig& config, Device device,
                         uint64_t seed, DType dtype)
    : world_(world),
      options_(checked(world, options)),
      chooser_(options.mesh.rank_of({0, options.mesh.size(Axis::pp) - 1, 0, 0})),
      device_(device),
      dtype_(dtype),
      data_(world.subgroup(options.mesh, kData)),
      pipeline_(world.subgroup(options.mesh, kPipeline)),
      tensor_(world.subgroup(options.mesh, kTensor)),
      context_(world.subgroup(options.mesh, kContext)),
      gradients_(world.subgroup(options.mesh, kGradients)),
      shards_(shard_group(gradients_, options)),
      cuts_(cuts_of(options, config)),
      gpt_(config, device, seed, dtype, part_of(options, config, pipeline_.rank(), tensor_, context_)) {
  std::vector<std::string> names;
  std::vector<int64_t> places;
  for (const Parameter& parameter : gpt_.parameters()) {
    names.push_back(parameter.name);
    places.push_back(layer_of(parameter.name, config));
  }
  const int last = pipeline_.size() - 1;
  if (shards_.size() < gradients_.size()) replicas_.emplace(replica_group(gradients_, shards_.size()));
  dist::DataParallelOptions data_options{.zero = options.zero, .bucket_bytes = options.bucket_bytes};
  if (gpt_.embeds() && gpt_.has_head()) {
    data_options.second_uses = {{.parameter = kTable, .leaf = gpt_.head()}};
  } else if (gpt_.embeds() || gpt_.has_head()) {
    ends_.emplace(pipeline_.subgroup(std::array{0, last}, concat("ends of ", pipeline_.name())));
    data_options.second_uses = {{.parameter = kTable, .pair = &*ends_}};
  }
  data_options.replicas = replicas_ ? &*replicas_ : nullptr;
  if (runs_units()) {
    data_options.units = gpt_.units();
  } else if (sharded()) {
    data_options.units = {names};
  }
  data_parallel_ = std::make_unique<dist::DataParallel>(shards_, gpt_.parameters(), data_options);
  if (sharded()) gpt_.draw(parameters(), parts());
  const dist::MeshNorms::Groups groups{.shards = options.zero == dist::Zero::kNone ? nullptr : &shards_,
                                       .tensor = &tensor_,
                                       .stages = last > 0 ? &pipeline_ : nullptr};
  norms_ = std::make_shared<dist::MeshNorms>(groups, names, places);
}

ParallelGpt::~ParallelGpt() = default;

std::vector<int64_t> ParallelGpt::shares(int64_t micro_batches) const {
  if (micro_batches < data_.size() || (!consecutive() && micro_batches % data_.size() != 0)) {
    fail(ErrorKind::kValue, kWhere, "a step needs ",
         consecutive() ? "at least one micro-batch for each of " : "as many micro-batches for each of ", data_.size(),
         " data ranks, got ", micro_batches);
  }
  return dist::micro_batch_shares(micro_batches, data_.size());
}

void ParallelGpt::begin_step(int64_t micro_batches) {
  shares_ = shares(micro_batches);
  std::vector<int64_t> counts;
  for (const int64_t share : shares_)
    counts.insert(counts.end(), static_cast<size_t>(gradients_.size() / data_.size()), share);
  data_parallel_->begin_step(counts);
}

int64_t ParallelGpt::micro_batch(int64_t i) const {
  if (!consecutive()) return i * data_.size() + data_.rank();
  return std::accumulate(shares_.begin(), shares_.begin() + data_.rank(), i);
}

std::pair<int64_t, int64_t> ParallelGpt::token_counts(int64_t tokens, int64_t valid) {
  const Tensor counts = Tensor::from(std::vector<int64_t>{tokens, valid}, {2}, device_);
  data_.all_reduce_(counts);
  const std::vector<int64_t> sums = counts.to_vector<int64_t>();
  return {sums[0], sums[1]};
}

ParallelGpt::OwnTokens ParallelGpt::own_tokens(const MicroBatch& batch, GptStep step) {
  if (context_.size() == 1) return {batch, step};
  const autograd::NoGrad no_grad;
  step.layout = dist::SequenceLayout(batch.inputs.size(1), context_.size());
  const auto own = [&](const Tensor& ids) { return step.layout->take(ids, 1, context_.rank()).contiguous(); };
  return {{own(batch.inputs), own(batch.targets)}, step};
}

ParallelGpt::Passage ParallelGpt::loss_passage(const OwnTokens& own) const {
  return {.ids = own.batch.inputs.shape(),
          .begin = [this, own] { return gpt_.begin(own.batch.inputs, own.step); },
          .blocks = [this, own](GptStream stream, int64_t first,
                                int64_t end) { return gpt_.blocks(std::move(stream), first, end, own.step); },
          .finish = [this, own](const GptStream& stream) { return gpt_.finish(stream, own.batch.targets, own.step); }};
}

Tensor ParallelGpt::forward(const std::optional<Passage>& passage) {
  const int rank = pipeline_.rank(), ranks = pipeline_.size();
  GptStream stream;
  Tensor result;
  for (int chunk = 0; chunk < chunks(); ++chunk) {
    const auto stage = static_cast<size_t>(chunk * ranks + rank);
    if (runs_units()) data_parallel_->begin_unit(stage, dist::Pass::kForward);
    if (passage) {
      if (stage == 0) {
        stream = passage->begin();
      } else if (ranks > 1) {
        const Shape shape = gpt_.stream_shape(passage->ids);
        stream = {Tensor::empty(shape, dtype_, device_), Tensor::empty(shape, dtype_, device_), passage->ids};
        pipeline_.recv_(stream.x, (rank + ranks - 1) % ranks);
        pipeline_.recv_(stream.branch, (rank + ranks - 1) % ranks);
      }
      stream = passage->blocks(std::move(stream), cuts_[stage], cuts_[stage + 1]);
      if (stage + 2 == cuts_.size()) {
        result = passage->finish(stream);
      } else if (ranks > 1) {
        pipeline_.send(stream.x.detach().contiguous(), (rank + 1) % ranks);
        pipeline_.send(stream.branch.detach().contiguous(), (rank + 1) % ranks);
      }
    }
    if (runs_units()) end_unit(stage, dist::Pass::kForward);
  }
  return result;
}

void ParallelGpt::prepare_pipeline() {
  const Shape& ids = own_.front().batch.inputs.shape();
  for (const OwnTokens& own : own_) {
    if (!(own.batch.inputs.shape() == ids)) {
      fail(ErrorKind::kShape, kWhere, "micro-batches of a pipeline must have one shape, got ", ids, " and ",
           own.batch.inputs.shape());
    }
  }
  const std::string wanted = concat(own_.size(), " of ", ids);
  if (executor_ && executor_for_ == wanted) return;
  std::vector<dist::PipelineStage> stages;
  const int ranks = pipeline_.size(), count = ranks * chunks();
  for (int chunk = 0; chunk < chunks(); ++chunk) {
    const int stage = chunk * ranks + pipeline_.rank();
    const int64_t first = cuts_[static_cast<size_t>(stage)], end = cuts_[static_cast<size_t>(stage) + 1];
    stages.push_back([this, stage, count, first, end](int micro_batch, const std::vector<Tensor>& inputs) {
      const auto& [batch, step] = own_[static_cast<size_t>(micro_batch)];
      const Tensor& ids = batch.inputs;
      GptStream stream = stage == 0 ? gpt_.begin(ids, step) : GptStream{inputs[0], inputs[1], ids.shape()};
      stream = gpt_.blocks(stream, first, end, step);
      if (stage < count - 1) return std::vector<Tensor>{stream.x, stream.branch};
      return std::vector<Tensor>{gpt_.finish(stream, batch.targets, step)};
    });
  }
  const dist::PipelineShape schedule{ranks, static_cast<int>(own_.size()), chunks()};
  const auto kind = runs_units() ? dist::PipelineKind::kGPipe : options_.schedule;
  executor_.emplace(pipeline_, dist::make_pipeline_schedule(kind, schedule), std::move(stages),
                    std::vector<dist::BoundaryTensor>(2, {gpt_.stream_shape(ids), dtype_}), device_);
  executor_for_ = wanted;
  if (!runs_units()) return;
  executor_->set_hooks(
      {.begin = [this](int unit, dist::Pass pass) { data_parallel_->begin_unit(static_cast<size_t>(unit), pass); },
       .end = [this](int unit, dist::Pass pass) { end_unit(static_cast<size_t>(unit), pass); }});
}

Tensor ParallelGpt::run(std::span<const MicroBatch> batches, const std::function<GptStep(size_t)>& settings,
                        double loss_scale) {
  const int64_t share = shares_.empty() ? 0 : shares_[static_cast<size_t>(data_.rank())];
  if (static_cast<int64_t>(batches.size()) != share) {
    fail(ErrorKind::kValue, kWhere, "the step was begun with ", share, " micro-batches of this rank, got ",
         batches.size());
  }
  std::vector<OwnTokens> own_batches;
  for (size_t i = 0; i < batches.size(); ++i) own_batches.push_back(own_tokens(batches[i], settings(i)));
  std::vector<Tensor> losses;
  if (pipeline_.size() == 1 && !sharded()) {
    for (const auto& [batch, step] : own_batches) {
      const Tensor loss = gpt_.loss(batch.inputs, batch.targets, step);
      losses.push_back(loss.detach().reshape({1}));
      loss.backward(Tensor::full({}, loss_scale, loss.dtype(), device_));
    }
  } else {
    own_ = own_batches;
    prepare_pipeline();
    // A pipeline's micro-batches are under way in both directions at once: its rank has all weights until they are
    // done.
    if (gathers_all_at_once()) {
      data_parallel_->begin_unit(0, dist::Pass::kForward);
      data_parallel_->end_unit(0, dist::Pass::kForward);
      data_parallel_->begin_unit(0, dist::Pass::kBackward);
    }
    for (const Tensor& loss : executor_->run(loss_scale)) losses.push_back(loss.reshape({1}));
    if (gathers_all_at_once()) end_unit(0, dist::Pass::kBackward);
    own_ = {};
  }
  const autograd::NoGrad no_grad;
  const DType wide = dtype_ == DType::f64 ? DType::f64 : DType::f32;
  const Tensor own = losses.empty() ? Tensor::empty({share}, wide, device_) : cat(losses);
  if (pipeline_.size() > 1) pipeline_.broadcast_(own, pipeline_.size() - 1);
  if (context_.size() > 1) context_.all_reduce_(own);
  // In the order of their numbers: ranks have ranges of them, or every n-th.
  Tensor all = data_.all_gather(own, shares_);
  if (!consecutive()) all = all.reshape({data_.size(), share}).transpose(0, 1);
  return all.contiguous().reshape({-1});
}

void ParallelGpt::forward_again(std::span<const MicroBatch> batches, const std::function<GptStep(size_t)>& settings,
                                const std::function<void(int64_t micro_batch, int64_t layer)>& entering) {
  if (gathers_all_at_once()) data_parallel_->begin_unit(0, dist::Pass::kForward);
  const auto most = static_cast<size_t>(*std::max_element(shares_.begin(), shares_.end()));
  for (size_t i = 0; i < most; ++i) {
    if (i >= batches.size()) {
      // The others need this rank's weights.
      if (runs_units()) forward({});
      continue;
    }
    const int64_t number = micro_batch(static_cast<int64_t>(i));
    entering(number, 0);
    Passage passage = loss_passage(own_tokens(batches[i], settings(i)));
    passage.blocks = [&, blocks = passage.blocks](GptStream stream, int64_t first, int64_t end) {
      entering(number, first);
      return blocks(std::move(stream), first, end);
    };
    forward(passage);
  }
  if (gathers_all_at_once()) end_unit(0, dist::Pass::kForward);
}

void ParallelGpt::end_unit(size_t unit, dist::Pass pass) {
  data_parallel_->end_unit(unit, pass);
  if (fp8_) fp8_->forget_weights();
}

std::shared_ptr<optim::DelayedScaling> ParallelGpt::use_fp8() {
  fp8_ = gpt_.use_fp8();
  // Data ranks have other micro-batches and the same weights.
  for (size_t i = 0; data_.rank() > 0 && i < fp8_->size(); ++i)
    fp8_->layer(i)->counts[static_cast<size_t>(Fp8Role::kWeight)] = false;
  return fp8_;
}

optim::DelayedScaling::Counts ParallelGpt::fp8_counts() {
  if (!fp8_) fail(ErrorKind::kState, kWhere, "the model does not multiply in fp8. Hint: ParallelGpt::use_fp8()");
  return agree_on_fp8(*fp8_, gpt_.config().layers, world_);
}

std::vector<double> ParallelGpt::loss_sums(int64_t count,
                                           const std::function<std::pair<MicroBatch, int64_t>(int64_t)>& batch) {
  const autograd::NoGrad no_grad;
  std::vector<double> sums(static_cast<size_t>(count), 0);
  if (gathers_all_at_once()) data_parallel_->begin_unit(0, dist::Pass::kForward);
  for (int64_t round = 0; round < count; round += data_.size()) {
    const int64_t i = round + data_.rank();
    if (i >= count) {
      // The others need this rank's weights.
      if (runs_units()) forward({});
      continue;
    }
    const auto [rows, valid] = batch(i);
    GptStep step;
    step.valid_tokens = static_cast<double>(valid);
    const Tensor mean = forward(loss_passage(own_tokens(rows, step)));
    if (mean.defined()) sums[static_cast<size_t>(i)] = mean.item() * static_cast<double>(valid);
  }
  if (gathers_all_at_once()) data_parallel_->end_unit(0, dist::Pass::kForward);
  const Tensor all = Tensor::from(sums, {count}, device_);
  if (pipeline_.size() > 1) pipeline_.broadcast_(all, pipeline_.size() - 1);
  if (context_.size() > 1) context_.all_reduce_(all);
  data_.all_reduce_(all);
  return all.to_vector<double>();
}

Tensor ParallelGpt::next_logits(const Tensor& ids, KvCache& cache) {
  const autograd::NoGrad no_grad;
  if (gathers_all_at_once()) data_parallel_->begin_unit(0, dist::Pass::kForward);
  const Tensor logits =
      forward(Passage{.ids = ids.shape(),
                      .begin = [&] { return gpt_.begin_next(ids, cache); },
                      .blocks = [&](GptStream stream, int64_t first,
                                    int64_t end) { return gpt_.extend(std::move(stream), first, end, cache); },
                      .finish = [&](const GptStream& stream) { return gpt_.finish_next(stream); }});
  if (gathers_all_at_once()) data_parallel_->end_unit(0, dist::Pass::kForward);
  cache.advance(ids.size(1));
  return logits;
}

int32_t ParallelGpt::chosen(int32_t token) {
  const Tensor choice = Tensor::from(std::vector<int32_t>{token}, {1}, device_);
  world_.broadcast_(choice, chooser_);
  return choice.to_vector<int32_t>()[0];
}

}  // namespace weft::models
