#pragma once
#include "cuda/device.cuh"

namespace weft::cuda {

/// store_pack() for packs of 8 or 16 bytes behind branches, where the compiler may lose sight of the alignment and
/// store element by element: this one it cannot take apart. It keeps its order among the thread's other accesses.
template <int kCount, class T>
__device__ inline void store_whole(T* to, const Pack<T, kCount>& pack) {
#if !defined(WEFT_CUDA_EMULATION)
  if constexpr (sizeof(pack) == 16) {
    __stwb(reinterpret_cast<uint4*>(to), __builtin_bit_cast(uint4, pack));
    return;
  } else if constexpr (sizeof(pack) == 8) {
    __stwb(reinterpret_cast<uint2*>(to), __builtin_bit_cast(uint2, pack));
    return;
  }
#endif
  store_pack(to, pack);
}

}  // namespace weft::cuda
