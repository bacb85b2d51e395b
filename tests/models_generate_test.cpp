#include "models/generate.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>

namespace weft::models {
namespace {

Gpt make_gpt() { return Gpt({.layers = 2, .heads = 2, .width = 16, .context = 8, .vocab = 23}, Device::cpu(), 1); }

TEST(Sampling, TemperatureZeroTakesTheLargestLogitAndTheLowestIdAmongEquals) {
  EXPECT_EQ(sample({0.5, 2, 2, -1}, {.temperature = 0}, 0), 1);
}

TEST(Sampling, TopKAndTopPNeverLeaveTheirSets) {
  const std::vector<double> logits = {1, 3, 2, 0, 2.5};
  for (uint64_t position = 0; position < 500; ++position) {
    const int32_t k = sample(logits, {.top_k = 2, .seed = 9}, position);
    EXPECT_TRUE(k == 1 || k == 4) << k;
    // exp(3) / sum is 0.45: the smallest set that reaches 0.4 is the largest alone.
    EXPECT_EQ(sample(logits, {.top_p = 0.4, .seed = 9}, position), 1);
  }
}

TEST(Sampling, FrequenciesFollowTheSoftmaxAtTheTemperature) {
  const std::vector<double> logits = {std::log(1.0), std::log(2.0), std::log(4.0)};
  std::map<int32_t, int> counts;
  constexpr int kDraws = 20000;
  for (uint64_t position = 0; position < kDraws; ++position)
    ++counts[sample(logits, {.temperature = 0.5, .seed = 3}, position)];
  // At temperature 1/2 the weights are squared: 1, 4, 16 of 21. Five standard deviations of a count are below 0.02.
  for (int id = 0; id < 3; ++id) EXPECT_NEAR(counts[id] / double(kDraws), std::pow(4.0, id) / 21, 0.02) << id;
}

TEST(Sampling, TheSameSeedGivesTheSameTokenAndAnotherSeedOthers) {
  const std::vector<double> logits(50, 0.0);
  int same = 0;
  for (uint64_t position = 0; position < 200; ++position) {
    EXPECT_EQ(sample(logits, {.seed = 1}, position), sample(logits, {.seed = 1}, position));
    same += sample(logits, {.seed = 1}, position) == sample(logits, {.seed = 2}, position);
  }
  EXPECT_LT(same, 20);
}

TEST(Sampling, RefusesNaNAndSettingsOutsideTheirRange) {
  EXPECT_THROW(sample({0, std::nan("")}, {}, 0), Error);
  EXPECT_THROW(sample({}, {}, 0), Error);
  EXPECT_THROW(sample({0, 1}, {.temperature = -1}, 0), Error);
  EXPECT_THROW(sample({0, 1}, {.top_k = -1}, 0), Error);
  EXPECT_THROW(sample({0, 1}, {.top_p = 0}, 0), Error);
  EXPECT_THROW(sample({0, 1}, {.top_p = 1.5}, 0), Error);
}

TEST(Sampling, AnInfiniteLogitIsCertain) {
  EXPECT_EQ(sample({0, std::numeric_limits<double>::infinity(), 5}, {.seed = 4}, 7), 1);
}

TEST(Generation, GreedyWithTheCacheIsGreedyOverWholeSequences) {
  const Gpt gpt = make_gpt();
  std::vector<int32_t> sequence = {3, 1};
  const std::vector<int32_t> got = generate(gpt, sequence, 6, {.temperature = 0});
  for (const int32_t token : got) {
    const Tensor ids = Tensor::from(sequence, {1, static_cast<int64_t>(sequence.size())});
    const std::vector<double> logits = gpt.logits(ids).select(1, ids.size(1) - 1).to_vector<double>();
    EXPECT_EQ(token, sample(logits, {.temperature = 0}, 0));
    sequence.push_back(token);
  }
}

TEST(Generation, GoesOnBeyondTheContext) {
  const Gpt gpt = make_gpt();
  EXPECT_EQ(generate(gpt, {1, 2, 3}, 40, {.seed = 2}).size(), 40u);
  EXPECT_EQ(generate(gpt, std::vector<int32_t>(30, 5), 3, {.seed = 2}).size(), 3u)
      << "a prompt longer than the context";
}

TEST(Generation, StreamsEachTokenAndStopsWhenTold) {
  const Gpt gpt = make_gpt();
  std::vector<int32_t> seen;
  const std::vector<int32_t> got = generate(gpt, {1}, 20, {.seed = 2}, [&](int32_t token) {
    seen.push_back(token);
    return seen.size() < 4;
  });
  EXPECT_EQ(got.size(), 4u);
  EXPECT_EQ(seen, got);
  EXPECT_THROW(generate(gpt, {}, 3, {}), Error);
}

}  // namespace
}  // namespace weft::models
