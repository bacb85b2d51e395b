#pragma once
#include <cuda_runtime.h>

#include <cstring>

namespace weft::cuda {

/// Starts a copy of kBytes (4, 8 or 16; both places aligned to that) from global to shared memory that passes no
/// register. The thread that started it may read it after wait_for_copies(), others after a barrier behind that.
template <int kBytes>
__device__ inline void copy_async(void* shared, const void* global) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
#if defined(WEFT_CUDA_EMULATION)
  std::memcpy(shared, global, kBytes);
#else
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(kBytes) : "memory");
  }
#endif
}

/// Until all copies that this thread has started are done.
__device__ inline void wait_for_copies() {
#if !defined(WEFT_CUDA_EMULATION)
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

}  // namespace weft::cuda
