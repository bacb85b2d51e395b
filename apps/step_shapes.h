#pragma once
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "models/gpt.h"
#include "models/text/shard.h"

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
/// 64 batches of random tokens, the same each time.
std::shared_ptr<text::TokenVector> random_tokens(const StepShape& shape);
/// What the option that chooses one says of them.
extern const char* const kStepShapesHelp;

}  // namespace weft::apps
