#include "models/generate.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/autograd.h"

namespace weft::models {

void SamplingOptions::check() const {
  if (!(temperature >= 0) || !std::isfinite(temperature)) {
    fail(ErrorKind::kValue, "generate", "temperature must be at least 0 and finite, got ", temperature);
  }
  if (top_k < 0) fail(ErrorKind::kValue, "generate", "top_k must be at least 0 (0 is all), got ", top_k);
  if (!(top_p > 0) || !(top_p <= 1)) fail(ErrorKind::kValue, "generate", "top_p must be in (0, 1], got ", top_p);
}

int32_t sample(std::vector<double> logits, const SamplingOptions& options, uint64_t position) {
  options.check();
  if (logits.empty()) fail(ErrorKind::kShape, "generate", "there are no logits to choose from");
  for (size_t i = 0; i < logits.size(); ++i) {
    if (std::isnan(logits[i]))
      fail(ErrorKind::kValue, "generate", "the logit of token ", i, " is NaN: the weights or the input are broken");
  }
  const auto largest = std::max_element(logits.begin(), logits.end());
  if (options.temperature == 0) return static_cast<int32_t>(largest - logits.begin());

  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return logits[static_cast<size_t>(a)] > logits[static_cast<size_t>(b)];
  });
  if (options.top_k > 0 && options.top_k < static_cast<int64_t>(order.size()))
    order.resize(static_cast<size_t>(options.top_k));
  std::vector<double> weights;
  const double top = *largest;
  double total = 0;
  for (const int32_t id : order) {
    const double logit = logits[static_cast<size_t>(id)];
    weights.push_back(logit == top ? 1.0 : std::exp((logit - top) / options.temperature));  // also when top is infinite
    total += weights.back();
  }
  double kept = 0;
  size_t count = 0;
  while (count < weights.size() && (count == 0 || kept < options.top_p * total)) kept += weights[count++];

  double point = RandomStream(options.seed, "sample").uniform_f64(position) * kept;
  for (size_t i = 0; i < count; ++i) {
    point -= weights[i];
    if (point < 0) return order[i];
  }
  return order[count - 1];
}

namespace {

/// The token after `all`, of which the last ones, `ids` [1, n], are new to the cache; it is number `position`.
using NextToken = std::function<int32_t(const Tensor& ids, KvCache& cache, uint64_t position)>;

std::vector<int32_t> generate(int64_t context, Device device, const std::vector<int32_t>& prompt, int64_t count,
                              const NextToken& next_token, const std::function<bool(int32_t)>& on_token) {
  if (prompt.empty()) fail(ErrorKind::kValue, "generate", "the prompt must have at least one token");
  if (count < 0) fail(ErrorKind::kValue, "generate", "the number of tokens must not be negative, got ", count);
  std::vector<int32_t> all = prompt, fresh;
  KvCache cache;
  size_t fed = all.size() > static_cast<size_t>(context) ? all.size() - static_cast<size_t>(context) : 0;
  while (static_cast<int64_t>(fresh.size()) < count) {
    if (cache.positions() + static_cast<int64_t>(all.size() - fed) > context) {
      cache = KvCache();
      fed = all.size() - static_cast<size_t>(std::max<int64_t>(1, context / 2));
    }
    const std::vector<int32_t> next(all.begin() + static_cast<std::ptrdiff_t>(fed), all.end());
    const Tensor ids = Tensor::from(next, {1, static_cast<int64_t>(next.size())}, device);
    fed = all.size();
    all.push_back(next_token(ids, cache, fresh.size()));
    fresh.push_back(all.back());
    if (on_token && !on_token(fresh.back())) break;
  }
  return fresh;
}

}  // namespace

std::vector<int32_t> generate(const Gpt& gpt, const std::vector<int32_t>& prompt, int64_t count,
                              const SamplingOptions& options, const std::function<bool(int32_t)>& on_token) {
  options.check();
  const auto next_token = [&](const Tensor& ids, KvCache& cache, uint64_t position) {
    return sample(gpt.next_logits(ids, cache).to_vector<double>(), options, position);
  };
  const Device device = gpt.parameters().front().tensor.device();
  return generate(gpt.config().context, device, prompt, count, next_token, on_token);
}

std::vector<int32_t> generate(ParallelGpt& parallel, const std::vector<int32_t>& prompt, int64_t count,
                              const SamplingOptions& options) {
  options.check();
  const auto next_token = [&](const Tensor& ids, KvCache& cache, uint64_t position) {
    const Tensor logits = parallel.next_logits(ids, cache);
    return parallel.chosen(parallel.chooses() ? sample(logits.to_vector<double>(), options, position) : 0);
  };
  return generate(parallel.gpt().config().context, parallel.device(), prompt, count, next_token, {});
}

}  // namespace weft::models
