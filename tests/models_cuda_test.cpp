// GPT on a CUDA device: the golden trajectory, the CPU's numbers, the same bits twice and after a resume. Runs on a
// real device and on the emulated one.
#include <gtest/gtest.h>

#include "core/autograd.h"
#include "core/backend.h"
#include "models/generate.h"
#include "models/trainer.h"
#include "tests/golden_gpt.h"

namespace weft::models {
namespace {

class CudaGpt : public ::testing::Test {
 protected:
  void SetUp() override {
    if (*why_no_cuda() != '\0') GTEST_SKIP() << why_no_cuda();
  }
};

std::shared_ptr<text::TokenVector> random_tokens(int64_t count, int64_t vocab) {
  const RandomStream stream(5, "tokens");
  std::vector<int32_t> tokens(static_cast<size_t>(count));
  for (size_t i = 0; i < tokens.size(); ++i)
    tokens[i] = static_cast<int32_t>(stream.below(i, static_cast<uint64_t>(vocab)));
  return std::make_shared<text::TokenVector>(std::move(tokens), vocab);
}

/// A run of a small model with dropout and accumulation, which can be stopped and gone on with.
struct Small {
  static constexpr int64_t kVocab = 37;
  Gpt gpt;
  optim::Adam adam;
  text::Loader loader{random_tokens(500, kVocab), {.batch = 2, .context = 8, .seed = 2}};
  Trainer trainer;

  explicit Small(Device device, DType dtype = DType::f32, bool recompute = false, int64_t step = 0)
      : gpt({.layers = 2,
             .heads = 2,
             .width = 32,
             .context = 8,
             .vocab = kVocab,
             .dropout = 0.1,
             .recompute = {.block = recompute}},
            device, 1, dtype),
        adam(gpt.parameters(), {.clip_norm = 1.0}),
        trainer(gpt, adam, loader, {.peak = 1e-3, .warmup = 2, .total = 100}, 2, step) {}

  std::vector<double> losses(int steps) {
    std::vector<double> out;
    for (int i = 0; i < steps; ++i) out.push_back(trainer.step().loss);
    return out;
  }
  std::vector<std::vector<double>> state() {
    std::vector<std::vector<double>> out;
    for (const auto& [name, tensor] : gpt.named_tensors()) out.push_back(tensor.to_vector<double>());
    for (const auto& [name, tensor] : adam.state()) out.push_back(tensor.to_vector<double>());
    return out;
  }
};

TEST_F(CudaGpt, TenStepsFollowPyTorchInF32Within1e4) {
  Golden golden(Device::cuda());
  EXPECT_LE(worst(golden.gpt.logits(golden.inputs).to_vector<double>(), golden.file.load("logits").to_vector<double>()),
            1e-4);
  for (int i = 0; i < kSteps; ++i) {
    EXPECT_NEAR(golden.step(i), golden.loss[static_cast<size_t>(i)], 1e-4) << "step " << i;
    EXPECT_NEAR(golden.last_norm, golden.norm[static_cast<size_t>(i)], 1e-4 * golden.norm[static_cast<size_t>(i)])
        << "step " << i;
  }
}

TEST_F(CudaGpt, TenStepsFollowPyTorchInBf16WithinItsRounding) {
  // Weights and activations have 8 bits: a relative 2^-9 each, over some dozen roundings in a row; logits are below 1
  // and losses near 3.4. The f32 master keeps the trajectory from drifting further.
  Golden golden(Device::cuda(), DType::bf16);
  EXPECT_LE(worst(golden.gpt.logits(golden.inputs).to_vector<double>(), golden.file.load("logits").to_vector<double>()),
            0.05);
  for (int i = 0; i < kSteps; ++i)
    EXPECT_NEAR(golden.step(i), golden.loss[static_cast<size_t>(i)], 0.03) << "step " << i;
}

TEST_F(CudaGpt, TenStepsFollowPyTorchInF16WithinItsRounding) {
  // Three bits more than bf16: an eighth of its bounds, and of the losses a little more, for gradients below 6e-5 lose
  // digits without a loss scale.
  Golden golden(Device::cuda(), DType::f16);
  EXPECT_LE(worst(golden.gpt.logits(golden.inputs).to_vector<double>(), golden.file.load("logits").to_vector<double>()),
            0.01);
  for (int i = 0; i < kSteps; ++i)
    EXPECT_NEAR(golden.step(i), golden.loss[static_cast<size_t>(i)], 0.005) << "step " << i;
}

TEST_F(CudaGpt, EveryGradientIsThatOfPyTorchWithin1e4Relative) {
  Golden golden(Device::cuda());
  golden.gpt.loss(golden.inputs, golden.targets).backward();
  for (const Parameter& parameter : golden.gpt.parameters()) {
    const std::vector<double> want = golden.file.load("grad." + parameter.name).to_vector<double>();
    ASSERT_TRUE(parameter.tensor.grad().defined()) << parameter.name;
    EXPECT_LE(worst(parameter.tensor.grad().to_vector<double>(), want) / largest(want), 1e-4) << parameter.name;
  }
}

TEST_F(CudaGpt, StartsFromTheCpusWeightsAndFollowsItsLosses) {
  Small cpu(Device::cpu()), cuda(Device::cuda());
  EXPECT_EQ(cpu.gpt.parameters()[0].tensor.to_vector<double>(), cuda.gpt.parameters()[0].tensor.to_vector<double>());
  const std::vector<double> want = cpu.losses(5), got = cuda.losses(5);
  EXPECT_LE(worst(got, want), 1e-5) << "dropout drew other masks, or a kernel is wrong";
}

TEST_F(CudaGpt, TwoRunsHaveTheSameBitsInF32AndBf16) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    Small a(Device::cuda(), dtype), b(Device::cuda(), dtype);
    EXPECT_EQ(a.losses(4), b.losses(4)) << dtype;
    EXPECT_EQ(a.state(), b.state()) << dtype;
  }
}

TEST_F(CudaGpt, AResumedRunHasTheBitsOfTheStraightOne) {
  Small straight(Device::cuda());
  straight.losses(3);
  NamedTensors model, optimizer;
  for (const auto& [name, tensor] : straight.gpt.named_tensors())
    model.emplace_back(name, tensor.detach().clone().to(Device::cpu()));
  for (const auto& [name, tensor] : straight.adam.state())
    optimizer.emplace_back(name, tensor.detach().clone().to(Device::cpu()));
  Small again(Device::cuda(), DType::f32, false, 3);
  again.gpt.load(model);
  again.adam.load_state(optimizer);
  again.loader.seek(straight.loader.position());
  EXPECT_EQ(straight.losses(3), again.losses(3));
  EXPECT_EQ(straight.state(), again.state());
}

TEST_F(CudaGpt, RecomputationGivesTheSameBits) {
  Small plain(Device::cuda()), saving(Device::cuda(), DType::f32, true);
  EXPECT_EQ(plain.losses(3), saving.losses(3));
  EXPECT_EQ(plain.state(), saving.state());
}

TEST_F(CudaGpt, NothingIsTakenFromTheSystemAfterTheSecondStep) {
  Small run(Device::cuda());
  run.losses(2);
  const int64_t before = allocator(Device::cuda()).statistics().system_allocations;
  run.losses(4);
  EXPECT_EQ(allocator(Device::cuda()).statistics().system_allocations, before);
}

TEST_F(CudaGpt, GreedyGenerationIsThatOfTheCpu) {
  const Golden cpu(Device::cpu()), cuda(Device::cuda());
  const std::vector<int32_t> prompt = {1, 5, 9};
  SamplingOptions greedy;
  greedy.temperature = 0;
  EXPECT_EQ(generate(cpu.gpt, prompt, 20, greedy), generate(cuda.gpt, prompt, 20, greedy));
}

TEST_F(CudaGpt, AnIdBeyondTheVocabularyIsReportedAtTheNextReading) {
  const Golden golden(Device::cuda());
  const Tensor wrong = Tensor::from(std::vector<int32_t>{1, 2, 400, 3}, {1, 4}, Device::cuda());
  try {
    golden.gpt.logits(wrong).to_vector<double>();
    FAIL() << "an id of 400 in a vocabulary of 29 went unnoticed";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::kIndex) << error.what();
    for (const char* part : {"embedding", "400", "28"})
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
  }
  EXPECT_NO_THROW(golden.gpt.logits(golden.inputs).to_vector<double>()) << "the report was not taken back";
}

TEST_F(CudaGpt, TheLogitsOfAGpt2InBf16AreThoseOfF32Within005) {
  // Fresh weights of GPT-2's deviations, whose logits are of the size of those of a trained model's middle layers:
  // below some 3. bf16 rounds each of the residual stream's 2 L sums to 2^-9 of its size. On the emulated device a
  // narrow one of two layers, because it computes some million times slower than a GPU.
  const bool real = backend(Device::cuda()).name().find("emulated") == std::string::npos;
  const GptConfig gpt2 = {.layers = 12, .heads = 12, .width = 768, .context = 1024, .vocab = 50304};
  const GptConfig config = real ? gpt2 : GptConfig{.layers = 2, .heads = 2, .width = 64, .context = 16, .vocab = 96};
  const RandomStream stream(7, "ids");
  std::vector<int32_t> ids(static_cast<size_t>(config.context));
  for (size_t i = 0; i < ids.size(); ++i)
    ids[i] = static_cast<int32_t>(stream.below(i, static_cast<uint64_t>(config.vocab)));
  const Tensor inputs = Tensor::from(ids, {1, config.context}, Device::cuda());
  const autograd::NoGrad no_grad;
  Gpt wide(config, Device::cuda(), 1, DType::f32), narrow(config, Device::cuda(), 1, DType::bf16);
  wide.eval(), narrow.eval();
  const std::vector<double> want = wide.logits(inputs).to_vector<double>();
  EXPECT_GT(largest(want), 0.1) << "the logits are those of a model that does nothing";
  EXPECT_LE(worst(narrow.logits(inputs).to_vector<double>(), want), 0.05);
}

TEST_F(CudaGpt, ANonFiniteLossStopsBeforeAnyWeightChanges) {
  Small run(Device::cuda());
  {
    const autograd::NoGrad no_grad;
    Tensor(run.gpt.parameters()[4].tensor).fill_(std::nan(""));
  }
  EXPECT_THROW(run.trainer.step(), Error);
  EXPECT_EQ(run.adam.steps(), 0);
}

}  // namespace
}  // namespace weft::models
