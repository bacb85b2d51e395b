// That the emulated device shows every wait that a user of Backend::copy_async forgets: offloading by hand, right and
// with one wait left out.
#include <gtest/gtest.h>

#include "core/autograd.h"
#include "cuda_emulation/emulation.h"
#include "ops/elementwise.h"
#include "ops/reduce.h"

namespace weft {
namespace {

using weft_emulation::Late;
using Values = std::vector<double>;
constexpr int64_t kCount = 4096;

enum class Forgotten { kNothing, kWaitForTheWayOut, kWaitForTheWayIn };

/// The gradient of sum(x^2) whose saved tensor was on the host meanwhile.
double gradient(Forgotten forgotten) {
  const Device device = Device::cuda();
  Backend& on = backend(device);
  const Tensor x = Tensor::full({kCount}, 3, DType::f32, device).requires_grad_();
  const Tensor host = Tensor::pinned({kCount}, DType::f32, device);
  host.detach().fill_(-1);
  const size_t bytes = kCount * sizeof(float);
  Tensor loss, kept;
  std::shared_ptr<Backend::Event> out;
  {
    const autograd::SavedTensorHooks hooks([&](const Tensor& saved) {
      kept = saved;
      out = on.copy_async(host.raw(), saved.raw(), bytes, Backend::Direction::kToHost);
      return [&] {
        Tensor back = Tensor::empty({kCount}, DType::f32, device);
        const auto in = on.copy_async(back.raw(), host.raw(), bytes, Backend::Direction::kToDevice);
        if (forgotten != Forgotten::kWaitForTheWayIn) on.wait(*in);
        return back;
      };
    });
    loss = sum(square(mul(x, 1.0)));
  }
  if (forgotten != Forgotten::kWaitForTheWayOut) on.wait(*out);
  kept = Tensor();
  // Whoever takes memory of that size next is given the same.
  const Tensor next = Tensor::full({kCount}, 100, DType::f32, device);
  loss.backward();
  return x.grad().to_vector<double>()[kCount - 1];
}

TEST(LateCopies, ShowAMissingWait) {
  for (const Late late : {Late::kNothing, Late::kCopies, Late::kKernels}) {
    weft_emulation::set_late(late);
    EXPECT_EQ(gradient(Forgotten::kNothing), 6);
  }
  weft_emulation::set_late(Late::kCopies);
  EXPECT_NE(gradient(Forgotten::kWaitForTheWayOut), 6) << "memory was used again before the copy had read it";
  EXPECT_NE(gradient(Forgotten::kWaitForTheWayIn), 6) << "a kernel read what the copy had yet to write";
}

}  // namespace
}  // namespace weft
