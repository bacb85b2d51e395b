// A program that uses no device pays for none: the libraries of devices, hundreds of megabytes, are loaded when the
// first device or group of devices needs them.
#include <gtest/gtest.h>

#include <fstream>
#include <sstream>
#include <string>

#include "core/backend.h"
#include "core/tensor.h"
#include "cuda/library_version.h"
#include "dist/processes.h"
#include "ops/matmul.h"

namespace weft::testing {
namespace {

bool loaded(const char* library) {
  std::ostringstream maps;
  maps << std::ifstream("/proc/self/maps").rdbuf();
  EXPECT_NE(maps.str().find("libc.so"), std::string::npos);
  return maps.str().find(library) != std::string::npos;
}

TEST(CudaLibraries, AreNotLoadedByAProgramThatComputesOnTheProcessor) {
  EXPECT_NE(&dist::nccl_group, nullptr);  // linked
  EXPECT_EQ(Device::best().kind == DeviceKind::cpu, *why_no_cuda() != '\0');
  EXPECT_EQ(matmul(Tensor::full({1, 3}, 2), Tensor::full({3, 1}, 1)).item(), 6);
  EXPECT_FALSE(loaded("libcublasLt"));
  EXPECT_FALSE(loaded("libnccl"));
}

TEST(CudaLibraries, CublasLtIsTheOneThatTheProgramWasBuiltFor) {
  const size_t version = cuda::cublaslt().GetVersion();
  EXPECT_TRUE(loaded("libcublasLt"));
  EXPECT_EQ(version / 10000, size_t{CUBLAS_VER_MAJOR});
  cublasLtMatmulDesc_t product = nullptr;
  ASSERT_EQ(cuda::cublaslt().MatmulDescCreate(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F), CUBLAS_STATUS_SUCCESS);
  EXPECT_EQ(cuda::cublaslt().MatmulDescDestroy(product), CUBLAS_STATUS_SUCCESS);
}

}  // namespace
}  // namespace weft::testing
