#include "models/verify/training_record.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <utility>

#include "core/autograd.h"
#include "core/random.h"

namespace weft::models {
namespace {

constexpr const char* kWhere = "training record";

/// Adds up norms as another reducer does, and keeps the sums.
class KeptNorms final : public optim::NormReducer {
 public:
  explicit KeptNorms(std::shared_ptr<optim::NormReducer> norms) : norms_(std::move(norms)) {}
  bool exact() const override { return norms_->exact(); }
  void reduce(std::span<double> squares, const Parameters& parameters) override {
    norms_->reduce(squares, parameters);
    sums_.emplace_back(squares.begin(), squares.end());
  }
  void reduce(std::span<optim::ExactSum> squares, const Parameters& parameters) override {
    norms_->reduce(squares, parameters);
    std::vector<double>& values = sums_.emplace_back();
    for (const optim::ExactSum& sum : squares) values.push_back(sum.value());
  }
  void complete(std::vector<double>& squares, const Parameters& parameters) override {
    norms_->complete(squares, parameters);
  }

  /// The sums of a step in their order: of gradients, and of LAMB those of weights and of updates.
  std::vector<std::vector<double>> take() { return std::exchange(sums_, {}); }

 private:
  std::shared_ptr<optim::NormReducer> norms_;
  std::vector<std::vector<double>> sums_;
};

/// Notes what the functions of a rank's forward passes answer with.
class Watch {
 public:
  Watch(const Parameters& parameters, const std::vector<int64_t>& micro_batches, std::vector<SeenOutput>& into)
      : micro_batches_(micro_batches),
        into_(into),
        observer_([this](const char* op, const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs) {
          see(op, inputs, outputs);
        }) {
    for (const Parameter& parameter : parameters) {
      const size_t dot = parameter.name.rfind('.');
      modules_[parameter.tensor.storage().get()] = parameter.name.substr(0, dot);
      if (parameter.name.substr(dot) == ".weight" && parameter.part && parameter.part->dim == 0)
        weights_.emplace(parameter.name.substr(0, dot), *parameter.part);
    }
  }

 private:
  void see(const char* op, const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs) {
    for (const Tensor& input : inputs) {
      const auto found = input.defined() ? modules_.find(input.storage().get()) : modules_.end();
      if (found == modules_.end() || found->second == module_) continue;
      module_ = found->second;
      counts_.clear();
    }
    for (const Tensor& output : outputs) {
      const int number = ++counts_[op];
      std::string place = (module_.empty() ? "" : module_ + ": ") + op;
      if (number > 1) place += concat(" ", number);
      // Every schedule has the forward passes of a stage in the order of the micro-batches.
      const size_t time = times_[place]++;
      if (time >= micro_batches_.size()) continue;
      const autograd::NoGrad no_grad;
      const auto weight = weights_.find(module_);
      into_.push_back({micro_batches_[time], std::move(place), output.detach().clone(),
                       weight == weights_.end() ? std::nullopt : std::optional(weight->second)});
    }
  }

  const std::vector<int64_t>& micro_batches_;
  std::vector<SeenOutput>& into_;
  std::map<std::string, size_t> times_;
  std::map<const Storage*, std::string> modules_;
  std::map<std::string, TensorPart> weights_;  ///< of modules
  std::map<std::string, int> counts_;
  std::string module_;
  autograd::RecordObserver observer_;
};

const Tensor& named(const NamedTensors& tensors, const std::string& name) {
  const auto found =
      std::find_if(tensors.begin(), tensors.end(), [&](const auto& entry) { return entry.first == name; });
  if (found == tensors.end()) fail(ErrorKind::kData, kWhere, "what a run begins with has no tensor ", quoted(name));
  return found->second;
}

/// What ranks hold of the optimizer's state: "<parameter>.<name of the state>" is cut as its parameter is.
std::vector<HeldPart> parts_of_state(const NamedTensors& state, const Parameters& parameters,
                                     const std::vector<TensorPart>& parts) {
  std::vector<HeldPart> held;
  for (const auto& [name, tensor] : state) {
    TensorPart part = TensorPart::all(tensor.shape());
    for (size_t p = 0; p < parameters.size(); ++p) {
      if (name.substr(0, name.rfind('.')) == parameters[p].name) part = parts[p];
    }
    held.push_back({name, std::move(part), tensor.detach().clone()});
  }
  return held;
}

/// The weights that a rank holds between steps, and which parts of the model's they are.
std::vector<std::pair<Parameter, TensorPart>> weights_of(ParallelGpt& parallel) {
  std::vector<std::pair<Parameter, TensorPart>> weights;
  if (parallel.sharded()) {
    const std::vector<TensorPart> parts = parallel.parts();
    for (size_t p = 0; p < parts.size(); ++p) weights.emplace_back(parallel.parameters()[p], parts[p]);
    return weights;
  }
  for (const Parameter& parameter : parallel.gpt().parameters()) {
    TensorPart part = parameter.part ? *parameter.part : TensorPart::all(parameter.tensor.shape());
    weights.emplace_back(parameter, std::move(part));
  }
  return weights;
}

void load(const TrainingState& start, const RankView& view) {
  auto& [rank, step, parallel, optimizer, fp8] = view;
  const autograd::NoGrad no_grad;
  const std::vector<TensorPart> parts = parallel.parts();
  for (const auto& [parameter, part] : weights_of(parallel)) {
    Tensor values = parameter.tensor.detach();
    values.copy_(part.of(named(start.parameters, parameter.name)).reshape(values.shape()));
  }
  NamedTensors own;
  for (const HeldPart& held : parts_of_state(optimizer.state(), parallel.parameters(), parts))
    own.emplace_back(held.name, held.part.of(named(start.state, held.name)).reshape(held.values.shape()));
  optimizer.load_state(own);
  if (fp8 == nullptr) return;
  NamedTensors scales;
  for (const auto& [name, tensor] : fp8->state()) scales.emplace_back(name, named(start.state, name));
  fp8->load_state(scales);
}

/// All state that a rank has between steps beside its weights.
NamedTensors state_of(const RankView& view) {
  NamedTensors state = view.optimizer.state();
  if (view.fp8 == nullptr) return state;
  for (auto& scales : view.fp8->state()) state.push_back(std::move(scales));
  return state;
}

/// One rank's run.
class RankRun {
 public:
  RankRun(const TrainingProblem& problem, const RecordOptions& options, dist::Group& world, TrainingRecord& record)
      : problem_(problem), options_(options), world_(world), record_(record) {}

  void run() {
    ParallelOptions layout = record_.layout;
    if (options_.watch) problem_.config.recompute = {};
    if (const auto* change = hook(&TrainingHooks::arguments)) (*change)(world_.rank(), problem_, layout);
    ParallelGpt parallel(world_, layout, problem_.config, Device::cpu(), problem_.seed, problem_.dtype);
    std::shared_ptr<optim::NormReducer> norms = parallel.norms();
    if (const auto* change = hook(&TrainingHooks::norms)) norms = (*change)(world_.rank(), norms);
    const auto kept_norms = std::make_shared<KeptNorms>(norms);
    optim::Adam optimizer(parallel.parameters(), problem_.adam, kept_norms);
    const std::shared_ptr<optim::DelayedScaling> fp8 = problem_.fp8 ? parallel.use_fp8() : nullptr;
    RankView view{world_.rank(), options_.first_step, parallel, optimizer, fp8.get()};
    if (options_.start != nullptr) {
      TrainingState start = *options_.start;
      if (const auto* change = hook(&TrainingHooks::loaded)) (*change)(world_.rank(), start);
      load(start, view);
    }
    at(TrainingMoment::kMade, view);
    for (int64_t i = 0; i < options_.steps; ++i) {
      view.step = options_.first_step + i;
      step(view, *kept_norms, record_.steps[static_cast<size_t>(i)][static_cast<size_t>(world_.rank())]);
    }
  }

 private:
  template <class Member>
  const Member* hook(Member TrainingHooks::* member) const {
    return options_.hooks != nullptr && options_.hooks->*member ? &(options_.hooks->*member) : nullptr;
  }
  void at(TrainingMoment moment, const RankView& view) const {
    if (const auto* call = hook(&TrainingHooks::at)) (*call)(moment, view);
  }

  void step(const RankView& view, KeptNorms& norms, RankStep& kept) {
    ParallelGpt& parallel = view.parallel;
    parallel.begin_step(problem_.micro_batches);
    if (view.fp8 != nullptr) view.fp8->begin_step();
    const int64_t share = parallel.shares(problem_.micro_batches)[static_cast<size_t>(parallel.data_rank())];
    at(TrainingMoment::kBegun, view);
    std::vector<MicroBatch> batches;
    std::vector<GptStep> settings;
    for (int64_t i = 0; i < share; ++i) {
      const int64_t j = parallel.micro_batch(i);
      kept.micro_batches.push_back(j);
      batches.push_back(problem_.micro_batch(view.step, j));
      GptStep& of = settings.emplace_back();
      of.step = static_cast<uint64_t>(view.step);
      of.first_row = j * problem_.rows;
      of.valid_tokens = static_cast<double>(problem_.valid_tokens(view.step));
      if (const auto* change = hook(&TrainingHooks::micro_batch))
        (*change)(view.rank, view.step, j, batches.back(), of);
    }
    std::optional<Watch> watch;
    if (options_.watch) watch.emplace(parallel.gpt().parameters(), kept.micro_batches, kept.outputs);
    const Tensor losses = parallel.run(batches, [&](size_t i) { return settings[i]; });
    watch.reset();
    kept.losses = losses.to_vector<double>();
    at(TrainingMoment::kPassed, view);
    parallel.reduce();
    if (view.fp8 != nullptr) parallel.fp8_counts();
    at(TrainingMoment::kReduced, view);
    const std::vector<TensorPart> parts = parallel.parts();
    const Parameters& own = parallel.parameters();
    for (size_t p = 0; p < own.size(); ++p) {
      const Tensor gradient = own[p].tensor.grad();
      if (gradient.defined()) kept.gradients.push_back({own[p].name, parts[p], gradient.detach().clone()});
    }
    const optim::StepReport report = view.optimizer.step(problem_.lr);
    kept.norms = {{"gradient norm", report.grad_norm}, {"clip factor", report.clip_factor}};
    if (const std::vector<std::vector<double>> sums = norms.take(); sums.size() == 3) {
      for (size_t p = 0; p < own.size(); ++p) {
        if (own[p].role != ParameterRole::weight && own[p].role != ParameterRole::embedding) continue;
        const double weight = sums[1][p], update = sums[2][p];
        const std::string& name = own[p].name;
        kept.norms.emplace_back("squared norm of " + name, weight);
        kept.norms.emplace_back("squared norm of the update of " + name, update);
        kept.norms.emplace_back("trust ratio of " + name, weight > 0 && update > 0 ? std::sqrt(weight / update) : 1);
      }
    }
    at(TrainingMoment::kUpdated, view);
    parallel.gather();
    if (view.fp8 != nullptr) view.fp8->update();
    view.optimizer.zero_grad();
    at(TrainingMoment::kGathered, view);
    for (auto& [parameter, part] : weights_of(parallel))
      kept.parameters.push_back({parameter.name, std::move(part), parameter.tensor.detach().clone()});
    kept.state = parts_of_state(state_of(view), own, parts);
  }

  TrainingProblem problem_;
  const RecordOptions& options_;
  dist::Group& world_;
  TrainingRecord& record_;
};

}  // namespace

MicroBatch TrainingProblem::micro_batch(int64_t step, int64_t j) const {
  const RandomStream stream = RandomStream(seed, "made-up data").at_step(static_cast<uint64_t>(step));
  const int64_t length = config.context;
  std::vector<int32_t> ids, targets;
  for (int64_t row = j * rows; row < (j + 1) * rows; ++row) {
    const auto at = static_cast<uint64_t>(row * (3 * length + 1));
    const auto counted = static_cast<int64_t>(stream.below(at, static_cast<uint64_t>(length) + 1));
    for (int64_t t = 0; t < length; ++t) {
      const uint64_t number = at + 1 + 3 * static_cast<uint64_t>(t);
      const auto vocab = static_cast<uint64_t>(config.vocab);
      ids.push_back(static_cast<int32_t>(stream.below(number, vocab)));
      // Not the last ones of a row alone are left out.
      const bool counts = row == 0 || (t < counted && stream.below(number + 1, 8) != 0);
      targets.push_back(counts ? static_cast<int32_t>(stream.below(number + 2, vocab)) : -1);
    }
  }
  return {Tensor::from(ids, {rows, length}), Tensor::from(targets, {rows, length})};
}

int64_t TrainingProblem::valid_tokens(int64_t step) const {
  int64_t valid = 0;
  for (int64_t j = 0; j < micro_batches; ++j) {
    for (const int32_t target : micro_batch(step, j).targets.to_vector<int32_t>()) valid += target >= 0;
  }
  return valid;
}

NamedTensors put_together(const std::vector<RankStep>& ranks, std::vector<HeldPart> RankStep::* parts) {
  struct Whole {
    std::vector<double> values;
    std::vector<bool> known;
    Shape shape;
    DType dtype = DType::f32;
  };
  std::map<std::string, Whole> wholes;
  std::vector<std::string> order;
  for (const RankStep& rank : ranks) {
    for (const HeldPart& held : rank.*parts) {
      const auto [found, added] = wholes.try_emplace(held.name);
      Whole& whole = found->second;
      if (added) {
        const auto count = static_cast<size_t>(numel(held.part.whole));
        whole = {std::vector<double>(count), std::vector<bool>(count), held.part.whole, held.values.dtype()};
        order.push_back(held.name);
      }
      const std::vector<double> values = held.values.to_vector<double>();
      held.part.for_each_run([&](int64_t at, int64_t from, int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
          const auto to = static_cast<size_t>(at + i);
          if (!whole.known[to]) whole.values[to] = values[static_cast<size_t>(from + i)];
          whole.known[to] = true;
        }
      });
    }
  }
  NamedTensors tensors;
  for (const std::string& name : order) {
    const Whole& whole = wholes.at(name);
    if (const auto missing = std::find(whole.known.begin(), whole.known.end(), false); missing != whole.known.end()) {
      fail(ErrorKind::kData, kWhere, "no rank has element ", missing - whole.known.begin(), " of ", quoted(name), ' ',
           whole.shape);
    }
    tensors.emplace_back(name, Tensor::from(whole.values, whole.shape).to(whole.dtype));
  }
  return tensors;
}

TrainingState state_after(const std::vector<RankStep>& ranks) {
  return {put_together(ranks, &RankStep::parameters), put_together(ranks, &RankStep::state)};
}

TrainingRecord record_training(const TrainingProblem& problem, const ParallelOptions& layout,
                               const RecordOptions& options) {
  const int ranks = layout.mesh.size();
  TrainingRecord record{layout, options.first_step, {}};
  record.steps.assign(static_cast<size_t>(options.steps), std::vector<RankStep>(static_cast<size_t>(ranks)));
  dist::ThreadsOptions threads;
  if (options.hooks != nullptr) threads.engine = options.hooks->engine;
  dist::run_threads(ranks, [&](dist::Group& world) { RankRun(problem, options, world, record).run(); }, threads);
  return record;
}

}  // namespace weft::models
