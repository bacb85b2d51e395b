#include "optim/norm.h"

#include <cmath>

#include "core/autograd.h"
#include "core/backend.h"
#include "ops/launch.h"
#include "optim/optimizer_kernels.h"

namespace weft::optim {
namespace {

/// A tensor that must be contiguous, or nothing, as the kernels take it.
TensorData data_of(const Tensor& tensor) {
  if (!tensor.defined()) return {};
  return {tensor.raw(), tensor.numel(), tensor.dtype()};
}

void require_whole(const Parameters& parameters) {
  for (const Parameter& parameter : parameters) {
    if (!parameter.part) continue;
    fail(
        ErrorKind::kState, "grad_norm", "this process has a part of ", quoted(parameter.name), " (",
        describe(*parameter.part),
        "), so that its squares alone are not those of the tensor. Hint: give the optimizer a NormReducer that adds up "
        "the parts, such as dist::MeshNorms");
  }
}

/// Says what is wrong with a gradient whose sum of squares is not finite.
[[noreturn]] void report(const Parameter& parameter) {
  const Tensor gradient = parameter.tensor.grad();
  if (gradient.defined()) {
    const std::vector<double> values = gradient.to_vector<double>();
    for (size_t i = 0; i < values.size(); ++i) {
      if (std::isfinite(values[i])) continue;
      fail(ErrorKind::kValue, "grad_norm", "the gradient of ", quoted(parameter.name), " (", gradient.describe(),
           ") is ", values[i], " at element ", grouped(static_cast<int64_t>(i)),
           "; the step was not taken. Hint: a lower learning rate, more warm-up or clipping");
    }
  }
  fail(ErrorKind::kValue, "grad_norm", "the squares of the gradient of ", quoted(parameter.name), " (",
       parameter.tensor.describe(),
       ") do not add up to a finite number, here or in another part of it; the step was not taken");
}

}  // namespace

Device device_of(const char* op, const Parameters& parameters) {
  if (parameters.empty()) return Device::cpu();
  const Parameter& first = parameters.front();
  for (const Parameter& parameter : parameters) {
    if (parameter.tensor.device() == first.tensor.device()) continue;
    fail(ErrorKind::kDevice, op, "all parameters must be on one device: ", quoted(first.name), " is on ",
         first.tensor.device(), ", ", quoted(parameter.name), " on ", parameter.tensor.device());
  }
  return first.tensor.device();
}

void NormReducer::reduce(std::span<ExactSum>, const Parameters&) {
  fail(ErrorKind::kState, "grad_norm", "this reducer takes rounded sums; ask exact() first");
}

void NormReducer::queue(const Tensor&, const Parameters&) {
  fail(ErrorKind::kState, "grad_norm", "this reducer works on the host; ask on_device() first");
}

void LocalNorms::reduce(std::span<double>, const Parameters& parameters) { require_whole(parameters); }

void LocalNorms::queue(const Tensor&, const Parameters& parameters) { require_whole(parameters); }

void reduce_on(const Tensor& squares, const Parameters& parameters, NormReducer& reducer) {
  if (DryRun::active()) return;
  if (reducer.on_device()) return reducer.queue(squares, parameters);
  std::vector<double> values = squares.to_vector<double>();
  reducer.reduce(values, parameters);
  if (!values.empty())
    backend(squares.device()).to_device(squares.raw(), values.data(), values.size() * sizeof(double));
}

namespace {

/// Gradients row by row, as long as their squares are looked at.
struct Gradients {
  explicit Gradients(const Parameters& parameters) {
    const autograd::NoGrad no_grad;
    for (const Parameter& parameter : parameters) {
      const Tensor gradient = parameter.tensor.grad();
      tensors.push_back(gradient.defined() ? gradient.contiguous() : gradient);
      data.push_back(data_of(tensors.back()));
    }
  }
  std::vector<Tensor> tensors;
  std::vector<TensorData> data;
};

/// The squares of each parameter's gradient, as far as this process holds it.
Tensor gradient_squares(const Parameters& parameters, const Gradients& gradients) {
  const Device device = device_of("grad_norm", parameters);
  int64_t partials = 0;
  for (const TensorData& data : gradients.data)
    partials += ask(device, [&](auto on) { return square_partials(on, data); });
  const Tensor partial = Tensor::empty({partials}, DType::f64, device);
  const Tensor sums = Tensor::empty({static_cast<int64_t>(parameters.size())}, DType::f64, device);
  launch(device, "grad_norm",
         [&](auto on) { sum_squares(on, gradients.data, partial.data<double>(), sums.data<double>()); });
  return sums;
}

std::vector<double> values_of(const std::vector<ExactSum>& sums) {
  std::vector<double> values;
  for (const ExactSum& sum : sums) values.push_back(sum.value());
  return values;
}

}  // namespace

bool takes_exact(const Parameters& parameters, const NormReducer& reducer) {
  return reducer.exact() && device_of("grad_norm", parameters).kind == DeviceKind::cpu && !DryRun::active();
}

Tensor reduced_squares(const Parameters& parameters, NormReducer& reducer) {
  const MemoryScope scope(MemoryCategory::workspace);
  const Gradients gradients(parameters);
  if (takes_exact(parameters, reducer)) {
    std::vector<ExactSum> sums = exact_squares(gradients.data);
    reducer.reduce(sums, parameters);
    std::vector<double> values = values_of(sums);
    reducer.complete(values, parameters);
    return Tensor::from(values, {static_cast<int64_t>(values.size())});
  }
  const Tensor squares = gradient_squares(parameters, gradients);
  if (reducer.on_device() || DryRun::active()) {
    reduce_on(squares, parameters, reducer);
    return squares;
  }
  std::vector<double> values = squares.to_vector<double>();
  reducer.reduce(values, parameters);
  reducer.complete(values, parameters);
  return Tensor::from(values, {static_cast<int64_t>(values.size())}, squares.device());
}

double grad_norm(const Parameters& parameters, NormReducer& reducer) {
  const MemoryScope scope(MemoryCategory::workspace);
  const Gradients gradients(parameters);
  std::vector<double> own, whole;
  if (takes_exact(parameters, reducer)) {
    std::vector<ExactSum> sums = exact_squares(gradients.data);
    own = values_of(sums);
    reducer.reduce(sums, parameters);
    whole = values_of(sums);
  } else {
    const Tensor squares = gradient_squares(parameters, gradients);
    if (DryRun::active()) return 0;
    own = whole = squares.to_vector<double>();
    reducer.reduce(whole, parameters);
  }
  const std::vector<double> reduced = whole;
  reducer.complete(whole, parameters);
  for (size_t p = 0; p < own.size(); ++p) {
    if (!std::isfinite(own[p])) report(parameters[p]);
  }
  double total = 0;
  for (size_t p = 0; p < reduced.size(); ++p) {
    total += reduced[p];
    if (!std::isfinite(total)) report(parameters[p]);
  }
  total = 0;
  for (const double square : whole) total += square;
  if (!std::isfinite(total)) {
    fail(ErrorKind::kValue, "grad_norm",
         "the squares of the gradients of layers on other ranks do not add up to a finite number; the step was not "
         "taken. Hint: a lower learning rate, more warm-up or clipping");
  }
  return std::sqrt(total);
}

double grad_norm(const Parameters& parameters) {
  LocalNorms local;
  return grad_norm(parameters, local);
}

double clip_factor(double norm, double max_norm) {
  if (!(max_norm > 0)) fail(ErrorKind::kValue, "clip_factor", "the largest norm must be positive, got ", max_norm);
  return norm > max_norm ? max_norm / norm : 1.0;
}

double clip_grad_norm(const Parameters& parameters, double max_norm, NormReducer& reducer) {
  const double norm = grad_norm(parameters, reducer);
  const double factor = clip_factor(norm, max_norm);
  for (const Parameter& parameter : parameters) {
    const Tensor gradient = parameter.tensor.grad();
    if (!gradient.defined() || gradient.is_contiguous()) continue;
    fail(ErrorKind::kValue, "clip_grad_norm", "the gradient of ", quoted(parameter.name), " is not contiguous");
  }
  if (factor == 1.0 || DryRun::active()) return norm;
  std::vector<TensorData> data;
  for (const Parameter& parameter : parameters) {
    const Tensor gradient = parameter.tensor.grad();
    if (!gradient.defined()) continue;
    gradient.begin_change("clip_grad_norm");
    data.push_back(data_of(gradient));
  }
  launch(device_of("clip_grad_norm", parameters), "clip_grad_norm", [&](auto on) { scale(on, data, factor); });
  return norm;
}

double clip_grad_norm(const Parameters& parameters, double max_norm) {
  LocalNorms local;
  return clip_grad_norm(parameters, max_norm, local);
}

}  // namespace weft::optim
