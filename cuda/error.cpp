#include "cuda/error.h"

#include <cstring>

#include "core/error.h"

namespace weft::cuda {

void check(cudaError_t status, const char* expression, const char* file, int line) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  const char* name = std::strrchr(file, '/');
  fail(status == cudaErrorMemoryAllocation ? ErrorKind::kMemory : ErrorKind::kDevice, "cuda", expression, " at ",
       name == nullptr ? file : name + 1, ':', line, ": ", cudaGetErrorName(status), ": ", cudaGetErrorString(status));
}

}  // namespace weft::cuda
