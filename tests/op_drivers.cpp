#include "tests/op_drivers.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/autograd.h"
#include "core/random.h"

namespace weft::testing {

std::string full_name(const OpCase& made) { return made.op + "_" + made.name; }

Tensors make_arguments(const OpCase& made, DType dtype) {
  Tensors out;
  for (const Argument& argument : made.arguments) {
    const RandomStream stream(7, full_name(made) + "/" + std::to_string(out.size()));
    if (argument.index) {
      std::vector<int64_t> values(static_cast<size_t>(numel(argument.shape)));
      const auto low = static_cast<int64_t>(argument.low), high = static_cast<int64_t>(argument.high);
      for (size_t i = 0; i < values.size(); ++i)
        values[i] = low + static_cast<int64_t>(stream.below(i, static_cast<uint64_t>(high - low)));
      out.push_back(Tensor::from(values, argument.shape));
    } else {
      const Tensor x = Tensor::empty(argument.shape, DType::f64);
      fill_uniform(x, stream, argument.low, argument.high);
      out.push_back(x.to(dtype));
    }
  }
  return out;
}

Tensors make_cotangents(const OpCase& made, const Tensors& outputs) {
  Tensors out;
  for (const Tensor& output : outputs) {
    const Tensor x = Tensor::empty(output.shape(), DType::f64);
    fill_uniform(x, RandomStream(7, full_name(made) + "/cotangent" + std::to_string(out.size())), -1, 1);
    out.push_back(x.to(output.dtype()));
  }
  return out;
}

Tensors cast(const Tensors& in, DType dtype) {
  Tensors out;
  for (const Tensor& x : in) out.push_back(is_float(x.dtype()) ? x.detach().to(dtype) : x);
  return out;
}

Placed place(const Tensor& x, Layout layout) {
  const autograd::NoGrad no_grad;
  // No op may look at these: a NaN would show in its result, an index this large would be refused.
  const double elsewhere = is_float(x.dtype()) ? std::numeric_limits<double>::quiet_NaN() : 1e15;
  Placed placed;
  if (layout == Layout::kSliced) {
    Shape around;
    for (const int64_t size : x.shape()) around.push_back(2 * size + 3);
    placed.buffer = Tensor::full(around, elsewhere, x.dtype());
    placed.view = placed.buffer;
    for (int d = 0; d < x.rank(); ++d) {
      // Every second element of the last dimension, neighbours in the others.
      const int64_t step = d + 1 == x.rank() ? 2 : 1;
      placed.view = placed.view.slice(d, 1, 1 + step * x.size(d), step);
    }
  } else {
    Dims reversed;
    for (int d = x.rank() - 1; d >= 0; --d) reversed.push_back(d);
    placed.buffer = layout == Layout::kTransposed ? Tensor::empty_like(x.permute(reversed)) : Tensor::empty_like(x);
    placed.view = layout == Layout::kTransposed ? placed.buffer.permute(reversed) : placed.buffer;
  }
  placed.view.copy_(x);
  placed.view = placed.view.detach();
  return placed;
}

std::vector<size_t> differentiable_arguments(const OpCase& made) {
  std::vector<size_t> out;
  for (size_t i = 0; i < made.arguments.size(); ++i) {
    if (!made.arguments[i].index && made.arguments[i].gradient) out.push_back(i);
  }
  return out;
}

Tensors gradients_of(const OpCase& made, const OpFunction& run, const Tensors& arguments, const Tensors& cotangents) {
  Tensors leaves, wanted;
  for (const Tensor& argument : arguments) leaves.push_back(argument.detach());
  for (const size_t i : differentiable_arguments(made)) wanted.push_back(leaves[i].requires_grad_());
  const Tensors outputs = run(leaves);
  autograd::backward(outputs, cotangents);
  Tensors gradients;
  for (const Tensor& leaf : wanted) {
    gradients.push_back(leaf.grad().defined() ? leaf.grad() : Tensor::zeros(leaf.shape(), leaf.dtype()));
  }
  return gradients;
}

double worst_error(const std::vector<double>& got, const std::vector<double>& want) {
  if (got.size() != want.size()) return std::numeric_limits<double>::infinity();
  double worst = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    if (got[i] == want[i] || (std::isnan(got[i]) && std::isnan(want[i]))) continue;
    const double error = std::abs(got[i] - want[i]) / (1 + std::abs(want[i]));
    if (!(error <= worst)) worst = std::isnan(error) ? std::numeric_limits<double>::infinity() : error;
  }
  return worst;
}

Tensor planted(const Tensor& x, Plant plant) {
  Tensor y = x.detach().clone();
  autograd::record("planted", {x}, {y}, {}, [plant](autograd::BackwardContext& context) {
    std::vector<double> values = context.grad().to_vector<double>();
    if (plant == Plant::kScaled) {
      for (double& value : values) value *= 1.01;
    } else {
      const auto largest =
          std::max_element(values.begin(), values.end(), [](double a, double b) { return std::abs(a) < std::abs(b); });
      if (largest != values.end()) *largest = -*largest;
    }
    context.set(0, Tensor::from(values, context.grad().shape()).to(context.grad().dtype()));
  });
  return y;
}

}  // namespace weft::testing
