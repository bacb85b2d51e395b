// Conversion to 8-bit floats: one pass over a bf16 matrix writes it and its transpose, and finds the largest magnitude
// and the number of elements that saturated. Both are integers, so that atomics add them up to the same in any order.
#include "core/float8.h"
#include "cuda/device.cuh"
#include "cuda/launch.cuh"
#include "cuda/store_whole.cuh"
#include "ops/fp8_kernels.h"

namespace weft {
namespace {

using cuda::block_reduce;
using cuda::divide_up;
using cuda::Grid;
using cuda::load_pack;
using cuda::Pack;
using cuda::packs_fit;
using cuda::start;
using cuda::store_whole;

constexpr int kThreads = 256;
// A thread takes four rows of eight columns, so that the transposed tile is made of words: 8 threads across, 32 down.
constexpr int kRows = 128, kColumns = 64;
constexpr int kWords = kRows / 4 + 1;  // of a transposed row in shared memory; odd
constexpr int64_t kMostBlocks = 2048;  // a few waves on the largest devices: few atomics, which all meet in one place

/// Two elements as 16 bits, the first below.
template <class Float8>
__device__ uint32_t convert_pair(float first, float second) {
#if !defined(WEFT_CUDA_EMULATION) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t pair;
  if constexpr (std::is_same_v<Float8, Float8E4M3>)
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(second), "f"(first));
  else
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(second), "f"(first));
  // The instruction has one NaN, without a sign.
  if (first == first && second == second) return pair;
#endif
  return saturating_cast<Float8>(first).bits | static_cast<uint32_t>(saturating_cast<Float8>(second).bits) << 8;
}

template <class Float8>
__global__ void __launch_bounds__(kThreads)
    quantise(const __grid_constant__ Fp8Quantise q, int64_t tiles_across, int64_t tiles, bool whole_packs) {
  __shared__ uint32_t turned[kColumns * kWords];
  __shared__ unsigned scratch[32];
  const bool converts = q.y != nullptr || q.transposed != nullptr;
  const float scale = converts ? q.scale->scale : 1.0f;
  const int thread = static_cast<int>(threadIdx.x), across = thread % 8, down = thread / 8;
  unsigned most = 0, saturated = 0;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t tile_row = tile / tiles_across * kRows, tile_column = tile % tiles_across * kColumns;
    const int64_t row = tile_row + down * 4, column = tile_column + across * 8;
    uint32_t words[8] = {};  // of the transpose: an element of each of the four rows
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if (row + r >= q.rows || column >= q.columns) continue;
      const BFloat16* from = q.x + (row + r) * q.columns + column;
      Pack<BFloat16, 8> x;
      if (whole_packs) {
        x = load_pack<8>(from);
      } else {
        for (int e = 0; e < 8; ++e) x.at[e] = from[e];
      }
      Pack<uint32_t, 2> codes = {};
#pragma unroll
      for (int e = 0; e < 8; e += 2) {
        const float first = static_cast<float>(x.at[e]) * scale, second = static_cast<float>(x.at[e + 1]) * scale;
        most = max(most, max(x.at[e].bits & 0x7fffu, x.at[e + 1].bits & 0x7fffu));
        saturated += fabsf(first) > Float8Format<Float8>::kLargest ? 1 : 0;
        saturated += fabsf(second) > Float8Format<Float8>::kLargest ? 1 : 0;
        const uint32_t pair = convert_pair<Float8>(first, second);
        codes.at[e / 4] |= pair << (e % 4 * 8);
        words[e] |= (pair & 0xffu) << (8 * r);
        words[e + 1] |= (pair >> 8) << (8 * r);
      }
      if (q.y != nullptr) store_whole(reinterpret_cast<uint32_t*>(q.y + (row + r) * q.columns + column), codes);
    }
    if (q.transposed == nullptr) continue;
#pragma unroll
    for (int e = 0; e < 8; ++e) turned[(across * 8 + e) * kWords + down] = words[e];
    __syncthreads();
    // A warp writes 128 bytes of a transposed row.
    for (int i = thread; i < kColumns * (kRows / 4); i += kThreads) {
      const int c = i / (kRows / 4), word = i % (kRows / 4);
      if (tile_column + c >= q.columns || tile_row + word * 4 >= q.transposed_ld) continue;
      uint8_t* to = q.transposed + (tile_column + c) * q.transposed_ld + tile_row;
      reinterpret_cast<uint32_t*>(to)[word] = turned[c * kWords + word];
    }
    __syncthreads();
  }
  if (q.stats == nullptr) return;
  most = block_reduce(most, cuda::Max(), scratch);
  saturated = block_reduce(saturated, cuda::Sum(), scratch);
  if (thread != 0) return;
  atomicMax(&q.stats->amax, static_cast<unsigned long long>(most) << 16);
  if (!converts) return;
  if (saturated > 0) atomicAdd(&q.stats->saturated, static_cast<unsigned long long>(saturated));
  if (blockIdx.x == 0) atomicAdd(&q.stats->converted, static_cast<unsigned long long>(q.rows * q.columns));
}

__global__ void update(const __grid_constant__ Fp8Update u) {
  for (int64_t i = cuda::thread_index(); i < u.count; i += cuda::thread_count()) fp8_update_one(u, i);
}

__global__ void __launch_bounds__(kThreads) verdict(const __grid_constant__ Fp8Verdict v) {
  __shared__ unsigned scratch[32];
  unsigned most = 0;
  for (int64_t i = threadIdx.x; i < v.count; i += kThreads) most = max(most, static_cast<unsigned>(v.stats[i].amax));
  most = block_reduce(most, cuda::Max(), scratch);
  if (threadIdx.x == 0) *v.verdict = fp8_verdict_of(most);
}

}  // namespace

void fp8_quantise(Cuda device, const Fp8Quantise& q) {
  const int64_t rows = q.transposed != nullptr ? q.transposed_ld : q.rows;
  const int64_t tiles_across = divide_up(q.columns, kColumns), tiles = tiles_across * divide_up(rows, kRows);
  if (tiles == 0) return;
  const Grid grid{static_cast<unsigned>(std::min(tiles, kMostBlocks)), kThreads};
  dispatch_fp8(q.format, [&]<class Float8>() {
    start(device, grid, quantise<Float8>, q, tiles_across, tiles, packs_fit<8>(q.x, q.columns));
  });
}

void fp8_verdict(Cuda device, const Fp8Verdict& v) { start(device, {1, kThreads}, verdict, v); }

void fp8_update(Cuda device, const Fp8Update& u) {
  if (u.count > 0) start(device, cuda::grid_for(u.count, 64), update, u);
}

}  // namespace weft
