#include "optim/norm.h"

#include <cmath>

#include "core/autograd.h"
#include "ops/launch.h"
#include "optim/optimizer_kernels.h"

namespace weft::optim {
namespace {

/// A tensor that must be contiguous, or nothing, as the kernels take it.
TensorData data_of(const Tensor& tensor) {
  if (!tensor.defined()) return {};
  return {tensor.raw(), tensor.numel(), tensor.dtype()};
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

namespace {

/// The squares of each parameter's gradient: what this process holds, and the whole.
struct Squares {
  std::vector<double> own, whole;
};

/// Nothing in a dry run.
Squares gradient_squares(const Parameters& parameters, NormReducer& reducer) {
  const autograd::NoGrad no_grad;
  const MemoryScope scope(MemoryCategory::workspace);
  const Device device = device_of("grad_norm", parameters);
  std::vector<Tensor> gradients;
  std::vector<TensorData> data;
  int64_t partials = 0;
  for (const Parameter& parameter : parameters) {
    const Tensor gradient = parameter.tensor.grad();
    gradients.push_back(gradient.defined() ? gradient.contiguous() : gradient);
    data.push_back(data_of(gradients.back()));
    partials += ask(device, [&](auto on) { return square_partials(on, data.back()); });
  }
  const Tensor partial = Tensor::empty({partials}, DType::f64, device);
  const Tensor sums = Tensor::empty({static_cast<int64_t>(parameters.size())}, DType::f64, device);
  if (DryRun::active()) return {};
  launch(device, "grad_norm", [&](auto on) { sum_squares(on, data, partial.data<double>(), sums.data<double>()); });
  Squares squares;
  squares.own = squares.whole = sums.to_vector<double>();
  reducer.reduce(squares.whole, parameters);
  return squares;
}

}  // namespace

double grad_norm(const Parameters& parameters, NormReducer& reducer) {
  const Squares squares = gradient_squares(parameters, reducer);
  for (size_t p = 0; p < squares.own.size(); ++p) {
    if (!std::isfinite(squares.own[p])) report(parameters[p]);
  }
  double total = 0;
  for (size_t p = 0; p < squares.whole.size(); ++p) {
    total += squares.whole[p];
    if (!std::isfinite(total)) report(parameters[p]);
  }
  return std::sqrt(total);
}

std::optional<double> finite_grad_norm(const Parameters& parameters, NormReducer& reducer) {
  double total = 0;
  for (const double square : gradient_squares(parameters, reducer).whole) total += square;
  return std::isfinite(total) ? std::optional(std::sqrt(total)) : std::nullopt;
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
