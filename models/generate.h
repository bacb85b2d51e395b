#pragma once
#include <functional>
#include <vector>

#include "models/parallel_gpt.h"

namespace weft::models {

/// How the next token is chosen from logits.
struct SamplingOptions {
  double temperature = 1;  ///< logits are divided by it; 0 is greedy: the largest, the lowest id among equals
  int64_t top_k = 0;       ///< only the k most likely; 0: all
  double top_p = 1;  ///< only the most likely ones that together reach probability p (Holtzman et al. 2020), in (0, 1]
  uint64_t seed = 0;

  /// @throws Error kValue naming the field that makes no sense.
  void check() const;
};

/// One token id from logits [V]. Random numbers come from the stream (seed, "sample"), number `position`: the same
/// logits at the same position give the same token on every machine that computes them alike.
/// @throws Error kValue if a logit is NaN.
int32_t sample(std::vector<double> logits, const SamplingOptions& options, uint64_t position);

/// Continues `prompt` token by token with a KV cache; when the context is full, the last half of it is kept and
/// computed again.
/// @param prompt    at least one id
/// @param count     tokens to add, unless on_token ends it
/// @param on_token  called with each new token as it is chosen; false ends the generation
/// @return          the new tokens
std::vector<int32_t> generate(const Gpt& gpt, const std::vector<int32_t>& prompt, int64_t count,
                              const SamplingOptions& options, const std::function<bool(int32_t)>& on_token = {});

/// The same with a model on several ranks, all of which call it with equal arguments and have the result: one of those
/// with logits chooses each token and tells the others. Without tp the logits have the bits that one process has.
std::vector<int32_t> generate(ParallelGpt& parallel, const std::vector<int32_t>& prompt, int64_t count,
                              const SamplingOptions& options);

}  // namespace weft::models
