// Memory that is given back while tensors still refer to it, and given again.
#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "core/autograd.h"
#include "core/memory.h"
#include "ops/elementwise.h"
#include "ops/matmul.h"
#include "ops/reduce.h"
#include "tests/error_of.h"

namespace weft {
namespace {

int64_t parameter_bytes() {
  return allocator(Device::cpu()).statistics().categories[static_cast<size_t>(MemoryCategory::parameters)].current;
}

Tensor make(const std::vector<float>& values) {
  const MemoryScope scope(MemoryCategory::parameters);
  return Tensor::from(values, {static_cast<int64_t>(values.size())});
}

TEST(Storage, ReleasedMemoryIsGone) {
  const int64_t before = parameter_bytes();
  const Tensor weight = make(std::vector<float>(1000, 1)), view = weight.narrow(0, 10, 5), handle = weight;
  EXPECT_EQ(parameter_bytes() - before, 4032);
  weight.storage()->release("parameter \"w\"");
  EXPECT_EQ(parameter_bytes(), before);
  EXPECT_TRUE(handle.storage()->is_released());
  EXPECT_EQ(view.shape(), (Shape{5}));
}

TEST(Storage, ReachingForReleasedMemoryIsAnErrorThatNamesIt) {
  Tensor weight = make({1, 2, 3, 4});
  const Tensor view = weight.narrow(0, 1, 2);
  weight.storage()->release("parameter \"w\"");
  for (const auto& reach : std::vector<std::function<void()>>{
           [&] { (void)weight.raw(); }, [&] { (void)view.to_vector<float>(); }, [&] { weight.fill_(1); },
           [&] { (void)(view + view); }, [&] { (void)weight.clone(); }, [&] { (void)weight.storage()->data(); }})
    EXPECT_ERROR(ErrorKind::kState, "parameter \"w\" is released", reach());
}

TEST(Storage, LentMemoryHasTheOwnersValuesAndLivesAsLongAsItIsLent) {
  const int64_t before = parameter_bytes();
  const Tensor weight = make({1, 2, 3, 4}), view = weight.narrow(0, 1, 2);
  weight.storage()->release("w");
  Tensor owner = make(std::vector<float>(32, 7));
  owner.narrow(0, 16, 4).copy_(make({5, 6, 7, 8}));
  weight.storage()->lend(owner.storage(), 64);
  owner = Tensor();
  EXPECT_EQ(weight.to_vector<float>(), (std::vector<float>{5, 6, 7, 8}));
  EXPECT_EQ(view.to_vector<float>(), (std::vector<float>{6, 7}));
  EXPECT_EQ(parameter_bytes() - before, 128);
  weight.storage()->release("w");
  EXPECT_EQ(parameter_bytes(), before);
}

TEST(Storage, AReleaseAndALoanAreNoChange) {
  Tensor weight = make({1, 2, 3});
  weight.requires_grad_();
  const Tensor kept = make({1, 2, 3});
  const Tensor y = sum(weight * weight);
  const uint64_t version = weight.storage()->version();
  weight.storage()->release("w");
  EXPECT_ERROR(ErrorKind::kState, "w is released", autograd::gradients({y}, {weight}, {}, true));
  weight.storage()->lend(kept.storage(), 0);
  EXPECT_EQ(weight.storage()->version(), version);
  y.backward();
  EXPECT_EQ(weight.grad().to_vector<float>(), (std::vector<float>{2, 4, 6}));
}

TEST(Storage, WhatFunctionsSavedIsReadFromTheMemoryThatIsThereThen) {
  Tensor weight = make({1, 2, 3, 4, 5, 6}).reshape({2, 3});
  Tensor leaf = weight.detach();
  leaf.requires_grad_();
  const Tensor x = Tensor::ones({1, 3}), kept = weight.clone();
  Tensor input = x.detach();
  input.requires_grad_();
  const auto out = autograd::checkpoint(
      [&](const std::vector<Tensor>& in) { return std::vector<Tensor>{gelu(linear(in[0], leaf, Tensor()))}; }, {input});
  leaf.storage()->release("w");
  leaf.storage()->lend(kept.storage(), 0);
  sum(out[0]).backward();
  EXPECT_TRUE(leaf.grad().defined());
  EXPECT_TRUE(input.grad().defined());
}

TEST(Storage, TensorsCanBeMadeWithoutMemory) {
  const int64_t before = allocator(Device::cpu()).statistics().total.current;
  const Tensor weight = Tensor::without_memory({1 << 20, 1 << 20}, DType::f32, Device::cpu(), "the table");
  EXPECT_EQ(allocator(Device::cpu()).statistics().total.current, before);
  EXPECT_ERROR(ErrorKind::kState, "the table is released: its 4,398,046,511,104 bytes", weight.raw());
}

TEST(Storage, LoansThatDoNotFitAreErrors) {
  const Tensor weight = make({1, 2, 3, 4}), owner = make(std::vector<float>(8));
  EXPECT_ERROR(ErrorKind::kState, "memory can be lent only where it was released",
               weight.storage()->lend(owner.storage(), 0));
  weight.storage()->release("w");
  EXPECT_ERROR(ErrorKind::kIndex, "w needs 16 bytes", weight.storage()->lend(owner.storage(), 20));
  EXPECT_ERROR(ErrorKind::kIndex, "w needs 16 bytes", weight.storage()->lend(owner.storage(), -4));
  weight.storage()->lend(owner.storage(), 16);
}

TEST(Storage, LentMemoryIsCountedWithItsOwner) {
  const int64_t before = parameter_bytes();
  const Tensor weight = make({1, 2, 3, 4});
  weight.storage()->release("w");
  weight.storage()->recount(MemoryCategory::parameters);
  const Tensor owner = Tensor::zeros({4});
  weight.storage()->lend(owner.storage(), 0);
  weight.storage()->recount(MemoryCategory::parameters);
  EXPECT_EQ(parameter_bytes() - before, 64);
}

TEST(Storage, WhoeverReachesForDeferredElementsHasThem) {
  for (const auto& reach : std::vector<std::function<double(const Tensor&)>>{
           [](const Tensor& w) { return w.select(0, 2).item(); },
           [](const Tensor& w) { return static_cast<double>(w.to_vector<float>()[2]); },
           [](const Tensor& w) { return (w + w).select(0, 2).item() / 2; },
           [](const Tensor& w) { return w.clone().to_vector<double>()[2]; },
           [](const Tensor& w) { return static_cast<double>(static_cast<const float*>(w.storage()->data())[2]); }}) {
    const Tensor weight = make({1, 2, 3, 4});
    int completed = 0;
    weight.storage()->defer([&, at = weight.data<float>() + 2] { *at = 30, ++completed; });
    EXPECT_TRUE(weight.storage()->is_deferred());
    EXPECT_EQ(weight.narrow(0, 1, 2).shape(), (Shape{2})) << "a view reads nothing";
    EXPECT_EQ(completed, 0);
    EXPECT_EQ(reach(weight), 30);
    EXPECT_EQ(reach(weight), 30);
    EXPECT_EQ(completed, 1);
    EXPECT_FALSE(weight.storage()->is_deferred());
  }
}

TEST(Storage, DeferredElementsThatDoNotComeAreAnErrorForEveryReader) {
  const Tensor weight = make({1, 2});
  bool fails = true;
  std::vector<int> order;
  weight.storage()->defer([&] {
    if (fails) fail(ErrorKind::kIo, "peer", "rank 1 is gone");
    order.push_back(1);
  });
  weight.storage()->defer([&] { order.push_back(2); });
  for (int reader = 0; reader < 3; ++reader) EXPECT_ERROR(ErrorKind::kIo, "rank 1 is gone", weight.to_vector<float>());
  EXPECT_TRUE(order.empty());
  fails = false;
  EXPECT_EQ(weight.to_vector<float>(), (std::vector<float>{1, 2}));
  EXPECT_EQ(order, (std::vector<int>{1, 2}));
}

TEST(Storage, DeferredElementsComeOnceForManyThreads) {
  const Tensor weight = make({0});
  weight.storage()->defer([at = weight.data<float>()] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    *at += 1;
  });
  std::atomic<int> right = 0;
  std::vector<std::thread> readers;
  for (int i = 0; i < 4; ++i) readers.emplace_back([&] { right += *static_cast<float*>(weight.raw()) == 1; });
  for (std::thread& reader : readers) reader.join();
  EXPECT_EQ(right, 4);
}

TEST(Storage, DeferringIsNoChangeAndReleasingEndsIt) {
  Tensor weight = make({1, 2, 3});
  weight.requires_grad_();
  bool completed = false;
  const uint64_t version = weight.storage()->version();
  weight.storage()->defer([&] { completed = true; });
  sum(weight * weight).backward();
  EXPECT_TRUE(completed);
  EXPECT_EQ(weight.storage()->version(), version);
  weight.storage()->defer([] { FAIL() << "nobody has asked"; });
  weight.storage()->release("w");
  EXPECT_ERROR(ErrorKind::kState, "w is released", weight.raw());
  EXPECT_ERROR(ErrorKind::kState, "w is released", weight.storage()->defer([] {}));
}

}  // namespace
}  // namespace weft
