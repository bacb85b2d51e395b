#pragma once
// The header of this name in the emulated build of CUDA sources: see emulation.h.
#define WEFT_CUDA_EMULATION 1

#include <functional>
#include <memory>  // before __noinline__ becomes a macro, which it names
#include <tuple>
#include <utility>

#include "cuda_runtime_api.h"
#include "device_builtins.h"
#include "emulation.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) __attribute__((aligned(bytes)))
// The blocks that one thread runs come one after another, so a static of the thread is the block's own.
#define __shared__ static thread_local

namespace weft_emulation {
/// Checks a launch as the runtime does and runs or captures it.
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, std::function<void()> thread);
}  // namespace weft_emulation

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  // A lambda's parameters convert the arguments implicitly, as a call of the kernel would.
  return [&](Parameters... converted) {
    return weft_emulation::launch(
        *config, reinterpret_cast<const void*>(kernel),
        [kernel, values = std::tuple<Parameters...>(std::move(converted)...)] { std::apply(kernel, values); });
  }(std::forward<Arguments>(arguments)...);
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel kernel, int block_size,
                                                          size_t dynamic_shared_bytes) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, reinterpret_cast<const void*>(kernel), block_size,
                                                       dynamic_shared_bytes);
}
