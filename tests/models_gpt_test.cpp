#include "models/gpt.h"

#include <gtest/gtest.h>
#include <hwy/highway.h>

#include <cmath>

#include "core/autograd.h"
#include "core/thread_pool.h"
#include "models/trainer.h"
#include "ops/gemm.h"
#include "optim/adam.h"
#include "tests/error_of.h"

namespace weft::models {
namespace {

GptConfig tiny() { return {.layers = 2, .heads = 2, .width = 16, .context = 8, .vocab = 23}; }

std::vector<int32_t> random_values(int64_t count, int64_t vocab, const char* stream) {
  std::vector<int32_t> ids(static_cast<size_t>(count));
  const RandomStream random(5, stream);
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(random.below(i, static_cast<uint64_t>(vocab)));
  return ids;
}

Tensor random_ids(const Shape& shape, int64_t vocab, const char* stream) {
  return Tensor::from(random_values(numel(shape), vocab, stream), shape);
}

std::shared_ptr<text::TokenVector> random_tokens(int64_t count, int64_t vocab) {
  return std::make_shared<text::TokenVector>(random_values(count, vocab, "tokens"), vocab);
}

std::vector<std::vector<double>> gradients_of(const Gpt& gpt) {
  std::vector<std::vector<double>> all;
  for (const Parameter& parameter : gpt.parameters()) all.push_back(parameter.tensor.grad().to_vector<double>());
  return all;
}

TEST(Gpt, ParameterCountFollowsTheFormula) {
  EXPECT_EQ(Gpt(tiny(), Device::cpu()).parameter_count(), tiny().parameter_count());
  // GPT-2's smallest model is known to have 124,439,808.
  EXPECT_EQ((GptConfig{.layers = 12, .heads = 12, .width = 768, .context = 1024, .vocab = 50257}.parameter_count()),
            124439808);
}

TEST(Gpt, InitialWeightsDependOnSeedAndNameAlone) {
  const Gpt a(tiny(), Device::cpu(), 3), b(tiny(), Device::cpu(), 3), c(tiny(), Device::cpu(), 4);
  GptConfig deeper = tiny();
  deeper.layers = 3;
  const Gpt d(deeper, Device::cpu(), 3);
  const auto first = [](const Gpt& gpt) { return gpt.parameters()[0].tensor.to_vector<double>(); };
  EXPECT_EQ(first(a), first(b));
  EXPECT_NE(first(a), first(c));
  EXPECT_EQ(first(a), first(d)) << "another layer must not move the random numbers of this one";
}

TEST(Gpt, AModelWithoutMemoryIsDrawnInPiecesToTheSameBits) {
  for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) {
    const Gpt whole(tiny(), Device::cpu(), 3, dtype);
    const int64_t before = allocator(Device::cpu()).statistics().total.current;
    const Gpt empty(tiny(), Device::cpu(), 3, dtype, {.values = false});
    EXPECT_EQ(allocator(Device::cpu()).statistics().total.current, before);
    for (const Parameter& parameter : whole.parameters()) {
      const TensorPart all = TensorPart::all(parameter.tensor.shape());
      const int64_t cut = all.count() / 3;
      std::vector<TensorPart> parts = {all, all.elements(0, cut), all.elements(cut, all.count())};
      if (all.whole.rank() == 2) parts.push_back(TensorPart::along(all.whole, 1, {{1, 3}, {5, 9}}).elements(1, 20));
      for (const TensorPart& part : parts) {
        const Tensor drawn = Tensor::empty(part.shape(), dtype);
        empty.draw({{parameter.name, drawn}}, {part});
        EXPECT_EQ(drawn.to_vector<double>(), part.of(parameter.tensor.detach()).to_vector<double>()) << parameter.name;
      }
      const Tensor drawn = Tensor::empty(all.whole, dtype);
      empty.draw({{parameter.name, drawn}}, {all});
      EXPECT_EQ(drawn.to_vector<double>(), parameter.tensor.to_vector<double>()) << parameter.name;
    }
  }
  const Gpt gpt(tiny(), Device::cpu(), 3, DType::f32, {.values = false});
  const Tensor two = Tensor::empty({2});
  const TensorPart all = TensorPart::all({2}), table = TensorPart::all({23, 16});
  EXPECT_ERROR(ErrorKind::kData, "there is no parameter \"wte\"", gpt.draw({{"wte", two}}, {all}));
  EXPECT_ERROR(ErrorKind::kData, "parameter \"wte.weight\" is [23, 16]; asked for [2] of it in f32 [2]",
               gpt.draw({{"wte.weight", two}}, {all}));
  EXPECT_ERROR(ErrorKind::kData, "asked for [23, 16] of it in f32 [2]", gpt.draw({{"wte.weight", two}}, {table}));
  EXPECT_ERROR(ErrorKind::kValue, "there are 1 parameters, but 0 parts", gpt.draw({{"wte.weight", two}}, {}));
  EXPECT_ERROR(ErrorKind::kState, "a parameter of \"wte\" is released",
               gpt.loss(random_ids({1, 8}, 23, "in"), random_ids({1, 8}, 23, "out")));
}

TEST(Gpt, UnitsHaveEveryParameterAndTheTiedOneTwice) {
  const Gpt gpt(tiny(), Device::cpu(), 3);
  const auto units = gpt.units();
  ASSERT_EQ(units.size(), 3u);
  size_t count = 0;
  for (const auto& unit : units) count += unit.size();
  EXPECT_EQ(count, gpt.parameters().size() + 1);
  EXPECT_EQ(units[0].front(), "wte.weight");
  EXPECT_EQ(units[1].front(), "h.1.ln_1.weight");
  EXPECT_EQ(units[2], (std::vector<std::string>{"wte.weight", "ln_f.weight", "ln_f.bias"}));
  const Gpt half(tiny(), Device::cpu(), 3, DType::f32, {.layers = {{0, 1}}});
  EXPECT_ERROR(ErrorKind::kState, "a list of units needs the whole model", half.units());
}

TEST(Gpt, TheFirstLossIsThatOfAUniformGuess) {
  const Gpt gpt(tiny(), Device::cpu(), 1);
  const Tensor ids = random_ids({4, 8}, 23, "in"), targets = random_ids({4, 8}, 23, "out");
  EXPECT_NEAR(gpt.loss(ids, targets).item(), std::log(23.0), 0.05);  // weights of 0.02 give logits of about 0.05
}

TEST(Gpt, LossIsTheCrossEntropyOfItsLogits) {
  const Gpt gpt(tiny(), Device::cpu(), 1, DType::f64);
  const Tensor ids = random_ids({2, 8}, 23, "in"), targets = random_ids({2, 8}, 23, "out");
  const std::vector<double> logits = gpt.logits(ids).to_vector<double>();
  const std::vector<int64_t> want = targets.to_vector<int64_t>();
  double nats = 0;
  for (size_t row = 0; row < want.size(); ++row) {
    double sum = 0;
    for (size_t v = 0; v < 23; ++v) sum += std::exp(logits[row * 23 + v]);
    nats += std::log(sum) - logits[row * 23 + static_cast<size_t>(want[row])];
  }
  EXPECT_NEAR(gpt.loss(ids, targets).item(), nats / static_cast<double>(want.size()), 1e-12);
}

TEST(Gpt, ALaterTokenDoesNotChangeAnEarlierLogit) {
  const Gpt gpt(tiny(), Device::cpu(), 1);
  const Tensor ids = random_ids({1, 8}, 23, "in");
  std::vector<int32_t> changed = ids.to_vector<int32_t>();
  changed[5] = (changed[5] + 1) % 23;
  const std::vector<double> a = gpt.logits(ids).to_vector<double>(),
                            b = gpt.logits(Tensor::from(changed, {1, 8})).to_vector<double>();
  for (size_t i = 0; i < 5 * 23; ++i) EXPECT_EQ(a[i], b[i]) << "position " << i / 23;
  EXPECT_NE(a.back(), b.back());
}

TEST(Gpt, CachedGenerationGivesTheLogitsOfTheWholeSequence) {
  const Gpt gpt(tiny(), Device::cpu(), 1);
  const Tensor ids = random_ids({2, 8}, 23, "in");
  const std::vector<double> whole = gpt.logits(ids).select(1, 7).to_vector<double>();
  KvCache cache;
  gpt.next_logits(ids.narrow(1, 0, 3).contiguous(), cache);
  for (int64_t t = 3; t < 7; ++t) gpt.next_logits(ids.narrow(1, t, 1).contiguous(), cache);
  const std::vector<double> last = gpt.next_logits(ids.narrow(1, 7, 1).contiguous(), cache).to_vector<double>();
  for (size_t i = 0; i < last.size(); ++i) EXPECT_NEAR(last[i], whole[i], 1e-5) << i;  // other tile shapes, f32 sums
  EXPECT_EQ(cache.positions(), 8);
  EXPECT_THROW(gpt.next_logits(ids.narrow(1, 7, 1).contiguous(), cache), Error) << "the context is full";
}

TEST(Gpt, RecomputationGivesTheSameGradientsBitForBitWithLessMemory) {
  GptConfig config{.layers = 6, .heads = 2, .width = 32, .context = 32, .vocab = 23};
  config.dropout = 0.1;
  GptConfig saving = config;
  saving.recompute.block = true;
  const Tensor ids = random_ids({8, 32}, 23, "in"), targets = random_ids({8, 32}, 23, "out");
  const auto run = [&](const GptConfig& which, int64_t& peak) {
    const Gpt gpt(which, Device::cpu(), 1);
    allocator(Device::cpu()).reset_peak();
    gpt.loss(ids, targets, {.step = 7}).backward();
    peak = allocator(Device::cpu()).statistics().categories[static_cast<size_t>(MemoryCategory::activations)].peak;
    return gradients_of(gpt);
  };
  int64_t plain_peak = 0, saving_peak = 0;
  EXPECT_EQ(run(config, plain_peak), run(saving, saving_peak));
  EXPECT_LT(saving_peak, plain_peak / 2);
}

TEST(Gpt, TrainingIsBitEqualOnOneTwoAndThreeThreads) {
  const int before = num_threads();
  std::vector<std::vector<double>> results[3];
  for (int threads = 1; threads <= 3; ++threads) {
    set_num_threads(threads);
    Gpt gpt({.layers = 2, .heads = 4, .width = 64, .context = 48, .vocab = 101, .dropout = 0.1}, Device::cpu(), 1);
    optim::Adam adam(gpt.parameters(), {.clip_norm = 1.0});
    text::Loader loader(random_tokens(5000, 101), {.batch = 5, .context = 48, .seed = 2});
    Trainer trainer(gpt, adam, loader, {.peak = 1e-3, .warmup = 2, .total = 100}, 2);
    std::vector<double> losses;
    for (int i = 0; i < 5; ++i) losses.push_back(trainer.step().loss);
    auto& result = results[threads - 1];
    result.push_back(losses);
    for (const auto& [name, tensor] : gpt.named_tensors()) result.push_back(tensor.to_vector<double>());
    for (const auto& [name, tensor] : adam.state()) result.push_back(tensor.to_vector<double>());
  }
  set_num_threads(before);
  EXPECT_EQ(results[0], results[1]);
  EXPECT_EQ(results[0], results[2]);
}

/// Everything on one instruction set: the products by name, all other ops by the targets of Highway that it may use.
class GptOnEveryIsa : public ::testing::TestWithParam<std::pair<const char*, int64_t>> {
 protected:
  void SetUp() override {
    const auto& [name, targets] = GetParam();
    if (!set_gemm_isa(name)) GTEST_SKIP() << "this machine or build has no " << name;
    hwy::SetSupportedTargetsForTest(targets | HWY_STATIC_TARGET);
  }
  void TearDown() override {
    hwy::SetSupportedTargetsForTest(0);
    set_gemm_isa("");
  }
};
INSTANTIATE_TEST_SUITE_P(Isa, GptOnEveryIsa,
                         ::testing::Values(std::pair("avx512bf16", int64_t{HWY_AVX3}),
                                           std::pair("avx512", int64_t{HWY_AVX3}), std::pair("avx2", int64_t{HWY_AVX2}),
                                           std::pair("portable", int64_t{0})),
                         [](const auto& info) { return std::string(info.param.first); });

// Instrumented, a step takes a hundred times as long; what is looked for then is in each of them.
#ifdef __SANITIZE_ADDRESS__
constexpr int kTrainingSteps = 14;
constexpr double kLearnt = 2.5;
#else
constexpr int kTrainingSteps = 80;
constexpr double kLearnt = 1.0;
#endif

/// Mean loss of the last 10 steps on tokens of which each follows from the two before it.
double final_loss(DType dtype) {
  constexpr int64_t kVocab = 19;
  std::vector<int32_t> tokens = {1, 2};
  for (size_t i = 2; i < 6000; ++i) tokens.push_back((tokens[i - 1] + 3 * tokens[i - 2] + 1) % kVocab);
  const GptConfig config{.layers = 2, .heads = 2, .width = 48, .context = 24, .vocab = kVocab};
  Gpt gpt(config, Device::cpu(), 1, dtype);
  optim::Adam adam(gpt.parameters(), {.clip_norm = 1.0});
  text::Loader loader(std::make_shared<text::TokenVector>(tokens, kVocab), {.batch = 8, .context = 24, .seed = 3});
  Trainer trainer(gpt, adam, loader, {.peak = 3e-3, .warmup = 5, .total = 80}, 2);
  double sum = 0;
  for (int i = 0; i < kTrainingSteps; ++i) {
    const double loss = trainer.step().loss;
    if (i == 0) {
      EXPECT_NEAR(loss, std::log(19.0), 0.1);
    }
    if (i >= kTrainingSteps - 10) sum += loss / 10;
  }
  return sum;
}

TEST_P(GptOnEveryIsa, TrainingInBfloat16EndsWhereF32Does) {
  const double f32 = final_loss(DType::f32), bf16 = final_loss(DType::bf16);
  EXPECT_LT(f32, kLearnt);
  // Weights, activations and gradients err by up to 2^-9 of themselves, to either side, and the master weights keep
  // what rounding takes from a step: a mean over some 3,800 tokens moves by 0.001 to 0.002 nats, and a wrong gradient
  // by far more.
  EXPECT_NEAR(bf16, f32, 0.01);
}

TEST(Gpt, AccumulationOverRaggedMicroBatchesEqualsTheFullBatch) {
  const Gpt full(tiny(), Device::cpu(), 1, DType::f64), parts(tiny(), Device::cpu(), 1, DType::f64);
  const Tensor ids = random_ids({6, 8}, 23, "in");
  std::vector<int32_t> targets = random_ids({6, 8}, 23, "out").to_vector<int32_t>();
  int valid = 0;
  for (size_t i = 0; i < targets.size(); ++i) {
    if (i % 7 < i / 8) targets[i] = -1;  // the later rows have fewer targets that count
    valid += targets[i] >= 0;
  }
  const Tensor all = Tensor::from(targets, {6, 8});
  const Tensor loss = full.loss(ids, all);
  loss.backward();
  double sum = 0;
  for (const auto& [first, count] : {std::pair{0, 1}, {1, 3}, {4, 2}}) {
    const Tensor part = parts.loss(ids.narrow(0, first, count).contiguous(), all.narrow(0, first, count).contiguous(),
                                   {.valid_tokens = double(valid)});
    part.backward();
    sum += part.item();
  }
  EXPECT_NEAR(sum, loss.item(), 1e-12);
  const auto a = gradients_of(full), b = gradients_of(parts);
  for (size_t p = 0; p < a.size(); ++p) {
    for (size_t i = 0; i < a[p].size(); ++i)
      ASSERT_NEAR(a[p][i], b[p][i], 1e-12) << full.parameters()[p].name << " " << i;
  }
}

TEST(Gpt, ADryRunCountsTheMemoryOfARealStep) {
  const auto peak = [] {
    Gpt gpt(tiny(), Device::cpu(), 1);
    optim::Adam adam(gpt.parameters(), {.clip_norm = 1.0});
    text::Loader loader(random_tokens(1000, 23), {.batch = 4, .context = 8, .prefetch = 0});
    Trainer trainer(gpt, adam, loader, {.peak = 1e-3, .total = 100}, 2);
    const int64_t start = allocator(Device::cpu()).statistics().total.current;
    allocator(Device::cpu()).reset_peak();
    trainer.step();
    trainer.step();
    return allocator(Device::cpu()).statistics().total.peak - start;
  };
  const int64_t real = peak();
  const DryRun dry;
  EXPECT_EQ(peak(), real);
}

TEST(Gpt, NothingIsTakenFromTheSystemAfterTheSecondStep) {
  Gpt gpt({.layers = 3, .heads = 4, .width = 64, .context = 64, .vocab = 300}, Device::cpu(), 1);
  optim::Adam adam(gpt.parameters(), {.clip_norm = 1.0});
  text::Loader loader(random_tokens(20000, 300), {.batch = 16, .context = 64});
  Trainer trainer(gpt, adam, loader, {.peak = 1e-3, .total = 100}, 2);
  trainer.step();
  trainer.step();
  const int64_t before = allocator(Device::cpu()).statistics().system_allocations;
  for (int i = 0; i < 10; ++i) trainer.step();
  EXPECT_EQ(allocator(Device::cpu()).statistics().system_allocations, before);
}

TEST(Gpt, ALossThatIsNotFiniteStopsBeforeAnyWeightChanges) {
  Gpt gpt(tiny(), Device::cpu(), 1);
  optim::Adam adam(gpt.parameters(), {});
  {
    const autograd::NoGrad no_grad;
    Tensor(gpt.parameters()[4].tensor).fill_(std::nan(""));
  }
  const auto before = gpt.parameters()[0].tensor.to_vector<double>();
  text::Loader loader(random_tokens(1000, 23), {.batch = 4, .context = 8});
  Trainer trainer(gpt, adam, loader, {.peak = 1e-3, .total = 100}, 1);
  try {
    trainer.step();
    FAIL() << "a NaN went unnoticed";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find(gpt.parameters()[4].name), std::string::npos) << error.what();
  }
  EXPECT_EQ(gpt.parameters()[0].tensor.to_vector<double>(), before);
  EXPECT_EQ(adam.steps(), 0);
}

TEST(Gpt, ALossThatOverflowsWithFiniteWeightsNamesTheFirstTensorThatDid) {
  Gpt gpt(tiny(), Device::cpu(), 1);
  optim::Adam adam(gpt.parameters(), {});
  std::string changed;
  for (const Parameter& parameter : gpt.parameters()) {
    if (!changed.empty() || parameter.name.find("mlp.fc.weight") == std::string::npos) continue;
    const autograd::NoGrad no_grad;
    Tensor(parameter.tensor).fill_(3e38);
    changed = parameter.name;
  }
  ASSERT_FALSE(changed.empty());
  text::Loader loader(random_tokens(1000, 23), {.batch = 4, .context = 8});
  Trainer trainer(gpt, adam, loader, {.peak = 1e-3, .total = 100}, 1);
  try {
    trainer.step();
    FAIL() << "an infinity went unnoticed";
  } catch (const Error& error) {
    const std::string text = error.what();
    for (const std::string& part : {changed, std::string("output of linear"), std::string("every weight is finite")}) {
      EXPECT_NE(text.find(part), std::string::npos) << text;
    }
  }
  EXPECT_EQ(adam.steps(), 0);
}

TEST(Gpt, RefusesConfigurationsAndInputsThatMakeNoSense) {
  const auto message = [](auto&& call) -> std::string {
    try {
      call();
    } catch (const Error& error) {
      return error.what();
    }
    return "nothing was thrown";
  };
  GptConfig config = tiny();
  config.heads = 3;
  EXPECT_NE(message([&] { Gpt gpt(config, Device::cpu()); }).find("heads must divide width"), std::string::npos);
  config = tiny();
  config.vocab = 0;
  EXPECT_NE(message([&] { Gpt gpt(config, Device::cpu()); }).find("vocab"), std::string::npos);
  const Gpt gpt(tiny(), Device::cpu());
  EXPECT_NE(message([&] { gpt.logits(random_ids({1, 9}, 23, "long")); }).find("context"), std::string::npos);
  EXPECT_NE(message([&] { gpt.logits(Tensor::from(std::vector<int32_t>{23}, {1, 1})); }).find("23"), std::string::npos);
  NamedTensors tensors = gpt.named_tensors();
  tensors.pop_back();
  Gpt other(tiny(), Device::cpu());
  EXPECT_NE(message([&] { other.load(tensors); }).find("ln_f.bias"), std::string::npos);
}

}  // namespace
}  // namespace weft::models
