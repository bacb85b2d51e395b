#pragma once
#include <optional>
#include <string>
#include <vector>

#include "core/tensor.h"
#include "core/tensor_part.h"

namespace weft {

/// What a parameter does in its layer: rules such as weight decay go by this, not by names.
enum class ParameterRole : uint8_t { weight, bias, norm, embedding };

/// A tensor to be trained. One that serves in two places (a tied head) is listed once.
struct Parameter {
  std::string name;  ///< unique in its model: "h.3.mlp.fc.weight"
  Tensor tensor;
  ParameterRole role = ParameterRole::weight;
  /// Set where `tensor` is a part of the parameter, whose other parts other processes hold.
  std::optional<TensorPart> part = {};
};

using Parameters = std::vector<Parameter>;

/// Tensors under their names, in a fixed order: what a checkpoint stores.
using NamedTensors = std::vector<std::pair<std::string, Tensor>>;

}  // namespace weft
