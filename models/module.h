#pragma once
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "core/random.h"
#include "optim/parameter.h"

namespace weft::models {

/// A part of a model: named parameters, named parts, and whether it is being trained. Parts are members of the class
/// that registers them, so a Module stays where it was made.
class Module {
 public:
  virtual ~Module() = default;
  Module(const Module&) = delete;
  Module& operator=(const Module&) = delete;

  /// Every parameter below here under its full name ("h.3.mlp.fc.weight"), in the order of registration; a tensor that
  /// serves in several places is listed once, under its first name.
  Parameters parameters() const;
  /// The same as names and tensors, for checkpoints.
  NamedTensors named_tensors() const;
  /// Number of elements in parameters().
  int64_t parameter_count() const;

  /// Copies values into the parameters. @throws Error kData if one is missing, unknown, or of another shape or dtype.
  void load(const NamedTensors& tensors);

  /// Training mode turns dropout on. New modules are in it.
  void train(bool on = true);
  void eval() { train(false); }
  bool is_training() const { return training_; }

  /// Calls visit(full name, module) for this (name "") and every part.
  void visit(const std::function<void(const std::string&, Module&)>& visit);

 protected:
  Module() = default;
  /// Adds a parameter; the tensor becomes a leaf that requires a gradient. `part`: what it is of the whole parameter,
  /// if not all of it.
  Tensor add(const std::string& name, Tensor tensor, ParameterRole role);
  Tensor add(const std::string& name, Tensor tensor, ParameterRole role, const TensorPart& part);
  void add(const std::string& name, Module& part);

 private:
  void collect(const std::string& prefix, Parameters& into) const;

  std::vector<Parameter> own_;
  std::vector<std::pair<std::string, Module*>> parts_;
  bool training_ = true;
};

/// How new parameters are made: element type, device, and random numbers that depend on (seed, parameter name) alone.
struct Init {
  uint64_t seed = 0;
  DType dtype = DType::f32;
  Device device = Device::cpu();
  std::string path = {};  ///< name of the module being made

  Init at(const std::string& part) const;
  /// Normal values with mean 0, drawn from the stream "init/<path>.<name>". A part has the values that the whole tensor
  /// has there, which is never made.
  Tensor normal(const std::string& name, const TensorPart& part, double deviation) const;
  Tensor constant(const Shape& shape, double value) const;
};

}  // namespace weft::models
