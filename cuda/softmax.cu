// Softmax and its logarithm along one dimension. A row of neighbours that fits stays in registers, so that each array
// is moved once; a longer one is read twice, the second time from its end, which the caches still have. Sums are of f32
// terms, a few of them in f32 and those in f64.
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>

#include "cuda/device.cuh"
#include "cuda/launch.cuh"
#include "cuda/rows.cuh"
#include "cuda/strided.cuh"
#include "ops/softmax_kernels.h"

namespace weft {
namespace {

using cuda::block_reduce;
using cuda::kFull;
using cuda::kWarp;
using cuda::load_pack;
using cuda::Max;
using cuda::narrow;
using cuda::Pack;
using cuda::RowLayout;
using cuda::start;
using cuda::store_pack;
using cuda::Strided;
using cuda::Sum;
using cuda::widen;

constexpr int kMostThreads = 512;  ///< of a block that holds rows
constexpr int kMostPacks = 4;      ///< that a thread holds

// ---- what is done to an element ----

/// e^(x - max) and its sum, of what one thread has seen.
template <class A>
struct ExpSum {
  A max = -std::numeric_limits<A>::infinity();
  double sum = 0;

  template <int kCount>
  __device__ void add(const A (&x)[kCount]) {
    A larger = max;
#pragma unroll
    for (int e = 0; e < kCount; ++e) larger = Max()(larger, x[e]);
    if (larger == -std::numeric_limits<A>::infinity()) return;  // adds nothing, and has no difference from itself
    if (larger != max) sum *= static_cast<double>(std::exp(max - larger));
    max = larger;
    A more = 0;
#pragma unroll
    for (int e = 0; e < kCount; ++e) more += std::exp(x[e] - larger);
    sum += static_cast<double>(more);
  }
  /// The sum as seen from a row's maximum.
  __device__ double sum_below(A row_max) const {
    return max == row_max ? sum : sum * static_cast<double>(std::exp(max - row_max));
  }
};

/// What turns x into y, from a row's maximum and sum.
template <class A, bool kLog>
struct Normal {
  A max, other;
  __device__ Normal(A row_max, double sum) : max(row_max), other(static_cast<A>(kLog ? std::log(sum) : 1 / sum)) {}
  __device__ A operator()(A x) const { return kLog ? x - max - other : std::exp(x - max) * other; }
};

template <bool kLog, class A>
__device__ A gradient_term(A dy, A y) {
  return kLog ? dy : dy * y;
}
template <bool kLog, class A>
__device__ A gradient(A dy, A y, A sum) {
  return kLog ? fma(-std::exp(y), sum, dy) : y * (dy - sum);
}

// ---- rows in registers ----

template <class T, int kPacks, bool kLog>
__global__ void __launch_bounds__(kMostThreads)
    forward_held(const __grid_constant__ Strided<2> rows, T* y, const T* x, int packs) {
  constexpr int kCount = kFull<T>;
  __shared__ float scratch[kWarp];
  __shared__ double sum_scratch[kWarp];
  const int first = static_cast<int>(threadIdx.x), step = static_cast<int>(blockDim.x);
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < rows.count;
       row += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    int64_t at[2];
    rows.offsets(row, at);
    float v[kPacks][kCount];
    float max = -std::numeric_limits<float>::infinity();
    Pack<T, kCount> in[kPacks];
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (first + p * step < packs) in[p] = load_pack<kCount>(x + at[1] + (first + p * step) * kCount);
    }
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const bool exists = first + p * step < packs;
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        v[p][e] = exists ? widen(in[p].at[e]) : -std::numeric_limits<float>::infinity();
        max = Max()(max, v[p][e]);
      }
    }
    max = block_reduce(max, Max(), scratch);
    float sum = 0;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        const float power = std::exp(v[p][e] - max);
        if constexpr (!kLog) v[p][e] = power;
        sum += power;
      }
    }
    const double total = block_reduce(static_cast<double>(sum), Sum(), sum_scratch);
    const float other = static_cast<float>(kLog ? std::log(total) : 1 / total);
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (first + p * step >= packs) continue;
      Pack<T, kCount> out;
#pragma unroll
      for (int e = 0; e < kCount; ++e) out.at[e] = narrow<T>(kLog ? v[p][e] - max - other : v[p][e] * other);
      store_pack(y + at[0] + (first + p * step) * kCount, out);
    }
  }
}

template <class T, int kPacks, bool kLog>
__global__ void __launch_bounds__(kMostThreads)
    backward_held(const __grid_constant__ Strided<3> rows, T* dx, const T* dy, const T* y, int packs) {
  constexpr int kCount = kFull<T>;
  __shared__ double scratch[kWarp];
  const int first = static_cast<int>(threadIdx.x), step = static_cast<int>(blockDim.x);
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < rows.count;
       row += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    int64_t at[3];
    rows.offsets(row, at);
    cuda::Held<T> g[kPacks], v[kPacks];
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (first + p * step >= packs) continue;
      g[p].load(dy + at[1] + (first + p * step) * kCount);
      v[p].load(y + at[2] + (first + p * step) * kCount);
    }
    float sum = 0;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (first + p * step >= packs) continue;
#pragma unroll
      for (int e = 0; e < kCount; ++e) sum += gradient_term<kLog>(g[p][e], v[p][e]);
    }
    const auto total = static_cast<float>(block_reduce(static_cast<double>(sum), Sum(), scratch));
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (first + p * step >= packs) continue;
      g[p].forget(), v[p].forget();
      Pack<T, kCount> out;
#pragma unroll
      for (int e = 0; e < kCount; ++e) out.at[e] = narrow<T>(gradient<kLog>(g[p][e], v[p][e], total));
      store_pack(dx + at[0] + (first + p * step) * kCount, out);
    }
  }
}

// ---- rows of any length ----

/// Packs that a thread reads of each array before it looks at the first.
template <int kCount, int kArrays>
constexpr int kInFlight = kCount == 1 ? 8 / kArrays : 2;

/// Calls body(base, whole) for every stretch of kPacks packs for each of the block's threads, last stretch first if
/// kBackwards; a thread's packs are base, base + blockDim.x and so on, all of which exist if `whole`.
template <int kPacks, bool kBackwards, class Body>
__device__ void for_stretches(int64_t packs, Body body) {
  const int64_t step = static_cast<int64_t>(blockDim.x) * kPacks, stretches = (packs + step - 1) / step;
  for (int64_t s = 0; s < stretches; ++s) {
    const int64_t begin = (kBackwards ? stretches - 1 - s : s) * step;
    body(begin + threadIdx.x, begin + step <= packs);
  }
}

/// One block to a row, or one warp where blockDim.y counts rows.
template <class T, int kCount, bool kLog>
__global__ void __launch_bounds__(1024)
    forward_any(const __grid_constant__ Strided<2> rows, T* y, const T* x, int64_t packs) {
  using A = Accumulate<T>;
  constexpr int kPacks = kInFlight<kCount, 1>;
  __shared__ A scratch[kWarp];
  __shared__ double sum_scratch[kWarp];
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < rows.count;
       row += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    int64_t at[2];
    rows.offsets(row, at);
    const T* from = x + at[1];
    const auto load = [&](int64_t base, bool whole, Pack<T, kCount>(&in)[kPacks]) {
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        const int64_t pack = base + p * static_cast<int64_t>(blockDim.x);
        if (whole || pack < packs) in[p] = load_pack<kCount>(from + pack * kCount);
      }
    };
    ExpSum<A> own;
    for_stretches<kPacks, false>(packs, [&](int64_t base, bool whole) {
      Pack<T, kCount> in[kPacks];
      load(base, whole, in);
      A wide[kPacks * kCount];
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        const bool exists = whole || base + p * static_cast<int64_t>(blockDim.x) < packs;
#pragma unroll
        for (int e = 0; e < kCount; ++e)
          wide[p * kCount + e] = exists ? widen(in[p].at[e]) : -std::numeric_limits<A>::infinity();
      }
      own.add(wide);
    });
    const A max = block_reduce(own.max, Max(), scratch);
    const Normal<A, kLog> normal(max, block_reduce(own.sum_below(max), Sum(), sum_scratch));
    for_stretches<kPacks, true>(packs, [&](int64_t base, bool whole) {
      Pack<T, kCount> v[kPacks];
      load(base, whole, v);
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        const int64_t pack = base + p * static_cast<int64_t>(blockDim.x);
        if (!whole && pack >= packs) continue;
        Pack<T, kCount> out;
#pragma unroll
        for (int e = 0; e < kCount; ++e) out.at[e] = narrow<T>(normal(widen(v[p].at[e])));
        cuda::store_whole(y + at[0] + pack * kCount, out);
      }
    });
  }
}

template <class T, int kCount, bool kLog>
__global__ void __launch_bounds__(1024)
    backward_any(const __grid_constant__ Strided<3> rows, T* dx, const T* dy, const T* y, int64_t packs) {
  using A = Accumulate<T>;
  constexpr int kPacks = kInFlight<kCount, 2>;
  __shared__ double scratch[kWarp];
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < rows.count;
       row += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    int64_t at[3];
    rows.offsets(row, at);
    const auto load = [&](int64_t base, bool whole, Pack<T, kCount>(&g)[kPacks], Pack<T, kCount>(&v)[kPacks]) {
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        const int64_t pack = base + p * static_cast<int64_t>(blockDim.x);
        if (!whole && pack >= packs) continue;
        g[p] = load_pack<kCount>(dy + at[1] + pack * kCount);
        v[p] = load_pack<kCount>(y + at[2] + pack * kCount);
      }
    };
    double sum = 0;
    for_stretches<kPacks, false>(packs, [&](int64_t base, bool whole) {
      Pack<T, kCount> g[kPacks], v[kPacks];
      load(base, whole, g, v);
      A part = 0;
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        if (!whole && base + p * static_cast<int64_t>(blockDim.x) >= packs) continue;
#pragma unroll
        for (int e = 0; e < kCount; ++e) part += gradient_term<kLog>(widen(g[p].at[e]), widen(v[p].at[e]));
      }
      sum += static_cast<double>(part);
    });
    const A total = static_cast<A>(block_reduce(sum, Sum(), scratch));
    for_stretches<kPacks, true>(packs, [&](int64_t base, bool whole) {
      Pack<T, kCount> g[kPacks], v[kPacks];
      load(base, whole, g, v);
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        const int64_t pack = base + p * static_cast<int64_t>(blockDim.x);
        if (!whole && pack >= packs) continue;
        Pack<T, kCount> out;
#pragma unroll
        for (int e = 0; e < kCount; ++e)
          out.at[e] = narrow<T>(gradient<kLog>(widen(g[p].at[e]), widen(v[p].at[e]), total));
        cuda::store_whole(dx + at[0] + pack * kCount, out);
      }
    });
  }
}

// ---- rows whose elements are not neighbours: a lane to a row, so that neighbouring rows are read together ----

constexpr int kAcross = 32, kAlong = 16;

/// Sum over threadIdx.y, in every thread.
__device__ double sum_along(double own, double (&scratch)[kAlong][kAcross]) {
  scratch[threadIdx.y][threadIdx.x] = own;
  __syncthreads();
  double total = 0;
  for (const auto& part : scratch) total += part[threadIdx.x];
  __syncthreads();
  return total;
}

template <class T, bool kLog>
__global__ void __launch_bounds__(kAcross* kAlong)
    forward_across(const __grid_constant__ Strided<2> rows, T* y, const T* x, int64_t n, int64_t y_step,
                   int64_t x_step) {
  using A = Accumulate<T>;
  __shared__ A maxima[kAlong][kAcross];
  __shared__ double scratch[kAlong][kAcross];
  for (int64_t begin = static_cast<int64_t>(blockIdx.x) * kAcross; begin < rows.count;
       begin += static_cast<int64_t>(gridDim.x) * kAcross) {
    const int64_t row = begin + threadIdx.x;
    const bool exists = row < rows.count;
    int64_t at[2] = {};
    if (exists) rows.offsets(row, at);
    ExpSum<A> own;
    for (int64_t i = threadIdx.y; exists && i < n; i += kAlong) own.add({widen(x[at[1] + i * x_step])});
    maxima[threadIdx.y][threadIdx.x] = own.max;
    __syncthreads();
    A max = own.max;
    for (const auto& part : maxima) max = Max()(max, part[threadIdx.x]);
    const Normal<A, kLog> normal(max, sum_along(own.sum_below(max), scratch));
    for (int64_t i = threadIdx.y; exists && i < n; i += kAlong)
      y[at[0] + i * y_step] = narrow<T>(normal(widen(x[at[1] + i * x_step])));
  }
}

template <class T, bool kLog>
__global__ void __launch_bounds__(kAcross* kAlong)
    backward_across(const __grid_constant__ Strided<3> rows, T* dx, const T* dy, const T* y, int64_t n, int64_t dx_step,
                    int64_t dy_step, int64_t y_step) {
  using A = Accumulate<T>;
  __shared__ double scratch[kAlong][kAcross];
  for (int64_t begin = static_cast<int64_t>(blockIdx.x) * kAcross; begin < rows.count;
       begin += static_cast<int64_t>(gridDim.x) * kAcross) {
    const int64_t row = begin + threadIdx.x;
    const bool exists = row < rows.count;
    int64_t at[3] = {};
    if (exists) rows.offsets(row, at);
    double own = 0;
    for (int64_t i = threadIdx.y; exists && i < n; i += kAlong) {
      own += static_cast<double>(gradient_term<kLog>(widen(dy[at[1] + i * dy_step]), widen(y[at[2] + i * y_step])));
    }
    const A total = static_cast<A>(sum_along(own, scratch));
    for (int64_t i = threadIdx.y; exists && i < n; i += kAlong) {
      dx[at[0] + i * dx_step] =
          narrow<T>(gradient<kLog>(widen(dy[at[1] + i * dy_step]), widen(y[at[2] + i * y_step]), total));
    }
  }
}

// ---- choice ----

/// N arrays as rows along `dim`.
template <int N>
struct Rows {
  Strided<N> rows;
  int64_t n;
  int64_t steps[N];
  bool neighbours = true;  ///< a row's elements, in every array

  Rows(const StridedView* const (&views)[N], int dim) : rows(without(views, dim)), n(views[0]->shape[dim]) {
    for (int a = 0; a < N; ++a) {
      steps[a] = views[a]->strides[dim];
      neighbours = neighbours && (steps[a] == 1 || n == 1);
    }
  }

  template <class T>
  bool in_packs(const StridedView* const (&views)[N]) const {
    bool fit = neighbours && n % kFull<T> == 0;
    for (int a = 0; a < N; ++a) {
      fit = fit && cuda::packs_fit<kFull<T>>(static_cast<const T*>(views[a]->data));
      for (int d = 0; d < rows.rank; ++d) fit = fit && rows.strides[a][d] % kFull<T> == 0;
    }
    return fit;
  }

 private:
  static Strided<N> without(const StridedView* const (&views)[N], int dim) {
    Shape shape = views[0]->shape;
    shape.erase(dim);
    Strides strides[N];
    for (int a = 0; a < N; ++a) {
      strides[a] = views[a]->strides;
      strides[a].erase(dim);
    }
    return [&]<size_t... I>(std::index_sequence<I...>) {
      return Strided<N>(shape, {&strides[I]...});
    }(std::make_index_sequence<N>());
  }
};

/// Chooses a kernel: held(kPacks, packs, grid), any(kCount, packs, grid) or across(grid).
template <class T, int N, class HeldRows, class AnyRows, class Across>
void choose(const Rows<N>& work, const StridedView* const (&views)[N], HeldRows held, AnyRows any, Across across) {
  const int64_t count = work.rows.count;
  if (count == 0 || work.n == 0) return;
  if (!work.neighbours) return across(cuda::Grid{cuda::row_blocks(count, kAcross), dim3(kAcross, kAlong)});
  int64_t packs = work.n;
  bool in_packs = false;
  if constexpr (!std::is_same_v<T, double>) {
    in_packs = work.template in_packs<T>(views);
    if (in_packs) {
      packs /= kFull<T>;
      if (const RowLayout layout = cuda::row_layout(packs, kMostPacks, kMostThreads / kWarp)) {
        const cuda::Grid grid{cuda::row_blocks(count, layout.rows), layout.threads()};
        return cuda::with_packs<kMostPacks>(
            layout.packs, [&]<int kPacks>() { held.template operator()<kPacks>(static_cast<int>(packs), grid); });
      }
    }
  }
  // A warp for a short row, four such rows to a block; else up to 1024 threads.
  const bool small = packs <= 8 * kWarp;
  const auto threads =
      static_cast<unsigned>(std::clamp<int64_t>(cuda::divide_up(packs, 8 * kWarp) * kWarp, kWarp, 1024));
  const cuda::Grid grid{cuda::row_blocks(count, small ? 4 : 1), small ? dim3(kWarp, 4) : dim3(threads)};
  if constexpr (!std::is_same_v<T, double>) {
    if (in_packs) return any.template operator()<kFull<T>>(packs, grid);
  }
  any.template operator()<1>(packs, grid);
}

template <bool kLog>
void forward(Cuda device, const char* op, const StridedView& y_, const StridedView& x_, int dim) {
  const StridedView* const views[2] = {&y_, &x_};
  const Rows<2> work(views, dim);
  dispatch_float(y_.dtype, op, [&]<class T>() {
    T* y = static_cast<T*>(y_.data);
    const T* x = static_cast<const T*>(x_.data);
    choose<T>(
        work, views,
        [&]<int kPacks>(int packs, const cuda::Grid& grid) {
          start(device, grid, forward_held<T, kPacks, kLog>, work.rows, y, x, packs);
        },
        [&]<int kCount>(int64_t packs, const cuda::Grid& grid) {
          start(device, grid, forward_any<T, kCount, kLog>, work.rows, y, x, packs);
        },
        [&](const cuda::Grid& grid) {
          start(device, grid, forward_across<T, kLog>, work.rows, y, x, work.n, work.steps[0], work.steps[1]);
        });
  });
}

template <bool kLog>
void backward(Cuda device, const char* op, const StridedView& dx_, const StridedView& dy_, const StridedView& y_,
              int dim) {
  const StridedView* const views[3] = {&dx_, &dy_, &y_};
  const Rows<3> work(views, dim);
  dispatch_float(dx_.dtype, op, [&]<class T>() {
    T* dx = static_cast<T*>(dx_.data);
    const T *dy = static_cast<const T*>(dy_.data), *y = static_cast<const T*>(y_.data);
    choose<T>(
        work, views,
        [&]<int kPacks>(int packs, const cuda::Grid& grid) {
          start(device, grid, backward_held<T, kPacks, kLog>, work.rows, dx, dy, y, packs);
        },
        [&]<int kCount>(int64_t packs, const cuda::Grid& grid) {
          start(device, grid, backward_any<T, kCount, kLog>, work.rows, dx, dy, y, packs);
        },
        [&](const cuda::Grid& grid) {
          start(device, grid, backward_across<T, kLog>, work.rows, dx, dy, y, work.n, work.steps[0], work.steps[1],
                work.steps[2]);
        });
  });
}

}  // namespace

void softmax(Cuda device, const StridedView& y, const StridedView& x, int dim) {
  forward<false>(device, "softmax", y, x, dim);
}
void log_softmax(Cuda device, const StridedView& y, const StridedView& x, int dim) {
  forward<true>(device, "log_softmax", y, x, dim);
}
void softmax_backward(Cuda device, const StridedView& dx, const StridedView& dy, const StridedView& y, int dim) {
  backward<false>(device, "softmax", dx, dy, y, dim);
}
void log_softmax_backward(Cuda device, const StridedView& dx, const StridedView& dy, const StridedView& y, int dim) {
  backward<true>(device, "log_softmax", dx, dy, y, dim);
}

}  // namespace weft
