// Softmax cross-entropy: a block to a row of logits. Bytes of device memory per logit: sizeof(T) for the losses alone,
// 2 sizeof(T) for a gradient beside the logits, 4 + sizeof(T) for losses and gradient in place.
#include <algorithm>
#include <limits>

#include "cuda/async_copy.cuh"
#include "cuda/context.h"
#include "cuda/device.cuh"
#include "cuda/fault.cuh"
#include "cuda/launch.cuh"
#include "cuda/store_whole.cuh"
#include "ops/loss_kernels.h"

namespace weft {
namespace {

using cuda::block_reduce;
using cuda::divide_up;
using cuda::kFull;
using cuda::kWarp;
using cuda::load_pack;
using cuda::narrow;
using cuda::Pack;
using cuda::packs_fit;
using cuda::start;
using cuda::store_pack;
using cuda::store_whole;
using cuda::widen;

constexpr int kRowThreads = 512;
constexpr int64_t kMostBlocks = 1 << 20;
/// Packs that a thread loads before it looks at the first.
constexpr int kFlight = 4;

/// Threads for a row: whole warps, with kFlight packs for each thread of a long one.
int row_threads(int64_t packs) {
  return static_cast<int>(std::clamp<int64_t>(divide_up(packs, kFlight * kWarp) * kWarp, kWarp, kRowThreads));
}

template <class A>
constexpr A kNothing = -std::numeric_limits<A>::infinity();

__device__ bool is_class(const LossTargets& t, int64_t target) { return target >= 0 && target < t.classes; }
/// A target that is no class has been reported; its row is left out like an ignored one.
__device__ bool is_valid(const LossTargets& t, int64_t target) { return target != t.ignored && is_class(t, target); }

template <class A>
__device__ double value_of(const LossScale<A>& scale) {
  return (scale.gradient == nullptr ? 1 : static_cast<double>(*scale.gradient)) / *scale.denominator;
}

/// The gradient of the target's class, probability - 1, without the cancellation that a subtraction would have.
template <class T>
__device__ T target_gradient(double log_probability, double scale) {
  return narrow<T>(static_cast<Accumulate<T>>(expm1(log_probability) * scale));
}

/// The largest of some logits and the sum of their exponentials, taken relative to it so that none overflows.
template <class A>
struct ExpSum {
  A largest = kNothing<A>;
  A sum = 0;

  /// What exponents are relative to: -inf less -inf would be NaN.
  __device__ static A shift(A largest) { return largest == kNothing<A> ? A(0) : largest; }
  __device__ void rescale(A to) {
    sum *= exp(largest - shift(to));
    largest = to;
  }

  /// fmax passes over a NaN, which the sum then keeps.
  template <class T, int kCount, int kPacks>
  __device__ void add(const Pack<T, kCount> (&packs)[kPacks]) {
    A next = largest;
#pragma unroll
    for (int u = 0; u < kPacks; ++u) {
#pragma unroll
      for (int e = 0; e < kCount; ++e) next = fmax(next, static_cast<A>(widen(packs[u].at[e])));
    }
    rescale(next);
    const A from = shift(next);
#pragma unroll
    for (int u = 0; u < kPacks; ++u) {
#pragma unroll
      for (int e = 0; e < kCount; ++e) sum += exp(widen(packs[u].at[e]) - from);
    }
  }

  /// What all threads of the block have, for each of them.
  __device__ void join(A* scratch) {
    rescale(block_reduce(largest, cuda::Max{}, scratch));
    sum = block_reduce(sum, cuda::Sum{}, scratch);
  }
  __device__ double log_sum_exp() const { return static_cast<double>(largest) + log(static_cast<double>(sum)); }

  /// Logits of this thread's packs from number `begin` on.
  template <int kCount, class T>
  __device__ void add_row(const T* row, int64_t begin, int64_t packs) {
    for (int64_t p = begin + threadIdx.x; p < packs; p += kFlight * blockDim.x) {
      Pack<T, kCount> in[kFlight];
#pragma unroll
      for (int u = 0; u < kFlight; ++u) {
        const int64_t at = p + u * blockDim.x;
        if (at < packs) {
          in[u] = load_pack<kCount>(row + at * kCount);
        } else {
#pragma unroll
          for (int e = 0; e < kCount; ++e) in[u].at[e] = T(kNothing<float>);
        }
      }
      add(in);
    }
  }
};

// ---- targets and totals: one block ----

constexpr int kTotalThreads = 1024;

struct Earlier {
  __device__ int64_t operator()(int64_t a, int64_t b) const { return a < b ? a : b; }
};

__global__ void __launch_bounds__(kTotalThreads)
    count_targets(LossTargets t, const char* op, KnownDenominator given, double* denominator, cuda::Fault* fault) {
  __shared__ int64_t scratch[kWarp];
  int64_t valid = 0, outside = t.rows;
#pragma unroll 8
  for (int64_t row = threadIdx.x; row < t.rows; row += kTotalThreads) {
    const int64_t target = t.targets[row];
    valid += is_valid(t, target);
    if (target != t.ignored && !is_class(t, target)) outside = Earlier{}(outside, row);
  }
  valid = block_reduce(valid, cuda::Sum{}, scratch);
  outside = block_reduce(outside, Earlier{}, scratch);
  if (threadIdx.x != 0) return;
  const double known = given.at == nullptr ? given.value : *given.at;
  *denominator = known > 0 ? known : static_cast<double>(valid);
  if (outside < t.rows) {
    cuda::report(fault, cuda::Fault::kOutside, op, "targets", outside, t.targets[outside], t.classes);
  } else if (known <= 0 && valid == 0) {
    cuda::report(fault, cuda::Fault::kNoTarget, op, "targets", 0, 0, t.rows);
  }
}

/// Each thread adds every 1024th loss, then the threads' sums are added pairwise.
template <class A>
__global__ void __launch_bounds__(kTotalThreads)
    total_loss(const double* losses, int64_t rows, const double* denominator, A* out) {
  __shared__ double scratch[kWarp];
  double sum = 0;
#pragma unroll 8
  for (int64_t row = threadIdx.x; row < rows; row += kTotalThreads) sum += losses[row];
  sum = block_reduce(sum, cuda::Sum{}, scratch);
  if (threadIdx.x == 0) *out = static_cast<A>(sum / *denominator);
}

// ---- losses alone ----

template <class T, int kCount>
__global__ void __launch_bounds__(kRowThreads, 2)
    row_losses(LossTargets t, const T* logits, Accumulate<T>* lse, double* loss) {
  using A = Accumulate<T>;
  __shared__ A scratch[kWarp];
  for (int64_t n = blockIdx.x; n < t.rows; n += gridDim.x) {
    const int64_t target = t.targets[n];
    if (!is_valid(t, target)) {
      if (threadIdx.x == 0) {
        if (lse != nullptr) lse[n] = 0;
        loss[n] = 0;
      }
      continue;
    }
    const T* row = logits + n * t.classes;
    ExpSum<A> part;
    part.template add_row<kCount>(row, 0, t.classes / kCount);
    part.join(scratch);
    if (threadIdx.x == 0) {
      const double value = part.log_sum_exp();
      if (lse != nullptr) lse[n] = static_cast<A>(value);
      loss[n] = value - static_cast<double>(widen(row[target]));
    }
  }
}

// ---- gradient beside the logits ----

constexpr int kPieceThreads = 256;

/// A block takes kFlight packs per thread of a row; blockIdx.x counts such pieces, blockIdx.y rows.
template <class T, int kCount>
__global__ void __launch_bounds__(kPieceThreads)
    logits_gradient(LossTargets t, const T* logits, const Accumulate<T>* lse, LossScale<Accumulate<T>> by, T* dlogits) {
  using A = Accumulate<T>;
  const int64_t packs = t.classes / kCount,
                first = static_cast<int64_t>(blockIdx.x) * kFlight * kPieceThreads + threadIdx.x;
  for (int64_t n = blockIdx.y; n < t.rows; n += gridDim.y) {
    const int64_t target = t.targets[n];
    const bool valid = is_valid(t, target);
    const T* row = logits + n * t.classes;
    T* out = dlogits + n * t.classes;
    Pack<T, kCount> values[kFlight];
#pragma unroll
    for (int u = 0; u < kFlight; ++u) {
      const int64_t at = first + u * kPieceThreads;
      if (valid && at < packs) values[u] = load_pack<kCount>(row + at * kCount);
    }
    // In the place of the logits themselves nothing may be written before it is read.
    const bool owner = valid && target / kCount >= first && target / kCount < first + kFlight * kPieceThreads &&
                       (target / kCount - first) % kPieceThreads == 0;
    const double log_probability = owner ? static_cast<double>(widen(row[target])) - static_cast<double>(lse[n]) : 0;
    const double scale = valid ? value_of(by) : 0;
    const A factor = static_cast<A>(scale), shift = valid ? lse[n] : A(0);
#pragma unroll
    for (int u = 0; u < kFlight; ++u) {
      const int64_t at = first + u * kPieceThreads;
      if (at >= packs) break;
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        values[u].at[e] = valid ? narrow<T>(exp(widen(values[u].at[e]) - shift) * factor) : T(0.0f);
      }
      store_whole(out + at * kCount, values[u]);
    }
    if (owner) out[target] = target_gradient<T>(log_probability, scale);
  }
}

// ---- losses and gradient in place ----

/// A row's first `held` packs of logits (all, or a multiple of the block's threads) are copied to shared memory, where
/// they become exponentials and then, on their way out, the gradient; as a place becomes free it takes in the next
/// row's logits, so that loads and stores run at the same time. A thread copies the packs that it works on itself, and
/// nobody else looks at them. Packs beyond `held` are read twice.
template <class T, int kCount>
__global__ void __launch_bounds__(kRowThreads, 1)
    losses_in_place(LossTargets t, Accumulate<T>* logits, LossScale<Accumulate<T>> by, double* loss, int64_t held) {
  using A = Accumulate<T>;
  using In = Pack<A, kCount>;
  using Out = Pack<T, kCount>;
  __shared__ A scratch[kWarp];
  In* const kept = cuda::dynamic_shared<In>();
  const int64_t packs = t.classes / kCount;
  const int threads = static_cast<int>(blockDim.x);
  const auto fetch = [&](const A* row, int64_t p) { cuda::load_async<sizeof(In)>(kept + p, row + p * kCount); };
  const auto wanted = [&](int64_t n) { return n < t.rows && is_valid(t, t.targets[n]); };
  const auto scaled = [](const In& in, A factor) {
    Out out;
#pragma unroll
    for (int e = 0; e < kCount; ++e) out.at[e] = narrow<T>(in.at[e] * factor);
    return out;
  };

  if (wanted(blockIdx.x)) {
    for (int64_t p = threadIdx.x; p < held; p += threads) fetch(logits + blockIdx.x * t.classes, p);
  }
  for (int64_t n = blockIdx.x; n < t.rows; n += gridDim.x) {
    A* const row = logits + n * t.classes;
    T* const out = reinterpret_cast<T*>(row);
    const A* const next = row + gridDim.x * t.classes;
    const bool has_next = wanted(n + gridDim.x);
    const int64_t target = t.targets[n];
    if (!is_valid(t, target)) {
      const Out zeros = scaled(In{}, A(0));
      for (int64_t p = threadIdx.x; p < packs; p += threads) store_whole(out + p * kCount, zeros);
      for (int64_t p = threadIdx.x; has_next && p < held; p += threads) fetch(next, p);
      if (threadIdx.x == 0) loss[n] = 0;
      continue;
    }
    // The thread that writes the target's pack writes its element again at the end.
    const bool owner = target / kCount % threads == threadIdx.x;
    const double logit = owner ? static_cast<double>(row[target]) : 0;

    ExpSum<A> part;
    part.template add_row<kCount>(row, held, packs);
    A largest = part.largest;
    cuda::wait_for_loads();
#pragma unroll 4
    for (int64_t p = threadIdx.x; p < held; p += threads) {
      const In in = kept[p];
#pragma unroll
      for (int e = 0; e < kCount; ++e) largest = fmax(largest, in.at[e]);
    }
    largest = block_reduce(largest, cuda::Max{}, scratch);
    part.rescale(largest);
#pragma unroll 4
    for (int64_t p = threadIdx.x; p < held; p += threads) {
      In in = kept[p];
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        in.at[e] = exp(in.at[e] - largest);
        part.sum += in.at[e];
      }
      kept[p] = in;
    }
    part.sum = block_reduce(part.sum, cuda::Sum{}, scratch);
    const double scale = value_of(by);
    const A factor = static_cast<A>(scale) / part.sum;

    for (int64_t p = threadIdx.x; p < held; p += kFlight * threads) {
      In in[kFlight];
#pragma unroll
      for (int u = 0; u < kFlight; ++u) {
        if (p + u * threads < held) in[u] = kept[p + u * threads];
      }
#pragma unroll
      for (int u = 0; u < kFlight; ++u) {
        if (p + u * threads < held) store_whole(out + (p + u * threads) * kCount, scaled(in[u], factor));
      }
      if (!has_next) continue;
#pragma unroll
      for (int u = 0; u < kFlight; ++u) {
        if (p + u * threads < held) fetch(next, p + u * threads);
      }
    }
    // A narrower gradient is written over logits further in front: those of this step and earlier ones, which all
    // threads must have read.
    for (int64_t begin = held; begin < packs; begin += kFlight * threads) {
      const int64_t p = begin + threadIdx.x;
      In in[kFlight];
#pragma unroll
      for (int u = 0; u < kFlight; ++u) {
        if (p + u * threads < packs) in[u] = load_pack<kCount>(row + (p + u * threads) * kCount);
      }
      if constexpr (sizeof(T) < sizeof(A)) __syncthreads();
#pragma unroll
      for (int u = 0; u < kFlight; ++u) {
        if (p + u * threads >= packs) break;
#pragma unroll
        for (int e = 0; e < kCount; ++e) in[u].at[e] = exp(in[u].at[e] - largest);
        store_whole(out + (p + u * threads) * kCount, scaled(in[u], factor));
      }
    }
    if (owner) {
      const double lost = part.log_sum_exp() - logit;
      loss[n] = lost;
      out[target] = target_gradient<T>(-lost, scale);
    }
  }
}

template <class T, int kCount>
void start_in_place(Cuda device, const LossTargets& t, Accumulate<T>* logits, const LossScale<Accumulate<T>>& by,
                    double* loss) {
  using A = Accumulate<T>;
  const auto kernel = losses_in_place<T, kCount>;
  const cuda::Context& context = cuda::current_context();
  int most = 0;
  WEFT_CUDA(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, context.index));
  most -= 1 << 10;  // for the kernel's own arrays
  const int64_t packs = t.classes / kCount, room = most / static_cast<int64_t>(kCount * sizeof(A));
  const int threads = row_threads(packs);
  const int64_t held = packs <= room ? packs : room / threads * threads;
  const size_t shared = static_cast<size_t>(held) * kCount * sizeof(A);
  cuda::allow_shared(kernel, shared);
  int resident = 0;
  WEFT_CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, shared));
  const int64_t blocks =
      std::min<int64_t>(t.rows, static_cast<int64_t>(context.multiprocessors) * std::max(1, resident));
  start(device, {static_cast<unsigned>(blocks), static_cast<unsigned>(threads), shared}, kernel, t, logits, by, loss,
        held);
}

// ---- a slice of the classes ----

/// Reads each logit once.
template <class A, int kCount>
__global__ void __launch_bounds__(kRowThreads, 2)
    slice_parts(LossTargets t, int64_t first, const A* logits, double* parts) {
  __shared__ A scratch[kWarp];
  for (int64_t n = blockIdx.x; n < t.rows; n += gridDim.x) {
    if (t.targets[n] == t.ignored) {
      if (threadIdx.x == 0) parts[2 * n] = parts[2 * n + 1] = 0;
      continue;
    }
    const A* row = logits + n * t.classes;
    ExpSum<A> part;
    part.template add_row<kCount>(row, 0, t.classes / kCount);
    part.join(scratch);
    if (threadIdx.x == 0) {
      const int64_t here = t.targets[n] - first;
      parts[2 * n] = part.log_sum_exp();
      parts[2 * n + 1] = is_class(t, here) ? static_cast<double>(row[here]) : 0;
    }
  }
}

/// A thread to a row: 16 bytes of memory traffic for each slice and 8 + sizeof(A) for what comes of them.
template <class A>
__global__ void join_parts(LossTargets t, int64_t slices, const double* parts, A* lse, double* loss) {
  for (int64_t n = cuda::thread_index(); n < t.rows; n += cuda::thread_count()) {
    const LossParts joined = t.targets[n] == t.ignored ? LossParts{} : join(parts + 2 * n, slices, 2 * t.rows);
    lse[n] = static_cast<A>(joined.lse);
    loss[n] = joined.lse - joined.logit;
  }
}

/// Reads each logit and writes its gradient once. A narrower gradient is written over logits further in front: those of
/// this step and earlier ones, which all threads must have read.
template <class T, int kCount>
__global__ void __launch_bounds__(kRowThreads)
    slice_in_place(LossTargets t, int64_t first, const Accumulate<T>* lse, const double* loss, Accumulate<T>* logits,
                   LossScale<Accumulate<T>> by) {
  using A = Accumulate<T>;
  const int64_t packs = t.classes / kCount;
  const int threads = static_cast<int>(blockDim.x);
  for (int64_t n = blockIdx.x; n < t.rows; n += gridDim.x) {
    A* const row = logits + n * t.classes;
    T* const out = reinterpret_cast<T*>(row);
    const bool valid = t.targets[n] != t.ignored;
    const double scale = valid ? value_of(by) : 0;
    const A factor = static_cast<A>(scale), shift = valid ? lse[n] : A(0);
    for (int64_t begin = 0; begin < packs; begin += kFlight * threads) {
      const int64_t p = begin + threadIdx.x;
      Pack<A, kCount> in[kFlight];
#pragma unroll
      for (int u = 0; u < kFlight; ++u) {
        if (valid && p + u * threads < packs) in[u] = load_pack<kCount>(row + (p + u * threads) * kCount);
      }
      if constexpr (sizeof(T) < sizeof(A)) __syncthreads();
#pragma unroll
      for (int u = 0; u < kFlight; ++u) {
        if (p + u * threads >= packs) break;
        Pack<T, kCount> gradient;
#pragma unroll
        for (int e = 0; e < kCount; ++e) {
          gradient.at[e] = valid ? narrow<T>(exp(in[u].at[e] - shift) * factor) : T(0.0f);
        }
        store_whole(out + (p + u * threads) * kCount, gradient);
      }
    }
    // The thread that wrote the target's pack writes its element again.
    const int64_t here = t.targets[n] - first;
    if (valid && is_class(t, here) && here / kCount % threads == threadIdx.x) {
      out[here] = target_gradient<T>(-loss[n], scale);
    }
  }
}

// ---- scaling ----

/// sizeof(A) + sizeof(T) bytes per element, and sizeof(T) more to add.
template <class T, int kCount, bool kAdd>
__global__ void scale_elements(const Accumulate<T>* x, int64_t count, const Accumulate<T>* scale, T* out) {
  using A = Accumulate<T>;
  constexpr int kIn = kCount < kFull<A> ? kCount : kFull<A>;
  const A factor = *scale;
  for (int64_t i = cuda::thread_index() * kCount; i < count; i += cuda::thread_count() * kCount) {
    Pack<A, kIn> in[kCount / kIn];
    Pack<T, kCount> old, sum;
#pragma unroll
    for (int p = 0; p < kCount / kIn; ++p) in[p] = load_pack<kIn>(x + i + p * kIn);
    if constexpr (kAdd) old = load_pack<kCount>(out + i);
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      A value = in[e / kIn].at[e % kIn] * factor;
      if constexpr (kAdd) value += widen(old.at[e]);
      sum.at[e] = narrow<T>(value);
    }
    store_pack(out + i, sum);
  }
}

}  // namespace

void loss_denominator(Cuda device, const char* op, const LossTargets& targets, const KnownDenominator& known,
                      double* denominator) {
  start(device, {1, kTotalThreads}, count_targets, targets, op, known, denominator, cuda::current_context().fault);
}

template <class A>
void reduce_losses(Cuda device, const double* losses, int64_t rows, const double* denominator, A* out) {
  start(device, {1, kTotalThreads}, total_loss<A>, losses, rows, denominator, out);
}
template void reduce_losses(Cuda, const double*, int64_t, const double*, float*);
template void reduce_losses(Cuda, const double*, int64_t, const double*, double*);

template <class T>
void loss_forward(Cuda device, const LossTargets& t, const T* logits, Accumulate<T>* lse, double* loss) {
  if (t.rows == 0) return;
  const auto rows = [&](auto kernel, int count) {
    start(device,
          {static_cast<unsigned>(std::min(t.rows, kMostBlocks)), static_cast<unsigned>(row_threads(t.classes / count))},
          kernel, t, logits, lse, loss);
  };
  if (packs_fit<kFull<T>>(logits, t.classes)) return rows(row_losses<T, kFull<T>>, kFull<T>);
  rows(row_losses<T, 1>, 1);
}

template <class T>
void loss_backward(Cuda device, const LossTargets& t, const T* logits, const Accumulate<T>* lse,
                   const LossScale<Accumulate<T>>& scale, T* dlogits) {
  if (t.rows == 0) return;
  constexpr int64_t kMostRows = 65535;
  const auto pieces = [&](auto kernel, int count) {
    const dim3 blocks(static_cast<unsigned>(divide_up(t.classes / count, kFlight * kPieceThreads)),
                      static_cast<unsigned>(std::min(t.rows, kMostRows)));
    start(device, {blocks, kPieceThreads}, kernel, t, logits, lse, scale, dlogits);
  };
  if (packs_fit<kFull<T>>(logits, t.classes) && packs_fit<kFull<T>>(dlogits)) {
    return pieces(logits_gradient<T, kFull<T>>, kFull<T>);
  }
  pieces(logits_gradient<T, 1>, 1);
}

template <class T>
void loss_in_place(Cuda device, const LossTargets& t, Accumulate<T>* logits, const LossScale<Accumulate<T>>& scale,
                   double* loss) {
  using A = Accumulate<T>;
  if (t.rows == 0) return;
  if (packs_fit<kFull<A>>(logits, t.classes)) return start_in_place<T, kFull<A>>(device, t, logits, scale, loss);
  start_in_place<T, 1>(device, t, logits, scale, loss);
}

template <class A>
void loss_parts(Cuda device, const LossTargets& t, int64_t first, const A* logits, double* parts) {
  if (t.rows == 0) return;
  const auto rows = [&](auto kernel, int count) {
    start(device,
          {static_cast<unsigned>(std::min(t.rows, kMostBlocks)), static_cast<unsigned>(row_threads(t.classes / count))},
          kernel, t, first, logits, parts);
  };
  if (packs_fit<kFull<A>>(logits, t.classes)) return rows(slice_parts<A, kFull<A>>, kFull<A>);
  rows(slice_parts<A, 1>, 1);
}
template void loss_parts(Cuda, const LossTargets&, int64_t, const float*, double*);
template void loss_parts(Cuda, const LossTargets&, int64_t, const double*, double*);

template <class A>
void join_loss_parts(Cuda device, const LossTargets& t, int64_t slices, const double* parts, A* lse, double* loss) {
  if (t.rows == 0) return;
  start(device, cuda::grid_for(t.rows), join_parts<A>, t, slices, parts, lse, loss);
}
template void join_loss_parts(Cuda, const LossTargets&, int64_t, const double*, float*, double*);
template void join_loss_parts(Cuda, const LossTargets&, int64_t, const double*, double*, double*);

template <class T>
void loss_slice_in_place(Cuda device, const LossTargets& t, int64_t first, const Accumulate<T>* lse, const double* loss,
                         Accumulate<T>* logits, const LossScale<Accumulate<T>>& by) {
  using A = Accumulate<T>;
  if (t.rows == 0) return;
  const auto rows = [&](auto kernel, int count) {
    start(device,
          {static_cast<unsigned>(std::min(t.rows, kMostBlocks)), static_cast<unsigned>(row_threads(t.classes / count))},
          kernel, t, first, lse, loss, logits, by);
  };
  if (packs_fit<kFull<A>>(logits, t.classes)) return rows(slice_in_place<T, kFull<A>>, kFull<A>);
  rows(slice_in_place<T, 1>, 1);
}

template <class T>
void scale_to(Cuda device, const Accumulate<T>* x, int64_t count, const Accumulate<T>* scale, T* out, bool accumulate) {
  if (count == 0) return;
  constexpr int kCount = kFull<T>;
  const auto elements = [&](auto kernel, int together) {
    start(device, cuda::grid_for(divide_up(count, together)), kernel, x, count, scale, out);
  };
  if (packs_fit<kFull<Accumulate<T>>>(x) && packs_fit<kCount>(out) && count % kCount == 0) {
    return elements(accumulate ? scale_elements<T, kCount, true> : scale_elements<T, kCount, false>, kCount);
  }
  elements(accumulate ? scale_elements<T, 1, true> : scale_elements<T, 1, false>, 1);
}

#define WEFT_LOSS_INSTANCE(T)                                                                                         \
  template void loss_forward(Cuda, const LossTargets&, const T*, Accumulate<T>*, double*);                            \
  template void loss_backward(Cuda, const LossTargets&, const T*, const Accumulate<T>*,                               \
                              const LossScale<Accumulate<T>>&, T*);                                                   \
  template void loss_in_place<T>(Cuda, const LossTargets&, Accumulate<T>*, const LossScale<Accumulate<T>>&, double*); \
  template void loss_slice_in_place<T>(Cuda, const LossTargets&, int64_t, const Accumulate<T>*, const double*,        \
                                       Accumulate<T>*, const LossScale<Accumulate<T>>&);                              \
  template void scale_to(Cuda, const Accumulate<T>*, int64_t, const Accumulate<T>*, T*, bool);
WEFT_LOSS_INSTANCE(float)
WEFT_LOSS_INSTANCE(double)
WEFT_LOSS_INSTANCE(Half)
WEFT_LOSS_INSTANCE(BFloat16)
#undef WEFT_LOSS_INSTANCE

}  // namespace weft
