#pragma once
// What kernels are written in: wide arithmetic on narrow storage, whole-pack loads, reductions in a fixed order.
#include <cuda_runtime.h>

#include <cstdint>

#include "core/dtype.h"

namespace weft::cuda {

inline constexpr int kWarp = 32;

// ---- numbers ----

/// An element as the type that kernels compute in: f64 for f64, else f32. Exact.
template <class T>
__device__ inline Accumulate<T> widen(T x) {
  return static_cast<Accumulate<T>>(x);
}
/// Rounded once, to nearest even.
template <class T>
__device__ inline T narrow(Accumulate<T> x) {
  return T(x);
}
#if !defined(WEFT_CUDA_EMULATION)
template <>
__device__ inline float widen(Half x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}
template <>
__device__ inline Half narrow(float x) {
  Half small;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(small.bits) : "f"(x));
  return small;
}
template <>
__device__ inline BFloat16 narrow(float x) {
  BFloat16 small;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(small.bits) : "f"(x));
  return small;
}
#endif

/// kCount elements that are loaded and stored together; aligned to their whole size, 16 bytes for kFull<T> of them.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T at[kCount];
};
template <class T>
inline constexpr int kFull = 16 / static_cast<int>(sizeof(T));

template <int kCount, class T>
__device__ inline Pack<T, kCount> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, kCount>*>(from);
}
template <int kCount, class T>
__device__ inline void store_pack(T* to, const Pack<T, kCount>& pack) {
  *reinterpret_cast<Pack<T, kCount>*>(to) = pack;
}

/// Whether packs of kCount elements may be loaded from `data` and from every multiple of `stride` behind it.
template <int kCount, class T>
bool packs_fit(const T* data, int64_t stride = 0) {
  return reinterpret_cast<uintptr_t>(data) % (sizeof(T) * kCount) == 0 && stride % kCount == 0;
}

// ---- shared memory whose size is given at the launch ----

template <class T>
__device__ inline T* dynamic_shared() {
#if defined(WEFT_CUDA_EMULATION)
  return reinterpret_cast<T*>(weft_emulation::dynamic_shared());
#else
  extern __shared__ __align__(128) unsigned char weft_dynamic_shared[];
  return reinterpret_cast<T*>(weft_dynamic_shared);
#endif
}

// ---- reductions: a butterfly over a warp, then over the warps, so that every thread has the same bits ----

struct Sum {
  template <class A>
  __device__ A operator()(A a, A b) const {
    return a + b;
  }
};
/// The larger; NaN if either is.
struct Max {
  template <class A>
  __device__ A operator()(A a, A b) const {
    return a > b || a != a ? a : b;
  }
};

/// Over groups of kLanes neighbouring lanes; every lane of a group gets the result. All lanes of the warp must call.
template <int kLanes = kWarp, class A, class Combine>
__device__ inline A warp_reduce(A value, Combine combine) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) value = combine(value, __shfl_xor_sync(0xffffffffu, value, step));
  return value;
}

/// Over all threads of a block of whole warps (x dimension only); every thread gets the result. `scratch` is shared
/// memory for 32 values; it may be used again at once by another call.
template <class A, class Combine>
__device__ inline A block_reduce(A value, Combine combine, A* scratch) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  value = warp_reduce(value, combine);
  if (warps == 1) return value;
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  A total;
  if ((warps & (warps - 1)) == 0) {  // a butterfly again; every warp makes the same one
    total = scratch[lane & (warps - 1)];
    for (int step = warps / 2; step > 0; step /= 2) total = combine(total, __shfl_xor_sync(0xffffffffu, total, step));
  } else {
    total = scratch[0];
    for (int w = 1; w < warps; ++w) total = combine(total, scratch[w]);
  }
  __syncthreads();
  return total;
}

}  // namespace weft::cuda
