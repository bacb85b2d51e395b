// fp8 on a CUDA device: what is converted, counted and scaled has the CPU's bits; products are near; training has the
// same bits twice. Runs on a real device of compute capability 8.9 or newer and on the emulated one.
#include <gtest/gtest.h>

#include "core/autograd.h"
#include "core/backend.h"
#include "models/trainer.h"
#include "ops/launch.h"
#include "optim/adam.h"
#include "tests/fp8_reference.h"
#include "tests/golden_gpt.h"
#include "tests/values.h"

namespace weft {
namespace {

using testing::make_layer;
using testing::same_bits;

class CudaFp8 : public ::testing::Test {
 protected:
  void SetUp() override {
    if (*why_no_cuda() != '\0') GTEST_SKIP() << why_no_cuda();
    try {
      launch(Device::cuda(), "test", [](auto device) { fp8_check_device(device); });
    } catch (const Error& error) {
      GTEST_SKIP() << error.what();
    }
  }
};

/// All bf16, infinities and NaNs among them if wanted, in an order that mixes magnitudes.
Tensor every_bf16(int64_t rows, int64_t columns, bool finite) {
  std::vector<BFloat16> values(static_cast<size_t>(rows * columns));
  for (size_t i = 0; i < values.size(); ++i) {
    uint32_t bits = static_cast<uint32_t>(i * 40503u) & 0xffffu;
    if (finite && (bits & 0x7f80u) == 0x7f80u) bits &= 0x807fu;
    values[i].bits = static_cast<uint16_t>(bits);
  }
  return Tensor::from(values, {rows, columns});
}

struct Converted {
  Tensor y, transposed, stats;
};
/// @param offset  elements by which x lies off its allocation: whole packs cannot be loaded then
Converted convert(const Tensor& from, Device device, Fp8Format format, float scale, bool rows, bool columns,
                  int64_t offset = 0) {
  const Tensor memory = Tensor::zeros({from.numel() + offset}, DType::bf16, device);
  const Tensor x = memory.narrow(0, offset, from.numel()).reshape(from.shape());
  Tensor(x).copy_(from.to(device));
  const int64_t ld = (x.size(0) + 15) / 16 * 16;
  Converted out{Tensor::full(x.shape(), 0xee, DType::u8, device),
                Tensor::full({x.size(1), ld}, 0xee, DType::u8, device),
                Tensor::zeros({kFp8StatsWords}, DType::i64, device)};
  const Tensor both = Tensor::from(std::vector<float>{1 / scale, scale, 0, 0}, {4}, device);
  launch(device, "test", [&](auto on) {
    fp8_quantise(on, {.x = x.data<BFloat16>(),
                      .rows = x.size(0),
                      .columns = x.size(1),
                      .format = format,
                      .scale = reinterpret_cast<const Fp8Scale*>(both.raw()),
                      .y = rows ? out.y.data<uint8_t>() : nullptr,
                      .transposed = columns ? out.transposed.data<uint8_t>() : nullptr,
                      .transposed_ld = columns ? ld : 0,
                      .stats = reinterpret_cast<Fp8Stats*>(out.stats.raw())});
  });
  return {out.y.to(Device::cpu()), out.transposed.to(Device::cpu()), out.stats.to(Device::cpu())};
}

TEST_F(CudaFp8, ConversionTransposeAmaxAndCountsHaveTheCpusBits) {
  for (const auto& [rows, columns] :
       std::vector<std::pair<int64_t, int64_t>>{{256, 256}, {127, 144}, {1, 16}, {130, 80}}) {
    for (const Fp8Format format : {Fp8Format::kE4M3, Fp8Format::kE5M2}) {
      for (const float scale : {1.0f, 0x1p63f, 0x1p-9f}) {
        for (const int outputs : {1, 2, 3, 0}) {
          const Tensor x = every_bf16(rows, columns, outputs != 3);
          const int64_t offset = outputs == 2 ? 3 : 0;
          const Converted want = convert(x, Device::cpu(), format, scale, outputs & 1, outputs & 2, offset),
                          got = convert(x, Device::cuda(), format, scale, outputs & 1, outputs & 2, offset);
          const auto where = concat(rows, " x ", columns, ", scale ", scale, ", outputs ", outputs);
          EXPECT_TRUE(same_bits(got.y, want.y)) << where;
          EXPECT_TRUE(same_bits(got.transposed, want.transposed)) << where;
          EXPECT_EQ(got.stats.to_vector<int64_t>(), want.stats.to_vector<int64_t>()) << where;
        }
      }
    }
  }
}

TEST_F(CudaFp8, ScalesAndHistoriesHaveTheCpusBits) {
  const std::vector<std::string> names = {"a", "b", "c", "d"};
  optim::DelayedScaling cpu(names, Device::cpu()), cuda(names, Device::cuda());
  const RandomStream random(3, "amax");
  for (uint64_t step = 0; step < 40; ++step) {
    std::vector<int64_t> words;
    for (uint64_t i = 0; i < 12; ++i) {
      const float amax = std::exp2(random.uniform(step * 12 + i) * 200 - 120);
      const bool seen = random.below(1000 + step * 12 + i, 8) != 0;
      words.insert(words.end(), {seen ? std::bit_cast<int32_t>(amax) : 0, 0, seen ? 10 : 0});
    }
    for (optim::DelayedScaling* scaling : {&cpu, &cuda}) {
      for (size_t i = 0; i < names.size(); ++i) {
        const std::vector<int64_t> own(words.begin() + static_cast<std::ptrdiff_t>(9 * i),
                                       words.begin() + static_cast<std::ptrdiff_t>(9 * i + 9));
        Tensor(scaling->layer(i)->stats).copy_(Tensor::from(own, {3, 3}, scaling->layer(i)->stats.device()));
      }
      scaling->update();
    }
    const NamedTensors want = cpu.state(), got = cuda.state();
    for (size_t i = 0; i < want.size(); ++i)
      ASSERT_EQ(got[i].second.to_vector<double>(), want[i].second.to_vector<double>()) << want[i].first << step;
  }
}

TEST_F(CudaFp8, LinearIsTheCpusUpToTheOrderOfSums) {
  for (const std::vector<float>& history : {std::vector<float>{64, 128, 4096}, std::vector<float>()}) {
    for (const bool with_bias : {true, false}) {
      const auto run = [&](Device device) {
        const auto layer = make_layer(history, device);
        const Tensor x = testing::random({3, 7, 48}, DType::bf16, "x").to(device).requires_grad_(),
                     weight = testing::random({32, 48}, DType::bf16, "w").to(device).requires_grad_(),
                     bias = testing::random({32}, DType::bf16, "b").to(device).requires_grad_(),
                     gradient = testing::random({3, 7, 32}, DType::bf16, "g", -1e-2, 1e-2).to(device);
        std::vector<Tensor> out;
        for (int pass = 0; pass < 2; ++pass) {  // the second adds to the gradients
          const Tensor y = linear_fp8(x, weight, with_bias ? bias : Tensor(), layer);
          y.backward(gradient);
          out.push_back(y.detach());
        }
        out.insert(out.end(), {x.grad(), weight.grad(), layer->stats});
        if (with_bias) out.push_back(bias.grad());
        for (Tensor& tensor : out) tensor = tensor.to(Device::cpu());
        return out;
      };
      const std::vector<Tensor> want = run(Device::cpu()), got = run(Device::cuda());
      ASSERT_EQ(want.size(), got.size());
      for (size_t i = 0; i < want.size(); ++i) {
        // Where sums differ in their last bit, rounding to bf16 may go the other way.
        EXPECT_LE(testing::distance(got[i], want[i].to_vector<double>()), 0x1p-8) << i;
      }
      EXPECT_TRUE(same_bits(got[4], want[4])) << "amaxes and counts";
    }
  }
}

TEST_F(CudaFp8, ABatchWithoutRowsGivesAZeroGradient) {
  const auto layer = make_layer({}, Device::cuda());
  const Tensor x = Tensor::empty({0, 48}, DType::bf16, Device::cuda()).requires_grad_(),
               weight = Tensor::ones({32, 48}, DType::bf16, Device::cuda()).requires_grad_();
  linear_fp8(x, weight, {}, layer).backward(Tensor::empty({0, 32}, DType::bf16, Device::cuda()));
  for (const double value : weight.grad().to_vector<double>()) ASSERT_EQ(value, 0);
}

// ---- training ----

struct Small {
  static constexpr int64_t kVocab = 37;
  models::Gpt gpt;
  optim::Adam adam;
  text::Loader loader;
  models::Trainer trainer;
  int64_t saturated = 0, converted = 0;

  static std::shared_ptr<text::TokenVector> tokens() {
    const RandomStream stream(5, "tokens");
    std::vector<int32_t> all(500);
    for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int32_t>(stream.below(i, kVocab));
    return std::make_shared<text::TokenVector>(std::move(all), kVocab);
  }
  explicit Small(Device device, bool recompute = false, int64_t step = 0)
      : gpt({.layers = 2,
             .heads = 2,
             .width = 32,
             .context = 8,
             .vocab = kVocab,
             .dropout = 0.1,
             .recompute = recompute},
            device, 1, DType::bf16),
        adam(gpt.parameters(), {.clip_norm = 1.0}),
        loader(tokens(), {.batch = 2, .context = 8, .seed = 2}),
        trainer(gpt, adam, loader, {.peak = 1e-3, .warmup = 2, .total = 100}, 2, step) {
    trainer.scale_fp8(gpt.use_fp8());
  }
  std::vector<double> losses(int steps) {
    std::vector<double> out;
    for (int i = 0; i < steps; ++i) {
      const models::StepMetrics m = trainer.step();
      saturated += m.fp8.saturated, converted += m.fp8.converted;
      out.push_back(m.loss);
    }
    return out;
  }
  std::vector<std::vector<double>> state() {
    std::vector<std::vector<double>> out;
    for (const NamedTensors& part : {gpt.named_tensors(), adam.state(), trainer.fp8()->state()}) {
      for (const auto& [name, tensor] : part) out.push_back(tensor.to_vector<double>());
    }
    return out;
  }
};

NamedTensors on_the_cpu(const NamedTensors& tensors) {
  NamedTensors copy;
  for (const auto& [name, tensor] : tensors) copy.emplace_back(name, tensor.detach().clone().to(Device::cpu()));
  return copy;
}

TEST_F(CudaFp8, TrainingFollowsTheCpu) {
  Small cpu(Device::cpu()), cuda(Device::cuda());
  const std::vector<double> want = cpu.losses(4), got = cuda.losses(4);
  // Sums in another order move single bf16 and 8-bit roundings: 2^-4 of an element, averaged over thousands.
  EXPECT_LE(models::worst(got, want), 5e-3);
  EXPECT_EQ(cpu.converted, cuda.converted);
}

TEST_F(CudaFp8, TwoRunsAndRecomputationHaveTheSameBits) {
  Small one(Device::cuda()), again(Device::cuda()), saving(Device::cuda(), true);
  const std::vector<double> want = one.losses(4);
  EXPECT_EQ(want, again.losses(4));
  EXPECT_EQ(one.state(), again.state());
  EXPECT_EQ(want, saving.losses(4));
  EXPECT_EQ(one.state(), saving.state());
  EXPECT_EQ(one.saturated, saving.saturated);
  EXPECT_EQ(one.converted, saving.converted);
}

TEST_F(CudaFp8, AResumedRunHasTheBitsOfTheStraightOne) {
  Small straight(Device::cuda());
  straight.losses(3);
  Small again(Device::cuda(), false, 3);
  again.gpt.load(on_the_cpu(straight.gpt.named_tensors()));
  again.adam.load_state(on_the_cpu(straight.adam.state()));
  again.trainer.fp8()->load_state(on_the_cpu(straight.trainer.fp8()->state()));
  again.loader.seek(straight.loader.position());
  EXPECT_EQ(straight.losses(3), again.losses(3));
  EXPECT_EQ(straight.state(), again.state());
}

TEST_F(CudaFp8, NothingIsTakenFromTheSystemAfterTheSecondStep) {
  Small run(Device::cuda());
  run.losses(2);
  const int64_t before = allocator(Device::cuda()).statistics().system_allocations;
  run.losses(4);
  EXPECT_EQ(allocator(Device::cuda()).statistics().system_allocations, before);
}

}  // namespace
}  // namespace weft
