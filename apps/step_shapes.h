#pragma once
#include <span>
#include <string>
#include <vector>

#include "models/gpt.h"

namespace weft::apps {

/// A training step of docs/benchmarks by its name.
struct StepShape {
  const char* name;
  models::GptConfig config;
  int64_t batch;
};

/// Three for a CPU, and GPT-2's sizes with its context and a vocabulary padded to a multiple of 128 for a GPU.
std::span<const StepShape> step_shapes();
std::vector<std::string> step_shape_names();
const StepShape& step_shape(const std::string& name);
/// What the option that chooses one says of them.
extern const char* const kStepShapesHelp;

}  // namespace weft::apps
