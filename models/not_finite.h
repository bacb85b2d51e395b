#pragma once
#include <functional>
#include <span>

#include "models/parallel_gpt.h"

namespace weft::models {

/// A training step whose loss or gradients are not finite, as it is on one rank.
struct FailedStep {
  int64_t step = 0;
  const Gpt& gpt;
  ParallelGpt* parallel = nullptr;          ///< null: this process trains alone
  std::span<const MicroBatch> batches;      ///< of this rank
  std::function<GptStep(size_t)> settings;  ///< of each
};

/// Looks for the first tensor of the step that is not finite: at the weights, and then at what the forward passes
/// compute, which are made again. On several ranks all call it; each looks at what it has, and the first of all in the
/// order of execution (micro-batch, layer, function) is named with its rank.
/// @throws Error kValue, the same on all ranks.
[[noreturn]] void explain_loss(const FailedStep& failed, double loss);

/// The same for gradients: the first in the order of a backward pass is one of the last layer.
/// @throws Error kValue, the same on all ranks, unless every gradient of every rank is finite.
void explain_gradients(const FailedStep& failed);

}  // namespace weft::models
