#pragma once
#include <ostream>

namespace weft::apps {

/// Prints, as Markdown, what a training step of GPT-2's sizes on a GPU moves and computes, counted by formula, and the
/// least time that it takes at the rates of an H200, beside the goals. docs/benchmarks/cuda.md has it; a test compares.
void print_prediction(std::ostream& out);

}  // namespace weft::apps
