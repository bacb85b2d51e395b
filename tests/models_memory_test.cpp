// Recomputation of a GPT on the CPU: the same bits with less memory, by the amount that a formula gives.
#include <gtest/gtest.h>

#include "tests/error_of.h"
#include "tests/memory_run.h"

namespace weft::models {
namespace {

using Options = MemoryRun::Options;

TEST(Recomputation, OfAnyPartsGivesTheSameBitsInEveryPrecision) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16, DType::f64}) {
    const Options plain{.dtype = dtype, .layers = 2};
    MemoryRun want(Device::cpu(), plain);
    const auto gradients = want.gradients();
    const std::vector<double> losses = want.losses(3);
    const auto state = want.state();
    for (const Recompute& recompute : all_recomputations()) {
      Options options = plain;
      options.recompute = recompute;
      MemoryRun got(Device::cpu(), options);
      EXPECT_EQ(got.gradients(), gradients) << dtype << ' ' << name(recompute);
      EXPECT_EQ(got.losses(3), losses) << dtype << ' ' << name(recompute);
      EXPECT_EQ(got.state(), state) << dtype << ' ' << name(recompute);
    }
  }
}

/// What a forward pass leaves for its backward pass, and the most that both need, of activations.
struct Saved {
  int64_t after_forward = 0, peak = 0;
  bool operator==(const Saved&) const = default;
};

Saved saved_with(const Recompute& recompute, int64_t layers) {
  Options options{.recompute = recompute, .layers = layers};
  const MemoryRun run(Device::cpu(), options);
  Allocator& memory = allocator(Device::cpu());
  memory.reset_peak();
  const int64_t before = activations(memory).current;
  Saved saved;
  const Tensor loss = run.loss();
  saved.after_forward = activations(memory).current - before;
  loss.backward();
  saved.peak = activations(memory).peak - before;
  return saved;
}

/// B T C in bytes of f32.
constexpr int64_t kUnit = MemoryRun::kBatch * MemoryRun::kContext * MemoryRun::kWidth * 4;

TEST(Recomputation, SavesWhatTheFormulaSays) {
  constexpr int64_t kLayers = 6;
  const Saved plain = saved_with({}, kLayers);
  for (const Recompute& r : all_recomputations()) {
    if (r.block) continue;
    // Norms: two a block and the last, which the loss reads. GELU is four wide.
    const int64_t units =
        (r.norm ? 2 * kLayers + 1 : 0) + (r.activation ? 4 * kLayers : 0) + (r.attention ? kLayers : 0);
    const Saved saved = saved_with(r, kLayers);
    EXPECT_EQ(plain.after_forward - saved.after_forward, units * kUnit) << name(r);
    // The peak is in the last block's backward pass, when the last norm's output is gone already. What is made again
    // comes on top while a rule uses it: GELU's output at most.
    EXPECT_LE(saved.peak, plain.peak - (units - (r.norm ? 1 : 0)) * kUnit + 4 * kUnit) << name(r);
  }
}

TEST(Recomputation, OfABlockLeavesItsTwoInputs) {
  const auto blocks = [](int64_t layers) { return saved_with({.block = true}, layers).after_forward; };
  EXPECT_EQ(blocks(6) - blocks(5), 2 * kUnit) << "the residual stream and the branch that is yet to be added to it";
}

TEST(Recomputation, OfPartsLowersThePeakOfTheBlockThatIsComputedAgain) {
  const Saved block = saved_with({.block = true}, 3);
  const Saved both = saved_with({.block = true, .norm = true, .activation = true, .attention = true}, 3);
  EXPECT_EQ(both.after_forward, block.after_forward - kUnit) << "the norm that the loss reads";
  EXPECT_EQ(both.peak, block.peak - (2 + 4 + 1 - 4) * kUnit) << "norms, GELU and attention, but GELU while it is used";
}

TEST(Recomputation, ADryRunCountsTheSameBytes) {
  for (const Recompute& recompute : all_recomputations()) {
    const Saved real = saved_with(recompute, 3);
    const DryRun dry;
    EXPECT_EQ(saved_with(recompute, 3), real) << name(recompute);
  }
}

TEST(Recomputation, TakesNothingFromTheSystemAfterTheSecondStep) {
  MemoryRun run(Device::cpu(), {.recompute = {.norm = true, .activation = true, .attention = true}});
  run.losses(2);
  const int64_t before = allocator(Device::cpu()).statistics().system_allocations;
  run.losses(4);
  EXPECT_EQ(allocator(Device::cpu()).statistics().system_allocations, before);
}

TEST(Offloading, OnACpuIsAnErrorThatSaysWhy) {
  EXPECT_ERROR(ErrorKind::kValue, "the memory is the host's already",
               MemoryRun(Device::cpu(), {.offload_activations = true}));
  EXPECT_ERROR(ErrorKind::kDevice, "the memory is the host's already",
               MemoryRun(Device::cpu(), {.offload_optimizer = true}));
}

}  // namespace
}  // namespace weft::models
