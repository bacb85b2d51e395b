#pragma once
// Instructions of the tensor cores and those that feed them, one function each. Every function has a twin for the
// emulated device, on which the kernels' source is the same.
#include <cstdint>
#if defined(WEFT_CUDA_EMULATION)
#include <cmath>
#include <cstring>
#endif

#include "cuda/async_copy.cuh"
#include "cuda/device.cuh"

namespace weft::cuda {

// All threads of a warp call these together. Lane 4 g + t (g < 8, t < 4) holds, of a matrix in registers ("fragment"):
//   A, 16 x 16: pairs (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), each with the next column
//   B, 16 x 8:  pairs (2t, g), (2t + 8, g), each with the next row
//   C, 16 x 8:  values (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
// so that two C side by side, rounded to pairs, are an A.

#if !defined(WEFT_CUDA_EMULATION)

/// c += a b, of Half or BFloat16, summed in f32.
template <class T>
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ inline void mma<Half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ inline void mma<BFloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// Four 8 x 8 matrices of 16-bit elements from shared memory: lane 8 i + r has the address of row r of matrix i, 16
/// bytes that are aligned. Lane 4 g + t gets elements (g, 2t) and (g, 2t + 1) of each.
__device__ inline void load_matrices(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(row))
               : "memory");
}
/// The same of the transposed matrices: elements (2t, g) and (2t + 1, g) of each as it lies in memory.
__device__ inline void load_matrices_transposed(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(row))
               : "memory");
}

/// Two numbers rounded to nearest even, the first in the lower half.
template <class T>
__device__ inline uint32_t narrow_pair(float low, float high);
template <>
__device__ inline uint32_t narrow_pair<Half>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
__device__ inline uint32_t narrow_pair<BFloat16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

/// 2^x with a relative error of 2^-22; 0 below 2^-126. NaN gives NaN.
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#else

/// What the lanes of a warp show each other: all of them write, then all of them read.
template <class Value>
class EmulatedExchange {
 public:
  explicit EmulatedExchange(const Value& own) : all_(slots()) {
    all_[threadIdx.x % kWarp] = own;
    __syncwarp();
  }
  ~EmulatedExchange() { __syncwarp(); }
  const Value& operator[](uint32_t lane) const { return all_[lane]; }

 private:
  static Value* slots() {
    __shared__ Value all[32][kWarp];
    return all[threadIdx.x / kWarp];
  }
  Value* all_;
};

template <class T>
double emulated_half(uint32_t pair, uint32_t which) {
  T value;
  value.bits = static_cast<uint16_t>(pair >> (16 * which));
  return static_cast<double>(value);
}

template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Own {
    uint32_t a[4], b[2];
  };
  const EmulatedExchange<Own> lanes({{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const uint32_t lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  for (uint32_t i = 0; i < 4; ++i) {
    const uint32_t lower = i / 2, column = 2 * t + i % 2;  // of C: row g or g + 8
    double sum = c[i];
    for (uint32_t k = 0; k < 16; ++k) {
      const uint32_t pair = k % 8 / 2, right = k / 8;
      sum += emulated_half<T>(lanes[4 * g + pair].a[2 * right + lower], k % 2) *
             emulated_half<T>(lanes[4 * column + pair].b[right], k % 2);
    }
    c[i] = static_cast<float>(sum);
  }
}

inline void load_matrices(uint32_t (&m)[4], const void* row) {
  const EmulatedExchange<const char*> lanes(static_cast<const char*>(row));
  const uint32_t lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  for (uint32_t i = 0; i < 4; ++i) std::memcpy(&m[i], lanes[8 * i + g] + 4 * t, 4);
}
inline void load_matrices_transposed(uint32_t (&m)[4], const void* row) {
  const EmulatedExchange<const char*> lanes(static_cast<const char*>(row));
  const uint32_t lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  for (uint32_t i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (uint32_t e = 0; e < 2; ++e) std::memcpy(&pair[e], lanes[8 * i + 2 * t + e] + 2 * g, 2);
    m[i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
}

template <class T>
uint32_t narrow_pair(float low, float high) {
  return T(low).bits | static_cast<uint32_t>(T(high).bits) << 16;
}

inline float exp2_fast(float x) { return x < -126 ? 0 : std::exp2(x); }

#endif

}  // namespace weft::cuda
