#include "optim/adam.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "core/autograd.h"
#include "core/random.h"
#include "core/thread_pool.h"
#include "tests/error_of.h"

namespace weft::optim {
namespace {

using Values = std::vector<double>;

// ---- the reference: the documented formulas in f64, tensor by tensor, element by element ----

class Reference {
 public:
  Reference(const Parameters& parameters, const AdamOptions& options) : options_(options) {
    for (const Parameter& parameter : parameters) {
      const Values w = parameter.tensor.to_vector<double>();
      slots_.push_back({parameter.role, w, Values(w.size(), 0.0), Values(w.size(), 0.0)});
    }
  }

  /// One step; an empty list stands for a parameter without a gradient. `share` is what the reducer multiplies squares
  /// by.
  void step(double lr, const std::vector<Values>& gradients, double share = 1) {
    ++steps_;
    double squares = 0;
    for (const Values& gradient : gradients) squares += share * square(gradient);
    norm = std::sqrt(squares);
    factor = options_.clip_norm > 0 && norm > options_.clip_norm ? options_.clip_norm / norm : 1;
    for (size_t p = 0; p < slots_.size(); ++p) {
      auto& [role, w, m, v] = slots_[p];
      if (gradients[p].empty()) continue;
      Values u(w.size());
      const double bias1 = 1 - std::pow(options_.beta1, steps_), bias2 = 1 - std::pow(options_.beta2, steps_);
      for (size_t i = 0; i < w.size(); ++i) {
        const double g = factor * gradients[p][i];
        m[i] = options_.beta1 * m[i] + (1 - options_.beta1) * g;
        v[i] = options_.beta2 * v[i] + (1 - options_.beta2) * g * g;
        u[i] = m[i] / bias1 / (std::sqrt(v[i] / bias2) + options_.eps);
        if (role == ParameterRole::weight) u[i] += options_.weight_decay * w[i];
      }
      double ratio = 1;
      if (options_.trust_ratio && (role == ParameterRole::weight || role == ParameterRole::embedding)) {
        const double weight = std::sqrt(share * square(w)), update = std::sqrt(share * square(u));
        if (weight > 0 && update > 0) ratio = weight / update;
      }
      for (size_t i = 0; i < w.size(); ++i) w[i] -= lr * ratio * u[i];
    }
  }

  const Values& weights(size_t p) const { return slots_[p].w; }
  const Values& mean(size_t p) const { return slots_[p].m; }
  const Values& mean_square(size_t p) const { return slots_[p].v; }
  double norm = 0, factor = 1;

 private:
  static double square(const Values& x) {
    double total = 0;
    for (const double value : x) total += value * value;
    return total;
  }
  struct Slot {
    ParameterRole role;
    Values w, m, v;
  };
  AdamOptions options_;
  std::vector<Slot> slots_;
  int steps_ = 0;
};

/// Tensors of every role, of sizes around the width of vectors and pieces.
Parameters make_parameters(DType dtype) {
  const std::vector<std::tuple<std::string, Shape, ParameterRole>> list = {
      {"embedding", {37, 16}, ParameterRole::embedding}, {"h.0.weight", {129, 130}, ParameterRole::weight},
      {"h.0.bias", {130}, ParameterRole::bias},          {"norm.weight", {17}, ParameterRole::norm},
      {"h.1.weight", {3, 5}, ParameterRole::weight},     {"h.1.bias", {1}, ParameterRole::bias},
  };
  Parameters parameters;
  for (const auto& [name, shape, role] : list) {
    Tensor values = Tensor::empty(shape, DType::f64);
    fill_normal(values, RandomStream(5, name), role == ParameterRole::norm ? 1 : 0, 0.2);
    parameters.push_back({name, values.to(dtype).requires_grad_(), role});
  }
  return parameters;
}

/// Random gradients of step `step`, set and answered as the tensors hold them. Their size changes from step to step, so
/// that clipping is at work in some.
std::vector<Values> set_gradients(const Parameters& parameters, int step) {
  std::vector<Values> all;
  for (const Parameter& parameter : parameters) {
    Tensor gradient = Tensor::empty(parameter.tensor.shape(), DType::f64);
    const RandomStream stream = RandomStream(9, parameter.name).at_step(static_cast<uint64_t>(step));
    const double size = step % 3 == 0 ? 0.05 : 0.007;
    fill_uniform(gradient, stream, 0.002 - size, 0.002 + size);
    gradient = gradient.to(parameter.tensor.dtype());
    parameter.tensor.set_grad(gradient);
    all.push_back(gradient.to_vector<double>());
  }
  return all;
}

Tensor state_of(const Optimizer& optimizer, const std::string& name) {
  for (const auto& [each, tensor] : optimizer.state()) {
    if (each == name) return tensor;
  }
  ADD_FAILURE() << "no state " << name;
  return {};
}

/// Largest |got - want| / max(1, |want|).
double distance(const Values& got, const Values& want) {
  EXPECT_EQ(got.size(), want.size());
  double largest = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double difference = std::abs(got[i] - want[i]) / std::max(1.0, std::abs(want[i]));
    if (!(difference <= largest)) largest = difference;  // NaN too
  }
  return largest;
}

double rate(int step) { return 1e-3 * (1 + step % 7); }

struct Case {
  bool trust_ratio;
  DType dtype;
  double tolerance;  // f32: a hundred roundings of weights below 1, at most 3e-8 each, add up like a random walk
};

class AdamAgainstReference : public ::testing::TestWithParam<Case> {};

TEST_P(AdamAgainstReference, AgreesOverAHundredSteps) {
  const auto [trust_ratio, dtype, tolerance] = GetParam();
  const AdamOptions options{
      .beta1 = 0.9, .beta2 = 0.99, .eps = 1e-8, .weight_decay = 0.1, .clip_norm = 1.0, .trust_ratio = trust_ratio};
  const Parameters parameters = make_parameters(dtype);
  Adam adam(parameters, options);
  Reference reference(parameters, options);
  int clipped = 0;
  for (int step = 0; step < 100; ++step) {
    std::vector<Values> gradients = set_gradients(parameters, step);
    if (step % 10 == 4) parameters[2].tensor.clear_grad(), gradients[2].clear();
    reference.step(rate(step), gradients);
    const StepReport report = adam.step(rate(step));
    ASSERT_NEAR(report.grad_norm, reference.norm, 2e-6 * reference.norm);
    ASSERT_NEAR(report.clip_factor, reference.factor, 2e-6);
    clipped += reference.factor < 1;
  }
  EXPECT_EQ(adam.steps(), 100);
  EXPECT_GT(clipped, 20);
  EXPECT_LT(clipped, 80);
  for (size_t p = 0; p < parameters.size(); ++p) {
    const std::string& name = parameters[p].name;
    const Tensor master =
        dtype == DType::bf16 || dtype == DType::f16 ? state_of(adam, name + ".master") : parameters[p].tensor;
    EXPECT_LE(distance(master.to_vector<double>(), reference.weights(p)), tolerance) << name;
    EXPECT_LE(distance(state_of(adam, name + ".exp_avg").to_vector<double>(), reference.mean(p)), tolerance) << name;
    EXPECT_LE(distance(state_of(adam, name + ".exp_avg_sq").to_vector<double>(), reference.mean_square(p)), tolerance)
        << name;
    if (!master.is_same(parameters[p].tensor)) {
      EXPECT_EQ(master.dtype(), DType::f32);
      EXPECT_EQ(parameters[p].tensor.to_vector<double>(), master.to(dtype).to_vector<double>())
          << name << ": the master rounded";
      EXPECT_NE(parameters[p].tensor.to_vector<double>(), master.to_vector<double>()) << "the master has more bits";
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Rules, AdamAgainstReference,
                         ::testing::Values(Case{false, DType::f32, 1e-6}, Case{true, DType::f32, 1e-6},
                                           Case{false, DType::f64, 1e-12}, Case{true, DType::f64, 1e-12},
                                           Case{false, DType::bf16, 1e-6}, Case{true, DType::bf16, 1e-6},
                                           Case{false, DType::f16, 1e-6}),
                         [](const auto& info) {
                           return std::string(info.param.trust_ratio ? "Lamb_" : "AdamW_") + name(info.param.dtype);
                         });

TEST(Adam, SmallBetasForgetLargeOldGradients) {
  // 1e8 and then 1e-3: counted from the old mean, the new gradient would be lost in its rounding.
  for (const double beta : {0.0, 0.1}) {
    const AdamOptions options{.beta1 = beta, .beta2 = beta, .eps = 1e-8};
    const Parameters parameters = make_parameters(DType::f32);
    Adam adam(parameters, options);
    Reference reference(parameters, options);
    for (int step = 0; step < 30; ++step) {
      std::vector<Values> gradients;
      for (const Parameter& parameter : parameters) {
        const Tensor gradient = Tensor::full(parameter.tensor.shape(), step == 0 ? 1e8 : 1e-3);
        parameter.tensor.set_grad(gradient);
        gradients.push_back(gradient.to_vector<double>());
      }
      reference.step(1e-3, gradients);
      adam.step(1e-3);
    }
    for (size_t p = 0; p < parameters.size(); ++p) {
      EXPECT_LE(distance(parameters[p].tensor.to_vector<double>(), reference.weights(p)), 2e-6)
          << beta << ' ' << parameters[p].name << ": equal steps of 1e-3 round 30 times the same way, by at most 6e-8";
    }
  }
}

TEST(Adam, SlowMeansSettleWhereTheySay) {
  // With beta2 = 0.999 and a constant gradient v is 1 - 0.999^t times its square; 0.999 rounded to f32 would end 5e-5
  // off.
  Tensor w = Tensor::zeros({5});
  w.requires_grad_();
  Adam adam({{"w", w}}, {.beta1 = 0.9, .beta2 = 0.999});
  for (int step = 0; step < 3000; ++step) {
    w.set_grad(Tensor::full({5}, 3));
    adam.step(0);
  }
  const double want = 9 * (1 - std::pow(0.999, 3000));
  for (const double v : state_of(adam, "w.exp_avg_sq").to_vector<double>())
    EXPECT_NEAR(v, want, 9 * 4e-6) << "3,000 roundings of 6e-8, most one-sided";
}

TEST(Adam, FirstStepMovesEachWeightByTheLearningRate) {
  Tensor w = Tensor::zeros({3});
  w.requires_grad_();
  w.set_grad(Tensor::from(std::vector<float>{0.5f, -100, 1e-3f}, {3}));
  Adam({{"w", w}}, {}).step(0.01);
  const Values got = w.to_vector<double>();
  EXPECT_NEAR(got[0], -0.01, 1e-8);
  EXPECT_NEAR(got[1], 0.01, 1e-8);
  EXPECT_NEAR(got[2], -0.01, 2e-7) << "eps is 1e-5 of this gradient";
}

TEST(Adam, DecaySparesNormsBiasesAndEmbeddings) {
  const Parameters parameters = make_parameters(DType::f64);
  Adam adam(parameters, {.weight_decay = 0.5});
  std::vector<Values> before;
  for (const Parameter& parameter : parameters) {
    before.push_back(parameter.tensor.to_vector<double>());
    parameter.tensor.set_grad(Tensor::zeros_like(parameter.tensor));
  }
  adam.step(0.1);
  for (size_t p = 0; p < parameters.size(); ++p) {
    const double factor = parameters[p].role == ParameterRole::weight ? 1 - 0.1 * 0.5 : 1;
    Values want = before[p];
    for (double& value : want) value *= factor;
    EXPECT_LE(distance(parameters[p].tensor.to_vector<double>(), want), 1e-15) << parameters[p].name;
  }
}

TEST(Lamb, StepsOfWeightsAndEmbeddingsHaveTheSizeOfTheRateTimesTheirNorm) {
  const Parameters parameters = make_parameters(DType::f64);
  std::vector<Values> before;
  for (const Parameter& parameter : parameters) before.push_back(parameter.tensor.to_vector<double>());
  const auto lamb_optimizer = lamb(parameters, {.weight_decay = 0.01});
  set_gradients(parameters, 0);
  lamb_optimizer->step(0.01);
  for (size_t p = 0; p < parameters.size(); ++p) {
    const Values after = parameters[p].tensor.to_vector<double>();
    double moved = 0, norm = 0;
    for (size_t i = 0; i < after.size(); ++i)
      moved += std::pow(after[i] - before[p][i], 2), norm += before[p][i] * before[p][i];
    const bool ratio = parameters[p].role == ParameterRole::weight || parameters[p].role == ParameterRole::embedding;
    // Without the ratio the first step moves every element by the rate.
    EXPECT_NEAR(std::sqrt(moved), 0.01 * (ratio ? std::sqrt(norm) : std::sqrt(static_cast<double>(after.size()))), 1e-6)
        << parameters[p].name;
  }
}

TEST(Lamb, RatioIsOneForZeroWeightsAndZeroUpdates) {
  Tensor zero = Tensor::zeros({4, 4}), still = Tensor::ones({4, 4});
  zero.requires_grad_(), still.requires_grad_();
  const auto optimizer = lamb({{"zero", zero}, {"still", still}}, {});
  zero.set_grad(Tensor::ones({4, 4}));
  still.set_grad(Tensor::zeros({4, 4}));
  optimizer->step(0.01);
  for (const double w : zero.to_vector<double>()) EXPECT_NEAR(w, -0.01, 1e-8);
  EXPECT_EQ(still.to_vector<double>(), Values(16, 1));
}

TEST(Adamw, AndLambSetTheRatioTheirNamesSay) {
  Tensor w = Tensor::full({2}, 100);
  w.requires_grad_();
  w.set_grad(Tensor::ones({2}));
  adamw({{"w", w}}, {.trust_ratio = true})->step(0.01);
  EXPECT_NEAR(w.to_vector<double>()[0], 99.99, 1e-4);
}

/// As if each tensor were one of two equal halves, held by two processes.
class DoublingNorms final : public NormReducer {
 public:
  void reduce(std::span<double> squares, const Parameters& parameters) override {
    EXPECT_EQ(squares.size(), parameters.size());
    for (double& square : squares) square *= share;
  }
  double share = 2;
};

TEST(Adam, HonoursTheReducerForClippingAndTheTrustRatio) {
  for (const bool trust_ratio : {false, true}) {
    const AdamOptions options{.weight_decay = 0.1, .clip_norm = 1.0, .trust_ratio = trust_ratio};
    const Parameters parameters = make_parameters(DType::f64);
    Adam adam(parameters, options, std::make_shared<DoublingNorms>());
    Reference reference(parameters, options), alone(parameters, options);
    for (int step = 0; step < 5; ++step) {
      const std::vector<Values> gradients = set_gradients(parameters, 0);
      reference.step(0.01, gradients, 2);
      alone.step(0.01, gradients, 1);
      const StepReport report = adam.step(0.01);
      EXPECT_NEAR(report.grad_norm, reference.norm, 1e-12);
      EXPECT_NEAR(report.clip_factor, reference.factor, 1e-12);
      EXPECT_LT(reference.factor, 1);
    }
    for (size_t p = 0; p < parameters.size(); ++p) {
      EXPECT_LE(distance(parameters[p].tensor.to_vector<double>(), reference.weights(p)), 1e-12) << parameters[p].name;
      EXPECT_LE(distance(state_of(adam, parameters[p].name + ".exp_avg").to_vector<double>(), reference.mean(p)),
                1e-12);
      EXPECT_GT(distance(reference.mean(p), alone.mean(p)), 1e-6) << "the clip factors differ";
    }
  }
}

TEST(Lamb, UsesWhatTheReducerSaysOfWeightsAndUpdatesSeparately) {
  // Doubling both squares leaves their ratio; here the second call (weights) alone is multiplied.
  class Weights final : public NormReducer {
    void reduce(std::span<double> squares, const Parameters&) override {
      if (++call_ % 3 == 2) squares[0] *= 4;
    }
    int call_ = 0;
  };
  Tensor a = Tensor::full({3}, 2, DType::f64), b = Tensor::full({3}, 2, DType::f64);
  a.requires_grad_(), b.requires_grad_();
  Adam plain({{"w", a}}, {.trust_ratio = true}), told({{"w", b}}, {.trust_ratio = true}, std::make_shared<Weights>());
  a.set_grad(Tensor::ones({3}, DType::f64)), b.set_grad(Tensor::ones({3}, DType::f64));
  plain.step(0.01), told.step(0.01);
  EXPECT_NEAR((2 - b.to_vector<double>()[0]) / (2 - a.to_vector<double>()[0]), 2, 1e-12);
}

// ---- bits ----

/// All bits of parameters and state.
std::string bits(const Optimizer& optimizer) {
  std::string out;
  const auto append = [&](const Tensor& tensor) {
    out.append(static_cast<const char*>(tensor.raw()), static_cast<size_t>(tensor.numel() * size_of(tensor.dtype())));
  };
  for (const Parameter& parameter : optimizer.parameters()) append(parameter.tensor);
  for (const auto& [name, tensor] : optimizer.state()) append(tensor);
  return out;
}

TEST(Adam, IsBitEqualOnAnyNumberOfThreads) {
  const int before = num_threads();
  for (const bool trust_ratio : {false, true}) {
    for (const DType dtype : {DType::f32, DType::bf16, DType::f64}) {
      std::vector<std::string> runs;
      for (const int threads : {1, 2, 3}) {
        set_num_threads(threads);
        const Parameters parameters = make_parameters(dtype);
        Adam adam(parameters, {.weight_decay = 0.1, .clip_norm = 0.5, .trust_ratio = trust_ratio});
        for (int step = 0; step < 10; ++step) {
          set_gradients(parameters, step);
          adam.step(1e-3);
        }
        runs.push_back(bits(adam));
      }
      EXPECT_TRUE(runs[1] == runs[0]) << dtype;
      EXPECT_TRUE(runs[2] == runs[0]) << dtype;
    }
  }
  set_num_threads(before);
}

TEST(Adam, ContinuesBitEqualFromASavedState) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f64}) {
    const Parameters parameters = make_parameters(dtype);
    Adam adam(parameters, {.weight_decay = 0.1, .clip_norm = 0.5});
    for (int step = 0; step < 5; ++step) set_gradients(parameters, step), adam.step(1e-3);
    NamedTensors saved, weights;
    for (const auto& [name, tensor] : adam.state()) saved.emplace_back(name, tensor.clone());
    for (const Parameter& parameter : parameters)
      weights.emplace_back(parameter.name, parameter.tensor.detach().clone());
    for (int step = 5; step < 9; ++step) set_gradients(parameters, step), adam.step(1e-3);

    for (const bool weights_first : {true, false}) {
      const Parameters again = make_parameters(dtype);
      Adam resumed(again, {.weight_decay = 0.1, .clip_norm = 0.5});
      const auto load_weights = [&] {
        for (size_t p = 0; p < again.size(); ++p) again[p].tensor.detach().copy_(weights[p].second);
      };
      if (weights_first) load_weights();
      resumed.load_state(saved);
      if (!weights_first) load_weights();
      EXPECT_EQ(resumed.steps(), 5);
      for (int step = 5; step < 9; ++step) set_gradients(again, step), resumed.step(1e-3);
      EXPECT_TRUE(bits(resumed) == bits(adam)) << dtype;
    }
  }
}

TEST(Adam, FollowsAParameterThatSomeoneElseChanges) {
  // Loading a model after its optimizer was made: the next step must start from what was loaded.
  for (const DType dtype : {DType::f32, DType::bf16}) {
    Tensor w = Tensor::full({4}, 1, dtype);
    w.requires_grad_();
    Adam adam({{"w", w}}, {});
    w.detach().slice(0, 0, 2).fill_(5);
    w.set_grad(Tensor::zeros({4}, dtype));
    adam.step(0.1);
    EXPECT_EQ(w.to_vector<double>(), (Values{5, 5, 1, 1})) << dtype;
  }
}

TEST(Adam, KeepsWhatRoundingTakesFromAParameter) {
  // Steps of 1e-4 on a weight of 1: far below the spacing of bf16, 0.004, and yet a hundred of them arrive.
  Tensor w = Tensor::ones({2}, DType::bf16);
  w.requires_grad_();
  Adam adam({{"w", w}}, {});
  for (int step = 0; step < 100; ++step) {
    w.set_grad(Tensor::ones({2}, DType::bf16));
    adam.step(1e-4);
  }
  EXPECT_NEAR(state_of(adam, "w.master").to_vector<double>()[0], 0.99, 1e-5);
  EXPECT_NEAR(w.to_vector<double>()[0], 0.99, 0.002);
}

// ---- state ----

TEST(AdamState, HasANameForEachTensorOfEachParameter) {
  const Parameters parameters = {make_parameters(DType::f32)[2], make_parameters(DType::bf16)[4],
                                 make_parameters(DType::f64)[0]};
  const Adam adam(parameters, {});
  std::vector<std::string> names;
  for (const auto& [name, tensor] : adam.state()) names.push_back(concat(name, ' ', tensor.describe()));
  EXPECT_EQ(names, (std::vector<std::string>{"h.0.bias.exp_avg f32 [130]", "h.0.bias.exp_avg_sq f32 [130]",
                                             "h.1.weight.exp_avg f32 [3, 5]", "h.1.weight.exp_avg_sq f32 [3, 5]",
                                             "h.1.weight.master f32 [3, 5]", "embedding.exp_avg f64 [37, 16]",
                                             "embedding.exp_avg_sq f64 [37, 16]", "steps i64 [1]"}));
}

TEST(AdamState, IsCountedAsOptimizerMemory) {
  const auto held = [] {
    return allocator(Device::cpu()).statistics().categories[static_cast<size_t>(MemoryCategory::optimizer)].current;
  };
  Tensor w = Tensor::zeros({1024}, DType::bf16);
  w.requires_grad_();
  const int64_t before = held();
  const Adam adam({{"w", w}}, {});
  EXPECT_EQ(held() - before, 3 * 4096);
}

TEST(AdamState, WrongStatesAreErrorsThatChangeNothing) {
  const Parameters parameters = {make_parameters(DType::f32)[2], make_parameters(DType::f32)[4]};
  Adam adam(parameters, {});
  set_gradients(parameters, 0);
  adam.step(1e-3);
  const std::string before = bits(adam);
  NamedTensors good;
  for (const auto& [name, tensor] : adam.state()) good.emplace_back(name, Tensor::ones(tensor.shape(), tensor.dtype()));
  const auto load = [&](const std::function<void(NamedTensors&)>& damage) {
    NamedTensors state = good;
    damage(state);
    adam.load_state(state);
  };
  EXPECT_ERROR(ErrorKind::kData, "[optimizer] the stored state has no tensor \"h.0.bias.exp_avg\"",
               (load([](auto& s) { s.erase(s.begin()); }), 0));
  EXPECT_ERROR(ErrorKind::kData, "[optimizer] the stored state has no tensor \"steps\"",
               (load([](auto& s) { s.pop_back(); }), 0));
  EXPECT_ERROR(ErrorKind::kData, "stored state \"h.0.bias.exp_avg_sq\" is f32 [131]; expected f32 [130]",
               (load([](auto& s) { s[1].second = Tensor::zeros({131}); }), 0));
  EXPECT_ERROR(ErrorKind::kData, "stored state \"h.0.bias.exp_avg_sq\" is f64 [130]; expected f32 [130]",
               (load([](auto& s) { s[1].second = Tensor::zeros({130}, DType::f64); }), 0));
  EXPECT_ERROR(
      ErrorKind::kData,
      "has a tensor \"h.1.weight.exp_avgs\" that this optimizer does not keep; did you mean \"h.1.weight.exp_avg\"?",
      (load([](auto& s) { s.emplace_back("h.1.weight.exp_avgs", Tensor::zeros({1})); }), 0));
  EXPECT_ERROR(ErrorKind::kData, "the stored state has two tensors \"steps\"",
               (load([](auto& s) { s.push_back(s.back()); }), 0));
  EXPECT_ERROR(ErrorKind::kData, "stored state \"steps\" is undefined",
               (load([](auto& s) { s.back().second = Tensor(); }), 0));
  EXPECT_ERROR(ErrorKind::kData, "stored state \"steps\" is -1; expected at least 0",
               (load([](auto& s) { s.back().second = Tensor::full({1}, -1, DType::i64); }), 0));
  EXPECT_TRUE(bits(adam) == before);
  EXPECT_EQ(adam.steps(), 1);
  load([](auto& s) { std::reverse(s.begin(), s.end()); });  // any order
  EXPECT_EQ(adam.steps(), 1);
  EXPECT_EQ(state_of(adam, "h.1.weight.exp_avg").to_vector<double>(), Values(15, 1));
}

// ---- errors ----

TEST(AdamErrors, AGradientThatIsNotFiniteStopsTheStepBeforeAnyChange) {
  for (const bool trust_ratio : {false, true}) {
    for (const double bad : {std::numeric_limits<double>::quiet_NaN(), HUGE_VAL}) {
      const Parameters parameters = make_parameters(DType::bf16);
      Adam adam(parameters, {.weight_decay = 0.1, .clip_norm = 1, .trust_ratio = trust_ratio});
      for (int step = 0; step < 2; ++step) set_gradients(parameters, step), adam.step(1e-3);
      const std::string before = bits(adam);
      std::vector<uint64_t> versions;
      for (const Parameter& parameter : parameters) versions.push_back(parameter.tensor.storage()->version());
      set_gradients(parameters, 2);
      parameters[4].tensor.grad().select(0, 2).select(0, 3).fill_(bad);
      EXPECT_ERROR(
          ErrorKind::kValue,
          concat("the gradient of \"h.1.weight\" (bf16 [3, 5]) is ", bad, " at element 13; the step was not taken"),
          adam.step(1e-3));
      EXPECT_TRUE(bits(adam) == before);
      EXPECT_EQ(adam.steps(), 2);
      for (size_t p = 0; p < parameters.size(); ++p) EXPECT_EQ(parameters[p].tensor.storage()->version(), versions[p]);
      set_gradients(parameters, 2);
      adam.step(1e-3);
      EXPECT_EQ(adam.steps(), 3);
    }
  }
}

TEST(AdamErrors, GradientsWhoseSquaresDoNotFitTheStateStopItToo) {
  Tensor w = Tensor::ones({2});
  w.requires_grad_();
  w.set_grad(Tensor::full({2}, 1e20));
  Adam plain({{"w", w}}, {}), clipped({{"w", w}}, {.clip_norm = 1});
  EXPECT_ERROR(ErrorKind::kValue,
               "[adam] the gradients have norm 1.41421e+20, and their squares do not fit in the f32 state",
               plain.step(0.1));
  EXPECT_EQ(w.to_vector<double>(), Values(2, 1));
  EXPECT_EQ(plain.steps(), 0);
  clipped.step(0.1);
  EXPECT_NEAR(w.to_vector<double>()[0], 0.9, 1e-6) << "clipped, they fit";
}

TEST(AdamErrors, OptionsOutsideTheirRangeAreNamed) {
  Tensor w = Tensor::ones({2});
  w.requires_grad_();
  const auto make = [&](const AdamOptions& options) { return Adam({{"w", w}}, options); };
  const double nan = std::nan("");
  for (const double bad : {-0.1, 1.0, nan}) {
    EXPECT_ERROR(ErrorKind::kValue, concat("[adam] beta1 must be in [0, 1), got ", bad), make({.beta1 = bad}));
    EXPECT_ERROR(ErrorKind::kValue, concat("[adam] beta2 must be in [0, 1), got ", bad), make({.beta2 = bad}));
  }
  for (const double bad : {0.0, -1.0, 1e-46, nan, HUGE_VAL})
    EXPECT_ERROR(ErrorKind::kValue, "[adam] eps must be at least", make({.eps = bad}));
  for (const double bad : {-1.0, nan, HUGE_VAL}) {
    EXPECT_ERROR(ErrorKind::kValue, "[adam] weight_decay must be at least 0", make({.weight_decay = bad}));
    EXPECT_ERROR(ErrorKind::kValue, "[adam] clip_norm must be at least 0", make({.clip_norm = bad}));
    Adam adam({{"w", w}}, {});
    EXPECT_ERROR(ErrorKind::kValue, "[adam] the learning rate must be at least 0 and finite", adam.step(bad));
  }
  EXPECT_ERROR(ErrorKind::kValue, "[adam] needs a NormReducer", Adam({{"w", w}}, {}, nullptr));
}

TEST(AdamErrors, ParametersMustBeDistinctLeaves) {
  Tensor w = Tensor::ones({2, 3}), plain = Tensor::ones({2});
  w.requires_grad_();
  EXPECT_ERROR(ErrorKind::kValue, "[optimizer] two parameters are named \"w\"",
               Adam({{"w", w}, {"w", Tensor::ones({1}).requires_grad_()}}, {}));
  EXPECT_ERROR(ErrorKind::kValue, "[optimizer] parameters \"head\" and \"embedding\" are the same tensor",
               Adam({{"head", w}, {"embedding", w}}, {}));
  EXPECT_ERROR(ErrorKind::kValue, "parameter \"p\" must be a contiguous leaf that requires a gradient",
               Adam({{"p", plain}}, {}));
  EXPECT_ERROR(ErrorKind::kValue, "parameter \"p\" must be", Adam({{"p", w.reshape({6})}}, {}));
  EXPECT_ERROR(ErrorKind::kValue, "parameter \"p\" must be", Adam({{"p", Tensor()}}, {}));
  EXPECT_ERROR(ErrorKind::kValue, "parameter \"p\" must be",
               Adam({{"p", Tensor::ones({2, 3}).transpose(0, 1).requires_grad_()}}, {}));
}

// ---- the rest ----

TEST(Adam, LeavesParametersWithoutAGradientAndGradientsAsTheyAre) {
  const Parameters parameters = make_parameters(DType::f32);
  Adam adam(parameters, {.weight_decay = 0.1, .clip_norm = 0.01});
  const std::vector<Values> gradients = set_gradients(parameters, 0);
  parameters[1].tensor.clear_grad();
  const Values before = parameters[1].tensor.to_vector<double>();
  adam.step(0.1);
  EXPECT_EQ(parameters[1].tensor.to_vector<double>(), before);
  EXPECT_EQ(state_of(adam, "h.0.weight.exp_avg").to_vector<double>(), Values(before.size(), 0));
  EXPECT_EQ(parameters[0].tensor.grad().to_vector<double>(), gradients[0]) << "clipping is not written back";
  adam.zero_grad();
  for (const Parameter& parameter : parameters) EXPECT_FALSE(parameter.tensor.grad().defined());
}

TEST(Adam, TakesGradientsInAnyLayout) {
  Tensor a = Tensor::ones({40, 30}), b = Tensor::ones({40, 30});
  a.requires_grad_(), b.requires_grad_();
  const Tensor gradient = Tensor::arange(1200, DType::f32).reshape({30, 40}).transpose(0, 1);
  a.set_grad(gradient), b.set_grad(gradient.contiguous());
  Adam first({{"w", a}}, {.clip_norm = 1}), second({{"w", b}}, {.clip_norm = 1});
  for (int step = 0; step < 3; ++step) first.step(0.1), second.step(0.1);
  EXPECT_EQ(a.to_vector<double>(), b.to_vector<double>());
}

TEST(Adam, AStepIsAChangeThatABackwardPassNotices) {
  Tensor w = Tensor::ones({2});
  w.requires_grad_();
  w.set_grad(Tensor::ones({2}));
  Adam adam({{"w", w}}, {});
  const uint64_t version = w.storage()->version();
  adam.step(0.1);
  EXPECT_GT(w.storage()->version(), version);
}

TEST(Adam, SteadyStepsTakeNothingFromTheSystem) {
  const Parameters parameters = make_parameters(DType::bf16);
  Adam adam(parameters, {.clip_norm = 1, .trust_ratio = true});
  set_gradients(parameters, 0);
  adam.step(1e-3);
  const int64_t asked = allocator(Device::cpu()).statistics().system_allocations;
  for (int step = 0; step < 5; ++step) adam.step(1e-3);
  EXPECT_EQ(allocator(Device::cpu()).statistics().system_allocations, asked);
}

TEST(Adam, ADryStepCountsTheMemoryOfARealOne) {
  const auto run = [] {
    const int64_t before = allocator(Device::cpu()).statistics().total.current;
    allocator(Device::cpu()).reset_peak();
    const Parameters parameters = make_parameters(DType::bf16);
    Adam adam(parameters, {.clip_norm = 1, .trust_ratio = true});
    for (const Parameter& parameter : parameters) parameter.tensor.set_grad(Tensor::zeros_like(parameter.tensor));
    adam.step(1e-3);
    const MemoryStatistics statistics = allocator(Device::cpu()).statistics();
    return std::pair(statistics.total.current - before, statistics.total.peak - before);
  };
  const auto real = run();
  const DryRun scope;
  EXPECT_EQ(run(), real);
}

TEST(Adam, WorksForEmptyTensorsAndNoParameters) {
  Tensor empty = Tensor::zeros({0, 4});
  empty.requires_grad_();
  empty.set_grad(Tensor::zeros({0, 4}));
  Adam none({}, {}), one({{"empty", empty}}, {.clip_norm = 1, .trust_ratio = true});
  EXPECT_EQ(none.step(0.1).grad_norm, 0);
  EXPECT_EQ(one.step(0.1).clip_factor, 1);
}

}  // namespace
}  // namespace weft::optim
