#include "optim/optimizer.h"

#include <algorithm>
#include <map>
#include <set>
#include <utility>

#include "core/autograd.h"

namespace weft::optim {

Optimizer::Optimizer(Parameters parameters) : parameters_(std::move(parameters)) {
  std::set<std::string> names;
  std::map<std::pair<const Storage*, int64_t>, std::string> places;
  for (const Parameter& parameter : parameters_) {
    if (!names.insert(parameter.name).second) {
      fail(ErrorKind::kValue, "optimizer", "two parameters are named ", quoted(parameter.name),
           "; a tied tensor is listed once");
    }
    if (!parameter.tensor.defined() || !parameter.tensor.requires_grad() || !parameter.tensor.is_leaf() ||
        !parameter.tensor.is_contiguous()) {
      fail(ErrorKind::kValue, "optimizer", "parameter ", quoted(parameter.name),
           " must be a contiguous leaf that requires a gradient");
    }
    const auto [place, fresh] =
        places.emplace(std::pair(parameter.tensor.storage().get(), parameter.tensor.offset()), parameter.name);
    if (!fresh) {
      fail(ErrorKind::kValue, "optimizer", "parameters ", quoted(place->second), " and ", quoted(parameter.name),
           " are the same tensor, which would be changed twice; a tied tensor is listed once");
    }
  }
}

StepReport Optimizer::step(double lr, const GradientScale& scale) {
  prepare(lr, scale);
  queue();
  return finish();
}

void Optimizer::zero_grad() {
  for (const Parameter& parameter : parameters_) parameter.tensor.clear_grad();
}

NamedTensors Optimizer::state() const {
  NamedTensors tensors = state_tensors();
  tensors.emplace_back("steps", Tensor::from(std::vector<int64_t>{steps_}, {1}));
  return tensors;
}

void Optimizer::load_state(const NamedTensors& tensors) {
  const NamedTensors own = state();
  std::map<std::string, Tensor> given;
  for (const auto& [name, tensor] : tensors) {
    if (!tensor.defined()) fail(ErrorKind::kData, "optimizer", "stored state ", quoted(name), " is undefined");
    if (!given.emplace(name, tensor).second)
      fail(ErrorKind::kData, "optimizer", "the stored state has two tensors ", quoted(name));
  }
  std::vector<std::string> names;
  for (const auto& [name, tensor] : own) {
    names.push_back(name);
    const auto found = given.find(name);
    if (found == given.end()) fail(ErrorKind::kData, "optimizer", "the stored state has no tensor ", quoted(name));
    if (!(found->second.shape() == tensor.shape()) || found->second.dtype() != tensor.dtype()) {
      fail(ErrorKind::kData, "optimizer", "stored state ", quoted(name), " is ", found->second.describe(),
           "; expected ", tensor.describe());
    }
  }
  for (const auto& [name, tensor] : given) {
    if (std::find(names.begin(), names.end(), name) == names.end()) {
      fail(ErrorKind::kData, "optimizer", "the stored state has a tensor ", quoted(name),
           " that this optimizer does not keep", did_you_mean(name, names));
    }
  }
  const int64_t steps = static_cast<int64_t>(given.at("steps").item());
  if (steps < 0) fail(ErrorKind::kData, "optimizer", "stored state \"steps\" is ", steps, "; expected at least 0");
  const autograd::NoGrad no_grad;
  for (const auto& [name, tensor] : own) Tensor(tensor).copy_(given.at(name));
  steps_ = steps;
}

}  // namespace weft::optim
