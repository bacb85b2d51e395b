// Training in fp8 on the CPU: how far its loss is from bf16's, and the promises of same numbers.
#include <gtest/gtest.h>

#include <numeric>

#include "core/autograd.h"
#include "core/thread_pool.h"
#include "models/evaluation.h"
#include "models/trainer.h"
#include "optim/adam.h"
#include "tests/error_of.h"

namespace weft::models {
namespace {

/// Text that can be learned: each token follows from the one before it, four times out of five.
std::shared_ptr<text::TokenVector> learnable_tokens(int64_t count, int64_t vocab) {
  const RandomStream stream(5, "tokens");
  std::vector<int32_t> tokens(static_cast<size_t>(count), 1);
  for (size_t i = 1; i < tokens.size(); ++i) {
    const bool noise = stream.below(2 * i, 5) == 0;
    const auto next = static_cast<uint64_t>(3 * tokens[i - 1] + 1) % static_cast<uint64_t>(vocab);
    tokens[i] = static_cast<int32_t>(noise ? stream.below(2 * i + 1, static_cast<uint64_t>(vocab)) : next);
  }
  return std::make_shared<text::TokenVector>(std::move(tokens), vocab);
}

struct Setting {
  bool fp8 = true;
  bool recompute = false;
  double dropout = 0;
  int64_t accumulate = 1;
  int64_t step = 0;
  DType dtype = DType::bf16;
};

struct Session {
  static constexpr int64_t kVocab = 37;
  Gpt gpt;
  optim::Adam adam;
  text::Loader loader{learnable_tokens(20000, kVocab), {.batch = 4, .context = 16, .seed = 2}};
  Trainer trainer;
  optim::DelayedScaling::Counts counts;

  explicit Session(const Setting& s)
      : gpt({.layers = 2,
             .heads = 2,
             .width = 32,
             .context = 16,
             .vocab = kVocab,
             .dropout = s.dropout,
             .recompute = s.recompute},
            Device::cpu(), 1, s.dtype),
        adam(gpt.parameters(), {.beta2 = 0.95, .clip_norm = 1.0}),
        trainer(gpt, adam, loader, {.peak = 5e-3, .floor = 5e-4, .warmup = 10, .total = 150}, s.accumulate, s.step) {
    if (s.fp8) trainer.scale_fp8(gpt.use_fp8());
  }

  std::vector<double> losses(int steps) {
    std::vector<double> out;
    for (int i = 0; i < steps; ++i) {
      const StepMetrics m = trainer.step();
      counts.converted += m.fp8.converted, counts.saturated += m.fp8.saturated;
      out.push_back(m.loss);
    }
    return out;
  }
  NamedTensors state() const {
    NamedTensors all = gpt.named_tensors();
    for (const NamedTensors& part : {adam.state(), trainer.fp8() ? trainer.fp8()->state() : NamedTensors()})
      all.insert(all.end(), part.begin(), part.end());
    return all;
  }
  std::vector<std::vector<double>> values() const {
    std::vector<std::vector<double>> out;
    for (const auto& [name, tensor] : state()) out.push_back(tensor.to_vector<double>());
    return out;
  }
};

NamedTensors copy_of(const NamedTensors& tensors) {
  NamedTensors copy;
  for (const auto& [name, tensor] : tensors) copy.emplace_back(name, tensor.detach().clone());
  return copy;
}

double mean_of_last(const std::vector<double>& losses, size_t count) {
  return std::accumulate(losses.end() - static_cast<std::ptrdiff_t>(count), losses.end(), 0.0) /
         static_cast<double>(count);
}

TEST(Fp8Training, EndsWithinTwoPercentOfTheLossOfBf16) {
  Session wide({.fp8 = false}), narrow({});
  const std::vector<double> bf16 = wide.losses(150), fp8 = narrow.losses(150);
  const double want = mean_of_last(bf16, 30), got = mean_of_last(fp8, 30);
  RecordProperty("bf16", std::to_string(want));
  RecordProperty("fp8", std::to_string(got));
  EXPECT_LT(want, 0.75 * bf16[0]) << "the model is to learn something";
  EXPECT_LE(std::abs(got - want), 0.02 * want) << got << " against " << want;
  EXPECT_NE(bf16, fp8) << "fp8 was not used at all";
  EXPECT_GT(narrow.counts.converted, 0);
  EXPECT_LT(static_cast<double>(narrow.counts.saturated), 1e-3 * static_cast<double>(narrow.counts.converted));
}

TEST(Fp8Training, ConvertsEveryOperandOnceAMicroBatchAndEveryWeightOnceAStep) {
  for (const int64_t accumulate : {1, 3}) {
    for (const bool recompute : {false, true}) {
      Session run({.recompute = recompute, .accumulate = accumulate});
      // Inputs C + C + C + 4 C, gradients 3 C + C + 4 C + C a token; weights 12 C^2.
      constexpr int64_t kWidth = 32, kTokens = 4 * 16;
      const int64_t a_layer = accumulate * kTokens * (7 + 9) * kWidth + 12 * kWidth * kWidth;
      for (int i = 0; i < 2; ++i) EXPECT_EQ(run.trainer.step().fp8.converted, 2 * a_layer) << accumulate << recompute;
    }
  }
}

TEST(Fp8Training, TwoRunsAndAnyNumberOfThreadsHaveTheSameBits) {
  const int before = num_threads();
  Session one({.dropout = 0.1, .accumulate = 2}), again({.dropout = 0.1, .accumulate = 2});
  set_num_threads(1);
  const std::vector<double> want = one.losses(6);
  set_num_threads(3);
  const std::vector<double> got = again.losses(6);
  set_num_threads(before);
  EXPECT_EQ(want, got);
  EXPECT_EQ(one.values(), again.values());
}

TEST(Fp8Training, RecomputationHasTheSameBits) {
  Session plain({.dropout = 0.1, .accumulate = 2}), saving({.recompute = true, .dropout = 0.1, .accumulate = 2});
  EXPECT_EQ(plain.losses(5), saving.losses(5));
  EXPECT_EQ(plain.values(), saving.values());
  EXPECT_EQ(plain.counts.saturated, saving.counts.saturated);
}

TEST(Fp8Training, AResumedRunHasTheBitsOfTheStraightOne) {
  for (const int64_t steps : {0, 1, 20}) {
    Session straight({.dropout = 0.1});
    straight.losses(static_cast<int>(steps));
    Session again({.dropout = 0.1, .step = steps});
    again.gpt.load(copy_of(straight.gpt.named_tensors()));
    again.adam.load_state(copy_of(straight.adam.state()));
    again.trainer.fp8()->load_state(copy_of(straight.trainer.fp8()->state()));
    again.loader.seek(straight.loader.position());
    EXPECT_EQ(straight.losses(5), again.losses(5)) << steps;
    EXPECT_EQ(straight.values(), again.values()) << steps;
    // With other scales it would be another run: small gradients vanish at a scale of 1.
    Session wrong({.dropout = 0.1, .step = steps + 5});
    wrong.gpt.load(copy_of(straight.gpt.named_tensors()));
    wrong.adam.load_state(copy_of(straight.adam.state()));
    wrong.loader.seek(straight.loader.position());
    NamedTensors scales = copy_of(straight.trainer.fp8()->state());
    for (auto& [name, tensor] : scales) {
      if (name.ends_with("scale")) tensor.fill_(1);
    }
    wrong.trainer.fp8()->load_state(scales);
    EXPECT_NE(straight.losses(3), wrong.losses(3)) << steps;
  }
}

TEST(Fp8Training, EvaluationIsThatOfTheBf16WeightsAndLeavesTheScalesAlone) {
  Session run({});
  run.losses(3);
  Session plain({.fp8 = false});
  plain.gpt.load(copy_of(run.gpt.named_tensors()));
  const auto before = run.values();
  const text::Evaluation data(learnable_tokens(500, Session::kVocab), 4, 16);
  EXPECT_EQ(evaluate(run.gpt, data).nats_per_token, evaluate(plain.gpt, data).nats_per_token);
  EXPECT_EQ(run.values(), before);
}

TEST(Fp8Training, ActivationsThatOutgrowTheHistorySaturateAreCountedAndTheScaleFollows) {
  Session run({});
  run.losses(3);
  const auto saturated = [&] {
    const int64_t all = run.trainer.step().fp8.saturated;
    const int64_t inputs = run.trainer.fp8()->layer(0)->stats.to_vector<int64_t>()[1];  // of the first qkv
    EXPECT_GE(all, inputs);
    return inputs;
  };
  EXPECT_EQ(saturated(), 0);
  {
    const autograd::NoGrad no_grad;
    for (const Parameter& parameter : run.gpt.parameters()) {
      if (parameter.name == "h.0.ln_1.weight") Tensor(parameter.tensor).fill_(64);
    }
  }
  EXPECT_GT(saturated(), 1000) << "of 2,048";
  EXPECT_EQ(saturated(), 0) << "one step later the scale knows";
}

TEST(Fp8Training, AnInfinityStopsTheStepBeforeAnyWeightChanges) {
  Session run({});
  run.losses(2);
  {
    const autograd::NoGrad no_grad;
    for (const Parameter& parameter : run.gpt.parameters()) {
      if (parameter.name == "h.1.mlp.fc.weight") Tensor(parameter.tensor).select(0, 0).select(0, 0).fill_(INFINITY);
    }
  }
  const auto before = run.values();
  const std::string message = testing::error_of(ErrorKind::kValue, [&] { run.trainer.step(); });
  EXPECT_NE(message.find("the weight of \"h.1.mlp.fc\""), std::string::npos) << message;
  EXPECT_EQ(run.adam.steps(), 2);
  EXPECT_EQ(run.trainer.fp8()->updates(), 2);
}

TEST(Fp8Training, NeedsBf16AndAWidthOfSixteens) {
  Gpt wide({.layers = 1, .heads = 1, .width = 32, .context = 8, .vocab = 5}, Device::cpu(), 0, DType::f32);
  EXPECT_NE(testing::error_of(ErrorKind::kDType, [&] { wide.use_fp8(); }).find("bf16"), std::string::npos);
  Gpt odd({.layers = 1, .heads = 1, .width = 24, .context = 8, .vocab = 5}, Device::cpu(), 0, DType::bf16);
  EXPECT_NE(testing::error_of(ErrorKind::kValue, [&] { odd.use_fp8(); }).find("multiple of 16, got 24"),
            std::string::npos);
}

}  // namespace
}  // namespace weft::models
