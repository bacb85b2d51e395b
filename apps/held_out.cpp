#include "apps/held_out.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "models/text/kneser_ney.h"

namespace weft::apps {
namespace {

std::vector<int32_t> all_tokens(const text::TokenSource& source) {
  std::vector<int32_t> tokens(static_cast<size_t>(source.size()));
  source.read(0, tokens);
  return tokens;
}

/// Bytes of all tokens but the first, which is never predicted.
int64_t target_bytes(const std::vector<int32_t>& tokens, const text::Tokenizer& tokenizer) {
  int64_t bytes = 0;
  for (size_t i = 1; i < tokens.size(); ++i) bytes += static_cast<int64_t>(tokenizer.token(tokens[i]).size());
  return bytes;
}

}  // namespace

double HeldOutLoss::bits_per_byte() const {
  return nats_per_token * static_cast<double>(tokens) / (std::numbers::ln2 * static_cast<double>(bytes));
}

HeldOutLoss held_out_loss(models::Gpt& gpt, const std::shared_ptr<const text::TokenSource>& tokens,
                          const text::Tokenizer& tokenizer, int64_t batch,
                          const std::function<bool(double)>& progress) {
  const text::Evaluation evaluation(tokens, batch, gpt.config().context);
  const models::EvaluationResult result = models::evaluate(gpt, evaluation, progress);
  return {result.nats_per_token, result.tokens, target_bytes(all_tokens(*tokens), tokenizer), gpt.parameter_count()};
}

HeldOutLoss held_out_loss(models::ParallelGpt& parallel, const std::shared_ptr<const text::TokenSource>& tokens,
                          const text::Tokenizer& tokenizer, int64_t batch) {
  const models::GptConfig& config = parallel.gpt().config();
  const models::EvaluationResult result = models::evaluate(parallel, text::Evaluation(tokens, batch, config.context));
  return {result.nats_per_token, result.tokens, target_bytes(all_tokens(*tokens), tokenizer), config.parameter_count()};
}

HeldOutLoss kneser_ney_loss(const text::TokenSource& train, const text::TokenSource& held_out,
                            const text::Tokenizer& tokenizer, int order) {
  const text::KneserNey model(all_tokens(train), train.vocab_size(), order);
  const std::vector<int32_t> tokens = all_tokens(held_out);
  if (tokens.size() < 2) fail(ErrorKind::kValue, "eval", "held-out data needs at least 2 tokens, got ", tokens.size());
  const std::span<const int32_t> all(tokens);
  double nats = 0;
  for (size_t i = 1; i < all.size(); ++i) {
    const size_t context = std::min(i, static_cast<size_t>(order) - 1);
    nats -= std::log(model.probability(all.subspan(i - context, context), all[i]));
  }
  const auto targets = static_cast<int64_t>(tokens.size()) - 1;
  int64_t ngrams = 0;
  for (int k = 1; k <= order; ++k) ngrams += model.ngrams(k);
  return {nats / static_cast<double>(targets), targets, target_bytes(tokens, tokenizer), ngrams};
}

}  // namespace weft::apps
