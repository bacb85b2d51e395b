#include "apps/step_shapes.h"

#include "core/error.h"
#include "core/random.h"

namespace weft::apps {

const char* const kStepShapesHelp =
    "a: 4 layers x 128, T=64, B=12, V=65; b: 6 x 384, T=256, B=16, V=65; c: GPT-2 124M, T=64, B=4; 124m, 350m, 1558m: "
    "GPT-2's sizes, T=1,024, V=50,304, B=64, 32, 8";

std::span<const StepShape> step_shapes() {
  static const std::vector<StepShape> all = {
      {"a", {.layers = 4, .heads = 4, .width = 128, .context = 64, .vocab = 65}, 12},
      {"b", {.layers = 6, .heads = 6, .width = 384, .context = 256, .vocab = 65}, 16},
      {"c", {.layers = 12, .heads = 12, .width = 768, .context = 64, .vocab = 50257}, 4},
      {"124m", {.layers = 12, .heads = 12, .width = 768, .context = 1024, .vocab = 50304}, 64},
      {"350m", {.layers = 24, .heads = 16, .width = 1024, .context = 1024, .vocab = 50304}, 32},
      {"1558m", {.layers = 48, .heads = 25, .width = 1600, .context = 1024, .vocab = 50304}, 8},
  };
  return all;
}

std::vector<std::string> step_shape_names() {
  std::vector<std::string> names;
  for (const StepShape& shape : step_shapes()) names.emplace_back(shape.name);
  return names;
}

std::shared_ptr<text::TokenVector> random_tokens(const StepShape& shape) {
  const RandomStream stream(1, "bench tokens");
  std::vector<int32_t> tokens(static_cast<size_t>(64 * shape.batch * shape.config.context + 1));
  for (size_t i = 0; i < tokens.size(); ++i)
    tokens[i] = static_cast<int32_t>(stream.below(i, static_cast<uint64_t>(shape.config.vocab)));
  return std::make_shared<text::TokenVector>(std::move(tokens), shape.config.vocab);
}

const StepShape& step_shape(const std::string& name) {
  for (const StepShape& shape : step_shapes()) {
    if (shape.name == name) return shape;
  }
  fail(ErrorKind::kUsage, "bench", "there is no shape ", quoted(name));
}

}  // namespace weft::apps
