// A model spread over a mesh trains as one process does: same losses, same weights, bit for bit with dp, pp, any ZeRO
// and any schedule.
#include "models/parallel_gpt.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>
#include <mutex>

#include "core/autograd.h"
#include "core/random.h"
#include "dist/threads.h"
#include "models/evaluation.h"
#include "optim/adam.h"
#include "tests/error_of.h"

namespace weft::models {
namespace {

using dist::Mesh;
using dist::PipelineKind;
using dist::Zero;

constexpr int64_t kRows = 2, kContext = 7, kVocab = 29, kSteps = 3, kMicroBatches = 8;

struct Case {
  std::string mesh;
  Zero zero = Zero::kNone;
  PipelineKind schedule = PipelineKind::k1F1B;
  int chunks = 1;
  std::vector<int64_t> stage_layers = {};
  int64_t layers = 5;
  DType dtype = DType::f32;
  bool trust_ratio = false;
  Recompute recompute = {};
  double dropout = 0.1;
  bool sequence = false;
  int shard_ranks = 0;
};

std::string title(const Case& c) {
  std::string text = concat("mesh ", quoted(c.mesh), ", ZeRO ", static_cast<int>(c.zero), ", ", c.schedule, ", ",
                            c.chunks, " chunks, ", c.layers, " layers, ", c.dtype);
  for (const int64_t layers : c.stage_layers) text += concat(' ', layers);
  return text + (c.trust_ratio ? ", LAMB" : "") + (c.sequence ? ", sequence parallel" : "") +
         (c.recompute.block ? ", recomputed" : "");
}

GptConfig config_of(const Case& c) {
  GptConfig config;
  config.layers = c.layers, config.heads = 2, config.width = 24, config.context = kContext, config.vocab = kVocab;
  config.dropout = c.dropout, config.recompute = c.recompute;
  return config;
}

/// Micro-batch j of a step; some targets do not count.
MicroBatch data_of(int64_t step, int64_t j) {
  const RandomStream stream = RandomStream(9, "data").at_step(static_cast<uint64_t>(step));
  std::vector<int32_t> ids, targets;
  for (int64_t i = 0; i < kRows * kContext; ++i) {
    const auto at = static_cast<uint64_t>((j * kRows * kContext + i) * 3);
    ids.push_back(static_cast<int32_t>(stream.below(at, kVocab)));
    targets.push_back(stream.below(at + 1, 4) == 0 ? -1 : static_cast<int32_t>(stream.below(at + 2, kVocab)));
  }
  return {Tensor::from(ids, {kRows, kContext}), Tensor::from(targets, {kRows, kContext})};
}

double valid_tokens(int64_t step) {
  double valid = 0;
  for (int64_t j = 0; j < kMicroBatches; ++j) {
    for (const int32_t target : data_of(step, j).targets.to_vector<int32_t>()) valid += target >= 0;
  }
  return valid;
}

/// What a run leaves behind: losses and norms of steps, and weights by name, put together from the ranks' parts.
struct Outcome {
  std::vector<double> losses, norms, held_out;
  std::map<std::string, std::vector<double>> weights;
};

Outcome train(const Case& c) {
  Outcome outcome;
  std::mutex mutex;
  const int ranks = Mesh::parse(c.mesh).size();
  dist::run_threads(ranks, [&](dist::Group& world) {
    ParallelOptions options;
    options.mesh = Mesh::parse(c.mesh), options.zero = c.zero, options.bucket_bytes = 4096;
    options.schedule = c.schedule, options.chunks = c.chunks, options.stage_layers = c.stage_layers;
    options.sequence = c.sequence, options.shard_ranks = c.shard_ranks;
    ParallelGpt parallel(world, options, config_of(c), Device::cpu(), 3, c.dtype);
    optim::AdamOptions adam;
    adam.weight_decay = 0.1, adam.clip_norm = 0.5, adam.trust_ratio = c.trust_ratio;
    optim::Adam optimizer(parallel.parameters(), adam, parallel.norms());
    const int64_t share = parallel.shares(kMicroBatches)[static_cast<size_t>(parallel.data_rank())];
    std::vector<double> losses, norms;
    for (int64_t step = 0; step < kSteps; ++step) {
      parallel.begin_step(kMicroBatches);
      std::vector<MicroBatch> batches;
      for (int64_t i = 0; i < share; ++i) batches.push_back(data_of(step, parallel.micro_batch(i)));
      const auto settings = [&](size_t i) {
        GptStep settings;
        settings.step = static_cast<uint64_t>(step);
        settings.first_row = parallel.micro_batch(static_cast<int64_t>(i)) * kRows;
        settings.valid_tokens = valid_tokens(step);
        return settings;
      };
      const std::vector<double> of_step = parallel.run(batches, settings).to_vector<double>();
      losses.insert(losses.end(), of_step.begin(), of_step.end());
      parallel.reduce();
      norms.push_back(optimizer.step(1e-2).grad_norm);
      parallel.gather();
      optimizer.zero_grad();
    }
    parallel.gpt().eval();
    const std::vector<double> sums =
        parallel.loss_sums(5, [](int64_t i) { return std::pair(data_of(kSteps, i), int64_t{kRows * kContext}); });
    const std::lock_guard lock(mutex);
    if (outcome.losses.empty()) outcome.losses = losses, outcome.norms = norms, outcome.held_out = sums;
    EXPECT_EQ(losses, outcome.losses) << "on rank " << world.rank();
    EXPECT_EQ(norms, outcome.norms) << "on rank " << world.rank();
    EXPECT_EQ(sums, outcome.held_out) << "on rank " << world.rank();
    const Parameters& held = parallel.sharded() ? parallel.parameters() : parallel.gpt().parameters();
    for (size_t p = 0; p < held.size(); ++p) {
      const Parameter& parameter = held[p];
      const std::vector<double> values = parameter.tensor.to_vector<double>();
      TensorPart part = parallel.parts()[p];
      if (!parallel.sharded()) part = parameter.part ? *parameter.part : TensorPart::all(parameter.tensor.shape());
      std::vector<double>& whole = outcome.weights[parameter.name];
      whole.resize(static_cast<size_t>(numel(part.whole)), std::numeric_limits<double>::quiet_NaN());
      part.for_each_run([&](int64_t at, int64_t from, int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
          double& element = whole[static_cast<size_t>(at + i)];
          const double value = values[static_cast<size_t>(from + i)];
          EXPECT_TRUE(std::isnan(element) || element == value) << parameter.name << " of rank " << world.rank();
          element = value;
        }
      });
    }
  });
  return outcome;
}

void expect_equal_to_one_rank(const Case& c) {
  const ::testing::ScopedTrace trace(__FILE__, __LINE__, title(c));
  Case alone = c;
  alone.mesh = "", alone.zero = Zero::kNone, alone.chunks = 1, alone.stage_layers = {}, alone.shard_ranks = 0;
  alone.schedule = PipelineKind::k1F1B;
  const Outcome one = train(alone), many = train(c);
  EXPECT_EQ(many.losses, one.losses);
  EXPECT_EQ(many.norms, one.norms);
  EXPECT_EQ(many.held_out, one.held_out);
  ASSERT_EQ(many.weights.size(), one.weights.size());
  for (const auto& [name, values] : one.weights) EXPECT_EQ(many.weights.at(name), values) << name;
}

/// Other sums than one rank's: as close as f64 and the depth of the model allow.
void expect_close_to_one_rank(Case c) {
  const ::testing::ScopedTrace trace(__FILE__, __LINE__, title(c));
  c.dtype = DType::f64;
  Case alone = c;
  alone.mesh = "", alone.zero = Zero::kNone, alone.chunks = 1, alone.schedule = PipelineKind::k1F1B;
  const Outcome one = train(alone), many = train(c);
  const auto close = [](const std::vector<double>& a, const std::vector<double>& b, const std::string& what) {
    ASSERT_EQ(a.size(), b.size()) << what;
    for (size_t i = 0; i < a.size(); ++i) ASSERT_NEAR(a[i], b[i], 1e-10 * std::max(1.0, std::abs(b[i]))) << what;
  };
  close(many.losses, one.losses, "losses");
  close(many.norms, one.norms, "norms");
  close(many.held_out, one.held_out, "held-out losses");
  ASSERT_EQ(many.weights.size(), one.weights.size());
  for (const auto& [name, values] : one.weights) close(many.weights.at(name), values, name);
}

TEST(ParallelGpt, EveryPipelineScheduleHasTheBitsOfOneRank) {
  for (const PipelineKind kind :
       {PipelineKind::kGPipe, PipelineKind::k1F1B, PipelineKind::kEager1F1B, PipelineKind::kZeroBubble}) {
    expect_equal_to_one_rank({.mesh = "pp=2", .schedule = kind});
    expect_equal_to_one_rank({.mesh = "pp=3", .schedule = kind});
  }
  expect_equal_to_one_rank({.mesh = "pp=2", .schedule = PipelineKind::kInterleaved, .chunks = 2});
  expect_equal_to_one_rank({.mesh = "pp=4", .schedule = PipelineKind::kInterleaved, .chunks = 2, .layers = 9});
}

TEST(ParallelGpt, DataAndPipelineParallelismComposeWithEveryZeroStage) {
  for (const Zero zero : {Zero::kNone, Zero::kOptimizer, Zero::kGradients}) {
    expect_equal_to_one_rank({.mesh = "dp=2", .zero = zero});
    expect_equal_to_one_rank({.mesh = "dp=2,pp=2", .zero = zero});
    expect_equal_to_one_rank({.mesh = "dp=4,pp=2", .zero = zero, .schedule = PipelineKind::kZeroBubble});
  }
  expect_equal_to_one_rank(
      {.mesh = "dp=2,pp=2", .zero = Zero::kGradients, .schedule = PipelineKind::kInterleaved, .chunks = 2});
}

TEST(ParallelGpt, CopiesNeedNotHaveAsManyMicroBatches) {
  expect_equal_to_one_rank({.mesh = "dp=3"});
  expect_equal_to_one_rank({.mesh = "dp=3,pp=2", .zero = Zero::kOptimizer});
}

TEST(ParallelGpt, LambMixedPrecisionAndRecomputationChangeNothingOfThat) {
  expect_equal_to_one_rank({.mesh = "dp=2,pp=2", .zero = Zero::kOptimizer, .trust_ratio = true});
  expect_equal_to_one_rank({.mesh = "dp=2,pp=2", .zero = Zero::kGradients, .dtype = DType::bf16, .trust_ratio = true});
  expect_equal_to_one_rank({.mesh = "pp=2", .schedule = PipelineKind::kZeroBubble, .dtype = DType::bf16});
  expect_equal_to_one_rank({.mesh = "pp=2", .recompute = {.block = true}});
  expect_equal_to_one_rank({.mesh = "pp=2", .recompute = {.norm = true, .activation = true, .attention = true}});
}

TEST(ParallelGpt, TensorAndSequenceParallelismComposeWithTheRest) {
  for (const bool sequence : {false, true}) {
    expect_close_to_one_rank({.mesh = "tp=2", .sequence = sequence});
    expect_close_to_one_rank({.mesh = "dp=2,tp=2", .zero = Zero::kGradients, .sequence = sequence});
    expect_close_to_one_rank({.mesh = "pp=2,tp=2", .schedule = PipelineKind::kZeroBubble, .sequence = sequence});
    expect_close_to_one_rank({.mesh = "dp=2,pp=2,tp=2",
                              .zero = Zero::kOptimizer,
                              .trust_ratio = true,
                              .recompute = {.block = true},
                              .sequence = sequence});
  }
}

TEST(ParallelGpt, ContextParallelismComposesWithTheRest) {
  expect_close_to_one_rank({.mesh = "cp=2"});
  expect_close_to_one_rank({.mesh = "cp=3", .zero = Zero::kOptimizer});
  expect_close_to_one_rank({.mesh = "dp=2,cp=2", .zero = Zero::kGradients, .trust_ratio = true});
  expect_close_to_one_rank({.mesh = "pp=2,cp=2", .schedule = PipelineKind::kZeroBubble});
  expect_close_to_one_rank({.mesh = "cp=2,tp=2", .recompute = {.block = true}});
  expect_close_to_one_rank({.mesh = "dp=2,pp=2,cp=2", .zero = Zero::kGradients});
}

TEST(ParallelGpt, WeightsMayBeSharedOutOnEveryMesh) {
  for (const char* mesh : {"", "dp=2", "dp=3", "dp=4"})
    expect_equal_to_one_rank({.mesh = mesh, .zero = Zero::kParameters});
  expect_equal_to_one_rank({.mesh = "dp=2,pp=2", .zero = Zero::kParameters});
  expect_equal_to_one_rank({.mesh = "dp=2,pp=2",
                            .zero = Zero::kParameters,
                            .schedule = PipelineKind::kInterleaved,
                            .chunks = 2,
                            .trust_ratio = true});
  expect_equal_to_one_rank(
      {.mesh = "dp=2", .zero = Zero::kParameters, .dtype = DType::bf16, .recompute = {.block = true}});
  expect_close_to_one_rank({.mesh = "dp=2,tp=2", .zero = Zero::kParameters});
  expect_close_to_one_rank({.mesh = "dp=2,cp=2", .zero = Zero::kParameters});
  expect_close_to_one_rank({.mesh = "dp=2,pp=2,tp=2", .zero = Zero::kParameters, .sequence = true});
}

TEST(ParallelGpt, StatesMayBeSharedOutWithinGroupsOfCopies) {
  for (const Zero zero : {Zero::kOptimizer, Zero::kParameters})
    expect_equal_to_one_rank({.mesh = "dp=4", .zero = zero, .shard_ranks = 2});
  expect_equal_to_one_rank({.mesh = "dp=4,pp=2", .zero = Zero::kOptimizer, .trust_ratio = true, .shard_ranks = 2});
}

TEST(ParallelGpt, StagesMayHaveAnyNumbersOfLayers) {
  expect_equal_to_one_rank({.mesh = "pp=2", .stage_layers = {4, 1}});
  expect_equal_to_one_rank({.mesh = "pp=3", .stage_layers = {1, 1, 3}});
}

TEST(ParallelGpt, TheHeadWeighsAsManyLayersAsItHasFlops) {
  dist::run_threads(2, [](dist::Group& world) {
    GptConfig config;
    config.layers = 12, config.heads = 2, config.width = 24, config.context = 8, config.vocab = 24 * 12 * 4;
    const ParallelGpt parallel(world, {.mesh = Mesh::parse("pp=2")}, config, Device::cpu());
    EXPECT_EQ(parallel.stages(), (std::vector<int64_t>{0, 8, 12}));
  });
}

TEST(ParallelGpt, WhatDoesNotFitIsRefused) {
  const auto make = [](const Case& c) {
    dist::run_threads(Mesh::parse(c.mesh).size(), [&](dist::Group& world) {
      ParallelOptions options;
      options.mesh = Mesh::parse(c.mesh), options.schedule = c.schedule, options.chunks = c.chunks;
      options.stage_layers = c.stage_layers;
      const ParallelGpt parallel(world, options, config_of(c), Device::cpu());
    });
  };
  EXPECT_ERROR(ErrorKind::kValue, "a pipeline of 3 stages needs as many layers at least, got 2",
               make({.mesh = "pp=3", .layers = 2}));
  EXPECT_ERROR(ErrorKind::kValue, "must be given for all 2 and add up to 5, got 2 that add up to 4",
               make({.mesh = "pp=2", .stage_layers = {2, 2}}));
  EXPECT_ERROR(ErrorKind::kValue, "every stage needs at least one layer",
               make({.mesh = "pp=2", .stage_layers = {5, 0}}));
  dist::Group one = dist::self_group();
  EXPECT_ERROR(ErrorKind::kValue, "is for 2 ranks, there are 1",
               ParallelGpt(one, {.mesh = Mesh::parse("dp=2")}, config_of({}), Device::cpu()));
}

}  // namespace
}  // namespace weft::models
