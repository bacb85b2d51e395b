// A device that has no products of 8-bit floats.
#include <gtest/gtest.h>

#include "emulation.h"
#include "models/gpt.h"
#include "tests/error_of.h"

namespace weft {
namespace {

TEST(Fp8, ADeviceWithoutSuchProductsIsToldWhatItCanUseInstead) {
  weft_emulation::set_compute_capability(8, 0);
  models::Gpt gpt({.layers = 1, .heads = 1, .width = 32, .context = 8, .vocab = 5}, Device::cuda(), 0, DType::bf16);
  const std::string message = testing::error_of(ErrorKind::kDevice, [&] { gpt.use_fp8(); });
  for (const char* part : {"compute capability 8.0", "8.9", "bf16"})
    EXPECT_NE(message.find(part), std::string::npos) << message;
}

}  // namespace
}  // namespace weft
