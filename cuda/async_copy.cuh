#pragma once
// Copies from global to shared memory that pass no register and that a thread waits for later (cp.async), with a twin
// for the emulated device.
#include <cuda_runtime.h>

#include <cstdint>
#if defined(WEFT_CUDA_EMULATION)
#include <cstring>
#include <vector>
#endif

namespace weft::cuda {

#if !defined(WEFT_CUDA_EMULATION)

__device__ inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

/// Starts to copy kBytes (4, 8 or 16, both sides aligned to them) into shared memory; zeros if not `exists`, when
/// nothing is read and `global` may be anything. They are there for this thread after wait_for_loads(), for others
/// after a barrier behind that.
template <int kBytes>
__device__ inline void load_async(void* shared, const void* global, bool exists = true) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(exists ? 16 : 0)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global),
                 "n"(kBytes), "r"(exists ? kBytes : 0)
                 : "memory");
  }
}
/// Until all copies that this thread has started are done.
__device__ inline void wait_for_loads() { asm volatile("cp.async.wait_all;" ::: "memory"); }

#else

/// Loads land as late as they may, when their thread waits, so that a missing wait shows.
struct EmulatedLoad {
  void* to;
  const void* from;
  size_t bytes;
  bool exists;
};
inline std::vector<EmulatedLoad>& emulated_loads() {
  static thread_local std::vector<EmulatedLoad> pending[1024];
  return pending[threadIdx.x];
}
template <int kBytes>
void load_async(void* shared, const void* global, bool exists = true) {
  emulated_loads().push_back({shared, global, kBytes, exists});
}
inline void wait_for_loads() {
  for (const EmulatedLoad& load : emulated_loads()) {
    if (load.exists) {
      std::memcpy(load.to, load.from, load.bytes);
    } else {
      std::memset(load.to, 0, load.bytes);
    }
  }
  emulated_loads().clear();
}

#endif

}  // namespace weft::cuda
