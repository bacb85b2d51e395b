// Recomputation and offloading of a GPT on a CUDA device: the same bits in every combination, with less memory on the
// device by the amount that a formula gives. Runs on a real device and on the emulated one.
#include <gtest/gtest.h>

#include "models/gpt_checkpoint.h"
#include "ops/elementwise.h"
#include "ops/matmul.h"
#include "ops/reduce.h"
#include "tests/error_of.h"
#include "tests/lateness.h"
#include "tests/memory_run.h"

namespace weft::models {
namespace {

using Options = MemoryRun::Options;

class CudaMemory : public ::testing::Test {
 protected:
  void SetUp() override {
    if (*why_no_cuda() != '\0') GTEST_SKIP() << why_no_cuda();
  }
};

constexpr Recompute kParts = {.norm = true, .activation = true, .attention = true};
constexpr Recompute kAll = {.block = true, .norm = true, .activation = true, .attention = true};

TEST_F(CudaMemory, EverySaverAndEveryCombinationGivesTheSameBits) {
  constexpr Recompute kNone = {}, kBlock = {.block = true};
  struct Case {
    Recompute recompute;
    bool activations, optimizer;
  };
  for (const DType dtype : {DType::f32, DType::bf16}) {
    MemoryRun want(Device::cuda(), {.dtype = dtype, .layers = 4});
    const auto gradients = want.gradients();
    const std::vector<double> losses = want.losses(2);
    const auto state = want.state();
    testing::for_each_lateness([&](const char* late) {
      for (const auto& [recompute, activations, optimizer] : {Case{kNone, true, false},
                                                              {kNone, false, true},
                                                              {kParts, true, true},
                                                              {kBlock, true, true},
                                                              {kAll, true, true}}) {
        MemoryRun got(Device::cuda(), {.dtype = dtype,
                                       .recompute = recompute,
                                       .offload_activations = activations,
                                       .offload_optimizer = optimizer,
                                       .layers = 4});
        const std::string what = concat(dtype, ", recomputed: ", name(recompute), activations ? ", activations" : "",
                                        optimizer ? ", optimizer" : "", ", late: ", late);
        EXPECT_EQ(got.gradients(), gradients) << what;
        EXPECT_EQ(got.losses(2), losses) << what;
        EXPECT_EQ(got.state(), state) << what;
      }
    });
  }
}

TEST_F(CudaMemory, SelectiveRecomputationGivesTheSameBits) {
  MemoryRun want(Device::cuda(), {.layers = 1});
  const auto gradients = want.gradients();
  const std::vector<double> losses = want.losses(2);
  for (const Recompute& recompute : all_recomputations()) {
    MemoryRun got(Device::cuda(), {.recompute = recompute, .layers = 1});
    EXPECT_EQ(got.gradients(), gradients) << name(recompute);
    EXPECT_EQ(got.losses(2), losses) << name(recompute);
    EXPECT_EQ(got.state(), want.state()) << name(recompute);
  }
}

TEST_F(CudaMemory, AnOffloadedStateOfLambGivesTheSameBits) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    MemoryRun want(Device::cuda(), {.dtype = dtype, .trust_ratio = true, .layers = 2});
    want.losses(3);
    testing::for_each_lateness([&](const char* late) {
      MemoryRun got(Device::cuda(), {.dtype = dtype, .offload_optimizer = true, .trust_ratio = true, .layers = 2});
      got.losses(3);
      EXPECT_EQ(got.state(), want.state()) << dtype << ", late: " << late;
    });
  }
}

TEST_F(CudaMemory, ARunGoesOnWithOrWithoutOffloading) {
  for (const bool first : {false, true}) {
    const auto options = [](bool offload) {
      return Options{.dtype = DType::bf16, .offload_activations = offload, .offload_optimizer = offload, .layers = 3};
    };
    MemoryRun straight(Device::cuda(), options(first));
    straight.losses(2);
    NamedTensors model, optimizer;
    for (const auto& [name, tensor] : straight.gpt.named_tensors())
      model.emplace_back(name, tensor.detach().clone().to(Device::cpu()));
    for (const auto& [name, tensor] : straight.adam.state())
      optimizer.emplace_back(name, tensor.detach().clone().to(Device::cpu()));
    MemoryRun again(Device::cuda(), options(!first), 2);
    again.gpt.load(model);
    again.adam.load_state(optimizer);
    again.loader.seek(straight.loader.position());
    EXPECT_EQ(straight.losses(2), again.losses(2));
    EXPECT_EQ(straight.state(), again.state());
  }
}

/// B T C in bytes of f32.
constexpr int64_t kUnit = MemoryRun::kBatch * MemoryRun::kContext * MemoryRun::kWidth * 4;

struct Bytes {
  int64_t on_device = 0, on_host = 0;  // after a forward pass
  int64_t peak_on_device = 0, peak_on_host = 0;
  bool operator==(const Bytes&) const = default;
};

Bytes activations_with(const Options& options) {
  const MemoryRun run(Device::cuda(), options);
  Allocator &device = allocator(Device::cuda()), &host = pinned_allocator(Device::cuda());
  device.reset_peak();
  host.reset_peak();
  const int64_t device_before = activations(device).current, host_before = activations(host).current;
  Bytes bytes;
  const Tensor loss = run.loss();
  bytes.on_device = activations(device).current - device_before;
  bytes.on_host = activations(host).current - host_before;
  loss.backward();
  bytes.peak_on_device = activations(device).peak - device_before;
  bytes.peak_on_host = activations(host).peak - host_before;
  return bytes;
}

TEST_F(CudaMemory, OffloadedActivationsLeaveTheDeviceByTheFormula) {
  // Of a block: two sums and their norms, qkv, attention's output, and before and behind GELU four each.
  constexpr int64_t kBlock = (2 + 2 + 3 + 1 + 4 + 4) * kUnit, kSmallBlock = (2 + 3 + 4) * kUnit;
  for (const int64_t layers : {2, 3, 7}) {
    const Bytes plain = activations_with({.layers = layers, .dropout = 0});
    const Bytes away = activations_with({.offload_activations = true, .layers = layers, .dropout = 0});
    EXPECT_EQ(away.on_host, (layers - 2) * kBlock);
    EXPECT_EQ(plain.on_device - away.on_device, (layers - 2) * kBlock);
    EXPECT_EQ(away.peak_on_host, away.on_host);
    const Bytes both =
        activations_with({.recompute = kParts, .offload_activations = true, .layers = layers, .dropout = 0});
    EXPECT_EQ(both.on_host, (layers - 2) * kSmallBlock);
    const Bytes block =
        activations_with({.recompute = {.block = true}, .offload_activations = true, .layers = layers, .dropout = 0});
    EXPECT_EQ(block.on_host, layers == 2 ? 0 : (2 * (layers - 2) - 1) * kUnit) << "the first block has one input";
  }
}

TEST_F(CudaMemory, ThePeakOfOffloadedActivationsDoesNotGrowWithTheLayers) {
  const auto peak = [](int64_t layers, bool offload) {
    return activations_with({.offload_activations = offload, .layers = layers}).peak_on_device;
  };
  // Statistics of rows stay, mean and deviation of two norms and attention's: a block of 256 bytes each.
  static_assert(MemoryRun::kBatch * 2 * MemoryRun::kContext * 4 <= 256);
  const int64_t small = 5 * 256;
  EXPECT_EQ(peak(9, true) - peak(6, true), 3 * small);
  EXPECT_GT(peak(9, false) - peak(6, false), 3 * 15 * kUnit);
}

TEST_F(CudaMemory, AnOffloadedStateLeavesTheDeviceWhole) {
  const auto state = [](const Allocator& memory) {
    return memory.statistics().categories[static_cast<size_t>(MemoryCategory::optimizer)].current;
  };
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const int64_t device = state(allocator(Device::cuda())), host = state(pinned_allocator(Device::cuda()));
    const MemoryRun run(Device::cuda(), {.dtype = dtype, .offload_optimizer = true});
    EXPECT_EQ(state(allocator(Device::cuda())), device);
    // Two moments, and for bf16 masters; each tensor begins at a multiple of 64 bytes.
    int64_t elements = 0;
    for (const Parameter& parameter : run.gpt.parameters()) elements += (parameter.tensor.numel() + 15) / 16 * 16;
    EXPECT_EQ(state(pinned_allocator(Device::cuda())) - host, (dtype == DType::bf16 ? 12 : 8) * elements);
  }
}

TEST_F(CudaMemory, ADryRunCountsTheSameBytes) {
  const auto step = [](const Options& options) {
    MemoryRun run(Device::cuda(), options);
    Allocator &device = allocator(Device::cuda()), &host = pinned_allocator(Device::cuda());
    device.reset_peak();
    host.reset_peak();
    const int64_t device_before = device.statistics().total.current, host_before = host.statistics().total.current;
    run.losses(2);
    return std::pair(device.statistics().total.peak - device_before, host.statistics().total.peak - host_before);
  };
  for (const Recompute& recompute : {Recompute{}, kParts, kAll}) {
    for (const bool lamb : {false, true}) {
      const Options options{
          .recompute = recompute, .offload_activations = true, .offload_optimizer = true, .trust_ratio = lamb};
      const auto real = step(options);
      const DryRun dry;
      EXPECT_EQ(step(options), real) << name(recompute) << lamb;
    }
  }
}

TEST_F(CudaMemory, NothingIsTakenFromTheSystemAfterTheSecondStep) {
  MemoryRun run(Device::cuda(), {.recompute = kParts, .offload_activations = true, .offload_optimizer = true});
  run.losses(2);
  const auto taken = [] {
    return allocator(Device::cuda()).statistics().system_allocations +
           pinned_allocator(Device::cuda()).statistics().system_allocations;
  };
  const int64_t before = taken();
  run.losses(4);
  EXPECT_EQ(taken(), before);
}

TEST_F(CudaMemory, AGraphThatIsDroppedOrUsedTwiceLeavesMemoryThatCanBeUsed) {
  const MemoryRun plain(Device::cuda(), {});
  const auto want = plain.gradients();
  testing::for_each_lateness([&](const char* late) {
    const MemoryRun run(Device::cuda(), {.offload_activations = true});
    const int64_t before = activations(pinned_allocator(Device::cuda())).current;
    run.loss();
    EXPECT_EQ(activations(pinned_allocator(Device::cuda())).current, before);
    // Only the last block's rules run: what was sent for on the way is dropped with the graph.
    autograd::gradients({run.loss()}, {run.gpt.parameters()[2 + 4 * 12].tensor});
    EXPECT_EQ(run.gradients(), want) << late;
    const Tensor loss = run.loss();
    loss.backward({}, true);
    for (const Parameter& parameter : run.gpt.parameters()) parameter.tensor.clear_grad();
    loss.backward();
    for (size_t i = 0; i < want.size(); ++i)
      EXPECT_EQ(run.gpt.parameters()[i].tensor.grad().to_vector<double>(), want[i]) << late;
  });
}

TEST_F(CudaMemory, AChangeInPlaceOfWhatWasOffloadedIsAnError) {
  for (const bool moves : {false, true}) {
    const Tensor x = Tensor::full({64, 32}, 0.5, DType::f32, Device::cuda());
    const Tensor w = Tensor::full({8, 32}, 0.25, DType::f32, Device::cuda()).requires_grad_();
    autograd::Offload offload(1);
    Tensor loss, changed = x.clone();
    {
      const autograd::Offload::Group group(offload, moves);
      loss = sum(linear(changed, w, {}));
    }
    changed.fill_(2);
    if (moves) {
      const autograd::Offload::Group second(offload, false), third(offload, false);
      changed = Tensor();  // the change is known although the tensor is gone
    }
    EXPECT_ERROR(ErrorKind::kState, "[offload] the backward pass needs a tensor (of 8,192 bytes) that [fill_] changed",
                 loss.backward());
  }
}

TEST_F(CudaMemory, EvaluationOffloadsNothing) {
  MemoryRun run(Device::cuda(), {.offload_activations = true});
  const auto peak = [] { return pinned_allocator(Device::cuda()).statistics().total.peak; };
  pinned_allocator(Device::cuda()).reset_peak();
  const int64_t before = peak();
  const autograd::NoGrad no_grad;
  run.loss().item();
  EXPECT_EQ(peak(), before);
}

}  // namespace
}  // namespace weft::models
