#include "core/memory.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "core/autograd.h"
#include "core/tensor.h"
#include "tests/error_of.h"

namespace weft {
namespace {

constexpr int64_t kMiB = 1 << 20;

MemoryStatistics::Use use(const Allocator& allocator, MemoryCategory category) {
  return allocator.statistics().categories[static_cast<size_t>(category)];
}

TEST(Memory, BlocksAreAlignedAndHoldWhatIsWritten) {
  Allocator memory(Device::cpu(), false);
  std::vector<char*> blocks;
  for (size_t bytes = 1; bytes <= 3000; bytes += 37) {
    auto* block = static_cast<char*>(memory.allocate(bytes, MemoryCategory::data));
    EXPECT_EQ(reinterpret_cast<uintptr_t>(block) % 64, 0u);
    std::memset(block, 0x5a, bytes);
    blocks.push_back(block);
  }
  for (char* block : blocks) memory.free(block);
  EXPECT_EQ(memory.statistics().total.current, 0);
}

TEST(Memory, NothingIsTakenForNoBytes) {
  Allocator memory(Device::cpu(), false);
  EXPECT_EQ(memory.allocate(0, MemoryCategory::data), nullptr);
  memory.free(nullptr);
  memory.recount(nullptr, MemoryCategory::data);
  EXPECT_EQ(memory.statistics().system_allocations, 0);
}

TEST(Memory, IsCountedByCategoryInWholeBlocksOf64Bytes) {
  Allocator memory(Device::cpu(), false);
  void* weights = memory.allocate(1000, MemoryCategory::parameters);
  void* work = memory.allocate(64, MemoryCategory::workspace);
  EXPECT_EQ(use(memory, MemoryCategory::parameters).current, 1024);
  EXPECT_EQ(use(memory, MemoryCategory::workspace).current, 64);
  EXPECT_EQ(use(memory, MemoryCategory::gradients).current, 0);
  EXPECT_EQ(memory.statistics().total.current, 1088);
  memory.free(work);
  EXPECT_EQ(use(memory, MemoryCategory::workspace).current, 0);
  EXPECT_EQ(use(memory, MemoryCategory::workspace).peak, 64);
  memory.free(weights);
}

TEST(Memory, PeaksAreKeptByCategoryAndAtTheMomentOfTheTotalOne) {
  Allocator memory(Device::cpu(), false);
  void* work = memory.allocate(10 * kMiB, MemoryCategory::workspace);  // the category's own peak
  memory.free(work);
  void* weights = memory.allocate(8 * kMiB, MemoryCategory::parameters);
  work = memory.allocate(5 * kMiB, MemoryCategory::workspace);  // the total's
  memory.free(work);
  const MemoryStatistics statistics = memory.statistics();
  EXPECT_EQ(statistics.total.current, 8 * kMiB);
  EXPECT_EQ(statistics.total.peak, 13 * kMiB);
  EXPECT_EQ(statistics.total.at_peak, 13 * kMiB);
  EXPECT_EQ(use(memory, MemoryCategory::workspace).peak, 10 * kMiB);
  EXPECT_EQ(use(memory, MemoryCategory::workspace).at_peak, 5 * kMiB);
  EXPECT_EQ(use(memory, MemoryCategory::parameters).at_peak, 8 * kMiB);
  memory.reset_peak();
  EXPECT_EQ(memory.statistics().total.peak, 8 * kMiB);
  EXPECT_EQ(use(memory, MemoryCategory::workspace).peak, 0);
  EXPECT_EQ(use(memory, MemoryCategory::parameters).at_peak, 8 * kMiB);
  memory.free(weights);
}

TEST(Memory, CanBeCountedUnderAnotherCategoryLater) {
  Allocator memory(Device::cpu(), false);
  void* block = memory.allocate(640, MemoryCategory::activations);
  memory.recount(block, MemoryCategory::gradients);
  EXPECT_EQ(use(memory, MemoryCategory::activations).current, 0);
  EXPECT_EQ(use(memory, MemoryCategory::gradients).current, 640);
  EXPECT_EQ(memory.statistics().total.peak, 640);
  memory.free(block);
  EXPECT_EQ(use(memory, MemoryCategory::gradients).current, 0);
}

TEST(Memory, ScopeNestsAndIsPerThread) {
  EXPECT_EQ(MemoryScope::current(), MemoryCategory::activations);
  const MemoryScope outer(MemoryCategory::parameters);
  {
    const MemoryScope inner(MemoryCategory::optimizer);
    EXPECT_EQ(MemoryScope::current(), MemoryCategory::optimizer);
    std::thread([] { EXPECT_EQ(MemoryScope::current(), MemoryCategory::activations); }).join();
  }
  EXPECT_EQ(MemoryScope::current(), MemoryCategory::parameters);
}

TEST(Memory, TensorsAreCountedUnderTheScopeInWhichTheyWereMade) {
  const int64_t before = use(allocator(Device::cpu()), MemoryCategory::communication).current;
  Tensor tensor;
  {
    const MemoryScope scope(MemoryCategory::communication);
    tensor = Tensor::empty({100});
  }
  EXPECT_EQ(use(allocator(Device::cpu()), MemoryCategory::communication).current, before + 448);
  const Tensor view = tensor.slice(0, 5, 10);
  tensor = Tensor();
  EXPECT_EQ(use(allocator(Device::cpu()), MemoryCategory::communication).current, before + 448)
      << "a view keeps all of it";
}

TEST(Memory, GivenBackMemoryIsUsedAgain) {
  Allocator memory(Device::cpu(), false);
  void* first = memory.allocate(3 * kMiB, MemoryCategory::data);
  memory.free(first);
  EXPECT_EQ(memory.allocate(3 * kMiB, MemoryCategory::data), first);
  memory.free(first);
  EXPECT_EQ(memory.statistics().system_allocations, 1);
}

TEST(Memory, NeighboursAreJoinedInWhateverOrderTheyComeBack) {
  std::vector<int> order = {0, 1, 2, 3};
  do {
    Allocator memory(Device::cpu(), false);
    std::vector<void*> blocks;
    for (int i = 0; i < 4; ++i) blocks.push_back(memory.allocate(8 * kMiB, MemoryCategory::data));
    ASSERT_EQ(memory.statistics().system_allocations, 1) << "four quarters of one segment";
    for (const int i : order) memory.free(blocks[static_cast<size_t>(i)]);
    void* whole = memory.allocate(32 * kMiB, MemoryCategory::data);
    EXPECT_EQ(memory.statistics().system_allocations, 1);
    memory.free(whole);
  } while (std::next_permutation(order.begin(), order.end()));
}

TEST(Memory, CachedMemoryGoesBackWhenAsked) {
  Allocator memory(Device::cpu(), false);
  void* kept = memory.allocate(kMiB, MemoryCategory::data);
  void* own = memory.allocate(100 * kMiB, MemoryCategory::data);
  memory.free(own);
  const int64_t reserved = memory.statistics().reserved;
  memory.release_cached();
  EXPECT_EQ(memory.statistics().reserved, reserved - 100 * kMiB) << "a segment of which a part is in use stays";
  memory.free(kept);
  memory.release_cached();
  EXPECT_EQ(memory.statistics().reserved, 0);
}

TEST(ReplayMemory, CountsWhatOthersHoldOfItAndNothingElse) {
  Allocator memory(Device::cpu(), false);
  void* before = memory.allocate(kMiB, MemoryCategory::parameters);
  const std::unique_ptr<ReplayMemory> replay = memory.record();
  void* temporary = memory.allocate(2 * kMiB, MemoryCategory::activations);
  void* kept = memory.allocate(kMiB, MemoryCategory::gradients);
  memory.free(temporary);
  replay->stop();
  EXPECT_EQ(replay->bytes(), 3 * kMiB);
  EXPECT_EQ(replay->taken(), 0) << "what the recorded work keeps itself is its own";

  void* in_it = memory.allocate(2 * kMiB, MemoryCategory::activations);
  ASSERT_EQ(in_it, temporary) << "others may use it in between";
  EXPECT_EQ(replay->taken(), 2 * kMiB);
  void* beside = memory.allocate(kMiB, MemoryCategory::activations);
  EXPECT_EQ(replay->taken(), 2 * kMiB) << "that one lies elsewhere";
  memory.free(in_it);
  EXPECT_EQ(replay->taken(), 0);
  for (void* data : {before, kept, beside}) memory.free(data);
  EXPECT_EQ(replay->taken(), 0);
}

TEST(ReplayMemory, StaysReservedWhileItLives) {
  Allocator memory(Device::cpu(), false);
  memory.free(memory.allocate(40 * kMiB, MemoryCategory::data));
  std::unique_ptr<ReplayMemory> replay = memory.record();
  memory.free(memory.allocate(100 * kMiB, MemoryCategory::activations));
  memory.release_cached();
  EXPECT_EQ(memory.statistics().reserved, 140 * kMiB) << "nothing goes back during a recording";
  replay->stop();
  memory.release_cached();
  EXPECT_EQ(memory.statistics().reserved, 100 * kMiB) << "only what the recording did not use";
  replay.reset();
  memory.release_cached();
  EXPECT_EQ(memory.statistics().reserved, 0);
}

TEST(Memory, BlocksOfOtherDevicesAreAlignedForEveryKernel) {
  Allocator memory(Device::cuda(), true);
  std::vector<void*> blocks;
  for (size_t bytes = 1; bytes <= 3000; bytes += 37) {
    blocks.push_back(memory.allocate(bytes, MemoryCategory::data));
    EXPECT_EQ(reinterpret_cast<uintptr_t>(blocks.back()) % 256, 0u);
  }
  for (void* block : blocks) memory.free(block);
}

/// Random allocations and frees; whoever overlapped another would find its pattern broken.
void stress(Allocator& memory, unsigned seed, int rounds) {
  std::mt19937 random(seed);
  struct Block {
    size_t bytes;
    unsigned char mark;
  };
  std::map<char*, Block> held;
  const auto release = [&](std::map<char*, Block>::iterator it) {
    const auto& [data, block] = *it;
    // Both ends and a stride inside: a neighbour's write shows there.
    for (size_t i = 0; i < block.bytes; i += 61) ASSERT_EQ(static_cast<unsigned char>(data[i]), block.mark);
    ASSERT_EQ(static_cast<unsigned char>(data[block.bytes - 1]), block.mark);
    memory.free(data);
    held.erase(it);
  };
  for (int round = 0; round < rounds; ++round) {
    if (held.empty() || random() % 5 < 3) {
      const size_t limit =
          size_t{1} << (4 + random() % 18);  // 16 bytes to 2 MiB, so that both kinds of segments are used
      const size_t bytes = 1 + random() % limit;
      char* data =
          static_cast<char*>(memory.allocate(bytes, static_cast<MemoryCategory>(random() % kMemoryCategories)));
      const auto after = held.lower_bound(data);
      if (after != held.end()) {
        ASSERT_LE(data + bytes, after->first);
      }
      if (after != held.begin()) {
        const auto before = std::prev(after);
        ASSERT_LE(before->first + before->second.bytes, data);
      }
      const auto mark = static_cast<unsigned char>(random());
      std::memset(data, mark, bytes);
      held[data] = {bytes, mark};
    } else {
      release(std::next(held.begin(), static_cast<int64_t>(random() % held.size())));
    }
    if (held.size() > 150) {
      while (held.size() > 20) release(held.begin());
    }
  }
  while (!held.empty()) release(held.begin());
}

TEST(Memory, RandomSizesAreSplitAndJoinedWithoutOverlap) {
  Allocator memory(Device::cpu(), false);
  stress(memory, 1, 6000);
  const MemoryStatistics statistics = memory.statistics();
  EXPECT_EQ(statistics.total.current, 0);
  for (const auto& each : statistics.categories) EXPECT_EQ(each.current, 0);
  memory.release_cached();
  EXPECT_EQ(memory.statistics().reserved, 0) << "every segment must have been joined whole again";
}

TEST(Memory, ManyThreadsShareAnAllocator) {
  Allocator memory(Device::cpu(), false);
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 4; ++t) threads.emplace_back([&, t] { stress(memory, t, 1500); });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(memory.statistics().total.current, 0);
  memory.release_cached();
  EXPECT_EQ(memory.statistics().reserved, 0);
}

/// A training step in miniature, of what core has: parameters that live on, activations of several sizes, gradients,
/// temporaries. Answers with what the step left behind.
std::vector<Tensor> step(const std::vector<Tensor>& weights) {
  std::vector<Tensor> pieces;
  for (const Tensor& weight : weights) {
    const Tensor narrow = weight.to(DType::bf16).to(DType::f32);
    pieces.push_back(cat({narrow.clone(), weight.transpose(0, 1).reshape(weight.shape())}, 0));
  }
  const Tensor joined = cat(pieces, 0);
  const Tensor scaled = joined.expand({2, joined.size(0), joined.size(1)}).contiguous();
  autograd::backward({scaled}, {Tensor::ones(scaled.shape())});
  return {scaled.detach()};
}

std::vector<Tensor> make_weights(int count, int64_t width) {
  const MemoryScope scope(MemoryCategory::parameters);
  std::vector<Tensor> weights;
  for (int i = 0; i < count; ++i) {
    Tensor weight = Tensor::full({width * (1 + i % 3), width}, i + 1);
    weights.push_back(weight.requires_grad_());
  }
  return weights;
}

TEST(Memory, ARepeatedStepTakesNothingFromTheSystem) {
  Allocator& memory = allocator(Device::cpu());
  memory.release_cached();
  const std::vector<Tensor> weights = make_weights(9, 250);
  std::vector<int64_t> asked;
  for (int i = 0; i < 6; ++i) {
    step(weights);
    for (const Tensor& weight : weights) weight.clear_grad();
    asked.push_back(memory.statistics().system_allocations);
  }
  EXPECT_GT(asked[0], 0);
  for (size_t i = 1; i < asked.size(); ++i) EXPECT_EQ(asked[i], asked[1]) << "step " << i;
  EXPECT_EQ(asked[1], asked[0]) << "the second step frees and asks in the order of the first";
}

TEST(Memory, GradientsThatStayAreCountedAsGradients) {
  Allocator& memory = allocator(Device::cpu());
  const std::vector<Tensor> weights = make_weights(4, 64);
  const int64_t before = use(memory, MemoryCategory::gradients).current;
  int64_t bytes = 0;
  for (const Tensor& weight : weights) bytes += weight.numel() * 4;
  step(weights);
  EXPECT_EQ(use(memory, MemoryCategory::gradients).current, before + bytes);
  step(weights);
  EXPECT_EQ(use(memory, MemoryCategory::gradients).current, before + bytes) << "added where they are";
}

/// Current and peak bytes that `run` adds to the device's allocator; `run` returns what stays.
MemoryStatistics counted(const std::function<std::vector<Tensor>()>& run) {
  Allocator& memory = allocator(Device::cpu());
  memory.reset_peak();
  const MemoryStatistics before = memory.statistics();
  const std::vector<Tensor> kept = run();
  MemoryStatistics after = memory.statistics();
  for (size_t i = 0; i <= after.categories.size(); ++i) {
    auto& use = i < after.categories.size() ? after.categories[i] : after.total;
    const auto& base = i < after.categories.size() ? before.categories[i] : before.total;
    use.current -= base.current, use.peak -= base.current, use.at_peak -= base.current;
  }
  return after;
}

std::vector<Tensor> whole_run() {
  std::vector<Tensor> kept = make_weights(5, 100);
  for (int i = 0; i < 3; ++i) step(kept);
  return kept;
}

TEST(DryRun, CountsTheSameAsARealRun) {
  const MemoryStatistics real = counted(whole_run);
  MemoryStatistics dry;
  {
    const DryRun scope;
    dry = counted(whole_run);
  }
  EXPECT_GT(real.total.peak, 0);
  EXPECT_EQ(dry.total.current, real.total.current);
  EXPECT_EQ(dry.total.peak, real.total.peak);
  for (int i = 0; i < kMemoryCategories; ++i) {
    const auto& d = dry.categories[static_cast<size_t>(i)];
    const auto& r = real.categories[static_cast<size_t>(i)];
    const char* label = name(static_cast<MemoryCategory>(i));
    EXPECT_EQ(d.current, r.current) << label;
    EXPECT_EQ(d.peak, r.peak) << label;
    EXPECT_EQ(d.at_peak, r.at_peak) << label;
  }
}

TEST(DryRun, TouchesNoMemory) {
  const int64_t before = peak_resident_bytes();
  {
    const DryRun scope;
    EXPECT_TRUE(DryRun::active());
    const Tensor huge = Tensor::zeros({1 << 20, 1 << 17});  // 512 GiB
    const Tensor copy = huge.transpose(0, 1).contiguous().to(DType::f64);
    EXPECT_EQ(copy.size(0), 1 << 17);
    EXPECT_NE(huge.raw(), copy.raw()) << "addresses are told apart";
    EXPECT_EQ(allocator(Device::cpu()).statistics().total.current, (int64_t{1} << 39) * 3);
  }
  EXPECT_FALSE(DryRun::active());
  EXPECT_LT(peak_resident_bytes() - before, 64 * kMiB);
}

TEST(DryRun, HasAnAllocatorOfItsOwn) {
  Allocator& real = allocator(Device::cpu());
  const int64_t before = real.statistics().total.current;
  Allocator* dry = nullptr;
  {
    const DryRun scope;
    const DryRun nested;
    dry = &allocator(Device::cpu());
    const Tensor tensor = Tensor::zeros({1000});
    EXPECT_EQ(real.statistics().total.current, before);
  }
  EXPECT_NE(dry, &real);
  EXPECT_EQ(&allocator(Device::cpu()), &real);
  EXPECT_EQ(dry->statistics().total.current, 0);
}

TEST(DryRun, ReadingValuesIsAnError) {
  const DryRun scope;
  const Tensor tensor = Tensor::zeros({1});
  EXPECT_ERROR(ErrorKind::kState, "no values to read in a dry run", tensor.item());
  EXPECT_ERROR(ErrorKind::kState, "no values to read in a dry run", tensor.to_vector<float>());
  EXPECT_EQ(concat(tensor), "f32 [1]") << "printing shows the shape alone";
}

TEST(DryRunDeathTest, TouchingTheDataFaults) {
  EXPECT_DEATH(
      {
        const DryRun scope;
        const Tensor tensor = Tensor::zeros({16});
        *static_cast<volatile float*>(tensor.data<float>()) = 1;
      },
      "");
}

TEST(DryRun, WorksForADeviceThatIsNotThere) {
  const DryRun scope;
  const Tensor tensor = Tensor::zeros({10, 10}, DType::bf16, Device::cuda(3));
  EXPECT_EQ(tensor.device(), Device::cuda(3));
  EXPECT_EQ(allocator(Device::cuda(3)).statistics().total.current, 256);
}

TEST(Memory, OutOfMemoryPrintsTheTable) {
  Allocator memory(Device::cpu(), false);
  void* weights = memory.allocate(3 * kMiB, MemoryCategory::parameters);
  const std::string text =
      testing::error_of(ErrorKind::kMemory, [&] { memory.allocate(size_t{1} << 60, MemoryCategory::activations); });
  EXPECT_NE(
      text.find(
          "[allocate] 1,152,921,504,606,846,976 bytes (1048576.0 TiB) of activations memory on cpu could not be had"),
      std::string::npos)
      << text;
  EXPECT_NE(text.find("  category              now         peak  at total peak\n  parameters        3.0 MiB      3.0 "
                      "MiB        3.0 MiB"),
            std::string::npos)
      << text;
  EXPECT_NE(text.find("\n  total             3.0 MiB      3.0 MiB        3.0 MiB\n"), std::string::npos) << text;
  EXPECT_NE(text.find("taken from the system: 32.0 MiB"), std::string::npos) << text;
  EXPECT_NE(text.find("Hint: a smaller micro-batch"), std::string::npos) << text;
  EXPECT_EQ(text.find("optimizer"), std::string::npos) << "categories without use are left out";
  EXPECT_EQ(memory.statistics().total.current, 3 * kMiB) << "what failed is not counted";
  memory.free(weights);
}

TEST(Memory, CachedMemoryIsGivenUpBeforeFailing) {
  Allocator memory(Device::cpu(), false);
  memory.free(memory.allocate(64 * kMiB, MemoryCategory::data));
  EXPECT_THROW(memory.allocate(size_t{1} << 60, MemoryCategory::data), Error);
  EXPECT_EQ(memory.statistics().reserved, 0);
}

TEST(Memory, TensorsTooLargeForTheMachineAreErrors) {
  EXPECT_ERROR(ErrorKind::kMemory, "[allocate]", Tensor::empty({int64_t{1} << 58}));
  EXPECT_ERROR(ErrorKind::kMemory, "[allocate]", Tensor::arange(int64_t{1} << 58));
  EXPECT_ERROR(ErrorKind::kShape, "[Tensor::empty] f64 [2305843009213693952] has more bytes than 64 bits can count",
               Tensor::empty({int64_t{1} << 61}, DType::f64));
}

TEST(Memory, HumanBytesHaveOneDecimal) {
  EXPECT_EQ(human_bytes(0), "0 B");
  EXPECT_EQ(human_bytes(1023), "1023 B");
  EXPECT_EQ(human_bytes(1024), "1.0 KiB");
  EXPECT_EQ(human_bytes(1536), "1.5 KiB");
  EXPECT_EQ(human_bytes(int64_t{2040109466}), "1.9 GiB");
  EXPECT_EQ(human_bytes(int64_t{5} << 40), "5.0 TiB");
  EXPECT_EQ(human_bytes(-1536), "-1.5 KiB");
}

TEST(Memory, CategoriesHaveNames) {
  const char* names[] = {"parameters", "gradients", "optimizer", "activations", "workspace", "communication", "data", "checkpoint"};
  for (int i = 0; i < kMemoryCategories; ++i) EXPECT_STREQ(name(static_cast<MemoryCategory>(i)), names[i]);
}

#if defined(__SANITIZE_ADDRESS__)
TEST(MemoryDeathTest, TheSanitizerSeesAccessesBeyondATensorAndAfterItsEnd) {
  EXPECT_DEATH(
      {
        const Tensor tensor = Tensor::zeros({3});
        *static_cast<volatile float*>(tensor.data<float>() + 3) = 1;
      },
      "use-after-poison");
  EXPECT_DEATH(
      {
        const float* data = Tensor::zeros({3}).data<float>();
        [[maybe_unused]] const float value = *static_cast<const volatile float*>(data);
      },
      "use-after-poison");
}
#endif

}  // namespace
}  // namespace weft
