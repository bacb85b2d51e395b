// Training steps recorded as a graph against the same steps called one kernel at a time: the same bits, whatever
// happens between the steps. Runs on a real device and on the emulated one.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/autograd.h"
#include "core/backend.h"
#include "core/log.h"
#include "models/evaluation.h"
#include "models/generate.h"
#include "models/trainer.h"
#include "ops/elementwise.h"
#include "ops/matmul.h"
#include "ops/reduce.h"
#include "optim/adam.h"
#include "tests/error_of.h"

namespace weft::models {
namespace {

class CudaGraph : public ::testing::Test {
 protected:
  void SetUp() override {
    if (*why_no_cuda() != '\0') GTEST_SKIP() << why_no_cuda();
    log::set_sink([this](log::Level, std::string_view line) { lines_ += std::string(line) + "\n"; });
  }
  void TearDown() override { log::set_sink({}); }
  bool was_said(const std::string& part) const { return lines_.find(part) != std::string::npos; }
  std::string lines_;
};

std::shared_ptr<text::TokenVector> random_tokens(int64_t count, int64_t vocab) {
  const RandomStream stream(5, "tokens");
  std::vector<int32_t> tokens(static_cast<size_t>(count));
  for (size_t i = 0; i < tokens.size(); ++i)
    tokens[i] = static_cast<int32_t>(stream.below(i, static_cast<uint64_t>(vocab)));
  return std::make_shared<text::TokenVector>(std::move(tokens), vocab);
}

using Values = std::vector<std::vector<double>>;

Values values_of(const NamedTensors& tensors) {
  Values out;
  for (const auto& [name, tensor] : tensors) out.push_back(tensor.to_vector<double>());
  return out;
}

NamedTensors copies_of(const NamedTensors& tensors) {
  const autograd::NoGrad no_grad;
  NamedTensors out;
  for (const auto& [name, tensor] : tensors) out.emplace_back(name, tensor.detach().clone().to(Device::cpu()));
  return out;
}

struct Recipe {
  const char* name;
  DType dtype = DType::f32;
  optim::AdamOptions adam;
  int64_t accumulate = 1;
  double dropout = 0;
  bool recompute = false;
  bool fp8 = false;
};

constexpr int64_t kVocab = 37;

GptConfig small(const Recipe& recipe) {
  return {.layers = 2,
          .heads = 2,
          .width = 32,
          .context = 8,
          .vocab = kVocab,
          .dropout = recipe.dropout,
          .recompute = {.block = recipe.recompute}};
}

struct Training {
  Gpt gpt;
  optim::Adam adam;
  text::Loader loader;
  Trainer trainer;

  Training(const Recipe& recipe, GraphUse use, int64_t step = 0, int64_t vocab = kVocab)
      : gpt(small(recipe), Device::cuda(), 1, recipe.dtype),
        adam(gpt.parameters(), recipe.adam),
        loader(random_tokens(500, vocab), {.batch = 2, .context = 8, .seed = 2, .prefetch = 0}),
        trainer(gpt, adam, loader, {.peak = 1e-2, .warmup = 3, .total = 20}, recipe.accumulate, step) {
    // After five good steps gradients times 2^24 overflow f16, once, and 2^10 is right again.
    if (recipe.dtype == DType::f16)
      trainer.scale_loss(optim::LossScale(
          {.initial = 0x1p10, .growth = 0x1p14, .backoff = 0x1p-14, .interval = 5, .largest = 0x1p24}));
    if (recipe.fp8) trainer.scale_fp8(gpt.use_fp8());
    trainer.use_graph(use);
  }

  /// Loss, norm, clip factor, rate, scale, whether it was skipped, and elements converted and saturated, of each step.
  Values steps(int count) {
    Values out;
    for (int i = 0; i < count; ++i) {
      const StepMetrics m = trainer.step();
      out.push_back({m.loss, m.grad_norm, m.clip_factor, m.lr, m.loss_scale, m.skipped ? 1.0 : 0.0,
                     static_cast<double>(m.fp8.converted), static_cast<double>(m.fp8.saturated)});
    }
    return out;
  }
  Values state() const {
    Values all = values_of(gpt.named_tensors());
    for (auto& tensor : values_of(adam.state())) all.push_back(std::move(tensor));
    for (auto& tensor : values_of(trainer.fp8() ? trainer.fp8()->state() : NamedTensors()))
      all.push_back(std::move(tensor));
    return all;
  }
  /// What runs between steps: an evaluation, a sample, a copy of everything for a checkpoint.
  std::vector<double> between() {
    const text::Evaluation data(random_tokens(60, kVocab), 3, 8);
    std::vector<double> out = {evaluate(gpt, data).nats_per_token};
    gpt.eval();
    for (const int32_t id : generate(gpt, {1, 2, 3}, 12, {})) out.push_back(id);
    gpt.train();
    copies_of(gpt.named_tensors());
    copies_of(adam.state());
    return out;
  }
};

const optim::AdamOptions kAdamw = {.weight_decay = 0.1, .clip_norm = 0.5};
const optim::AdamOptions kLamb = {.weight_decay = 0.1, .clip_norm = 0.5, .trust_ratio = true};

const Recipe kRecipes[] = {
    {"f32", DType::f32, kAdamw, 1},
    {"f32_dropout_three_micro_batches", DType::f32, kAdamw, 3, 0.1},
    {"f32_lamb", DType::f32, kLamb, 3},
    {"f32_recomputation", DType::f32, kAdamw, 1, 0.1, true},
    {"bf16_dropout", DType::bf16, kAdamw, 1, 0.1},
    {"bf16_lamb_three_micro_batches", DType::bf16, kLamb, 3, 0.1},
    {"f16_overflow", DType::f16, kAdamw, 1, 0.1},
    {"f16_lamb_overflow", DType::f16, kLamb, 3},
    {"fp8_dropout", DType::bf16, kAdamw, 1, 0.1, false, true},
    {"fp8_lamb_three_micro_batches_recomputation", DType::bf16, kLamb, 3, 0.1, true, true},
};

class EveryRecipe : public CudaGraph, public ::testing::WithParamInterface<Recipe> {};

TEST_P(EveryRecipe, HasTheBitsOfStepsThatAreNotRecorded) {
  constexpr int kSteps = 10;
  Training called(GetParam(), GraphUse::off), recorded(GetParam(), GraphUse::on);
  double clipped = 0, skipped = 0;
  for (int i = 0; i < kSteps; ++i) {
    const Values want = called.steps(1), got = recorded.steps(1);
    ASSERT_EQ(got, want) << "step " << i;
    clipped += want[0][2] < 1;
    skipped += want[0][5];
    if (i % 3 == 1) {
      ASSERT_EQ(recorded.between(), called.between()) << "after step " << i;
    }
  }
  EXPECT_EQ(recorded.state(), called.state());
  EXPECT_GE(clipped, 3) << "the recipe clips";
  EXPECT_EQ(skipped, GetParam().dtype == DType::f16 ? 1 : 0);
  EXPECT_EQ(recorded.adam.steps(), kSteps - static_cast<int64_t>(skipped));
  EXPECT_EQ(called.trainer.graph().launches(), 0);
  // In fp8 the first step, in which scales have no history, is another one.
  EXPECT_EQ(recorded.trainer.graph().launches(), kSteps - 2 - (GetParam().fp8 ? 1 : 0));
  EXPECT_EQ(recorded.trainer.graph().recordings(), 1);
}

INSTANTIATE_TEST_SUITE_P(Steps, EveryRecipe, ::testing::ValuesIn(kRecipes),
                         [](const auto& info) { return std::string(info.param.name); });

TEST_F(CudaGraph, ARunThatIsResumedHasTheBitsOfTheStraightOne) {
  const Recipe recipe = {"", DType::bf16, kLamb, 3, 0.1};
  Training straight(recipe, GraphUse::off), first(recipe, GraphUse::on);
  Values want = straight.steps(10), got = first.steps(5);
  Training second(recipe, GraphUse::on, 5);
  second.gpt.load(copies_of(first.gpt.named_tensors()));
  second.adam.load_state(copies_of(first.adam.state()));
  second.loader.seek(first.loader.position());
  for (auto& step : second.steps(5)) got.push_back(std::move(step));
  EXPECT_EQ(got, want);
  EXPECT_EQ(second.state(), straight.state());
  EXPECT_EQ(second.trainer.graph().launches(), 3);
}

TEST_F(CudaGraph, AStateThatIsLoadedBetweenRecordedStepsIsUsed) {
  const Recipe recipe = {"", DType::bf16, kAdamw};
  Training called(recipe, GraphUse::off), recorded(recipe, GraphUse::on);
  for (Training* run : {&called, &recorded}) {
    const NamedTensors model = copies_of(run->gpt.named_tensors()), state = copies_of(run->adam.state());
    run->steps(5);
    run->gpt.load(model);
    run->adam.load_state(state);
  }
  EXPECT_EQ(recorded.steps(4), called.steps(4));
  EXPECT_EQ(recorded.state(), called.state());
  EXPECT_EQ(recorded.trainer.graph().recordings(), 1);
}

TEST_F(CudaGraph, NothingIsTakenFromTheSystemAfterTheSecondStep) {
  Training run({"", DType::bf16, kLamb, 3, 0.1}, GraphUse::on);
  run.steps(2);
  const int64_t before = allocator(Device::cuda()).statistics().system_allocations;
  for (int i = 0; i < 4; ++i) run.steps(1), run.between();
  EXPECT_EQ(run.trainer.graph().launches(), 4);
  EXPECT_EQ(allocator(Device::cuda()).statistics().system_allocations, before);
}

// ---- what is wrong is found, and changes nothing ----

TEST_F(CudaGraph, AWeightThatIsNaNStopsARecordedStepWithItsName) {
  Training run({"", DType::f32, kAdamw}, GraphUse::on);
  run.steps(4);
  {
    const autograd::NoGrad no_grad;
    run.gpt.parameters()[4].tensor.detach().reshape({-1}).narrow(0, 7, 1).fill_(std::nan(""));
  }
  const Values before = run.state();
  EXPECT_ERROR(
      ErrorKind::kValue,
      concat("nan: weight ", quoted(run.gpt.parameters()[4].name), " is nan at element 7. No weight was changed"),
      run.trainer.step());
  EXPECT_EQ(run.trainer.graph().launches(), 2 + 1);
  EXPECT_EQ(run.adam.steps(), 4);
  Values after = run.state();
  ASSERT_EQ(after.size(), before.size());
  after[4][7] = 0;
  Values expected = before;
  expected[4][7] = 0;
  EXPECT_EQ(after, expected);
}

TEST_F(CudaGraph, TheFirstTensorThatOverflowsInARecordedStepIsNamed) {
  Training run({"", DType::f32, kAdamw}, GraphUse::on);
  run.steps(4);
  const Parameters parameters = run.gpt.parameters();
  const auto bias = std::find_if(parameters.begin(), parameters.end(),
                                 [](const Parameter& p) { return p.name == "h.1.ln_2.weight"; });
  ASSERT_NE(bias, parameters.end());
  {
    const autograd::NoGrad no_grad;
    bias->tensor.detach().fill_(3e38);
  }
  const Values before = run.state();
  EXPECT_ERROR(ErrorKind::kValue, "every weight is finite, and the first tensor that is not is the output of",
               run.trainer.step());
  EXPECT_EQ(run.state(), before);
  EXPECT_EQ(run.adam.steps(), 4);
}

TEST_F(CudaGraph, AnInfinityThatConversionHidesStopsARecordedStepWithItsName) {
  Recipe recipe = {"", DType::bf16, kAdamw};
  recipe.fp8 = true;
  Training run(recipe, GraphUse::on);
  run.steps(4);
  const Parameters parameters = run.gpt.parameters();
  const auto weight = std::find_if(parameters.begin(), parameters.end(),
                                   [](const Parameter& p) { return p.name == "h.1.mlp.fc.weight"; });
  ASSERT_NE(weight, parameters.end());
  {
    const autograd::NoGrad no_grad;
    weight->tensor.detach().reshape({-1}).narrow(0, 7, 1).fill_(INFINITY);
  }
  const Values before = values_of(run.gpt.named_tensors()), scales = values_of(run.trainer.fp8()->state());
  // The master copy of a weight follows what is written into it.
  const auto state = [&] {
    NamedTensors all = run.adam.state();
    std::erase_if(all, [](const auto& tensor) { return tensor.first == "h.1.mlp.fc.weight.master"; });
    return values_of(all);
  };
  const Values state_before = state();
  EXPECT_ERROR(ErrorKind::kValue, "the weight of \"h.1.mlp.fc\" has an element that is inf", run.trainer.step());
  EXPECT_EQ(run.trainer.graph().launches(), 1 + 1);
  EXPECT_EQ(values_of(run.gpt.named_tensors()), before);
  EXPECT_EQ(state(), state_before);
  EXPECT_EQ(values_of(run.trainer.fp8()->state()), scales);
  EXPECT_EQ(run.adam.steps(), 4);
  EXPECT_EQ(run.trainer.fp8()->updates(), 4);
}

TEST_F(CudaGraph, ScalesWithoutAHistoryThatAreLoadedMakeANewRecording) {
  Recipe recipe = {"", DType::bf16, kAdamw};
  recipe.fp8 = true;
  Training called(recipe, GraphUse::off), recorded(recipe, GraphUse::on);
  for (Training* run : {&called, &recorded}) {
    const NamedTensors scales = copies_of(run->trainer.fp8()->state());
    run->steps(4);
    run->trainer.fp8()->load_state(scales);
  }
  EXPECT_EQ(recorded.steps(5), called.steps(5));
  EXPECT_EQ(recorded.state(), called.state());
  EXPECT_EQ(recorded.trainer.graph().recordings(), 2);
}

TEST_F(CudaGraph, AnIdBeyondTheVocabularyInARecordedStepChangesNothing) {
  Training run({"", DType::f32, kAdamw}, GraphUse::on);
  run.steps(4);
  const Values before = run.state();
  // The same model goes on with tokens of a larger vocabulary.
  text::Loader loader(random_tokens(500, 10 * kVocab), {.batch = 2, .context = 8, .seed = 2, .prefetch = 0});
  run.loader = std::move(loader);
  EXPECT_ERROR(ErrorKind::kIndex, "but must be from 0 to 36", run.trainer.step());
  EXPECT_EQ(run.state(), before);
  EXPECT_EQ(run.adam.steps(), 4);
  EXPECT_EQ(run.trainer.graph().launches(), 3);
}

// ---- work of one's own ----

/// A weight with its optimizer, trained to follow a target that changes from step to step.
struct Tiny {
  static constexpr int64_t kCount = 9001;
  Tensor w = Tensor::full({kCount}, 0.5, DType::f32, Device::cuda());
  Tensor target = Tensor::zeros({kCount}, DType::f32, Device::cuda());
  Parameters parameters{{"w", w.requires_grad_(), ParameterRole::weight}};
  optim::Adam adam{parameters, {.weight_decay = 0.1}};
  StepGraph graph;

  explicit Tiny(GraphUse use) : graph(use, Device::cuda()) {}
  void set_target(double value) {
    const autograd::NoGrad no_grad;
    target.fill_(value);
  }
  void queue() {
    sum(w * target).backward();
    adam.queue();
  }
  double step(int i, const std::function<void()>& body, const std::string& frozen = "tiny") {
    set_target(0.1 * (i + 1));
    adam.prepare(0.01 * (i + 1));
    graph.run(frozen, "", parameters, body);
    const double norm = adam.finish().grad_norm;
    adam.zero_grad();
    return norm;
  }
  std::vector<double> values() const { return w.to_vector<double>(); }
};

TEST_F(CudaGraph, AGradientThatIsNotFiniteIsNamedAfterARecordedStep) {
  Tiny tiny(GraphUse::on);
  for (int i = 0; i < 4; ++i) tiny.step(i, [&] { tiny.queue(); });
  const std::vector<double> before = tiny.values();
  {
    const autograd::NoGrad no_grad;
    tiny.target.narrow(0, 8765, 1).fill_(std::numeric_limits<double>::infinity());
  }
  tiny.adam.prepare(0.01);
  tiny.graph.run("tiny", "", tiny.parameters, [&] { tiny.queue(); });
  EXPECT_ERROR(ErrorKind::kValue, "[grad_norm] the gradient of \"w\" (f32 [9001]) is inf at element 8,765",
               tiny.adam.finish());
  EXPECT_EQ(tiny.graph.launches(), 3);
  EXPECT_EQ(tiny.values(), before);
  EXPECT_EQ(tiny.adam.steps(), 4);
}

/// Changes the weight by the step's rate as the host knows it while the work is queued: what a recording must not do.
double differ_with_a_rate_taken_by_value(bool recorded) {
  Tiny tiny(recorded ? GraphUse::on : GraphUse::off);
  for (int i = 0; i < 5; ++i) {
    tiny.step(i, [&] {
      tiny.queue();
      const autograd::NoGrad no_grad;
      tiny.w.copy_(tiny.w - 0.01 * (i + 1) * tiny.w.grad());
    });
  }
  return tiny.values()[0];
}

TEST_F(CudaGraph, AStaleArgumentIsSeenInTheBits) {
  Tiny called(GraphUse::off), recorded(GraphUse::on);
  for (int i = 0; i < 5; ++i) {
    const double want = called.step(i, [&] { called.queue(); });
    EXPECT_EQ(recorded.step(i, [&] { recorded.queue(); }), want);
  }
  EXPECT_EQ(recorded.values(), called.values()) << "Adam reads its rate on the device";
  EXPECT_NE(differ_with_a_rate_taken_by_value(true), differ_with_a_rate_taken_by_value(false))
      << "a rate by value stayed that of the recording, and the comparison must show it";
}

TEST_F(CudaGraph, NumbersThatTheHostSendsWithinAStepAreRefused) {
  Tiny tiny(GraphUse::on);
  int i = 0;
  const auto body = [&] {
    sum(tiny.w * tiny.target).backward();
    tiny.adam.prepare(0.01 * (i + 1));
    tiny.adam.queue();
  };
  for (; i < 2; ++i) tiny.step(i, body);
  EXPECT_ERROR(ErrorKind::kState, "[capture] the host sends values to the device while a step is being recorded",
               tiny.step(i, body));
  EXPECT_NO_THROW(tiny.values()) << "the device works as before";
}

TEST_F(CudaGraph, AProductThatWasNotMadeBeforeIsRefused) {
  const autograd::NoGrad no_grad;
  const Tensor a = Tensor::ones({19, 23}, DType::f32, Device::cuda()),
               b = Tensor::ones({23, 17}, DType::f32, a.device());
  Backend& device = backend(a.device());
  EXPECT_ERROR(ErrorKind::kState, "the host looks for the algorithm of a product",
               device.capture([&] { matmul(a, b); }));
  EXPECT_EQ(matmul(a, b).to_vector<double>(), std::vector<double>(19 * 17, 23));
  Tensor c = Tensor::zeros({19, 17}, DType::f32, a.device());
  const std::unique_ptr<Graph> graph = device.capture([&] { c.copy_(matmul(a, b)); });
  EXPECT_EQ(c.to_vector<double>(), std::vector<double>(19 * 17, 0)) << "recorded, not done";
  graph->launch();
  EXPECT_EQ(c.to_vector<double>(), std::vector<double>(19 * 17, 23));
}

TEST_F(CudaGraph, AutomaticUseGoesOnWithoutARecordingWhereTheWorkNeedsTheHost) {
  Tiny called(GraphUse::off), recorded(GraphUse::automatic);
  for (int i = 0; i < 5; ++i) {
    for (Tiny* tiny : {&called, &recorded}) {
      tiny->step(i, [&] {
        tiny->queue();
        tiny->w.grad().to_vector<double>();
      });
    }
  }
  EXPECT_EQ(recorded.values(), called.values());
  EXPECT_EQ(recorded.graph.launches(), 0);
  EXPECT_TRUE(was_said("steps are not recorded: [capture] the host reads values")) << lines_;
}

TEST_F(CudaGraph, RaggedMicroBatchesAreDividedByTheValidTokensOfTheirOwnStep) {
  const auto run = [](GraphUse use) {
    const Device device = Device::cuda();
    Gpt gpt(small({"", DType::f32, kAdamw, 3, 0.1}), device, 1);
    optim::Adam adam(gpt.parameters(), kAdamw);
    StepGraph graph(use, device);
    const Tensor ids = Tensor::zeros({3, 2, 8}, DType::i32, device), targets = Tensor::zeros_like(ids);
    const Tensor numbers = Tensor::zeros({2}, DType::f64, device), losses = Tensor::zeros({3}, DType::f32, device);
    Values out;
    for (int step = 0; step < 10; ++step) {
      const RandomStream stream = RandomStream(4, "ragged").at_step(static_cast<uint64_t>(step));
      std::vector<int32_t> tokens(48), next(48);
      double valid = 0;
      for (uint64_t i = 0; i < 48; ++i) {
        tokens[i] = static_cast<int32_t>(stream.below(i, kVocab));
        const bool ignored = stream.below(100 + i, 48) < (i / 16) * 12 + static_cast<uint64_t>(step);
        next[i] = ignored ? -1 : static_cast<int32_t>(stream.below(200 + i, kVocab));
        valid += ignored ? 0 : 1;
      }
      const double host[] = {static_cast<double>(step), valid};
      backend(device).to_device(ids.raw(), tokens.data(), 48 * 4);
      backend(device).to_device(targets.raw(), next.data(), 48 * 4);
      backend(device).to_device(numbers.raw(), host, sizeof host);
      adam.prepare(1e-2 / (step + 1));
      graph.run("ragged", "", gpt.parameters(), [&] {
        for (int64_t i = 0; i < 3; ++i) {
          const Tensor loss = gpt.loss(
              ids.select(0, i), targets.select(0, i),
              {.first_row = 2 * i, .step_at = numbers.narrow(0, 0, 1), .valid_tokens_at = numbers.narrow(0, 1, 1)});
          losses.select(0, i).copy_(loss.detach());
          loss.backward();
        }
        adam.queue(losses);
      });
      const optim::StepReport report = adam.finish();
      adam.zero_grad();
      out.push_back({report.loss, report.grad_norm, valid});
    }
    EXPECT_EQ(graph.launches(), use == GraphUse::on ? 8 : 0);
    for (auto& tensor : values_of(gpt.named_tensors())) out.push_back(std::move(tensor));
    return out;
  };
  const Values called = run(GraphUse::off);
  EXPECT_NE(called[3][2], called[4][2]) << "the number of valid tokens changes";
  EXPECT_EQ(run(GraphUse::on), called);
}

// ---- when a recording does not serve any more ----

TEST_F(CudaGraph, AnotherShapeIsRecordedAnew) {
  Tiny called(GraphUse::off), recorded(GraphUse::on);
  for (int i = 0; i < 12; ++i) {
    const int64_t part = i < 5 ? Tiny::kCount : 4000;
    double norm[2];
    for (Tiny* tiny : {&called, &recorded}) {
      norm[tiny == &recorded] = tiny->step(
          i,
          [&] {
            sum(tiny->w.narrow(0, 0, part) * tiny->target.narrow(0, 0, part)).backward();
            tiny->adam.queue();
          },
          concat(part, " elements"));
    }
    ASSERT_EQ(norm[1], norm[0]) << "step " << i;
  }
  EXPECT_EQ(recorded.values(), called.values());
  EXPECT_EQ(recorded.graph.recordings(), 2);
  EXPECT_EQ(recorded.graph.launches(), 3 + 5);
  EXPECT_TRUE(was_said("step to be recorded again: 4000 elements instead of 9001 elements")) << lines_;
}

TEST_F(CudaGraph, TensorsThatSomeoneKeepsInItsMemoryAreLeftAlone) {
  const Recipe recipe = {"", DType::f32, kAdamw, 1, 0.1};
  Training called(recipe, GraphUse::off), recorded(recipe, GraphUse::on);
  const Values want = called.steps(8);
  Values got = recorded.steps(4);
  // As many small tensors as fit into what the step has left free, and more.
  std::vector<Tensor> kept;
  for (int i = 0; i < 400; ++i) kept.push_back(Tensor::full({1000}, i, DType::f32, Device::cuda()));
  for (auto& step : recorded.steps(4)) got.push_back(std::move(step));
  EXPECT_EQ(got, want);
  EXPECT_EQ(recorded.state(), called.state());
  for (int i = 0; i < 400; ++i)
    ASSERT_EQ(kept[static_cast<size_t>(i)].to_vector<double>(), std::vector<double>(1000, i)) << i;
  EXPECT_EQ(recorded.trainer.graph().recordings(), 2);
  EXPECT_EQ(recorded.trainer.graph().launches(), 6);
  EXPECT_TRUE(was_said("of its memory belong to others now")) << lines_;
}

TEST_F(CudaGraph, MemoryThatARecordingUsesIsNotGivenBackToTheSystem) {
  const Recipe recipe = {"", DType::f32, kAdamw, 1, 0.1};
  Training called(recipe, GraphUse::off), recorded(recipe, GraphUse::on);
  const Values want = called.steps(8);
  Values got;
  for (int i = 0; i < 8; ++i) {
    got.push_back(recorded.steps(1)[0]);
    allocator(Device::cuda()).release_cached();
  }
  EXPECT_EQ(got, want);
  EXPECT_EQ(recorded.trainer.graph().recordings(), 1);
}

TEST_F(CudaGraph, AHookOfTheHostIsAReasonNotToRecord) {
  Training automatic({"", DType::f32, kAdamw}, GraphUse::automatic), on({"", DType::f32, kAdamw}, GraphUse::on);
  int calls = 0;
  for (Training* run : {&automatic, &on}) {
    run->steps(4);
    run->gpt.parameters()[0].tensor.register_grad_ready_hook([&](const Tensor&) { ++calls; });
  }
  automatic.steps(2);
  EXPECT_EQ(calls, 2);
  EXPECT_EQ(automatic.trainer.graph().launches(), 2);
  EXPECT_TRUE(was_said("steps are not recorded: parameter \"wte.weight\" has a gradient hook")) << lines_;
  EXPECT_ERROR(ErrorKind::kUsage,
               "cuda_graph = on: a step cannot be recorded as a graph: parameter \"wte.weight\" has a gradient hook",
               on.trainer.step());
}

TEST_F(CudaGraph, AReducerOfTheHostIsAReasonNotToRecord) {
  class Host final : public optim::NormReducer {
    void reduce(std::span<double>, const Parameters&) override {}
  };
  Gpt gpt(small({}), Device::cuda(), 1);
  optim::Adam adam(gpt.parameters(), kLamb, std::make_shared<Host>());
  text::Loader loader(random_tokens(500, kVocab), {.batch = 2, .context = 8, .seed = 2, .prefetch = 0});
  Trainer trainer(gpt, adam, loader, {.peak = 1e-2, .warmup = 3, .total = 20}, 1);
  EXPECT_EQ(trainer.use_graph(GraphUse::automatic), "the gradients' norm is reduced on the host");
  EXPECT_ERROR(ErrorKind::kUsage, "the gradients' norm is reduced on the host", trainer.use_graph(GraphUse::on));
  Training local({"", DType::f32, kLamb}, GraphUse::off);
  trainer.use_graph(GraphUse::automatic);
  for (int i = 0; i < 4; ++i) EXPECT_EQ(trainer.step().loss, local.trainer.step().loss) << i;
  EXPECT_EQ(trainer.graph().launches(), 0);
}

TEST(StepGraph, OnACpuNothingIsRecordedAndAskingForItIsAnError) {
  EXPECT_EQ(StepGraph(GraphUse::automatic, Device::cpu()).reason(""), "the device is cpu");
  EXPECT_ERROR(ErrorKind::kUsage, "cuda_graph = on: a step cannot be recorded as a graph: the device is cpu",
               StepGraph(GraphUse::on, Device::cpu()).reason(""));
  EXPECT_ERROR(ErrorKind::kDevice, "records no work", backend(Device::cpu()).capture([] {}));
}

}  // namespace
}  // namespace weft::models
