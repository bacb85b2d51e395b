#include "models/module.h"

#include <algorithm>
#include <map>

#include "core/autograd.h"

namespace weft::models {

Tensor Module::add(const std::string& name, Tensor tensor, ParameterRole role) {
  tensor.requires_grad_();
  own_.push_back({name, std::move(tensor), role});
  return own_.back().tensor;
}

Tensor Module::add(const std::string& name, Tensor tensor, ParameterRole role, const TensorPart& part) {
  Tensor added = add(name, std::move(tensor), role);
  if (!part.is_whole()) own_.back().part = part;
  return added;
}

void Module::add(const std::string& name, Module& part) { parts_.emplace_back(name, &part); }

void Module::collect(const std::string& prefix, Parameters& into) const {
  for (const Parameter& parameter : own_) {
    const bool tied =
        std::any_of(into.begin(), into.end(), [&](const Parameter& p) { return p.tensor.is_same(parameter.tensor); });
    if (tied) continue;
    into.push_back(parameter);
    into.back().name = prefix + parameter.name;
  }
  for (const auto& [name, part] : parts_) part->collect(prefix + name + ".", into);
}

Parameters Module::parameters() const {
  Parameters all;
  collect("", all);
  return all;
}

NamedTensors Module::named_tensors() const {
  NamedTensors tensors;
  for (const Parameter& parameter : parameters()) tensors.emplace_back(parameter.name, parameter.tensor);
  return tensors;
}

int64_t Module::parameter_count() const {
  int64_t count = 0;
  for (const Parameter& parameter : parameters()) count += parameter.tensor.numel();
  return count;
}

void Module::load(const NamedTensors& tensors) {
  const Parameters own = parameters();
  const std::map<std::string, Tensor> given(tensors.begin(), tensors.end());
  std::vector<std::string> names;
  for (const Parameter& parameter : own) {
    names.push_back(parameter.name);
    const auto found = given.find(parameter.name);
    if (found == given.end())
      fail(ErrorKind::kData, "model", "the stored weights have no tensor ", quoted(parameter.name));
    const Tensor& tensor = found->second;
    if (!(tensor.shape() == parameter.tensor.shape()) || tensor.dtype() != parameter.tensor.dtype()) {
      fail(ErrorKind::kData, "model", "stored weight ", quoted(parameter.name), " is ", tensor.describe(),
           "; this model expects ", parameter.tensor.describe());
    }
  }
  for (const auto& [name, tensor] : given) {
    if (std::find(names.begin(), names.end(), name) == names.end()) {
      fail(ErrorKind::kData, "model", "the stored weights have a tensor ", quoted(name),
           " that this model does not have", did_you_mean(name, names));
    }
  }
  const autograd::NoGrad no_grad;
  for (const Parameter& parameter : own) Tensor(parameter.tensor).copy_(given.at(parameter.name));
}

void Module::train(bool on) {
  training_ = on;
  for (const auto& [name, part] : parts_) part->train(on);
}

void Module::visit(const std::function<void(const std::string&, Module&)>& visit) {
  visit("", *this);
  for (const auto& [name, part] : parts_) {
    part->visit([&, prefix = name](const std::string& inner, Module& module) {
      visit(inner.empty() ? prefix : prefix + "." + inner, module);
    });
  }
}

Init Init::at(const std::string& part) const {
  Init inner = *this;
  inner.path = path.empty() ? part : path + "." + part;
  return inner;
}

Tensor Init::normal(const std::string& name, const TensorPart& part, double deviation) const {
  const MemoryScope scope(MemoryCategory::parameters);
  const RandomStream stream(seed, "init/" + (path.empty() ? name : path + "." + name));
  const Tensor values = Tensor::empty({part.count()}, dtype == DType::f64 ? DType::f64 : DType::f32);
  part.for_each_run([&](int64_t at, int64_t from, int64_t count) {
    fill_normal(values.narrow(0, from, count), stream, 0, deviation, static_cast<uint64_t>(at));
  });
  return values.reshape(part.shape()).to(dtype).to(device);
}

Tensor Init::constant(const Shape& shape, double value) const {
  const MemoryScope scope(MemoryCategory::parameters);
  return Tensor::full(shape, value, dtype, device);
}

}  // namespace weft::models
