// A library without the CUDA backend, which every build makes: all symbols are there, and what needs a device says so.
#include <gtest/gtest.h>

#include "core/backend.h"
#include "tests/op_drivers.h"

namespace weft::testing {
namespace {

TEST(WithoutCuda, TheReasonIsSaid) {
  EXPECT_STREQ(why_no_cuda(), "this build has no CUDA backend");
  EXPECT_EQ(Device::best(), Device::cpu());
  EXPECT_EQ(Device::parse("auto"), Device::cpu());
}

TEST(WithoutCuda, ADeviceThatIsNotThereIsAnErrorThatNamesIt) {
  try {
    Tensor::zeros({2}, DType::f32, Device::cuda(1));
    FAIL() << "a tensor was made on a device that is not there";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::kDevice);
    for (const char* part : {"cuda:1", "no CUDA backend"})
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
  }
}

TEST(WithoutCuda, AStepOnADeviceCanBePlanned) {
  const DryRun dry;
  const Tensor x = Tensor::empty({64, 64}, DType::bf16, Device::cuda());
  EXPECT_EQ(x.device(), Device::cuda());
  EXPECT_GE(allocator(Device::cuda()).statistics().total.current, 64 * 64 * 2);
}

TEST(WithoutCuda, EveryOpCaseLinksAndRunsOnTheCpu) {
  for (const OpCase& made : all_op_cases()) {
    EXPECT_NO_THROW(made.run(make_arguments(made, DType::f32))) << full_name(made);
  }
}

}  // namespace
}  // namespace weft::testing
