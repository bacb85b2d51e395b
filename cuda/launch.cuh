#pragma once
// How kernels are started: through the runtime's function, which is plain C++, so that the files compile as C++ too.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda/error.h"
#include "ops/kernel_device.h"

namespace weft::cuda {

/// Blocks, threads of a block, and bytes of dynamic shared memory.
struct Grid {
  dim3 blocks = 1;
  dim3 threads = 1;
  size_t shared = 0;
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Blocks of `threads` threads for `count` pieces of work, one to a thread; kernels loop over what is left beyond the
/// limit, which is far above what the device can hold at once.
inline Grid grid_for(int64_t count, int threads = 256) {
  constexpr int64_t kMostBlocks = 1 << 16;
  return {static_cast<unsigned>(std::clamp<int64_t>(divide_up(count, threads), 1, kMostBlocks)),
          static_cast<unsigned>(threads)};
}

/// Queues kernel(arguments...) on the device's stream.
template <class... Parameters>
void start(Cuda device, const Grid& grid, void (*kernel)(Parameters...),
           std::type_identity_t<Parameters>... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid.blocks;
  config.blockDim = grid.threads;
  config.dynamicSmemBytes = grid.shared;
  config.stream = static_cast<cudaStream_t>(device.stream);
  WEFT_CUDA(cudaLaunchKernelEx(&config, kernel, arguments...));
}

/// Allows `kernel` more dynamic shared memory than the 48 KiB that every kernel may have. Call it before each start:
/// it is a table look-up in the driver.
template <class... Parameters>
void allow_shared(void (*kernel)(Parameters...), size_t bytes) {
  if (bytes <= (size_t{48} << 10)) return;
  WEFT_CUDA(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(bytes)));
}

/// Thread number over the whole grid, and how many there are: for loops over more work than threads.
__device__ inline int64_t thread_index() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ inline int64_t thread_count() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

}  // namespace weft::cuda
