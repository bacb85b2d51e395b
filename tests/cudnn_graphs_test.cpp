// The graphs of attention that cuda/cudnn_sdpa.cpp builds, given to the real cuDNN for a device that is described: it
// checks them, and proposes plans that it supports, with no GPU and no driver.
#include <dlfcn.h>
#include <gtest/gtest.h>

#include <string>

#include "cuda/cudnn_sdpa.h"
#include "tests/error_of.h"

namespace weft::cuda {
namespace {

// An H200, by the names that the library asks for.
constexpr const char* kH200 =
    R"({"version":1,"cudnnVersion":91900,"schemaVersion":1,"cudaDeviceId":0,"deviceVer":900,"driverVer":13000,)"
    R"("maxGridSize":[2147483647,65535,65535],"maxBlockSize":[1024,1024,64],"regsPerBlock":65536,)"
    R"("multiProcessorCount":132,"warpSize":32,"maxSharedMemoryPerBlock":49152,"maxSharedMemoryPerBlockOptin":232448,)"
    R"("reservedSharedMemoryPerBlock":1024,"maxRegistersPerSM":65536,"maxCtasPerSM":32,"maxThreadsPerBlock":1024,)"
    R"("maxThreadsPerSM":2048,"pciDeviceId":0,"isTccDriver":0,"supportCoopLaunch":1,"smClockRateKHz":1980000,)"
    R"("memClockRateKHz":3201000,"l2CacheSize":62914560,"deviceName":"NVIDIA H200","totalGlobalMem":150000000000})";

class CudnnGraphs : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    // cuDNN wants a driver to be there, if only to ask it for its functions: the toolkit's stub is one.
    if (dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL) == nullptr) dlopen(WEFT_DRIVER_STUB, RTLD_NOW | RTLD_GLOBAL);
  }
  void SetUp() override {
    if (const std::string why = why_no_cudnn(); !why.empty()) GTEST_SKIP() << why;
    if (dlopen("libcuda.so.1", RTLD_NOW) == nullptr) GTEST_SKIP() << "no driver, and no stub of one: " << dlerror();
  }
};

struct Case {
  int64_t batch, heads, kv_heads, tokens, head_size;
};

/// As causal_attention() lays it out with as many key heads as heads; else q, k and v for themselves.
Sdpa pass_of(const Case& c, DType dtype, bool causal, bool backward) {
  Sdpa s;
  s.backward = backward, s.dtype = dtype, s.causal = causal;
  s.batch = c.batch, s.heads = c.heads, s.kv_heads = c.kv_heads, s.tokens = c.tokens, s.head_size = c.head_size;
  s.scale = 0.125;
  const auto rows = [&](int64_t row) { return Sdpa::Strides{c.tokens * row, c.head_size, row}; };
  const int64_t width = c.heads * c.head_size, keys = c.kv_heads * c.head_size;
  const bool packed = c.heads == c.kv_heads;
  const Sdpa::Strides q = rows(packed ? 3 * width : width), k = rows(packed ? 3 * width : keys);
  s.strides[kQ] = q, s.strides[kK] = s.strides[kV] = k, s.strides[kOut] = rows(width);
  if (backward) s.strides[kDout] = rows(width), s.strides[kDq] = q, s.strides[kDk] = s.strides[kDv] = k;
  return s;
}

/// The micro-batches of `weft bench step` and of `weft bench attention`, one of the quick start, one of a Llama.
constexpr Case kCases[] = {{64, 12, 12, 1024, 64}, {32, 16, 16, 1024, 64}, {16, 20, 20, 1024, 64},
                           {8, 25, 25, 1024, 64},  {4, 16, 16, 8192, 64},  {16, 8, 8, 2048, 128},
                           {12, 4, 4, 128, 32},    {4, 12, 12, 128, 64},   {2, 32, 8, 2048, 128},
                           {3, 2, 2, 200, 16}};

TEST_F(CudnnGraphs, HaveSupportedPlansForTheShapesOfTheModels) {
  for (const Case& c : kCases) {
    for (const DType dtype : {DType::bf16, DType::f16}) {
      for (const bool backward : {false, true}) {
        const std::vector<std::string> plans = sdpa_proposals(pass_of(c, dtype, true, backward), kH200, 90);
        EXPECT_FALSE(plans.empty()) << c.batch << ' ' << c.heads << ' ' << c.tokens << ' ' << c.head_size;
      }
    }
  }
}

TEST_F(CudnnGraphs, HaveSupportedPlansWithoutACausalMask) {
  for (const bool backward : {false, true})
    EXPECT_FALSE(sdpa_proposals(pass_of(kCases[0], DType::bf16, false, backward), kH200, 90).empty());
}

TEST_F(CudnnGraphs, ThatCudnnCannotComputeAreRefusedInItsWords) {
  Sdpa odd = pass_of(kCases[0], DType::bf16, true, false);
  odd.head_size = 60;
  const std::string rule = testing::error_of(ErrorKind::kDevice, [&] { sdpa_proposals(odd, kH200, 90); });
  EXPECT_NE(rule.find("hidden_dim"), std::string::npos) << rule;
  Sdpa uneven = pass_of(kCases[8], DType::bf16, true, false);
  uneven.kv_heads = 5;
  EXPECT_ERROR(ErrorKind::kDevice, "not valid", sdpa_proposals(uneven, kH200, 90));
  EXPECT_ERROR(ErrorKind::kDevice, "properties of the device", sdpa_proposals(odd, "{}", 90));
}

TEST_F(CudnnGraphs, AreOfALibraryThatIsAsNewAsItsHeaders) {
  EXPECT_FALSE(cudnn_version().empty());
  EXPECT_NE(describe_cudnn().find(cudnn_version()), std::string::npos) << describe_cudnn();
}

}  // namespace
}  // namespace weft::cuda
