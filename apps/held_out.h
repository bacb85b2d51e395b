#pragma once
#include <memory>

#include "models/evaluation.h"
#include "models/text/bpe.h"

namespace weft::apps {

/// Loss on held-out text, in the unit of the model and in one that does not depend on the tokenizer.
struct HeldOutLoss {
  double nats_per_token = 0;
  int64_t tokens = 0;      ///< that were predicted: all but the first
  int64_t bytes = 0;       ///< that these tokens stand for
  int64_t parameters = 0;  ///< of what was measured: trained numbers, or n-grams stored
  /// nats * tokens / (ln 2 * bytes)
  double bits_per_byte() const;
};

/// Of a model: windows of the model's context one after the other. `progress` as for models::evaluate, but the answer
/// false makes the result worthless.
HeldOutLoss held_out_loss(models::Gpt& gpt, const std::shared_ptr<const text::TokenSource>& tokens,
                          const text::Tokenizer& tokenizer, int64_t batch,
                          const std::function<bool(double)>& progress = {});

/// Of a model on several ranks, all of which call it.
HeldOutLoss held_out_loss(models::ParallelGpt& parallel, const std::shared_ptr<const text::TokenSource>& tokens,
                          const text::Tokenizer& tokenizer, int64_t batch);

/// Of an interpolated Kneser-Ney n-gram model trained on `train`, for the same targets.
HeldOutLoss kneser_ney_loss(const text::TokenSource& train, const text::TokenSource& held_out,
                            const text::Tokenizer& tokenizer, int order);

}  // namespace weft::apps
