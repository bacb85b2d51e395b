#include "optim/adam.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "core/autograd.h"
#include "core/backend.h"
#include "ops/launch.h"
#include "optim/optimizer_kernels.h"

namespace weft::optim {
namespace {

void check(const AdamOptions& options) {
  const auto require = [](bool holds, const char* name, double value, const char* rule) {
    if (!holds) fail(ErrorKind::kValue, "adam", name, " must be ", rule, ", got ", value);
  };
  require(options.beta1 >= 0 && options.beta1 < 1, "beta1", options.beta1, "in [0, 1)");
  require(options.beta2 >= 0 && options.beta2 < 1, "beta2", options.beta2, "in [0, 1)");
  require(options.eps >= static_cast<double>(std::numeric_limits<float>::min()) && std::isfinite(options.eps), "eps",
          options.eps, "at least 1.2e-38");
  require(options.weight_decay >= 0 && std::isfinite(options.weight_decay), "weight_decay", options.weight_decay,
          "at least 0");
  require(options.clip_norm >= 0 && std::isfinite(options.clip_norm), "clip_norm", options.clip_norm,
          "at least 0 (0 is no clipping)");
  require(options.offload_piece >= 1, "offload_piece", static_cast<double>(options.offload_piece), "at least 1");
}

DType state_dtype(DType parameter) { return parameter == DType::f64 ? DType::f64 : DType::f32; }

/// A norm of gradients whose squares still fit in f32.
constexpr double kLargestNorm = 1e19;

}  // namespace

Adam::Adam(Parameters parameters, const AdamOptions& options, std::shared_ptr<NormReducer> norms)
    : Optimizer(std::move(parameters)), options_(options), norms_(std::move(norms)) {
  check(options_);
  if (norms_ == nullptr) fail(ErrorKind::kValue, "adam", "needs a NormReducer, got null");
  device_ = device_of("adam", parameters_);
  const MemoryScope scope(MemoryCategory::optimizer);
  if (options_.offload) make_stream(parameters_.empty() ? DType::f32 : state_dtype(parameters_[0].tensor.dtype()));
  for (const Parameter& parameter : parameters_) {
    const Tensor& tensor = parameter.tensor;
    const DType dtype = state_dtype(tensor.dtype());
    Slot slot;
    if (stream_) {
      const StateStream::Slot& hosted = stream_->slots()[slots_.size()];
      slot.exp_avg = hosted.exp_avg, slot.exp_avg_sq = hosted.exp_avg_sq, slot.master = hosted.master;
      const autograd::NoGrad no_grad;
      if (slot.master.defined()) slot.master.copy_(tensor);
    } else {
      slot.exp_avg = Tensor::zeros(tensor.shape(), dtype, tensor.device());
      slot.exp_avg_sq = Tensor::zeros(tensor.shape(), dtype, tensor.device());
      if (dtype != tensor.dtype()) slot.master = tensor.detach().to(dtype);
    }
    slot.version = tensor.storage()->version();
    slots_.push_back(std::move(slot));
  }
  const MemoryScope workspace(MemoryCategory::workspace);
  input_ = Tensor::empty({static_cast<int64_t>(sizeof(AdamInput))}, DType::u8, device_);
  decision_ = Tensor::empty({static_cast<int64_t>(sizeof(AdamDecision))}, DType::u8, device_);
}

void Adam::make_stream(DType dtype) {
  if (device_.kind == DeviceKind::cpu) {
    fail(ErrorKind::kDevice, "adam", "offload is for parameters on a CUDA device; on ", device_,
         " the memory is the host's already");
  }
  std::vector<StateStream::Wanted> wanted;
  for (const Parameter& parameter : parameters_) {
    if (state_dtype(parameter.tensor.dtype()) != dtype) {
      fail(ErrorKind::kDType, "adam", "offload wants the state of all parameters in one type: that of ",
           quoted(parameters_.front().name), " is ", dtype, ", that of ", quoted(parameter.name), " is not");
    }
    wanted.push_back({parameter.tensor.shape(), parameter.tensor.dtype() != dtype});
  }
  stream_.emplace(device_, dtype, wanted, options_.offload_piece);
}

NamedTensors Adam::state_tensors() const {
  NamedTensors tensors;
  for (size_t i = 0; i < slots_.size(); ++i) {
    const std::string& name = parameters_[i].name;
    tensors.emplace_back(name + ".exp_avg", slots_[i].exp_avg);
    tensors.emplace_back(name + ".exp_avg_sq", slots_[i].exp_avg_sq);
    if (slots_[i].master.defined()) tensors.emplace_back(name + ".master", slots_[i].master);
  }
  return tensors;
}

std::string Adam::host_work() const {
  if (stream_) return "the optimizer's state is kept in the host's memory";
  return norms_->on_device() ? "" : "the gradients' norm is reduced on the host";
}

void Adam::prepare(double lr, const GradientScale& scale) {
  if (!(lr >= 0) || !std::isfinite(static_cast<float>(lr))) {
    fail(ErrorKind::kValue, "adam", "the learning rate must be at least 0 and finite, got ", lr);
  }
  if (!(scale.factor > 0) || !std::isfinite(scale.factor)) {
    fail(ErrorKind::kValue, "adam", "the gradients' factor must be positive and finite, got ", scale.factor);
  }
  skip_overflow_ = scale.skip_overflow;
  if (DryRun::active()) return;
  const double t = static_cast<double>(steps_ + 1);
  const bool narrow = std::any_of(parameters_.begin(), parameters_.end(),
                                  [](const Parameter& p) { return p.tensor.dtype() != DType::f64; });
  const AdamInput input = {
      .constants = {.grad_scale = scale.factor,
                    .beta1 = options_.beta1,
                    .beta2 = options_.beta2,
                    .rest1 = 1 - options_.beta1,
                    .rest2 = 1 - options_.beta2,
                    .inverse_bias1 = 1 / (1 - std::pow(options_.beta1, t)),
                    .inverse_bias2 = 1 / (1 - std::pow(options_.beta2, t)),
                    .eps = options_.eps},
      .lr = lr,
      .clip_norm = options_.clip_norm,
      .largest_norm = narrow ? kLargestNorm : std::numeric_limits<double>::infinity(),
  };
  backend(device_).to_device(input_.raw(), &input, sizeof input);
  // Which masters follow is the host's to know, and so no part of what may be recorded.
  std::vector<AdamTensor> changed;  // by someone else
  changed_.assign(stream_ ? parameters_.size() : 0, false);
  for (size_t p = 0; p < parameters_.size(); ++p) {
    const uint64_t version = parameters_[p].tensor.storage()->version();
    if (slots_[p].version == version || !slots_[p].master.defined()) continue;
    if (stream_) {  // the update brings the master to the device
      changed_[p] = true;
    } else {
      changed.push_back(tensor_of(p));
      slots_[p].version = version;
    }
  }
  if (!changed.empty()) launch(device_, "adam", [&](auto on) { adam_follow(on, changed); });
}

AdamTensor Adam::tensor_of(size_t p) const {
  const Parameter& parameter = parameters_[p];
  const Slot& slot = slots_[p];
  return {
      .dtype = parameter.tensor.dtype(),
      .count = parameter.tensor.numel(),
      .parameter = parameter.tensor.raw(),
      .weight = slot.master.defined() ? slot.master.raw() : parameter.tensor.raw(),
      .exp_avg = slot.exp_avg.raw(),
      .exp_avg_sq = slot.exp_avg_sq.raw(),
      .weight_decay = parameter.role == ParameterRole::weight ? options_.weight_decay : 0.0,
      .number = static_cast<int64_t>(p),
  };
}

void Adam::queue(const Tensor& losses) {
  const autograd::NoGrad no_grad;
  const MemoryScope scope(MemoryCategory::workspace);
  const auto count = static_cast<int64_t>(parameters_.size());
  const auto* input = static_cast<const AdamInput*>(input_.raw());
  auto* decision = static_cast<AdamDecision*>(decision_.raw());
  TensorData loss_data;
  if (losses.defined()) loss_data = {losses.raw(), losses.numel(), losses.dtype()};
  {
    const Tensor squares = reduced_squares(parameters_, *norms_);
    launch(device_, "adam",
           [&](auto on) { adam_decide(on, input, squares.data<double>(), squares.numel(), loss_data, decision); });
  }

  if (stream_ && !DryRun::active()) {  // nothing is brought to the device for a step that is not taken
    AdamDecision decided;
    backend(device_).to_host(&decided, decision, sizeof decided);
    if (decided.verdict != AdamDecision::kTake) return updated_.clear();
  }

  std::vector<AdamTensor> plain, ratio;  // without and with the trust ratio
  std::vector<StateStream::Job> jobs;    // with offload: all of them
  std::vector<bool> job_changed;
  std::vector<Tensor> gradients;
  int64_t partials = 0;
  updated_.clear();
  for (size_t p = 0; p < parameters_.size(); ++p) {
    const Parameter& parameter = parameters_[p];
    if (!parameter.tensor.grad().defined()) continue;
    updated_.push_back(p);
    gradients.push_back(parameter.tensor.grad().contiguous());
    AdamTensor tensor = tensor_of(p);
    tensor.gradient = gradients.back().raw();
    const bool has_ratio =
        options_.trust_ratio && (parameter.role == ParameterRole::weight || parameter.role == ParameterRole::embedding);
    if (has_ratio) {
      partials += ask(device_, [&](auto on) { return adam_partials(on, tensor); });
      ratio.push_back(tensor);
    } else {
      tensor.lr = &decision->lr;
      plain.push_back(tensor);
    }
    if (!stream_) continue;
    jobs.push_back({tensor, has_ratio});
    job_changed.push_back(!changed_.empty() && changed_[p]);
  }
  const Tensor partial = Tensor::empty({2, partials}, DType::f64, device_);
  const Tensor sums = options_.trust_ratio ? Tensor::zeros({2, count}, DType::f64, device_) : Tensor();
  const bool exact = options_.trust_ratio && takes_exact(parameters_, *norms_);
  const auto sums_at = [&] { return sums.defined() ? sums.data<double>() : nullptr; };
  if (stream_ && DryRun::active()) {
    stream_->run(jobs, StateStream::Changes::kAll, {});
  } else if (stream_) {
    double* partials_left = partial.data<double>();
    stream_->run(jobs, StateStream::Changes::kAll, [&](std::span<const StateStream::Part> parts) {
      std::vector<AdamTensor> cut, whole, follow;
      for (const StateStream::Part& part : parts) {
        (jobs[part.job].whole ? whole : cut).push_back(part.tensor);
        if (job_changed[part.job]) follow.push_back(part.tensor);
      }
      launch(device_, "adam", [&](auto on) {
        adam_follow(on, follow);
        adam_update(on, cut, decision);
        if (whole.empty()) return;
        adam_moments(on, whole, decision, partials_left, sums_at(), count);
        for (const AdamTensor& tensor : whole) partials_left += 2 * adam_partials(on, tensor);
      });
    });
  } else if (exact) {
    adam_update(Cpu{}, plain, decision);
    std::vector<ExactSum> whole = exact_moments(ratio, decision, count);
    for (const size_t which : {0, 1})
      norms_->reduce(std::span(whole).subspan(which * parameters_.size(), parameters_.size()), parameters_);
    for (size_t i = 0; i < whole.size(); ++i) sums_at()[i] = whole[i].value();
  } else {
    launch(device_, "adam", [&](auto on) {
      adam_update(on, plain, decision);
      if (options_.trust_ratio) adam_moments(on, ratio, decision, partial.data<double>(), sums_at(), count);
    });
  }
  if (!options_.trust_ratio) return;

  const Tensor rates = Tensor::empty({count}, DType::f64, device_);
  for (const int which : {0, 1}) {
    if (!exact) reduce_on(sums.select(0, which), parameters_, *norms_);
  }
  for (AdamTensor& tensor : ratio) tensor.lr = rates.data<double>() + tensor.number;
  launch(device_, "adam", [&](auto on) { adam_rates(on, sums_at(), count, decision, rates.data<double>()); });
  if (!stream_) return launch(device_, "adam", [&](auto on) { adam_apply(on, ratio, decision); });
  std::vector<StateStream::Job> rest;
  for (const AdamTensor& tensor : ratio) rest.push_back({tensor, true});
  if (DryRun::active()) return stream_->run(rest, StateStream::Changes::kMasters, {});
  stream_->run(rest, StateStream::Changes::kMasters, [&](std::span<const StateStream::Part> parts) {
    std::vector<AdamTensor> tensors;
    for (const StateStream::Part& part : parts) tensors.push_back(part.tensor);
    launch(device_, "adam", [&](auto on) { adam_apply(on, tensors, decision); });
  });
}

StepReport Adam::finish() {
  StepReport report;
  if (!DryRun::active()) {
    AdamDecision decision;
    backend(device_).to_host(&decision, decision_.raw(), sizeof decision);
    report.loss = decision.loss;
    report.grad_norm = decision.grad_norm;
    report.clip_factor = decision.clip_factor;
    if (!std::isfinite(decision.loss)) return report;
    if (decision.verdict == AdamDecision::kNotFinite) {
      report.skipped = skip_overflow_;
      if (report.skipped) return report;
      grad_norm(parameters_, *norms_);  // says which gradient it is
      fail(ErrorKind::kState, "adam", "the gradients were not finite in the step and are now: someone changed them");
    }
    if (decision.verdict == AdamDecision::kTooLarge) {
      fail(ErrorKind::kValue, "adam", "the gradients have norm ", report.grad_norm,
           ", and their squares do not fit in the f32 state; the step was not taken. Hint: clip_norm");
    }
  }
  const autograd::NoGrad no_grad;
  ++steps_;
  for (const size_t p : updated_) {
    parameters_[p].tensor.begin_change("adam");
    slots_[p].version = parameters_[p].tensor.storage()->version();
  }
  return report;
}

}  // namespace weft::optim
