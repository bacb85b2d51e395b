#include "models/module.h"

#include <algorithm>
#include <map>

#include "core/autograd.h"

namespace weft::models {

Tensor Module::add(const std::string& name, InitialTensor initial, ParameterRole role) {
  initial.tensor.requires_grad_();
  own_.push_back({{name, std::move(initial.tensor), role}, std::move(initial.values)});
  return own_.back().parameter.tensor;
}

Tensor Module::add(const std::string& name, InitialTensor initial, ParameterRole role, const TensorPart& part) {
  Tensor added = add(name, std::move(initial), role);
  if (!part.is_whole()) own_.back().parameter.part = part;
  return added;
}

void Module::add(const std::string& name, Module& part) { parts_.emplace_back(name, &part); }

void Module::for_each(const std::string& prefix,
                      const std::function<void(const std::string&, const Own&)>& each) const {
  for (const Own& own : own_) each(prefix + own.parameter.name, own);
  for (const auto& [name, part] : parts_) part->for_each(prefix + name + ".", each);
}

Parameters Module::parameters() const {
  Parameters all;
  for_each("", [&](const std::string& name, const Own& own) {
    const bool tied =
        std::any_of(all.begin(), all.end(), [&](const Parameter& p) { return p.tensor.is_same(own.parameter.tensor); });
    if (tied) return;
    all.push_back(own.parameter);
    all.back().name = name;
  });
  return all;
}

void Module::draw(const Parameters& parameters, const std::vector<TensorPart>& parts) const {
  if (parts.size() != parameters.size())
    fail(ErrorKind::kValue, "model", "there are ", parameters.size(), " parameters, but ", parts.size(), " parts");
  std::map<std::string, const Own*> known;
  for_each("", [&](const std::string& name, const Own& own) { known.emplace(name, &own); });
  const autograd::NoGrad no_grad;
  for (size_t i = 0; i < parts.size(); ++i) {
    const Parameter& parameter = parameters[i];
    const auto found = known.find(parameter.name);
    if (found == known.end()) fail(ErrorKind::kData, "model", "there is no parameter ", quoted(parameter.name));
    const Parameter& own = found->second->parameter;
    const Shape& whole = own.part ? own.part->whole : own.tensor.shape();
    if (!(parts[i].whole == whole) || parameter.tensor.numel() != parts[i].count()) {
      fail(ErrorKind::kData, "model", "parameter ", quoted(parameter.name), " is ", whole, "; asked for ",
           describe(parts[i]), " of it in ", parameter.tensor.describe());
    }
    Tensor(parameter.tensor).copy_(found->second->values(parts[i]).reshape(parameter.tensor.shape()));
  }
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

InitialTensor Init::make(const TensorPart& part, std::function<Tensor(const TensorPart&)> values_of) const {
  const MemoryScope scope(MemoryCategory::parameters);
  Tensor tensor = values ? values_of(part)
                         : Tensor::without_memory(part.shape(), dtype, device, concat("a parameter of ", quoted(path)));
  return {std::move(tensor), std::move(values_of)};
}

InitialTensor Init::normal(const std::string& name, const TensorPart& part, double deviation) const {
  const RandomStream stream(seed, "init/" + (path.empty() ? name : path + "." + name));
  return make(part, [stream, deviation, type = dtype, place = device](const TensorPart& wanted) {
    const Tensor drawn = Tensor::empty({wanted.count()}, type == DType::f64 ? DType::f64 : DType::f32);
    wanted.for_each_run([&](int64_t at, int64_t from, int64_t count) {
      fill_normal(drawn.narrow(0, from, count), stream, 0, deviation, static_cast<uint64_t>(at));
    });
    return drawn.reshape(wanted.shape()).to(type).to(place);
  });
}

InitialTensor Init::constant(const Shape& shape, double value) const {
  return make(TensorPart::all(shape), [value, type = dtype, place = device](const TensorPart& wanted) {
    return Tensor::full(wanted.shape(), value, type, place);
  });
}

}  // namespace weft::models
