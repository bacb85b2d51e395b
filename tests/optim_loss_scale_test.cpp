#include "optim/loss_scale.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "core/autograd.h"
#include "models/trainer.h"
#include "optim/adam.h"

namespace weft::optim {
namespace {

TEST(LossScale, HalvesOnOverflowAndDoublesAfterTheInterval) {
  LossScale scale({.initial = 8, .interval = 3, .largest = 16});
  scale.update(true);
  EXPECT_EQ(scale.value(), 4);
  EXPECT_EQ(scale.skipped(), 1);
  for (const double want : {4.0, 4.0, 8.0, 8.0, 8.0, 16.0, 16.0, 16.0, 16.0}) {
    scale.update(false);
    EXPECT_EQ(scale.value(), want);
  }
}

TEST(LossScale, AnOverflowStartsTheCountAnew) {
  LossScale scale({.initial = 8, .interval = 2, .largest = 64});
  scale.update(false);
  scale.update(true);
  scale.update(false);
  EXPECT_EQ(scale.value(), 4) << "one good step before and one after are not two in a row";
  scale.update(false);
  EXPECT_EQ(scale.value(), 8);
}

TEST(LossScale, ItsStateComesBackExactly) {
  LossScale a({.initial = 3.7, .interval = 5}), b({.interval = 5});
  a.update(true);
  a.update(false);
  b.load_state(a.state());
  EXPECT_EQ(a.state(), b.state());
  for (int i = 0; i < 6; ++i) a.update(false), b.update(false);
  EXPECT_EQ(a.value(), b.value());
}

TEST(LossScale, RefusesBadOptionsAndStates) {
  using Options = LossScale::Options;
  for (const Options& options : {Options{.initial = 0}, Options{.growth = 1}, Options{.backoff = 1},
                                 Options{.interval = 0}, Options{.initial = 4, .largest = 2}}) {
    EXPECT_THROW(LossScale{options}, Error);
  }
  LossScale scale;
  for (const char* text : {"", "1 2", "1 2 3 4", "nan 1 1", "-1 0 0", "1 -1 0", "x 1 1"})
    EXPECT_THROW(scale.load_state(text), Error) << text;
}

TEST(LossScale, AScaleThatFallsWithoutEndIsAnError) {
  LossScale scale({.initial = 0x1p-22});
  scale.update(true);
  scale.update(true);
  EXPECT_THROW(scale.update(true), Error);
}

TEST(ScaledStep, GivesTheBitsOfAnUnscaledOne) {
  // A power of two is exact where nothing overflows or underflows.
  const auto run = [](double factor) {
    Tensor w = Tensor::full({5}, 0.5);
    w.requires_grad_();
    Adam adam({{"w", w, ParameterRole::weight}}, {.clip_norm = 0.25});
    for (int i = 0; i < 3; ++i) {
      w.set_grad(Tensor::full({5}, 0.3 * (i + 1) / factor));
      adam.step(0.1, {.factor = factor});
    }
    return w.to_vector<double>();
  };
  EXPECT_EQ(run(1), run(1.0 / 1024));
}

TEST(ScaledStep, AnOverflowSkipsTheStepAndChangesNothing) {
  Tensor w = Tensor::full({5}, 0.5);
  w.requires_grad_();
  Adam adam({{"w", w, ParameterRole::weight}}, {});
  w.set_grad(Tensor::full({5}, std::numeric_limits<double>::infinity()));
  const StepReport report = adam.step(0.1, {.factor = 0.5, .skip_overflow = true});
  EXPECT_TRUE(report.skipped);
  EXPECT_EQ(adam.steps(), 0);
  EXPECT_EQ(w.to_vector<double>(), std::vector<double>(5, 0.5));
  EXPECT_THROW(adam.step(0.1), Error) << "without the permission it stays an error";
  for (const double bad : {0.0, -1.0, std::nan("")}) EXPECT_THROW(adam.step(0.1, {.factor = bad}), Error);
}

TEST(ScaledStep, AnF16RunSkipsExactlyTheStepThatOverflowsAndLearns) {
  std::vector<int32_t> tokens(600);
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int32_t>(i * i % 23);
  models::Gpt gpt({.layers = 2, .heads = 2, .width = 16, .context = 8, .vocab = 23}, Device::cpu(), 1, DType::f16);
  Adam adam(gpt.parameters(), {.clip_norm = 1.0});
  text::Loader loader(std::make_shared<text::TokenVector>(tokens, 23), {.batch = 4, .context = 8});
  models::Trainer trainer(gpt, adam, loader, {.peak = 1e-2, .warmup = 2, .total = 100}, 1);
  // 2^24 times a gradient near 1e-2 is beyond the 65,504 of f16; 2^12 times is not.
  trainer.scale_loss(LossScale({.initial = 0x1p24, .backoff = 0x1p-12}));
  const models::StepMetrics first = trainer.step();
  EXPECT_TRUE(first.skipped);
  EXPECT_EQ(adam.steps(), 0);
  double loss = 0;
  for (int i = 0; i < 30; ++i) {
    const models::StepMetrics m = trainer.step();
    EXPECT_FALSE(m.skipped) << "step " << i;
    EXPECT_EQ(m.loss_scale, 0x1p12);
    loss = m.loss;
  }
  EXPECT_EQ(adam.steps(), 30);
  EXPECT_LT(loss, first.loss - 0.5);
}

}  // namespace
}  // namespace weft::optim
