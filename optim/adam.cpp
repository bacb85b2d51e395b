#include "optim/adam.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "core/autograd.h"
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

StepReport Adam::step(double lr, const GradientScale& scale) {
  if (!(lr >= 0) || !std::isfinite(static_cast<float>(lr))) {
    fail(ErrorKind::kValue, "adam", "the learning rate must be at least 0 and finite, got ", lr);
  }
  const autograd::NoGrad no_grad;
  const MemoryScope scope(MemoryCategory::workspace);
  StepReport report;
  if (!(scale.factor > 0) || !std::isfinite(scale.factor)) {
    fail(ErrorKind::kValue, "adam", "the gradients' factor must be positive and finite, got ", scale.factor);
  }
  if (scale.skip_overflow) {
    const std::optional<double> norm = finite_grad_norm(parameters_, *norms_);
    report.grad_norm = norm.value_or(0) * scale.factor;
    report.skipped = !norm.has_value();
    if (report.skipped) return report;
  } else {
    report.grad_norm = grad_norm(parameters_, *norms_) * scale.factor;
  }
  report.clip_factor = options_.clip_norm > 0 ? clip_factor(report.grad_norm, options_.clip_norm) : 1.0;
  const bool narrow = std::any_of(parameters_.begin(), parameters_.end(),
                                  [](const Parameter& p) { return p.tensor.dtype() != DType::f64; });
  if (narrow && report.grad_norm * report.clip_factor > kLargestNorm) {
    fail(ErrorKind::kValue, "adam", "the gradients have norm ", report.grad_norm,
         ", and their squares do not fit in the f32 state; the step was ", "not taken. Hint: clip_norm");
  }

  std::vector<AdamTensor> plain, ratio;  // without and with the trust ratio
  std::vector<size_t> ratio_index;       // of the parameters of the latter
  std::vector<AdamTensor> changed;       // by someone else
  std::vector<StateStream::Job> jobs;    // with offload: all of them
  std::vector<bool> job_changed;
  std::vector<Tensor> gradients;
  for (size_t p = 0; p < parameters_.size(); ++p) {
    const Parameter& parameter = parameters_[p];
    const Slot& slot = slots_[p];
    if (!parameter.tensor.grad().defined()) continue;
    gradients.push_back(parameter.tensor.grad().contiguous());
    const AdamTensor tensor = {
        .dtype = parameter.tensor.dtype(),
        .count = parameter.tensor.numel(),
        .parameter = parameter.tensor.raw(),
        .weight = slot.master.defined() ? slot.master.raw() : parameter.tensor.raw(),
        .gradient = gradients.back().raw(),
        .exp_avg = slot.exp_avg.raw(),
        .exp_avg_sq = slot.exp_avg_sq.raw(),
        .weight_decay = parameter.role == ParameterRole::weight ? options_.weight_decay : 0.0,
        .lr = lr,
    };
    if (options_.trust_ratio &&
        (parameter.role == ParameterRole::weight || parameter.role == ParameterRole::embedding)) {
      ratio.push_back(tensor);
      ratio_index.push_back(p);
    } else {
      plain.push_back(tensor);
    }
    const bool was_changed = slot.master.defined() && slot.version != parameter.tensor.storage()->version();
    if (was_changed) changed.push_back(tensor);
    if (stream_) {
      jobs.push_back({tensor, !ratio_index.empty() && ratio_index.back() == p});
      job_changed.push_back(was_changed);
    }
  }
  int64_t partials = 0;
  for (const AdamTensor& tensor : ratio) {
    partials += ask(device_, [&](auto on) { return adam_partials(on, tensor); });
  }
  const Tensor partial = Tensor::empty({2, partials}, DType::f64, device_);
  const Tensor sums = Tensor::empty({2, static_cast<int64_t>(ratio.size())}, DType::f64, device_);

  ++steps_;
  for (const Parameter& parameter : parameters_) {
    if (parameter.tensor.grad().defined()) parameter.tensor.begin_change("adam");
  }
  if (DryRun::active()) {
    if (stream_) stream_->run(jobs, StateStream::Changes::kAll, {});
    return report;
  }
  for (size_t p = 0; p < slots_.size(); ++p) {
    if (parameters_[p].tensor.grad().defined()) slots_[p].version = parameters_[p].tensor.storage()->version();
  }

  const double t = static_cast<double>(steps_);
  const AdamConstants<double> constants = {
      .grad_scale = scale.factor * report.clip_factor,
      .beta1 = options_.beta1,
      .beta2 = options_.beta2,
      .rest1 = 1 - options_.beta1,
      .rest2 = 1 - options_.beta2,
      .inverse_bias1 = 1 / (1 - std::pow(options_.beta1, t)),
      .inverse_bias2 = 1 / (1 - std::pow(options_.beta2, t)),
      .eps = options_.eps,
  };
  // Where the sums of squares of weight and update are, of each tensor with the ratio.
  std::vector<std::pair<size_t, size_t>> places;
  if (stream_) {
    double* partials_left = partial.data<double>();
    stream_->run(jobs, StateStream::Changes::kAll, [&](std::span<const StateStream::Part> parts) {
      std::vector<AdamTensor> cut, whole, follow;
      for (const StateStream::Part& part : parts) {
        (jobs[part.job].whole ? whole : cut).push_back(part.tensor);
        if (job_changed[part.job]) follow.push_back(part.tensor);
      }
      const size_t first = 2 * places.size();
      for (size_t i = 0; i < whole.size(); ++i) places.emplace_back(first + i, first + whole.size() + i);
      launch(device_, "adam", [&](auto on) {
        adam_follow(on, follow);
        adam_update(on, cut, constants);
        if (whole.empty()) return;
        adam_moments(on, whole, constants, partials_left, sums.data<double>() + first);
        for (const AdamTensor& tensor : whole) partials_left += 2 * adam_partials(on, tensor);
      });
    });
  } else {
    launch(device_, "adam", [&](auto on) {
      adam_follow(on, changed);
      adam_update(on, plain, constants);
      if (options_.trust_ratio) adam_moments(on, ratio, constants, partial.data<double>(), sums.data<double>());
    });
    for (size_t i = 0; i < ratio.size(); ++i) places.emplace_back(i, ratio.size() + i);
  }
  if (!options_.trust_ratio) return report;

  const std::vector<double> found = sums.to_vector<double>();
  std::vector<double> weights(parameters_.size(), 0.0), updates(parameters_.size(), 0.0);
  for (size_t i = 0; i < ratio_index.size(); ++i) {
    weights[ratio_index[i]] = found[places[i].first];
    updates[ratio_index[i]] = found[places[i].second];
  }
  norms_->reduce(weights, parameters_);
  norms_->reduce(updates, parameters_);
  for (size_t i = 0; i < ratio_index.size(); ++i) {
    const double weight = std::sqrt(weights[ratio_index[i]]), update = std::sqrt(updates[ratio_index[i]]);
    if (weight > 0 && update > 0) ratio[i].lr *= weight / update;
  }
  if (!stream_) {
    launch(device_, "adam", [&](auto on) { adam_apply(on, ratio, constants); });
    return report;
  }
  std::vector<StateStream::Job> rest;
  for (const AdamTensor& tensor : ratio) rest.push_back({tensor, true});
  stream_->run(rest, StateStream::Changes::kMasters, [&](std::span<const StateStream::Part> parts) {
    std::vector<AdamTensor> tensors;
    for (const StateStream::Part& part : parts) tensors.push_back(part.tensor);
    launch(device_, "adam", [&](auto on) { adam_apply(on, tensors, constants); });
  });
  return report;
}

}  // namespace weft::optim
