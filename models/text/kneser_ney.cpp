#include "models/text/kneser_ney.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "core/error.h"
#include "core/thread_pool.h"

namespace weft::text {
namespace {

uint64_t key_of(uint64_t context, uint32_t token) { return context << 32 | token; }

void check_tokens(const char* where, std::span<const int32_t> tokens, int64_t vocab_size) {
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] < 0 || tokens[i] >= vocab_size) {
      fail(ErrorKind::kIndex, where, "token ", tokens[i], " at position ", i, " is not in the vocabulary of ",
           vocab_size);
    }
  }
}

/// Keeps one of each run of equal keys and counts them.
void count_runs(std::vector<uint64_t>& keys, std::vector<uint32_t>& counts) {
  size_t kept = 0;
  for (size_t i = 0; i < keys.size();) {
    size_t end = i + 1;
    while (end < keys.size() && keys[end] == keys[i]) ++end;
    keys[kept++] = keys[i];
    counts.push_back(static_cast<uint32_t>(end - i));
    i = end;
  }
  keys.resize(kept);
  keys.shrink_to_fit();
  counts.shrink_to_fit();
}

/// Index of `key` in the sorted keys, -1 if it is not there.
int64_t find(const std::vector<uint64_t>& keys, size_t begin, size_t end, uint64_t key) {
  const auto from = keys.begin() + static_cast<ptrdiff_t>(begin), to = keys.begin() + static_cast<ptrdiff_t>(end);
  const auto found = std::lower_bound(from, to, key);
  return found == to || *found != key ? -1 : found - keys.begin();
}

}  // namespace

KneserNey::KneserNey(std::span<const int32_t> tokens, int64_t vocab_size, int order) : vocab_size_(vocab_size) {
  constexpr const char* kWhere = "KneserNey";
  if (vocab_size < 1 || vocab_size > std::numeric_limits<int32_t>::max()) {
    fail(ErrorKind::kValue, kWhere, "vocab_size must be from 1 to 2^31 - 1, got ", vocab_size);
  }
  if (order < 1 || order > 32) fail(ErrorKind::kValue, kWhere, "order must be from 1 to 32, got ", order);
  if (tokens.empty() || tokens.size() > std::numeric_limits<uint32_t>::max() - 1) {
    fail(ErrorKind::kValue, kWhere, "needs from 1 to 2^32 - 2 tokens, got ", tokens.size());
  }
  check_tokens(kWhere, tokens, vocab_size);
  const size_t n = tokens.size();
  const auto beginning = static_cast<uint32_t>(vocab_size);  // stands before the first token, as far back as need be
  orders_.resize(static_cast<size_t>(order));
  orders_[0].contexts = {0};

  // context[i] is the index of the context of token i, one token longer in every turn.
  std::vector<uint32_t> context(n, 0);
  {
    std::vector<std::pair<uint64_t, uint32_t>> keyed(order > 1 ? n : 0);
    for (size_t k = 1; k < orders_.size(); ++k) {
      std::vector<uint64_t>& contexts = orders_[k].contexts;
      for (size_t i = 0; i < n; ++i) {
        keyed[i] = {key_of(context[i], i >= k ? static_cast<uint32_t>(tokens[i - k]) : beginning),
                    static_cast<uint32_t>(i)};
      }
      std::sort(keyed.begin(), keyed.end());
      for (const auto& [key, i] : keyed) {
        if (contexts.empty() || contexts.back() != key) contexts.push_back(key);
        context[i] = static_cast<uint32_t>(contexts.size() - 1);
      }
      contexts.shrink_to_fit();
    }
  }

  for (size_t k = orders_.size(); k-- > 0;) {
    Order& here = orders_[k];
    if (k + 1 == orders_.size()) {
      here.grams.resize(n);
      for (size_t i = 0; i < n; ++i) here.grams[i] = key_of(context[i], static_cast<uint32_t>(tokens[i]));
      std::vector<uint32_t>().swap(context);
    } else {
      // Each distinct longer n-gram is one way to continue to the left: it counts once for the n-gram without its
      // oldest.
      const Order& longer = orders_[k + 1];
      here.grams.resize(longer.grams.size());
      for (size_t i = 0; i < longer.grams.size(); ++i) {
        const uint64_t shorter = longer.contexts[longer.grams[i] >> 32] >> 32;
        here.grams[i] = key_of(shorter, static_cast<uint32_t>(longer.grams[i]));
      }
    }
    std::sort(here.grams.begin(), here.grams.end());
    count_runs(here.grams, here.counts);

    here.first.resize(here.contexts.size() + 1);
    here.totals.resize(here.contexts.size());
    uint64_t ones = 0, twos = 0;
    for (size_t i = 0; i < here.grams.size(); ++i) {
      const size_t owner = here.grams[i] >> 32;
      here.first[owner + 1] = static_cast<uint32_t>(i + 1);  // every context is followed by something
      here.totals[owner] += here.counts[i];
      ones += here.counts[i] == 1;
      twos += here.counts[i] == 2;
    }
    here.discount = ones == 0 ? 0.5 : static_cast<double>(ones) / static_cast<double>(ones + 2 * twos);
  }
}

double KneserNey::probability_unchecked(const int32_t* end, int64_t available, int32_t token) const {
  double p = 1 / static_cast<double>(vocab_size_);
  uint64_t context = 0;
  for (size_t k = 0; k < orders_.size() && static_cast<int64_t>(k) <= available; ++k) {
    const Order& order = orders_[k];
    if (k > 0) {
      const uint64_t key = key_of(context, static_cast<uint32_t>(end[-static_cast<int64_t>(k)]));
      const int64_t found = find(order.contexts, 0, order.contexts.size(), key);
      if (found < 0) break;  // a context that was never seen: longer ones were not either
      context = static_cast<uint64_t>(found);
    }
    const size_t first = order.first[context], last = order.first[context + 1];
    const int64_t gram = find(order.grams, first, last, key_of(context, static_cast<uint32_t>(token)));
    const double count = gram < 0 ? 0 : order.counts[static_cast<size_t>(gram)];
    const double spread = order.discount * static_cast<double>(last - first);
    p = (std::max(count - order.discount, 0.0) + spread * p) / static_cast<double>(order.totals[context]);
  }
  return p;
}

double KneserNey::probability(std::span<const int32_t> context, int32_t token) const {
  check_tokens("KneserNey::probability", context, vocab_size_);
  check_tokens("KneserNey::probability", std::span(&token, 1), vocab_size_);
  return probability_unchecked(context.data() + context.size(), static_cast<int64_t>(context.size()), token);
}

double KneserNey::nats_per_token(std::span<const int32_t> tokens) const {
  constexpr const char* kWhere = "KneserNey::nats_per_token";
  if (tokens.empty()) fail(ErrorKind::kValue, kWhere, "there are no tokens to average over");
  check_tokens(kWhere, tokens, vocab_size_);
  constexpr int64_t kGrain = 4096;
  const auto n = static_cast<int64_t>(tokens.size());
  std::vector<double> sums(static_cast<size_t>((n + kGrain - 1) / kGrain));
  parallel_for(n, kGrain, [&](int64_t begin, int64_t end) {
    double sum = 0;
    for (int64_t i = begin; i < end; ++i)
      sum -= std::log(probability_unchecked(tokens.data() + i, i, tokens[static_cast<size_t>(i)]));
    sums[static_cast<size_t>(begin / kGrain)] = sum;
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0) / static_cast<double>(n);
}

double KneserNey::discount(int k) const {
  if (k < 1 || k > order())
    fail(ErrorKind::kValue, "KneserNey::discount", "k must be from 1 to ", order(), ", got ", k);
  return orders_[static_cast<size_t>(k - 1)].discount;
}

int64_t KneserNey::ngrams(int k) const {
  if (k < 1 || k > order()) fail(ErrorKind::kValue, "KneserNey::ngrams", "k must be from 1 to ", order(), ", got ", k);
  return static_cast<int64_t>(orders_[static_cast<size_t>(k - 1)].grams.size());
}

}  // namespace weft::text
