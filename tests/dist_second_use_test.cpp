// A tensor that serves in two places has the bits of one process, whether one rank has both uses or two have one each.
#include <gtest/gtest.h>

#include <map>
#include <mutex>
#include <optional>

#include "core/autograd.h"
#include "dist/data_parallel.h"
#include "dist/pipeline/executor.h"
#include "dist/threads.h"
#include "models/gpt.h"
#include "optim/adam.h"
#include "tests/error_of.h"

namespace weft::dist {
namespace {

// The table is cut inside, at a place that is no multiple of its rows.
constexpr int64_t kRows = 2, kContext = 5, kVocab = 131, kWidth = 24, kSteps = 3, kBlocks = 2;
constexpr const char* kTable = "wte.weight";

struct Case {
  int stages = 1;                            ///< 1: every rank has both uses
  std::vector<int64_t> micro_batches = {6};  ///< of each data-parallel rank
  Zero zero = Zero::kNone;
  DType dtype = DType::f32;
};

std::string title(const Case& c) {
  return concat(c.stages, " stages, ", c.micro_batches.size(), " ranks each, ZeRO ", static_cast<int>(c.zero), ", ",
                c.dtype);
}

models::GptConfig config() {
  models::GptConfig config;
  config.layers = kBlocks, config.heads = 2, config.width = kWidth, config.context = kContext, config.vocab = kVocab;
  config.dropout = 0.1;
  return config;
}

std::pair<Tensor, Tensor> data_of(int64_t step, int64_t micro_batch) {
  const RandomStream stream = RandomStream(9, "data").at_step(static_cast<uint64_t>(step));
  std::vector<int32_t> ids, targets;
  for (int64_t i = 0; i < kRows * kContext; ++i) {
    const auto at = static_cast<uint64_t>((micro_batch * kRows * kContext + i) * 2);
    ids.push_back(static_cast<int32_t>(stream.below(at, kVocab)));
    targets.push_back(static_cast<int32_t>(stream.below(at + 1, kVocab)));
  }
  return {Tensor::from(ids, {kRows, kContext}), Tensor::from(targets, {kRows, kContext})};
}

using Weights = std::map<std::string, std::vector<double>>;

/// Trains with LAMB; the weights at the end, of all stages, after checking that all who have one have the same.
Weights train(const Case& c) {
  Weights weights;
  std::mutex mutex;
  int64_t total = 0;
  for (const int64_t n : c.micro_batches) total += n;
  const int ranks = static_cast<int>(c.micro_batches.size());
  run_threads(ranks * c.stages, [&](Group& world) {
    const int stage = world.rank() % c.stages, rank = world.rank() / c.stages;
    std::vector<int> replicas, pipeline;
    for (int r = 0; r < ranks; ++r) replicas.push_back(r * c.stages + stage);
    for (int s = 0; s < c.stages; ++s) pipeline.push_back(rank * c.stages + s);
    Group group = world.subgroup(replicas, concat("stage", stage)),
          pipe = world.subgroup(pipeline, concat("rank", rank));

    const IndexRange blocks = {kBlocks * stage / c.stages, kBlocks * (stage + 1) / c.stages};
    const models::Gpt gpt(config(), Device::cpu(), 3, c.dtype, {.layers = {blocks}, .separate_head = true});
    if (world.rank() > 0) {  // the first rank's table counts
      const autograd::NoGrad no_grad;
      Tensor(gpt.parameters().front().tensor).fill_(0.5);
    }
    SecondUse use{.parameter = kTable};
    if (c.stages == 1)
      use.leaf = gpt.head();
    else
      use.pair = &pipe;
    DataParallel parallel(group, gpt.parameters(), {.zero = c.zero, .bucket_bytes = 4096, .second_uses = {use}});
    optim::AdamOptions options;
    options.trust_ratio = true, options.weight_decay = 0.1;
    optim::Adam optimizer(parallel.parameters(), options, parallel.norms());

    int64_t step = 0;
    const auto settings = [&](int64_t j) {
      return models::GptStep{.step = static_cast<uint64_t>(step),
                             .first_row = j * kRows,
                             .valid_tokens = static_cast<double>(total * kRows * kContext)};
    };
    const PipelineStage run = [&](int i, const std::vector<Tensor>& inputs) {
      const int64_t j = parallel.micro_batch(i);
      const auto [ids, targets] = data_of(step, j);
      models::GptStream stream = stage == 0 ? gpt.begin(ids, settings(j)) : models::GptStream{inputs[0], inputs[1]};
      stream = gpt.blocks(stream, blocks.begin, blocks.end, settings(j));
      if (stage + 1 < c.stages) return std::vector<Tensor>{stream.x, stream.branch};
      return std::vector<Tensor>{gpt.finish(stream, targets, settings(j))};
    };
    const auto own = c.micro_batches[static_cast<size_t>(rank)];
    const Shape shape = {kRows, kContext, kWidth};
    PipelineExecutor executor(pipe, make_pipeline_schedule(PipelineKind::k1F1B, {c.stages, static_cast<int>(own)}),
                              {run}, {{shape, c.dtype}, {shape, c.dtype}});
    for (; step < kSteps; ++step) {
      parallel.begin_step(c.micro_batches);
      executor.run();
      parallel.reduce();
      optimizer.step(0.01);
      parallel.gather();
      optimizer.zero_grad();
    }
    const std::lock_guard lock(mutex);
    for (const auto& [name, tensor] : gpt.named_tensors()) {
      const std::vector<double> values = tensor.to_vector<double>();
      EXPECT_EQ(weights.emplace(name, values).first->second, values) << "rank " << world.rank() << ": " << name;
    }
  });
  return weights;
}

void expect_same(const Case& alone, const std::vector<Case>& others) {
  const Weights expected = train(alone);
  for (const Case& other : others) {
    const Weights weights = train(other);
    ASSERT_EQ(weights.size(), expected.size()) << title(other);
    for (const auto& [name, values] : expected) EXPECT_EQ(weights.at(name), values) << title(other) << ": " << name;
  }
}

TEST(SecondUse, HasTheSameBitsOnOneRankAndOnTwoStages) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const Zero zero : {Zero::kNone, Zero::kOptimizer, Zero::kGradients}) {
      std::vector<Case> others;
      for (const int stages : {1, 2}) {
        for (const std::vector<int64_t>& ranks : {std::vector<int64_t>{6}, {3, 3}, {2, 2, 2}})
          others.push_back({stages, ranks, zero, dtype});
      }
      expect_same({1, {6}, Zero::kNone, dtype}, others);
    }
  }
}

TEST(SecondUse, SixteenBitSumsAreRoundedOnceWithOneMicroBatchARankToo) {
  for (const Zero zero : {Zero::kNone, Zero::kOptimizer, Zero::kGradients}) {
    expect_same({1, {2}, Zero::kNone, DType::bf16},
                {{1, {1, 1}, zero, DType::bf16}, {2, {2}, zero, DType::bf16}, {2, {1, 1}, zero, DType::bf16}});
  }
}

TEST(SecondUse, UnequalSharesHaveThemToo) {
  for (const Zero zero : {Zero::kNone, Zero::kOptimizer})
    expect_same({1, {7}}, {{1, {1, 6}, zero}, {2, {1, 6}, zero}, {2, {2, 3, 2}, zero}});
}

TEST(SecondUse, SumsAreAddedBeforeTheyAreRounded) {
  Group self = self_group();
  Tensor table = Tensor::ones({1}, DType::bf16);
  table.requires_grad_();
  Tensor head = table.detach();
  head.requires_grad_();
  DataParallel parallel(self, {{"table", table}}, {.second_uses = {{.parameter = "table", .leaf = head}}});
  parallel.begin_step(std::vector<int64_t>{2});
  // The sum is 1 + 3 2^-9, nearest to 1 + 2^-7, the first bf16 after 1; each use rounded by itself gives 1.
  const std::vector<std::pair<double, double>> gradients = {{1, 0x1p-9}, {0x1p-9, 0x1p-9}};
  for (const auto& [first, second] : gradients) {
    table.backward(Tensor::full({1}, first, DType::bf16));
    head.backward(Tensor::full({1}, second, DType::bf16));
  }
  parallel.reduce();
  EXPECT_EQ(table.grad().item(), 1 + 0x1p-7);
  EXPECT_FALSE(head.grad().defined());
}

TEST(SecondUse, MisuseIsNamed) {
  Group self = self_group();
  Tensor table = Tensor::ones({3}), other = Tensor::ones({3});
  table.requires_grad_(), other.requires_grad_();
  const auto with = [&](const std::vector<SecondUse>& uses) {
    DataParallel(self, {{"table", table}}, {.second_uses = uses});
  };
  Tensor head = table.detach();
  EXPECT_ERROR(ErrorKind::kValue, "must be another leaf on its memory", with({{"table", head}}));
  head.requires_grad_();
  EXPECT_ERROR(ErrorKind::kValue, "the second use of parameter \"head\" is of none", with({{"head", head}}));
  EXPECT_ERROR(ErrorKind::kValue, "given twice", with({{"table", head}, {"table", head}}));
  EXPECT_ERROR(ErrorKind::kValue, "either a leaf or a pair", with({{"table"}}));
  EXPECT_ERROR(ErrorKind::kValue, "either a leaf or a pair", with({{"table", head, &self}}));
  EXPECT_ERROR(ErrorKind::kValue, "on a pair of ranks, got 1", with({{"table", {}, &self}}));
  EXPECT_ERROR(ErrorKind::kValue, "must be another leaf on its memory", with({{"table", table}}));
  EXPECT_ERROR(ErrorKind::kValue, "must be another leaf on its memory", with({{"table", other}}));
  DataParallel parallel(self, {{"table", table}}, {.second_uses = {{"table", head}}});
  parallel.begin_step(std::vector<int64_t>{1});
  table.backward(Tensor::ones({3}));
  EXPECT_ERROR(ErrorKind::kState, "parameter \"table (second use)\" got 0 gradients from 1", parallel.reduce());
}

}  // namespace
}  // namespace weft::dist
