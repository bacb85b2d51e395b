#include "models/trainer.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <optional>

#include "core/autograd.h"

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

struct NotFinite {
  int64_t element;
  double value;
};
std::optional<NotFinite> first_not_finite(const Tensor& tensor) {
  const autograd::NoGrad no_grad;
  const std::vector<double> values = tensor.to_vector<double>();
  const auto found = std::find_if(values.begin(), values.end(), [](double value) { return !std::isfinite(value); });
  if (found == values.end()) return std::nullopt;
  return NotFinite{found - values.begin(), *found};
}

}  // namespace

std::pair<Tensor, Tensor> to_tensors(const text::Batch& batch, Device device) {
  const MemoryScope scope(MemoryCategory::data);
  const Shape shape = {batch.rows, batch.context};
  return {Tensor::from(batch.inputs, shape, device), Tensor::from(batch.targets, shape, device)};
}

Trainer::Trainer(Gpt& gpt, optim::Optimizer& optimizer, text::Loader& loader, const optim::CosineSchedule& schedule,
                 int64_t accumulate, int64_t step)
    : gpt_(gpt), optimizer_(optimizer), loader_(loader), schedule_(schedule), accumulate_(accumulate), step_(step) {
  if (accumulate < 1) fail(ErrorKind::kValue, "trainer", "a step needs at least one micro-batch, got ", accumulate);
}

StepMetrics Trainer::step() {
  StepMetrics metrics;
  metrics.step = step_;
  metrics.lr = schedule_.at(step_);
  const Device device = gpt_.parameters().front().tensor.device();
  Stopwatch watch;
  std::vector<text::Batch> batches;
  for (int64_t i = 0; i < accumulate_; ++i) {
    batches.push_back(loader_.next());
    metrics.tokens += batches.back().rows * batches.back().context;
    metrics.valid += batches.back().valid;
  }
  watch.lap(metrics.times.data);
  GptStep settings;
  settings.step = static_cast<uint64_t>(step_);
  settings.valid_tokens = static_cast<double>(metrics.valid);
  // Losses are read when all work of the step is queued: a device that waits for the host between micro-batches idles.
  if (loss_scale_) metrics.loss_scale = loss_scale_->value();
  if (fp8_) fp8_->begin_step();
  std::vector<Tensor> losses;
  for (const text::Batch& batch : batches) {
    const auto [inputs, targets] = to_tensors(batch, device);
    const Tensor loss = gpt_.loss(inputs, targets, settings);
    losses.push_back(loss.detach());
    watch.lap(metrics.times.forward);
    loss.backward(Tensor::full(loss.shape(), metrics.loss_scale, loss.dtype(), device));
    settings.first_row += batch.rows;
    watch.lap(metrics.times.backward);
  }
  if (!DryRun::active()) {
    for (const Tensor& loss : losses) metrics.loss += loss.item();
    if (!std::isfinite(metrics.loss)) explain_loss(metrics.loss, batches, settings);
    if (fp8_) metrics.fp8 = fp8_->counts();
  }
  watch.lap(metrics.times.backward);
  const optim::StepReport report =
      optimizer_.step(metrics.lr, {.factor = 1 / metrics.loss_scale, .skip_overflow = loss_scale_.has_value()});
  metrics.skipped = report.skipped;
  if (loss_scale_) loss_scale_->update(report.skipped);
  if (fp8_) fp8_->update();
  optimizer_.zero_grad();
  watch.lap(metrics.times.optimizer);
  metrics.grad_norm = report.grad_norm;
  metrics.clip_factor = report.clip_factor;
  ++step_;
  return metrics;
}

void Trainer::explain_loss(double loss, const std::vector<text::Batch>& batches, GptStep settings) const {
  const auto failed = concat("the loss of step ", step_, " is ", loss, ": ");
  constexpr const char* kAfter = ". No weight was changed by this step. Hint: a lower learning rate or more warm-up";
  const Parameters parameters = gpt_.parameters();
  for (const Parameter& parameter : parameters) {
    if (const auto at = first_not_finite(parameter.tensor)) {
      fail(ErrorKind::kValue, "trainer", failed, "weight ", quoted(parameter.name), " is ", at->value, " at element ",
           grouped(at->element), kAfter);
    }
  }
  std::string weights = "before the first weight";
  const autograd::RecordObserver observer(
      [&](const char* op, const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs) {
        std::string used;
        for (const Tensor& input : inputs) {
          for (const Parameter& parameter : parameters) {
            if (input.defined() && input.storage() == parameter.tensor.storage())
              used += (used.empty() ? "" : ", ") + parameter.name;
          }
        }
        if (!used.empty()) weights = "at or after " + used;
        for (const Tensor& output : outputs) {
          if (!is_float(output.dtype())) continue;
          const auto at = first_not_finite(output);
          if (!at) continue;
          fail(ErrorKind::kValue, "trainer", failed,
               "every weight is finite, and the first tensor that is not is the output of ", op, " ", output.describe(),
               ", ", weights, ", with ", at->value, " at element ", grouped(at->element), kAfter);
        }
      });
  settings.first_row = 0;
  for (const text::Batch& batch : batches) {
    const auto [inputs, targets] = to_tensors(batch, parameters.front().tensor.device());
    gpt_.loss(inputs, targets, settings);
    settings.first_row += batch.rows;
  }
  fail(ErrorKind::kValue, "trainer", failed,
       "every weight and every tensor of the forward pass is finite: the sum over the micro-batches overflowed",
       kAfter);
}

EvaluationResult evaluate(Gpt& gpt, const text::Evaluation& data, const std::function<bool(double)>& progress) {
  const autograd::NoGrad no_grad;
  const bool training = gpt.is_training();
  gpt.eval();
  const Device device = gpt.parameters().front().tensor.device();
  double nats = 0;
  EvaluationResult result;
  for (int64_t i = 0; i < data.batches(); ++i) {
    const text::Batch batch = data.batch(i);
    const auto [inputs, targets] = to_tensors(batch, device);
    nats += gpt.loss(inputs, targets).item() * static_cast<double>(batch.valid);
    result.tokens += batch.valid;
    if (progress && !progress(static_cast<double>(i + 1) / static_cast<double>(data.batches()))) break;
  }
  gpt.train(training);
  result.nats_per_token = nats / static_cast<double>(result.tokens);
  return result;
}

}  // namespace weft::models
