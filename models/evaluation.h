#pragma once
#include <functional>

#include "models/parallel_gpt.h"
#include "models/text/loader.h"

namespace weft::models {

/// How well a model predicts held-out tokens.
struct EvaluationResult {
  double nats_per_token = 0;
  int64_t tokens = 0;  ///< targets
};

/// Mean cross-entropy over every target of `data`; dropout is off meanwhile. @param progress  called with the fraction
/// done; false stops, and the result is over what was seen.
EvaluationResult evaluate(Gpt& gpt, const text::Evaluation& data, const std::function<bool(double)>& progress = {});

/// The same of a model on several ranks, all of which call it: data-parallel ranks share out the batches. The result
/// has the bits of one process where the mesh has neither tp nor cp, and is there on every rank.
EvaluationResult evaluate(ParallelGpt& parallel, const text::Evaluation& data);

/// A batch as tensors {inputs, targets}, i32 [B, T].
MicroBatch to_tensors(const text::Batch& batch, Device device);

}  // namespace weft::models
