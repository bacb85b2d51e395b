// Copies with casts, fills and sums of strided arrays: what the tensor runtime asks of the device.
#include "cuda/strided.h"

#include <array>
#include <bit>
#include <limits>
#include <type_traits>

#include "cuda/device.cuh"
#include "cuda/launch.cuh"
#include "cuda/strided.cuh"

namespace weft::cuda {
namespace {

// ---- one element cast: the rules of core/backend.h ----

template <class T>
constexpr bool kIsInteger = std::is_integral_v<T> && !std::is_same_v<T, bool>;

/// Truncated towards zero and saturated; NaN gives 0.
template <class Integer>
WEFT_HD Integer saturated(double x) {
  constexpr double kLow = static_cast<double>(std::numeric_limits<Integer>::min());
  constexpr double kEnd =
      static_cast<double>(std::numeric_limits<Integer>::max() / 2 + 1) * 2;  // exact, one past the largest
  if (x != x) return 0;
  if (x <= kLow) return std::numeric_limits<Integer>::min();
  if (x >= kEnd) return std::numeric_limits<Integer>::max();
  return static_cast<Integer>(x);
}

template <class Integer>
__device__ Integer saturated(int64_t x) {
  constexpr int64_t kLow = std::numeric_limits<Integer>::min(), kHigh = std::numeric_limits<Integer>::max();
  return static_cast<Integer>(x < kLow ? kLow : x > kHigh ? kHigh : x);
}

template <class To, class From>
__device__ To cast(From x) {
  if constexpr (std::is_same_v<To, From>) {
    return x;
  } else if constexpr (std::is_same_v<To, bool>) {
    if constexpr (std::is_integral_v<From>)
      return x != 0;
    else
      return static_cast<double>(x) != 0;
  } else if constexpr (std::is_integral_v<From> && kIsInteger<To>) {
    return saturated<To>(static_cast<int64_t>(x));
  } else if constexpr (std::is_integral_v<From>) {
    return To(static_cast<int64_t>(x));
  } else if constexpr (kIsInteger<To>) {
    return saturated<To>(static_cast<double>(x));
  } else if constexpr (std::is_same_v<From, double>) {
    return To(x);
  } else if constexpr (std::is_same_v<To, double>) {
    return static_cast<double>(widen(x));
  } else if constexpr (std::is_same_v<To, Float8E4M3> || std::is_same_v<To, Float8E5M2>) {
    return To(widen(x));
  } else {
    return narrow<To>(widen(x));
  }
}

// ---- copies ----

template <class To, class From>
__global__ void copy_strided(const __grid_constant__ Strided<2> at, To* dst, const From* src) {
  for (int64_t i = thread_index(); i < at.count; i += thread_count()) {
    int64_t offset[2];
    at.offsets(i, offset);
    dst[offset[0]] = cast<To>(src[offset[1]]);
  }
}

/// Both in order and aligned to packs of kCount; the last few elements one by one.
template <int kCount, class To, class From>
__global__ void copy_flat(int64_t count, To* dst, const From* src) {
  for (int64_t i = thread_index(); i * kCount < count; i += thread_count()) {
    const int64_t first = i * kCount;
    if (first + kCount > count) {
      for (int64_t k = first; k < count; ++k) dst[k] = cast<To>(src[k]);
      continue;
    }
    const Pack<From, kCount> in = load_pack<kCount>(src + first);
    Pack<To, kCount> out;
#pragma unroll
    for (int k = 0; k < kCount; ++k) out.at[k] = cast<To>(in.at[k]);
    store_pack(dst + first, out);
  }
}

/// Transposes through shared memory, so that both sides move in whole lines: dst[r][c] = src[c][r], where `src` has
/// stride 1 along r and `dst` along c.
constexpr int kTile = 32, kTileRows = 8;
template <class Bits>
__global__ void copy_transposed(int64_t rows, int64_t columns, Bits* dst, int64_t dst_stride, const Bits* src,
                                int64_t src_stride, int64_t batch_dst, int64_t batch_src) {
  __shared__ Bits tile[kTile][kTile + 1];
  dst += blockIdx.z * batch_dst;
  src += blockIdx.z * batch_src;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kTile;
  for (int64_t column0 = static_cast<int64_t>(blockIdx.y) * kTile; column0 < columns;
       column0 += static_cast<int64_t>(gridDim.y) * kTile) {
    for (int i = static_cast<int>(threadIdx.y); i < kTile; i += kTileRows) {
      if (column0 + i < columns && row0 + threadIdx.x < rows)
        tile[i][threadIdx.x] = src[(column0 + i) * src_stride + row0 + threadIdx.x];
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.y); i < kTile; i += kTileRows) {
      if (row0 + i < rows && column0 + threadIdx.x < columns)
        dst[(row0 + i) * dst_stride + column0 + threadIdx.x] = tile[threadIdx.x][i];
    }
    __syncthreads();
  }
}

template <class Bits>
bool copied_as_transpose(Cuda device, const Strided<2>& at, void* dst, const void* src) {
  if (at.rank < 2 || at.rank > 3) return false;
  const int r = at.rank - 2, c = at.rank - 1;
  const int64_t batch = at.rank == 3 ? at.sizes[0] : 1;
  if (at.strides[0][c] != 1 || at.strides[1][r] != 1 || at.sizes[r] < 8 || at.sizes[c] < 8 || batch > 65535)
    return false;
  const Grid grid{dim3(static_cast<unsigned>(divide_up(at.sizes[r], kTile)),
                       static_cast<unsigned>(std::min<int64_t>(divide_up(at.sizes[c], kTile), 65535)),
                       static_cast<unsigned>(batch)),
                  dim3(kTile, kTileRows)};
  start(device, grid, copy_transposed<Bits>, at.sizes[r], at.sizes[c], static_cast<Bits*>(dst), at.strides[0][r],
        static_cast<const Bits*>(src), at.strides[1][c], at.rank == 3 ? at.strides[0][0] : 0,
        at.rank == 3 ? at.strides[1][0] : 0);
  return true;
}

template <class To, class From>
void copy_as(Cuda device, const Strided<2>& at, void* dst_, const void* src_) {
  To* dst = static_cast<To*>(dst_);
  const From* src = static_cast<const From*>(src_);
  constexpr int kCount = 16 / static_cast<int>(sizeof(To) > sizeof(From) ? sizeof(To) : sizeof(From));
  if (at.is_flat(0) && at.is_flat(1) && packs_fit<kCount>(dst) && packs_fit<kCount>(src)) {
    start(device, grid_for(divide_up(at.count, kCount)), copy_flat<kCount, To, From>, at.count, dst, src);
  } else {
    start(device, grid_for(at.count), copy_strided<To, From>, at, dst, src);
  }
}

// ---- fill and add ----

template <class T>
__global__ void fill_strided(const __grid_constant__ Strided<1> at, T* dst, T value) {
  for (int64_t i = thread_index(); i < at.count; i += thread_count()) {
    int64_t offset[1];
    at.offsets(i, offset);
    dst[offset[0]] = value;
  }
}

template <class T>
__global__ void add_strided(const __grid_constant__ Strided<2> at, T* dst, const T* src) {
  for (int64_t i = thread_index(); i < at.count; i += thread_count()) {
    int64_t offset[2];
    at.offsets(i, offset);
    dst[offset[0]] = narrow<T>(widen(dst[offset[0]]) + widen(src[offset[1]]));
  }
}

template <int kCount, class T>
__global__ void add_flat(int64_t count, T* dst, const T* src) {
  for (int64_t i = thread_index(); i * kCount < count; i += thread_count()) {
    const int64_t first = i * kCount;
    if (first + kCount > count) {
      for (int64_t k = first; k < count; ++k) dst[k] = narrow<T>(widen(dst[k]) + widen(src[k]));
      continue;
    }
    Pack<T, kCount> sum = load_pack<kCount>(dst + first);
    const Pack<T, kCount> more = load_pack<kCount>(src + first);
#pragma unroll
    for (int k = 0; k < kCount; ++k) sum.at[k] = narrow<T>(widen(sum.at[k]) + widen(more.at[k]));
    store_pack(dst + first, sum);
  }
}

}  // namespace

void copy(Cuda device, const StridedView& dst, const StridedView& src) {
  const Strided<2> at(dst.shape, {&dst.strides, &src.strides});
  if (at.count == 0) return;
  if (dst.dtype == src.dtype) {
    const auto size = static_cast<size_t>(size_of(dst.dtype));
    if (at.is_flat(0) && at.is_flat(1)) {
      WEFT_CUDA(cudaMemcpyAsync(dst.data, src.data, static_cast<size_t>(at.count) * size, cudaMemcpyDeviceToDevice,
                                static_cast<cudaStream_t>(device.stream)));
      return;
    }
    // No arithmetic: by the size of an element alone.
    const auto run = [&]<class Bits>() {
      if (!copied_as_transpose<Bits>(device, at, dst.data, src.data))
        copy_as<Bits, Bits>(device, at, dst.data, src.data);
    };
    return dispatch_bytes(static_cast<int64_t>(size), run);
  }
  dispatch_all(dst.dtype, [&]<class To>() {
    dispatch_all(src.dtype, [&]<class From>() { copy_as<To, From>(device, at, dst.data, src.data); });
  });
}

void fill(Cuda device, const StridedView& dst, double value) {
  const Strided<1> at(dst.shape, {&dst.strides});
  if (at.count == 0) return;
  dispatch_all(dst.dtype, [&]<class T>() {
    T one;
    if constexpr (std::is_same_v<T, bool>)
      one = value != 0;
    else if constexpr (std::is_integral_v<T>)
      one = saturated<T>(value);
    else
      one = T(value);
    if (at.is_flat(0) &&
        std::bit_cast<std::array<unsigned char, sizeof(T)>>(one) == std::array<unsigned char, sizeof(T)>{}) {
      WEFT_CUDA(cudaMemsetAsync(dst.data, 0, static_cast<size_t>(at.count) * sizeof(T),
                                static_cast<cudaStream_t>(device.stream)));
      return;
    }
    start(device, grid_for(at.count), fill_strided<T>, at, static_cast<T*>(dst.data), one);
  });
}

void add(Cuda device, const StridedView& dst, const StridedView& src) {
  const Strided<2> at(dst.shape, {&dst.strides, &src.strides});
  if (at.count == 0) return;
  dispatch_float(dst.dtype, "accumulate", [&]<class T>() {
    T* to = static_cast<T*>(dst.data);
    const T* from = static_cast<const T*>(src.data);
    if (at.is_flat(0) && at.is_flat(1) && packs_fit<kFull<T>>(to) && packs_fit<kFull<T>>(from)) {
      start(device, grid_for(divide_up(at.count, kFull<T>)), add_flat<kFull<T>, T>, at.count, to, from);
    } else {
      start(device, grid_for(at.count), add_strided<T>, at, to, from);
    }
  });
}

}  // namespace weft::cuda
