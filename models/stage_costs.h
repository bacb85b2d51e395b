#pragma once
#include <vector>

#include "models/gpt.h"

namespace weft::models {

/// FLOPs of a training step per token in each layer, those of the head with the last: what pipeline_stages() splits by.
std::vector<double> counted_layer_costs(const GptConfig& config);

/// Seconds that forward and backward pass of each layer take here, those of final norm and head with the last, for ids
/// of shape [B, T]: medians of five, of a model of one layer.
std::vector<double> measured_layer_costs(const GptConfig& config, const Shape& ids, Device device, DType dtype);

}  // namespace weft::models
