#pragma once
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "core/random.h"
#include "optim/parameter.h"

namespace weft::models {

/// A new parameter, or a part of one, and what the parameter's elements are at first: values(part) makes those of any
/// part of it, in its dtype and on its device.
struct InitialTensor {
  Tensor tensor;
  std::function<Tensor(const TensorPart& part)> values;
};

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

  /// Writes what a new model begins with into tensors that hold parts[i] of parameters[i], which is found by its name:
  /// what is needed where parameters were made without values (Init::values). @throws Error kData for a name or a shape
  /// that this does not have.
  void draw(const Parameters& parameters, const std::vector<TensorPart>& parts) const;

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
  Tensor add(const std::string& name, InitialTensor initial, ParameterRole role);
  Tensor add(const std::string& name, InitialTensor initial, ParameterRole role, const TensorPart& part);
  void add(const std::string& name, Module& part);

 private:
  struct Own {
    Parameter parameter;
    std::function<Tensor(const TensorPart& part)> values;
  };
  /// Calls each(full name, parameter) for every one below here, tied ones as often as they are there.
  void for_each(const std::string& prefix, const std::function<void(const std::string&, const Own&)>& each) const;

  std::vector<Own> own_;
  std::vector<std::pair<std::string, Module*>> parts_;
  bool training_ = true;
};

/// How new parameters are made: element type, device, and random numbers that depend on (seed, parameter name) alone.
struct Init {
  uint64_t seed = 0;
  DType dtype = DType::f32;
  Device device = Device::cpu();
  std::string path = {};  ///< name of the module being made
  bool values = true;     ///< false: parameters have no memory yet (Tensor::without_memory)

  Init at(const std::string& part) const;
  /// Normal values with mean 0, drawn from the stream "init/<path>.<name>". A part has the values that the whole tensor
  /// has there, which is never made.
  InitialTensor normal(const std::string& name, const TensorPart& part, double deviation) const;
  InitialTensor constant(const Shape& shape, double value) const;

 private:
  InitialTensor make(const TensorPart& part, std::function<Tensor(const TensorPart&)> values_of) const;
};

}  // namespace weft::models
