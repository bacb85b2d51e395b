// Layer norm and RMS norm. A row is read once and stays in registers between the passes over it: forwards 2 x-sized
// arrays move (4 with a residual), backwards 3 (4 with a gradient to add), and nothing else of that size.
#include <algorithm>
#include <bit>
#include <cmath>
#include <type_traits>

#include "cuda/device.cuh"
#include "cuda/launch.cuh"
#include "cuda/rows.cuh"
#include "ops/norm_kernels.h"

namespace weft {
namespace {

using cuda::Held;
using cuda::kFull;
using cuda::kWarp;
using cuda::narrow;
using cuda::Pack;
using cuda::RowLayout;
using cuda::start;
using cuda::store_pack;
using cuda::widen;

/// Threads of a block of the kernels that hold rows, at most: each may then have 128 registers.
constexpr int kMostThreads = 512;
/// Threads of a block of the kernels for any row.
constexpr int kThreads = 256;

// ---- forward ----

template <class T, int kPacks>
__global__ void __launch_bounds__(kMostThreads) forward_held(NormForward<T> a) {
  using A = Accumulate<T>;
  constexpr int kCount = kFull<T>;
  __shared__ A scratch[kWarp];
  const int packs = static_cast<int>(a.columns / kCount), first = static_cast<int>(threadIdx.x),
            step = static_cast<int>(blockDim.x);
  const A scale = A(1) / static_cast<A>(a.columns);
  const int64_t row_step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < a.rows; row += row_step) {
    const int64_t begin = row * a.columns;
    Held<T> x[kPacks];
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int at = first + p * step;
      if (at < packs) x[p].load(a.x + begin + at * kCount);
    }
    if (a.residual != nullptr) {
      Held<T> more[kPacks];
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        const int at = first + p * step;
        if (at < packs) more[p].load(a.residual + begin + at * kCount);
      }
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        const int at = first + p * step;
        if (at >= packs) continue;
        Pack<T, kCount> sum;
#pragma unroll
        for (int e = 0; e < kCount; ++e) sum.at[e] = narrow<T>(x[p][e] + more[p][e]);
        x[p] = std::bit_cast<Held<T>>(sum);
        x[p].store(a.sum + begin + at * kCount);
      }
    }
    A mean = 0;
    if (a.mean != nullptr) {
      A sum = 0;
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        if (first + p * step >= packs) continue;
#pragma unroll
        for (int e = 0; e < kCount; ++e) sum += x[p][e];
      }
      mean = cuda::block_reduce(sum, cuda::Sum(), scratch) * scale;
    }
    // Asked for before the second reduction, so that they arrive meanwhile.
    Held<T> weight[kPacks], bias[kPacks];
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int at = first + p * step;
      if (at >= packs) continue;
      weight[p].load(a.weight + at * kCount);
      if (a.bias != nullptr) bias[p].load(a.bias + at * kCount);
    }
    A squares = 0;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (first + p * step >= packs) continue;
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        const A deviation = x[p][e] - mean;
        squares = fma(deviation, deviation, squares);
      }
    }
    squares = cuda::block_reduce(squares, cuda::Sum(), scratch);
    const A rstd = A(1) / std::sqrt(squares * scale + static_cast<A>(a.eps));
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      x[p].forget();
      const int at = first + p * step;
      if (at >= packs) continue;
      Pack<T, kCount> y;
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        const A normal = (x[p][e] - mean) * rstd, w = weight[p][e];
        y.at[e] = narrow<T>(a.bias != nullptr ? fma(normal, w, bias[p][e]) : normal * w);
      }
      store_pack(a.y + begin + at * kCount, y);
    }
    if (threadIdx.x == 0) {
      if (a.mean != nullptr) a.mean[row] = mean;
      a.rstd[row] = rstd;
    }
  }
}

/// Rows of any length and alignment: three passes, of which the caches serve the last two.
template <class T>
__global__ void __launch_bounds__(kThreads) forward_any(NormForward<T> a) {
  using A = Accumulate<T>;
  __shared__ A scratch[kWarp];
  const A scale = A(1) / static_cast<A>(a.columns);
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const int64_t begin = row * a.columns;
    const T* x = a.x + begin;
    if (a.residual != nullptr) {  // every thread reads back only what it has written itself
      for (int64_t c = threadIdx.x; c < a.columns; c += kThreads) {
        a.sum[begin + c] = narrow<T>(widen(x[c]) + widen(a.residual[begin + c]));
      }
      x = a.sum + begin;
    }
    A mean = 0;
    if (a.mean != nullptr) {
      for (int64_t c = threadIdx.x; c < a.columns; c += kThreads) mean += widen(x[c]);
      mean = cuda::block_reduce(mean, cuda::Sum(), scratch) * scale;
    }
    A squares = 0;
    for (int64_t c = threadIdx.x; c < a.columns; c += kThreads) {
      const A deviation = widen(x[c]) - mean;
      squares = fma(deviation, deviation, squares);
    }
    squares = cuda::block_reduce(squares, cuda::Sum(), scratch);
    const A rstd = A(1) / std::sqrt(squares * scale + static_cast<A>(a.eps));
    for (int64_t c = threadIdx.x; c < a.columns; c += kThreads) {
      const A normal = (widen(x[c]) - mean) * rstd, w = widen(a.weight[c]);
      a.y[begin + c] = narrow<T>(a.bias != nullptr ? fma(normal, w, widen(a.bias[c])) : normal * w);
    }
    if (threadIdx.x == 0) {
      if (a.mean != nullptr) a.mean[row] = mean;
      a.rstd[row] = rstd;
    }
  }
}

// ---- backward ----

/// Sums of two numbers over the threads of a row, in every one of them. The barrier is the whole block's; the next call
/// must bring the other half of `scratch`, which is why one barrier is enough.
template <class A>
__device__ void row_sums(A (&sums)[2], A (*scratch)[kMostThreads / kWarp]) {
#pragma unroll
  for (A& sum : sums) sum = cuda::warp_reduce(sum, cuda::Sum());
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  if (warps == 1) return;
  const int row_warp = static_cast<int>(threadIdx.y) * warps;
  if (threadIdx.x % kWarp == 0) {
    const int warp = row_warp + static_cast<int>(threadIdx.x) / kWarp;
    for (int i = 0; i < 2; ++i) scratch[i][warp] = sums[i];
  }
  __syncthreads();
  for (int i = 0; i < 2; ++i) {
    sums[i] = scratch[i][row_warp];
    for (int w = 1; w < warps; ++w) sums[i] += scratch[i][row_warp + w];
  }
}

/// What a row's gradient is made of, as far as one thread holds it.
template <class T, int kPacks>
struct GradientRow {
  Held<T> x[kPacks], dy[kPacks];
  Accumulate<T> mean, rstd;

  __device__ void load(const NormBackward<T>& a, int64_t row, int packs) {
    constexpr int kCount = kFull<T>;
    if (row >= a.rows) return;
    const int64_t begin = row * a.columns;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int at = static_cast<int>(threadIdx.x + p * blockDim.x);
      if (at >= packs) continue;
      x[p].load(a.x + begin + at * kCount);
      dy[p].load(a.dy + begin + at * kCount);
    }
    mean = a.mean != nullptr ? a.mean[row] : Accumulate<T>(0);
    rstd = a.rstd[row];
  }
};

/// A block goes through every gridDim.x-th group of blockDim.y rows, all its rows side by side; a thread keeps the sums
/// for weight and bias of its columns in registers until the end. With kAhead the next row is asked for before this one
/// is reduced.
template <class T, int kPacks, bool kCentered, bool kAhead>
__global__ void __launch_bounds__(kMostThreads) backward_held(NormBackward<T> a) {
  using A = Accumulate<T>;
  constexpr int kCount = kFull<T>;
  __shared__ A scratch[2][2][kMostThreads / kWarp];
  const int packs = static_cast<int>(a.columns / kCount), first = static_cast<int>(threadIdx.x),
            step = static_cast<int>(blockDim.x);
  const A scale = A(1) / static_cast<A>(a.columns);
  Held<T> weight[kPacks];
  A dweight[kPacks][kCount] = {}, dbias[kPacks][kCount] = {};
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int at = first + p * step;
    if (at < packs) weight[p].load(a.weight + at * kCount);
  }
  const int64_t row_step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  GradientRow<T, kPacks> next;
  if constexpr (kAhead) next.load(a, row, packs);
  int half = 0;
  // All rows of the block take part in its barriers, as long as its first one exists.
  for (int64_t block_row = row - threadIdx.y; block_row < a.rows; block_row += row_step, row += row_step, half ^= 1) {
    GradientRow<T, kPacks> now;
    if constexpr (kAhead) {
      now = next;
      next.load(a, row + row_step, packs);
    } else {
      now.load(a, row, packs);
    }
    const bool exists = row < a.rows;
    const int64_t begin = row * a.columns;
    Held<T> added[kPacks];
    if (a.added != nullptr && exists) {
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        const int at = first + p * step;
        if (at < packs) added[p].load(a.added + begin + at * kCount);
      }
    }
    A sums[2] = {};  // of dy weight, and of that times the normalised x
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (!exists || first + p * step >= packs) continue;
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        const A g = now.dy[p][e], normal = (now.x[p][e] - now.mean) * now.rstd;
        const A scaled = g * weight[p][e];
        sums[1] = fma(scaled, normal, sums[1]);
        dweight[p][e] = fma(g, normal, dweight[p][e]);
        if constexpr (kCentered) {
          sums[0] += scaled;
          dbias[p][e] += g;
        }
      }
    }
    if (a.dx == nullptr) continue;
    row_sums(sums, scratch[half]);
#pragma unroll
    for (int p = 0; p < kPacks; ++p) now.x[p].forget(), now.dy[p].forget(), weight[p].forget();
    const A mean_plain = sums[0] * scale, mean_weighted = sums[1] * scale;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int at = first + p * step;
      if (!exists || at >= packs) continue;
      Pack<T, kCount> dx;
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        const A normal = (now.x[p][e] - now.mean) * now.rstd;
        A g = now.dy[p][e] * weight[p][e];
        if constexpr (kCentered) g -= mean_plain;
        g = fma(-normal, mean_weighted, g) * now.rstd;
        if (a.added != nullptr) g += added[p][e];
        dx.at[e] = narrow<T>(g);
      }
      store_pack(a.dx + begin + at * kCount, dx);
    }
  }
  // The block's rows side by side become one.
  A* const partial = a.partials + static_cast<int64_t>(blockIdx.x) * 2 * a.columns;
  A* const shared = cuda::dynamic_shared<A>();  // [blockDim.y, columns]
  const int columns = packs * kCount, threads = static_cast<int>(blockDim.x * blockDim.y);
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    A* const to = blockDim.y == 1 ? partial + which * columns : shared + threadIdx.y * columns;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int at = first + p * step;
      if (at >= packs) continue;
#pragma unroll
      for (int e = 0; e < kCount; ++e) to[at * kCount + e] = which == 0 ? dweight[p][e] : dbias[p][e];
    }
    if (blockDim.y == 1) continue;
    __syncthreads();
    for (int c = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x); c < columns; c += threads) {
      A total = shared[c];
      for (int r = 1; r < static_cast<int>(blockDim.y); ++r) total += shared[r * columns + c];
      partial[which * columns + c] = total;
    }
    __syncthreads();
  }
}

/// Rows of any length and alignment; the sums for weight and bias are kept in `partials` itself.
template <class T>
__global__ void __launch_bounds__(kThreads) backward_any(NormBackward<T> a) {
  using A = Accumulate<T>;
  __shared__ A scratch[kWarp];
  const A scale = A(1) / static_cast<A>(a.columns);
  const bool centered = a.mean != nullptr;
  A* const dweight = a.partials + static_cast<int64_t>(blockIdx.x) * 2 * a.columns;
  A* const dbias = dweight + a.columns;
  for (int64_t c = threadIdx.x; c < a.columns; c += kThreads) dweight[c] = dbias[c] = 0;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const int64_t begin = row * a.columns;
    const A mean = centered ? a.mean[row] : A(0), rstd = a.rstd[row];
    A plain = 0, weighted = 0;
    for (int64_t c = threadIdx.x; c < a.columns; c += kThreads) {
      const A g = widen(a.dy[begin + c]), normal = (widen(a.x[begin + c]) - mean) * rstd;
      const A scaled = g * widen(a.weight[c]);
      weighted = fma(scaled, normal, weighted);
      dweight[c] = fma(g, normal, dweight[c]);
      if (centered) {
        plain += scaled;
        dbias[c] += g;
      }
    }
    if (a.dx == nullptr) continue;
    plain = cuda::block_reduce(plain, cuda::Sum(), scratch) * scale;
    weighted = cuda::block_reduce(weighted, cuda::Sum(), scratch) * scale;
    for (int64_t c = threadIdx.x; c < a.columns; c += kThreads) {
      const A normal = (widen(a.x[begin + c]) - mean) * rstd;
      A g = fma(-normal, weighted, widen(a.dy[begin + c]) * widen(a.weight[c]) - plain) * rstd;
      if (a.added != nullptr) g += widen(a.added[begin + c]);
      a.dx[begin + c] = narrow<T>(g);
    }
  }
}

/// In packs that a thread may hold; backwards each brings its share of the sums as well.
constexpr int kMostForward = 4;
template <class T>
constexpr int kMostBackward = sizeof(T) == 4 ? 4 : 3;

/// Backwards a block has as many rows as its warps allow, which wait for each other: the layout with the fewest threads
/// without work in blocks of 256, or for long rows 512.
RowLayout side_by_side(int64_t packs, int most_packs) {
  const auto within = [&](int block_warps) {
    RowLayout best;
    for (int warps = 1; warps <= block_warps; ++warps) {
      const int64_t each = cuda::divide_up(packs, kWarp * warps);
      if (each > most_packs) continue;
      const int rows = block_warps / warps;
      // Of a block's block_warps * each slots, rows * packs are used.
      if (!best || rows * best.packs > best.rows * each) best = {warps, static_cast<int>(each), rows};
    }
    return best;
  };
  const RowLayout best = within(8);
  return best ? best : within(kMostThreads / kWarp);
}

/// Whether all arrays can be read in packs.
template <class T, class... Arrays>
bool in_packs(int64_t columns, const Arrays*... arrays) {
  return columns % kFull<T> == 0 && (cuda::packs_fit<kFull<T>>(arrays) && ...);
}

}  // namespace

/// Two to each multiprocessor of an H100 or H200, whose sums then stay in registers from the first row to the last.
int64_t norm_blocks(Cuda, int64_t rows) { return std::min<int64_t>(rows, 264); }

template <class T>
void norm_forward(Cuda device, const NormForward<T>& a) {
  if (a.rows == 0) return;
  if constexpr (!std::is_same_v<T, double>) {
    RowLayout layout;
    if (in_packs<T>(a.columns, a.x, a.residual, a.weight, a.bias, a.sum, a.y)) {
      layout = cuda::row_layout(a.columns / kFull<T>, kMostForward, kMostThreads / kWarp);
    }
    if (layout) {
      return cuda::with_packs<kMostForward>(layout.packs, [&]<int kPacks>() {
        start(device, {cuda::row_blocks(a.rows, layout.rows), layout.threads()}, forward_held<T, kPacks>, a);
      });
    }
  }
  start(device, {cuda::row_blocks(a.rows, 1), kThreads}, forward_any<T>, a);
}

template <class T>
void norm_backward(Cuda device, const NormBackward<T>& a) {
  if (a.rows == 0) return;
  const auto blocks = static_cast<unsigned>(norm_blocks(device, a.rows));
  if constexpr (!std::is_same_v<T, double>) {
    constexpr int kMost = kMostBackward<T>;
    RowLayout layout;
    if (in_packs<T>(a.columns, a.dy, a.x, a.weight, a.added, a.dx)) {
      layout = side_by_side(a.columns / kFull<T>, kMost);
    }
    if (layout) {
      const size_t shared = layout.rows == 1 ? 0 : static_cast<size_t>(layout.rows * a.columns) * sizeof(Accumulate<T>);
      const cuda::Grid grid{blocks, layout.threads(), shared};
      return cuda::with_packs<kMost>(layout.packs, [&]<int kPacks>() {
        constexpr bool kAhead = kPacks <= 2;  // more would not fit into registers
        if (a.mean != nullptr) {
          start(device, grid, backward_held<T, kPacks, true, kAhead>, a);
        } else {
          start(device, grid, backward_held<T, kPacks, false, kAhead>, a);
        }
      });
    }
  }
  start(device, {blocks, kThreads}, backward_any<T>, a);
}

#define WEFT_NORM_INSTANCE(T)                              \
  template void norm_forward(Cuda, const NormForward<T>&); \
  template void norm_backward(Cuda, const NormBackward<T>&);
WEFT_NORM_INSTANCE(float)
WEFT_NORM_INSTANCE(double)
WEFT_NORM_INSTANCE(Half)
WEFT_NORM_INSTANCE(BFloat16)
#undef WEFT_NORM_INSTANCE

}  // namespace weft
