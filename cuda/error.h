#pragma once
#include <cuda_runtime.h>

namespace weft::cuda {

/// @throws Error kDevice (kMemory if memory ran out) with the expression, the place, and CUDA's name and text for the
/// error. The error is cleared first: only one that broke the device's context will come back with the next call.
void check(cudaError_t status, const char* expression, const char* file, int line);

}  // namespace weft::cuda

#define WEFT_CUDA(expression) ::weft::cuda::check((expression), #expression, __FILE__, __LINE__)
