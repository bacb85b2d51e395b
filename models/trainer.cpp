#include "models/trainer.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <optional>
#include <tuple>

#include "core/autograd.h"
#include "core/backend.h"
#include "ops/matmul.h"

namespace weft::models {
namespace {

/// Adds up the time between its calls.
class Stopwatch {
 public:
  void lap(double& into) {
    const auto now = std::chrono::steady_clock::now();
    into += std::chrono::duration<double>(now - last_).count();
    last_ = now;
  }

 private:
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

bool all_finite(const Tensor& tensor) {
  const std::vector<double> values = tensor.to_vector<double>();
  return std::all_of(values.begin(), values.end(), [](double value) { return std::isfinite(value); });
}

}  // namespace

Trainer::Trainer(Gpt& gpt, optim::Optimizer& optimizer, text::Loader& loader, const optim::CosineSchedule& schedule,
                 int64_t accumulate, int64_t step)
    : gpt_(gpt),
      optimizer_(optimizer),
      loader_(loader),
      schedule_(schedule),
      accumulate_(accumulate),
      step_(step),
      parameters_(gpt.parameters()),
      device_(parameters_.front().tensor.device()),
      graph_(GraphUse::off, device_) {
  if (accumulate < 1) fail(ErrorKind::kValue, "trainer", "a step needs at least one micro-batch, got ", accumulate);
}

std::string Trainer::use_graph(GraphUse use) {
  graph_ = StepGraph(use, device_);
  return graph_.reason(host_work());
}

void Trainer::parallelize(ParallelGpt& parallel, int64_t micro_batches) {
  const int64_t share = parallel.shares(micro_batches)[static_cast<size_t>(parallel.data_rank())];
  if (share != accumulate_) {
    fail(ErrorKind::kValue, "trainer", "of a step's ", micro_batches, " micro-batches this rank has ", share,
         "; the trainer was made for ", accumulate_);
  }
  parallel_ = &parallel;
  micro_batches_ = micro_batches;
}

std::string Trainer::host_work() const {
  if (parallel_ != nullptr) return "gradients are exchanged with other ranks";
  if (const std::string work = optimizer_.host_work(); !work.empty()) return work;
  if (gpt_.config().offload_from) return "activations wait in the host's memory";
  if (autograd::RecordObserver::active()) return "a RecordObserver looks at the tensors of the step";
  if (autograd::SavedTensorHooks::current() != nullptr) return "SavedTensorHooks take the step's saved tensors";
  for (const Parameter& parameter : parameters_) {
    if (parameter.tensor.has_hooks()) return concat("parameter ", quoted(parameter.name), " has a gradient hook");
  }
  return "";
}

void Trainer::send(const std::vector<text::Batch>& batches, const StepMetrics& metrics) {
  std::string shapes;
  std::vector<int32_t> tokens;
  for (const text::Batch& batch : batches) {
    shapes += concat(shapes.empty() ? "" : " ", '[', batch.rows, ", ", batch.context, ']');
    tokens.insert(tokens.end(), batch.inputs.begin(), batch.inputs.end());
    tokens.insert(tokens.end(), batch.targets.begin(), batch.targets.end());
  }
  if (shapes != shapes_ || !tokens_.defined()) {
    const MemoryScope scope(MemoryCategory::data);
    const DType wide = parameters_.front().tensor.dtype() == DType::f64 ? DType::f64 : DType::f32;
    tokens_ = Tensor::empty({static_cast<int64_t>(tokens.size())}, DType::i32, device_);
    numbers_ = Tensor::empty({3}, DType::f64, device_);
    losses_ = Tensor::empty({static_cast<int64_t>(batches.size())}, wide, device_);
    batches_.clear();
    int64_t begin = 0;
    for (const text::Batch& batch : batches) {
      const int64_t count = batch.rows * batch.context;
      const auto view = [&](int64_t at) { return tokens_.narrow(0, at, count).reshape({batch.rows, batch.context}); };
      batches_.push_back({view(begin), view(begin + count)});
      begin += 2 * count;
    }
    shapes_ = shapes;
  }
  if (DryRun::active()) return;
  const double numbers[] = {static_cast<double>(metrics.step), static_cast<double>(metrics.valid), metrics.loss_scale};
  backend(device_).to_device(tokens_.raw(), tokens.data(), tokens.size() * sizeof(int32_t));
  backend(device_).to_device(numbers_.raw(), numbers, sizeof numbers);
}

GptStep Trainer::settings(size_t i) const {
  GptStep settings;
  settings.first_row = first_rows_[i];
  settings.step_at = numbers_.narrow(0, 0, 1);
  settings.valid_tokens_at = numbers_.narrow(0, 1, 1);
  return settings;
}

void Trainer::compute(const StepMetrics& metrics, StepTimes& times) {
  Stopwatch watch;
  Tensor losses = losses_;
  if (parallel_ == nullptr) {
    for (size_t i = 0; i < batches_.size(); ++i) {
      std::optional<Range> range(std::in_place, "forward");
      const Tensor loss = gpt_.loss(batches_[i].inputs, batches_[i].targets, settings(i));
      losses_.select(0, static_cast<int64_t>(i)).copy_(loss.detach());
      watch.lap(times.forward);
      range.emplace("backward");
      loss.backward(numbers_.select(0, 2).to(loss.dtype()));
      watch.lap(times.backward);
    }
  } else {
    const Range range("forward and backward");
    losses = parallel_->run(batches_, [this](size_t i) { return settings(i); }, metrics.loss_scale);
    watch.lap(times.passes);
  }
  const Range range("optimizer");
  if (parallel_ != nullptr) parallel_->reduce();
  if (fp8_) {
    // Weights in 8 bits are of this step alone, and their memory is the optimizer's.
    fp8_->forget_weights();
    if (parallel_ != nullptr && !DryRun::active() && all_finite(losses)) fp8_counts_ = parallel_->fp8_counts();
    // Conversion hides infinities: without this the update would not know of them.
    if (parallel_ == nullptr) {
      const autograd::NoGrad no_grad;
      losses = cat({losses, fp8_->verdict()});
    }
  }
  optimizer_.queue(losses);
  watch.lap(times.optimizer);
}

void Trainer::begin_step(const std::vector<text::Batch>& batches, StepMetrics& metrics) {
  first_rows_.clear();
  int64_t rows = 0;
  for (const text::Batch& batch : batches) {
    first_rows_.push_back(rows);
    rows += batch.rows;
  }
  if (parallel_ == nullptr) return;
  parallel_->begin_step(micro_batches_);
  for (size_t i = 0; i < batches.size(); ++i)
    first_rows_[i] = parallel_->micro_batch(static_cast<int64_t>(i)) * batches[i].rows;
  std::tie(metrics.tokens, metrics.valid) = parallel_->token_counts(metrics.tokens, metrics.valid);
}

StepMetrics Trainer::step() {
  const Range range("step");
  StepMetrics metrics;
  metrics.step = step_;
  metrics.lr = schedule_.at(step_);
  if (loss_scale_) metrics.loss_scale = loss_scale_->value();
  Stopwatch watch;
  std::vector<text::Batch> batches;
  for (int64_t i = 0; i < accumulate_; ++i) {
    batches.push_back(loader_.next());
    metrics.tokens += batches.back().rows * batches.back().context;
    metrics.valid += batches.back().valid;
  }
  optimizer_.zero_grad();
  begin_step(batches, metrics);
  send(batches, metrics);
  optimizer_.prepare(metrics.lr, {.factor = 1 / metrics.loss_scale, .skip_overflow = loss_scale_.has_value()});
  watch.lap(metrics.times.data);
  if (fp8_) fp8_->begin_step();

  const std::string frozen =
      concat("micro-batches ", shapes_, gpt_.is_training() ? ", training" : ", without dropout",
             AllowTf32::active() ? ", tf32" : "", fp8_ && fp8_->updates() == 0 ? ", fp8 without a history" : "");
  StepTimes split;
  graph_.run(frozen, host_work(), parameters_, [&] { compute(metrics, split); });
  // The host waits here, once: a device that waits for the host within a step idles.
  Stopwatch finishing;
  const optim::StepReport report = finish_update();
  metrics.loss = report.loss;
  // Of tensors in 8 bits the first one with an infinity is named, unless a loss says more.
  if (fp8_ && parallel_ == nullptr && !DryRun::active() && (std::isfinite(report.loss) || all_finite(losses_)))
    fp8_counts_ = fp8_->counts();
  if (!std::isfinite(report.loss)) explain_loss(failed_step(), report.loss);
  if (parallel_ != nullptr) parallel_->gather();
  if (fp8_) metrics.fp8 = fp8_counts_;
  metrics.skipped = report.skipped;
  if (loss_scale_) loss_scale_->update(report.skipped);
  if (fp8_) fp8_->update();
  optimizer_.zero_grad();
  if (device_.kind == DeviceKind::cpu) {
    finishing.lap(split.optimizer);
    split.data = metrics.times.data;
    metrics.times = split;
  } else {
    watch.lap(metrics.times.device);
  }
  metrics.grad_norm = report.grad_norm;
  metrics.clip_factor = report.clip_factor;
  ++step_;
  return metrics;
}

FailedStep Trainer::failed_step() const {
  return {.step = step_, .gpt = gpt_, .parallel = parallel_, .batches = batches_, .settings = [this](size_t i) {
            return settings(i);
          }};
}

optim::StepReport Trainer::finish_update() {
  try {
    return optimizer_.finish();
  } catch (const Error& error) {
    // All ranks have failed alike, but each knows of its own gradients only.
    const bool spread = parallel_ != nullptr && parallel_->world().size() > 1;
    if (spread && error.kind() == ErrorKind::kValue) explain_gradients(failed_step());
    throw;
  }
}

}  // namespace weft::models
