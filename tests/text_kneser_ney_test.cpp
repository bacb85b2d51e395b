#include "models/text/kneser_ney.h"

#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/thread_pool.h"

namespace weft::text {
namespace {

using Ids = std::vector<int32_t>;

template <class Call>
void expect_error(ErrorKind kind, Call call) {
  try {
    call();
    ADD_FAILURE() << "nothing was thrown";
  } catch (const Error& error) {
    EXPECT_EQ(to_string(error.kind()), std::string(to_string(kind))) << error.what();
  }
}

/// A random second-order chain: there is something to learn, and rare contexts.
Ids chain(size_t n, int32_t vocab_size, unsigned seed) {
  std::mt19937 random(seed);
  Ids ids;
  for (size_t i = 0; i < n; ++i) {
    const int32_t a = i > 0 ? ids[i - 1] : 0, b = i > 1 ? ids[i - 2] : 0;
    const auto preferred = static_cast<int32_t>((a * 7 + b * 3 + 1) % vocab_size);
    ids.push_back(random() % 3 ? preferred : static_cast<int32_t>(random() % static_cast<unsigned>(vocab_size)));
  }
  return ids;
}

/// The definition in the header, word by word, over maps.
class Reference {
 public:
  Reference(const Ids& tokens, int vocab_size, int order) : vocab_size_(vocab_size), order_(order) {
    Ids padded(static_cast<size_t>(order), -1);
    padded.insert(padded.end(), tokens.begin(), tokens.end());
    counts_.resize(static_cast<size_t>(order) + 1);
    std::vector<std::set<Ids>> left(counts_.size());
    for (size_t end = static_cast<size_t>(order) + 1; end <= padded.size(); ++end) {
      const auto to = padded.begin() + static_cast<ptrdiff_t>(end);
      ++counts_[static_cast<size_t>(order)][Ids(to - order, to)];
      for (int k = 1; k < order; ++k) {
        if (left[static_cast<size_t>(k)].insert(Ids(to - k - 1, to)).second)
          ++counts_[static_cast<size_t>(k)][Ids(to - k, to)];
      }
    }
  }
  double discount(int k) const {
    double ones = 0, twos = 0;
    for (const auto& [gram, count] : counts_[static_cast<size_t>(k)]) ones += count == 1, twos += count == 2;
    return ones == 0 ? 0.5 : ones / (ones + 2 * twos);
  }
  double probability(Ids context, int32_t token) const {
    if (static_cast<int>(context.size()) >= order_) context.erase(context.begin(), context.end() - (order_ - 1));
    return p(context, token, static_cast<int>(context.size()) + 1);
  }

 private:
  double p(const Ids& context, int32_t token, int k) const {
    if (k == 0) return 1.0 / vocab_size_;
    const Ids shorter(context.begin() + (context.empty() ? 0 : 1), context.end());
    double total = 0, kinds = 0, count = 0;
    for (const auto& [gram, c] : counts_[static_cast<size_t>(k)]) {
      if (!std::equal(context.begin(), context.end(), gram.begin())) continue;
      total += c, kinds += 1;
      if (gram.back() == token) count = c;
    }
    const double lower = p(shorter, token, k - 1);
    if (total == 0) return lower;
    const double d = discount(k);
    return (std::max(count - d, 0.0) + d * kinds * lower) / total;
  }
  int vocab_size_, order_;
  std::vector<std::map<Ids, double>> counts_;
};

TEST(KneserNey, SumsToOneOverTheVocabularyForEveryContext) {
  const int32_t vocab_size = 50;
  const Ids tokens = chain(3000, 40, 1);  // the last 10 tokens are never seen
  for (const int order : {1, 2, 3, 5}) {
    const KneserNey model(tokens, vocab_size, order);
    std::mt19937 random(2);
    for (int round = 0; round < 60; ++round) {
      // Contexts from the text, contexts that the text has not, and short ones.
      Ids context;
      const size_t length = random() % 7, at = random() % (tokens.size() - 10);
      for (size_t i = 0; i < length; ++i)
        context.push_back(round % 3 ? tokens[at + i] : static_cast<int32_t>(random() % 50));
      double sum = 0;
      for (int32_t token = 0; token < vocab_size; ++token) {
        const double p = model.probability(context, token);
        ASSERT_GT(p, 0);
        sum += p;
      }
      // 50 terms of a few roundings each of 1e-16.
      ASSERT_NEAR(sum, 1, 1e-13) << "order " << order;
    }
  }
}

TEST(KneserNey, FollowsItsDefinition) {
  const Ids tokens = chain(400, 12, 3);
  for (const int order : {1, 2, 3, 5}) {
    const KneserNey model(tokens, 15, order);
    const Reference reference(tokens, 15, order);
    for (int k = 1; k <= order; ++k) EXPECT_NEAR(model.discount(k), reference.discount(k), 1e-15) << k;
    std::mt19937 random(4);
    for (int round = 0; round < 200; ++round) {
      const size_t at = random() % (tokens.size() - 8), length = random() % 7;
      Ids context(tokens.begin() + static_cast<ptrdiff_t>(at), tokens.begin() + static_cast<ptrdiff_t>(at + length));
      if (round % 4 == 0 && !context.empty()) context.front() = static_cast<int32_t>(random() % 15);
      const auto token = static_cast<int32_t>(random() % 15);
      ASSERT_NEAR(model.probability(context, token), reference.probability(context, token), 1e-14);
    }
  }
}

TEST(KneserNey, KnowsTheWorkedExample) {
  // "0 1 0 1 0 2", bigrams: (^ 0) 1, (0 1) 2, (1 0) 2, (0 2) 1: n1 = 2, n2 = 2, D_2 = 2 / 6. Continuations: 0 follows ^
  // and 1: 2; 1 and 2 follow 0: 1 each: D_1 = 2 / (2 + 2) = 1 / 2. p_1(2) = (1/2 + 1/2 * 3 / 4) / 4 = 7/32 with V = 4.
  const KneserNey model(Ids{0, 1, 0, 1, 0, 2}, 4, 2);
  EXPECT_DOUBLE_EQ(model.discount(2), 1.0 / 3);
  EXPECT_DOUBLE_EQ(model.discount(1), 0.5);
  EXPECT_DOUBLE_EQ(model.probability({}, 2), 7.0 / 32);
  EXPECT_DOUBLE_EQ(model.probability(Ids{0}, 2), (1 - 1.0 / 3 + 2 * (1.0 / 3) * 7 / 32) / 3);
  EXPECT_EQ(model.ngrams(1), 3);
  EXPECT_EQ(model.ngrams(2), 4);
}

TEST(KneserNey, LearnsTheChainAndBeatsShorterContexts) {
  const Ids train = chain(60'000, 64, 5), held_out = chain(5'000, 64, 6);
  const double uniform = std::log(64.0);
  const double one = KneserNey(train, 64, 1).nats_per_token(held_out);
  const double three = KneserNey(train, 64, 3).nats_per_token(held_out);
  // The chain's own entropy: 2/3 + 1/192 for the preferred token, 1/192 for each of the 63 others.
  const double best = -(2.0 / 3 + 1.0 / 192) * std::log(2.0 / 3 + 1.0 / 192) - 63.0 / 192 * std::log(1.0 / 192);
  EXPECT_NEAR(one, uniform, 0.01);
  EXPECT_GT(three, best - 0.05);  // 5,000 tokens: the standard error of the mean is 0.033
  EXPECT_LT(three, best + 0.35);  // each of 4,096 contexts was seen 15 times: the price of not knowing
}

TEST(KneserNey, MeanIsTheSameOnAnyNumberOfThreads) {
  const KneserNey model(chain(20'000, 64, 5), 64);
  const Ids held_out = chain(20'000, 64, 6);
  const int before = num_threads();
  set_num_threads(1);
  const double one = model.nats_per_token(held_out);
  set_num_threads(3);
  EXPECT_EQ(model.nats_per_token(held_out), one);
  set_num_threads(before);
  double sum = 0;
  for (size_t i = 0; i < held_out.size(); ++i) {
    sum -= std::log(model.probability(std::span(held_out).first(i), held_out[i]));
  }
  EXPECT_NEAR(sum / static_cast<double>(held_out.size()), one, 1e-12);
}

TEST(KneserNey, TakesTheSmallestInputs) {
  const KneserNey one(Ids{0}, 1);
  EXPECT_DOUBLE_EQ(one.probability({}, 0), 1);
  const KneserNey same(Ids(1000, 3), 5);
  double sum = 0;
  for (int32_t token = 0; token < 5; ++token) sum += same.probability(Ids{3, 3, 3, 3}, token);
  EXPECT_NEAR(sum, 1, 1e-14);
  EXPECT_GT(same.probability(Ids{3, 3, 3, 3}, 3), 0.99);
}

TEST(KneserNey, RefusesBadArguments) {
  expect_error(ErrorKind::kValue, [] { KneserNey(Ids{}, 5); });
  expect_error(ErrorKind::kValue, [] { KneserNey(Ids{1}, 0); });
  expect_error(ErrorKind::kValue, [] { KneserNey(Ids{1}, int64_t{1} << 31); });
  expect_error(ErrorKind::kValue, [] { KneserNey(Ids{1}, 5, 0); });
  expect_error(ErrorKind::kValue, [] { KneserNey(Ids{1}, 5, 33); });
  expect_error(ErrorKind::kIndex, [] { KneserNey(Ids{1, 5}, 5); });
  expect_error(ErrorKind::kIndex, [] { KneserNey(Ids{1, -1}, 5); });
  const KneserNey model(Ids{1, 2, 3}, 5);
  expect_error(ErrorKind::kIndex, [&] { (void)model.probability({}, 5); });
  expect_error(ErrorKind::kIndex, [&] { (void)model.probability(Ids{7}, 1); });
  expect_error(ErrorKind::kIndex, [&] { (void)model.nats_per_token(Ids{7}); });
  expect_error(ErrorKind::kValue, [&] { (void)model.nats_per_token({}); });
  expect_error(ErrorKind::kValue, [&] { (void)model.discount(6); });
}

}  // namespace
}  // namespace weft::text
