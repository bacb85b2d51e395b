// `weft doctor`: what it tells with a CUDA device (the emulated one), and without.
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <sstream>

#include "apps/commands.h"
#include "core/backend.h"
#include "core/device_report.h"
#include "core/tensor.h"

namespace weft::testing {
namespace {

std::string doctor() {
  const std::string cache = std::filesystem::temp_directory_path() / "weft-doctor-test";
  setenv("WEFT_CACHE_DIR", cache.c_str(), 1);
  std::ostringstream out;
  std::streambuf* const before = std::cout.rdbuf(out.rdbuf());
  const int code = apps::run_doctor({});
  std::cout.rdbuf(before);
  EXPECT_EQ(code, 0);
  return out.str();
}

void expect_all(const std::string& text, std::initializer_list<const char*> parts) {
  for (const char* part : parts) EXPECT_NE(text.find(part), std::string::npos) << part << " is not in\n" << text;
}

TEST(Doctor, TellsWhatWasCompiledInAndWhatIsThere) {
  const std::string text = doctor();
  expect_all(text, {"processor ", "kernels ", "cuda ", "compiled for ", "NCCL ", "speed "});
  if (*why_no_cuda() != '\0') {
    expect_all(text, {"none: ", why_no_cuda()});
    EXPECT_EQ(text.find("cuda:0"), std::string::npos) << text;
    return;
  }
  expect_all(text, {"driver ", "runtime ", "cuBLASLt ", "cuDNN ", "the build saw ", "cuda:0", "compute capability ", "multiprocessors ", "memory ",
                    " free", "L2 cache ", "ECC ", "clocks "});
}

TEST(Doctor, NamesEveryDeviceWithItsFacts) {
  const DeviceReport report = cuda_report();
  ASSERT_FALSE(report.backend.empty());
  EXPECT_EQ(report.devices.empty(), *why_no_cuda() != '\0');
  for (const DeviceReport::Facts& facts : report.devices) {
    ASSERT_FALSE(facts.empty());
    EXPECT_EQ(facts[0].first, "name");
    for (const auto& [name, value] : facts) EXPECT_FALSE(value.empty()) << name;
  }
  if (report.devices.empty()) return;
  EXPECT_EQ(report.devices[0][0].second, backend(Device::cuda()).name());
}

TEST(Doctor, AReportLeavesTheDeviceInUse) {
  if (*why_no_cuda() != '\0') return;  // no device is in use
  const Tensor before = Tensor::full({3}, 2, DType::f32, Device::cuda());
  cuda_report();
  const Tensor after = Tensor::full({3}, 3, DType::f32, Device::cuda());
  EXPECT_EQ(after.to(Device::cpu()).to_vector<float>(), std::vector<float>(3, 3.0f));
  EXPECT_EQ(before.to(Device::cpu()).to_vector<float>(), std::vector<float>(3, 2.0f));
}

}  // namespace
}  // namespace weft::testing
