// Dropout: the random words are made where they are used, so that each element is read once and written once.
#include <algorithm>
#include <cmath>

#include "cuda/device.cuh"
#include "cuda/launch.cuh"
#include "ops/dropout_kernels.h"

namespace weft {
namespace {

using cuda::kFull;
using cuda::load_pack;
using cuda::Pack;
using cuda::store_pack;

/// Elements that a thread takes together: whole Philox blocks, 16 bytes or more.
template <class T>
constexpr int kTogether = std::max(4, kFull<T>);
constexpr int kThreads = 256;

/// Words number first to first + kCount - 1 of the stream.
template <int kCount>
__device__ void random_words(const RandomStream& stream, uint64_t first, uint32_t (&out)[kCount]) {
  constexpr int kBlocks = kCount / 4;
  const unsigned skip = static_cast<unsigned>(first % 4);  // the same for all threads
  uint32_t words[kCount + 4];
  const auto make = [&](int b) {
    const auto block = stream.block(first / 4 + static_cast<uint64_t>(b));
#pragma unroll
    for (int e = 0; e < 4; ++e) words[4 * b + e] = block[static_cast<size_t>(e)];
  };
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) make(b);
  if (skip != 0) {
    make(kBlocks);
    // Two shifts by constants instead of one by a variable: the words stay in registers.
    if (skip & 1) {
#pragma unroll
      for (int e = 0; e < kCount + 3; ++e) words[e] = words[e + 1];
    }
    if (skip & 2) {
#pragma unroll
      for (int e = 0; e < kCount + 2; ++e) words[e] = words[e + 2];
    }
  }
#pragma unroll
  for (int e = 0; e < kCount; ++e) out[e] = words[e];
}

/// 2 sizeof(T) bytes per element; with kPacks 16 at a time.
template <class T, bool kPacks>
__global__ void __launch_bounds__(kThreads)
    drop(const T* x, T* y, int64_t count, uint64_t threshold, Accumulate<T> scale, RandomStream named, uint64_t first,
         const double* step) {
  const RandomStream stream(named.key(), step == nullptr ? named.step() : static_cast<uint64_t>(*step));
  constexpr int kCount = kTogether<T>, kPack = kFull<T>;
  for (int64_t begin = cuda::thread_index() * kCount; begin < count; begin += cuda::thread_count() * kCount) {
    const bool whole = kPacks && begin + kCount <= count;
    T values[kCount];
    if (whole) {
#pragma unroll
      for (int p = 0; p < kCount; p += kPack) {
        const Pack<T, kPack> pack = load_pack<kPack>(x + begin + p);
#pragma unroll
        for (int e = 0; e < kPack; ++e) values[p + e] = pack.at[e];
      }
    } else {
#pragma unroll
      for (int e = 0; e < kCount; ++e) values[e] = begin + e < count ? x[begin + e] : T(0.0f);
    }
    uint32_t words[kCount];
    random_words(stream, first + static_cast<uint64_t>(begin), words);
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      const auto kept = cuda::narrow<T>(cuda::widen(values[e]) * scale);
      values[e] = words[e] >= threshold ? kept : T(0.0f);
    }
    if (whole) {
#pragma unroll
      for (int p = 0; p < kCount; p += kPack) {
        Pack<T, kPack> pack;
#pragma unroll
        for (int e = 0; e < kPack; ++e) pack.at[e] = values[p + e];
        store_pack(y + begin + p, pack);
      }
    } else {
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        if (begin + e < count) y[begin + e] = values[e];
      }
    }
  }
}

}  // namespace

template <class T>
void dropout_forward(Cuda device, const T* x, T* y, int64_t count, double p, const RandomStream& stream, uint64_t first,
                     const double* step) {
  if (count == 0) return;
  const uint64_t threshold = static_cast<uint64_t>(std::llround(p * 0x1p32));
  const auto scale = static_cast<Accumulate<T>>(1 / (1 - p));
  const bool packs = cuda::packs_fit<kFull<T>>(x) && cuda::packs_fit<kFull<T>>(y);
  start(device, cuda::grid_for(cuda::divide_up(count, kTogether<T>), kThreads), packs ? drop<T, true> : drop<T, false>,
        x, y, count, threshold, scale, stream, first, step);
}

#define WEFT_DROPOUT_INSTANCE(T) \
  template void dropout_forward(Cuda, const T*, T*, int64_t, double, const RandomStream&, uint64_t, const double*);
WEFT_DROPOUT_INSTANCE(float)
WEFT_DROPOUT_INSTANCE(double)
WEFT_DROPOUT_INSTANCE(Half)
WEFT_DROPOUT_INSTANCE(BFloat16)
#undef WEFT_DROPOUT_INSTANCE

}  // namespace weft
