// What optimizers do to all tensors of a step at once: sums of squares, scaling, Adam.
//
// A model has hundreds of tensors, most of them small. A launch gets a table of tensors by value, as many as fit into a
// kernel's parameters. Each tensor is cut into chunks, one to a block, and a block finds its tensor by where the
// tensors' chunks begin. So all tensors are a few launches that are each as wide as the device. Sums are added chunk by
// chunk and then over the chunks of a tensor: in an order that depends on the tensor's size alone, not on the launch.
#include <cfloat>
#include <span>
#include <type_traits>
#include <vector>

#include "cuda/context.h"
#include "cuda/device.cuh"
#include "cuda/fault.h"
#include "cuda/launch.cuh"
#include "optim/optimizer_kernels.h"

namespace weft::optim {
namespace {

using cuda::block_reduce;
using cuda::divide_up;
using cuda::Grid;
using cuda::kFull;
using cuda::kWarp;
using cuda::load_pack;
using cuda::narrow;
using cuda::Pack;
using cuda::start;
using cuda::store_pack;
using cuda::Sum;
using cuda::widen;

constexpr int kThreads = 256;

// ---- tables ----

/// Of the 4 KiB that a kernel's parameters may take; the rest is for other arguments.
constexpr size_t kTableBytes = 4096 - 128;

template <class Entry>
struct Table {
  static constexpr int kMost = static_cast<int>((kTableBytes - alignof(Entry)) / (sizeof(Entry) + sizeof(unsigned)));
  Entry tensors[kMost] = {};
  unsigned first[kMost] = {};  ///< block of the launch at which each tensor begins
  int count = 0;
};

/// Which tensor this block belongs to.
template <class Entry>
__device__ int tensor_of_block(const Table<Entry>& table) {
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.first[middle] <= blockIdx.x)
      low = middle;
    else
      high = middle;
  }
  return low;
}

/// Calls start(table, blocks) until entry(i) of each tensor of type T has been in a table. Tensors without elements
/// have no blocks and are left out.
template <class T, class Tensor, class MakeEntry, class Start>
void for_each_table(std::span<const Tensor> tensors, int64_t chunk, MakeEntry entry, Start start) {
  using Entry = decltype(entry(size_t{0}));
  static_assert(sizeof(Table<Entry>) <= kTableBytes);
  Table<Entry> table;
  int64_t blocks = 0;
  const auto flush = [&] {
    if (blocks > 0) start(table, Grid{static_cast<unsigned>(blocks), kThreads});
    table.count = 0;
    blocks = 0;
  };
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].count == 0 || tensors[i].dtype != DTypeOf<T>::value) continue;
    if (table.count == Table<Entry>::kMost) flush();
    table.tensors[table.count] = entry(i);
    table.first[table.count] = static_cast<unsigned>(blocks);
    ++table.count;
    blocks += divide_up(tensors[i].count, chunk);
  }
  flush();
}

/// f.operator()<T>() for each dtype that parameters have.
template <class F>
void for_each_float(F&& f) {
  f.template operator()<float>();
  f.template operator()<BFloat16>();
  f.template operator()<Half>();
  f.template operator()<double>();
}

// ---- elements ----

template <int kCount, class T>
__device__ bool is_aligned(const T* data) {
  return reinterpret_cast<uintptr_t>(data) % (kCount * sizeof(T)) == 0;
}

/// kCount elements from i on. kWhole says that they exist and are aligned; otherwise those from `end` on are 0.
template <bool kWhole, int kCount, class T>
__device__ Pack<T, kCount> load(const T* data, int64_t i, int64_t end) {
  if constexpr (kWhole) {
    return load_pack<kCount>(data + i);
  } else {
    Pack<T, kCount> pack;
#pragma unroll
    for (int k = 0; k < kCount; ++k) pack.at[k] = i + k < end ? data[i + k] : T{};
    return pack;
  }
}

template <bool kWhole, int kCount, class T>
__device__ void store(T* data, int64_t i, int64_t end, const Pack<T, kCount>& pack) {
  if constexpr (kWhole) {
    store_pack(data + i, pack);
  } else {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if (i + k < end) data[i + k] = pack.at[k];
    }
  }
}

// Operations that the compiler must not merge or split, so that the bits are the CPU's.
__device__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ double multiply(double a, double b) { return __dmul_rn(a, b); }
__device__ float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ double fused(double a, double b, double c) { return __fma_rn(a, b, c); }
__device__ float divide(float a, float b) { return __fdiv_rn(a, b); }
__device__ double divide(double a, double b) { return __ddiv_rn(a, b); }
__device__ float root(float x) { return __fsqrt_rn(x); }
__device__ double root(double x) { return __dsqrt_rn(x); }

// ---- sums of squares ----

/// Of a pack: in f32 where that loses nothing to overflow or underflow (less than 2^-149 of each square), else in f64.
template <int kCount>
__device__ double squares(const Pack<float, kCount>& x) {
  float sum = 0;
#pragma unroll
  for (int k = 0; k < kCount; ++k) sum = fused(x.at[k], x.at[k], sum);
  if (sum >= 1e-30f && sum <= FLT_MAX) return static_cast<double>(sum);
  double wide = 0;
#pragma unroll
  for (int k = 0; k < kCount; ++k) wide = fused(static_cast<double>(x.at[k]), static_cast<double>(x.at[k]), wide);
  return wide;
}
template <int kCount>
__device__ double squares(const Pack<double, kCount>& x) {
  double sum = 0;
#pragma unroll
  for (int k = 0; k < kCount; ++k) sum = fused(x.at[k], x.at[k], sum);
  return sum;
}

template <class T>
struct Values {
  T* data;
  int64_t count;
  double* partials;
};

/// Packs of 16 bytes to a thread: a chunk is 32 KiB.
constexpr int kPacks = 8;
template <class T>
constexpr int64_t kChunk = int64_t{kThreads} * kPacks * kFull<T>;

template <bool kWhole, class T>
__device__ double squares_of_thread(const T* data, int64_t first, int64_t end) {
  constexpr int kInFlight = 4, kCount = kFull<T>;
  double total = 0;
#pragma unroll
  for (int round = 0; round < kPacks; round += kInFlight) {
    Pack<T, kCount> packs[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j)
      packs[j] = load<kWhole, kCount>(data, first + (round + j) * kThreads * kCount, end);
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      Pack<Accumulate<T>, kCount> x;
#pragma unroll
      for (int k = 0; k < kCount; ++k) x.at[k] = widen(packs[j].at[k]);
      total += squares(x);
    }
  }
  return total;
}

/// Reads each gradient once, and writes 8 bytes per 32 KiB.
template <class T>
__global__ void __launch_bounds__(kThreads) square_chunks(const __grid_constant__ Table<Values<T>> table) {
  __shared__ double scratch[kWarp];
  const int t = tensor_of_block(table);
  const Values<T> x = table.tensors[t];
  const int64_t chunk = blockIdx.x - table.first[t], begin = chunk * kChunk<T>;
  const int64_t first = begin + static_cast<int64_t>(threadIdx.x) * kFull<T>;
  const bool whole = begin + kChunk<T> <= x.count && is_aligned<kFull<T>>(x.data);
  const double own =
      whole ? squares_of_thread<true>(x.data, first, x.count) : squares_of_thread<false>(x.data, first, x.count);
  const double total = block_reduce(own, Sum{}, scratch);
  if (threadIdx.x == 0) x.partials[chunk] = total;
}

struct Partials {
  const double* data;
  int64_t count;
  double* sum;
};

struct PartialsTable {
  static constexpr size_t kMost = kTableBytes / sizeof(Partials);
  Partials at[kMost] = {};
};

/// One block to a sum. No partial sums give 0.
__global__ void __launch_bounds__(kThreads) add_partials(const __grid_constant__ PartialsTable table) {
  __shared__ double scratch[kWarp];
  const Partials partials = table.at[blockIdx.x];
  double own = 0;
  for (int64_t i = threadIdx.x; i < partials.count; i += kThreads) own += partials.data[i];
  const double total = block_reduce(own, Sum{}, scratch);
  if (threadIdx.x == 0) *partials.sum = total;
}

/// row(i) is the i-th of `count` sums.
template <class Row>
void add_all_partials(Cuda device, size_t count, Row row) {
  for (size_t begin = 0; begin < count; begin += PartialsTable::kMost) {
    PartialsTable table;
    size_t n = 0;
    for (; n < PartialsTable::kMost && begin + n < count; ++n) table.at[n] = row(begin + n);
    start(device, {static_cast<unsigned>(n), kThreads}, add_partials, table);
  }
}

// ---- scaling ----

template <bool kWhole, class T>
__device__ void scale_of_thread(T* data, int64_t first, int64_t end, Accumulate<T> factor) {
  constexpr int kCount = kFull<T>;
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    const int64_t i = first + j * kThreads * kCount;
    Pack<T, kCount> x = load<kWhole, kCount>(data, i, end);
#pragma unroll
    for (int k = 0; k < kCount; ++k) x.at[k] = narrow<T>(multiply(widen(x.at[k]), factor));
    store<kWhole>(data, i, end, x);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    scale_chunks(const __grid_constant__ Table<Values<T>> table, Accumulate<T> factor) {
  const int t = tensor_of_block(table);
  const Values<T> x = table.tensors[t];
  const int64_t begin = (blockIdx.x - table.first[t]) * kChunk<T>;
  const int64_t first = begin + static_cast<int64_t>(threadIdx.x) * kFull<T>;
  const bool whole = begin + kChunk<T> <= x.count && is_aligned<kFull<T>>(x.data);
  whole ? scale_of_thread<true>(x.data, first, x.count, factor)
        : scale_of_thread<false>(x.data, first, x.count, factor);
}

// ---- decisions of a step ----

/// One block. The squares come in a tile at a time, and one thread adds them in order, as the CPU does.
__global__ void __launch_bounds__(kThreads)
    decide_step(const AdamInput* input, const double* squares, int64_t count, TensorData losses, AdamDecision* decision,
                const cuda::Fault* fault) {
  __shared__ double tile[kThreads];
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kThreads) {
    if (begin + threadIdx.x < count) tile[threadIdx.x] = squares[begin + threadIdx.x];
    __syncthreads();
    const int64_t held = min(count - begin, static_cast<int64_t>(kThreads));
    for (int64_t i = 0; threadIdx.x == 0 && i < held; ++i) total += tile[i];
    __syncthreads();
  }
  if (threadIdx.x != 0) return;
  double loss = 0;
  for (int64_t i = 0; i < losses.count; ++i) {
    loss += losses.dtype == DType::f64 ? static_cast<const double*>(losses.data)[i]
                                       : static_cast<double>(static_cast<const float*>(losses.data)[i]);
  }
  AdamDecision decided = decide(*input, total, loss);
  // What a kernel found wrong with its input the host learns when it reads the decision: nothing may have changed.
  if (fault->kind != cuda::Fault::kNone) decided.verdict = AdamDecision::kNotFinite;
  *decision = decided;
}

__global__ void rates_of_step(const double* sums, int64_t parameters, const AdamDecision* decision, double* rates) {
  for (int64_t i = cuda::thread_index(); i < parameters; i += cuda::thread_count())
    rates[i] = trusted_rate(decision->lr, sums[i], sums[parameters + i]);
}

// ---- Adam ----

/// An AdamTensor with its types; T is that of the parameter.
template <class T>
struct AdamEntry {
  using State = Accumulate<T>;
  T* parameter;
  const T* gradient;
  State *weight, *exp_avg, *exp_avg_sq;
  double* partials;  ///< of weights, then of updates, one per chunk each
  int64_t count;
  const double* lr;
  State weight_decay;
};

/// Elements that a block takes: 114 KiB in and out of f32, and of bf16 with its master.
constexpr int64_t kAdamChunk = 4096;

enum class Pass { kWhole, kMoments, kApply };

/// beta * mean + (1 - beta) * x, counted from whichever of the two it is nearer to, as on the CPU.
template <class A>
__device__ A blend(A beta, A rest, A mean, A x) {
  return rest < A(0.5) ? fused(rest, x - mean, mean) : fused(beta, mean - x, x);
}

struct SquareSums {
  double weight = 0, update = 0;
};

/// Packs are as wide as 16 bytes of the state, so that its loads are whole lines of a warp; those of a bf16 gradient
/// and parameter are 8 bytes then.
template <Pass kPass, bool kWhole, class T>
__device__ SquareSums adam_of_thread(const AdamEntry<T>& at, const AdamConstants<Accumulate<T>>& c, Accumulate<T> lr,
                                     int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  constexpr int kCount = kFull<A>;
  SquareSums sums;
  for (int64_t i = begin + static_cast<int64_t>(threadIdx.x) * kCount; i < end; i += kThreads * kCount) {
    Pack<A, kCount> w = load<kWhole, kCount>(at.weight, i, end);
    Pack<A, kCount> m = load<kWhole, kCount>(at.exp_avg, i, end), v = load<kWhole, kCount>(at.exp_avg_sq, i, end);
    if constexpr (kPass != Pass::kApply) {
      const Pack<T, kCount> gradient = load<kWhole, kCount>(at.gradient, i, end);
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        const A g = multiply(widen(gradient.at[k]), c.grad_scale);
        m.at[k] = blend(c.beta1, c.rest1, m.at[k], g);
        v.at[k] = blend(c.beta2, c.rest2, v.at[k], multiply(g, g));
      }
      store<kWhole>(at.exp_avg, i, end, m);
      store<kWhole>(at.exp_avg_sq, i, end, v);
    }
    Pack<A, kCount> u;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const A mean = multiply(m.at[k], c.inverse_bias1), spread = root(multiply(v.at[k], c.inverse_bias2)) + c.eps;
      u.at[k] = fused(at.weight_decay, w.at[k], divide(mean, spread));
    }
    if constexpr (kPass == Pass::kMoments) {
      sums.weight += squares(w);
      sums.update += squares(u);
    } else {
      Pack<T, kCount> small;
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        w.at[k] = fused(-lr, u.at[k], w.at[k]);
        small.at[k] = narrow<T>(w.at[k]);
      }
      store<kWhole>(at.weight, i, end, w);
      if constexpr (!std::is_same_v<T, A>) store<kWhole>(at.parameter, i, end, small);
    }
  }
  return sums;
}

/// Bytes moved per element, of f32 and of bf16 with its master alike: 28 as a whole; with the trust ratio 24 (22) for
/// the moments and 16 (18) for the weights.
template <Pass kPass, class T>
__global__ void __launch_bounds__(kThreads)
    adam_chunks(const __grid_constant__ Table<AdamEntry<T>> table, const AdamDecision* decision) {
  constexpr int kCount = kFull<Accumulate<T>>;
  if (decision->verdict != AdamDecision::kTake) return;
  const AdamConstants<Accumulate<T>> c = decision->constants<Accumulate<T>>();
  const int t = tensor_of_block(table);
  const AdamEntry<T> at = table.tensors[t];
  const int64_t chunk = blockIdx.x - table.first[t], begin = chunk * kAdamChunk;
  const bool whole = begin + kAdamChunk <= at.count && is_aligned<kCount>(at.weight) &&
                     is_aligned<kCount>(at.parameter) && is_aligned<kCount>(at.gradient) &&
                     is_aligned<kCount>(at.exp_avg) && is_aligned<kCount>(at.exp_avg_sq);
  Accumulate<T> lr = 0;
  if constexpr (kPass != Pass::kMoments) lr = static_cast<Accumulate<T>>(*at.lr);
  const SquareSums own = whole ? adam_of_thread<kPass, true>(at, c, lr, begin, begin + kAdamChunk)
                               : adam_of_thread<kPass, false>(at, c, lr, begin, min(at.count, begin + kAdamChunk));
  if constexpr (kPass == Pass::kMoments) {
    __shared__ double scratch[kWarp];
    const double weight = block_reduce(own.weight, Sum{}, scratch), update = block_reduce(own.update, Sum{}, scratch);
    if (threadIdx.x == 0) {
      at.partials[chunk] = weight;
      at.partials[(at.count + kAdamChunk - 1) / kAdamChunk + chunk] = update;
    }
  }
}

/// Where a parameter is not its master rounded, the master takes its value.
template <class T>
__global__ void __launch_bounds__(kThreads) follow_chunks(const __grid_constant__ Table<AdamEntry<T>> table) {
  const int t = tensor_of_block(table);
  const AdamEntry<T> at = table.tensors[t];
  const int64_t begin = (blockIdx.x - table.first[t]) * kAdamChunk, end = min(at.count, begin + kAdamChunk);
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const Accumulate<T> value = widen(at.parameter[i]);
    if (widen(narrow<T>(at.weight[i])) != value) at.weight[i] = value;
  }
}

template <class T>
AdamEntry<T> entry_of(const AdamTensor& t, double* partials = nullptr) {
  using A = Accumulate<T>;
  return {static_cast<T*>(t.parameter),
          static_cast<const T*>(t.gradient),
          static_cast<A*>(t.weight),
          static_cast<A*>(t.exp_avg),
          static_cast<A*>(t.exp_avg_sq),
          partials,
          t.count,
          t.lr,
          static_cast<A>(t.weight_decay)};
}

/// partials(i): where those of tensors[i] begin.
template <Pass kPass, class WherePartials>
void start_adam(Cuda device, std::span<const AdamTensor> tensors, const AdamDecision* decision,
                WherePartials partials) {
  for_each_float([&]<class T>() {
    for_each_table<T>(
        tensors, kAdamChunk, [&](size_t i) { return entry_of<T>(tensors[i], partials(i)); },
        [&](const Table<AdamEntry<T>>& table, const Grid& grid) {
          start(device, grid, adam_chunks<kPass, T>, table, decision);
        });
  });
}

/// Where the partial sums of each tensor begin, one tensor after another.
template <class Tensor, class Count>
std::vector<double*> places(std::span<const Tensor> tensors, double* partials, Count count) {
  std::vector<double*> all;
  for (const Tensor& tensor : tensors) {
    all.push_back(partials);
    partials += count(tensor);
  }
  return all;
}

}  // namespace

int64_t square_partials(Cuda, const TensorData& tensor) {
  return dispatch_float(tensor.dtype, "grad_norm", [&]<class T>() { return divide_up(tensor.count, kChunk<T>); });
}

void sum_squares(Cuda device, std::span<const TensorData> tensors, double* partials, double* sums) {
  const auto count = [&](const TensorData& tensor) { return square_partials(device, tensor); };
  const std::vector<double*> place = places(tensors, partials, count);
  for_each_float([&]<class T>() {
    for_each_table<T>(
        tensors, kChunk<T>,
        [&](size_t i) { return Values<T>{static_cast<T*>(tensors[i].data), tensors[i].count, place[i]}; },
        [&](const Table<Values<T>>& table, const Grid& grid) { start(device, grid, square_chunks<T>, table); });
  });
  add_all_partials(device, tensors.size(), [&](size_t i) { return Partials{place[i], count(tensors[i]), sums + i}; });
}

void scale(Cuda device, std::span<const TensorData> tensors, double factor) {
  for_each_float([&]<class T>() {
    for_each_table<T>(
        tensors, kChunk<T>,
        [&](size_t i) { return Values<T>{static_cast<T*>(tensors[i].data), tensors[i].count, nullptr}; },
        [&](const Table<Values<T>>& table, const Grid& grid) {
          start(device, grid, scale_chunks<T>, table, static_cast<Accumulate<T>>(factor));
        });
  });
}

void adam_decide(Cuda device, const AdamInput* input, const double* squares, int64_t count, const TensorData& losses,
                 AdamDecision* decision) {
  start(device, {1, kThreads}, decide_step, input, squares, count, losses, decision, cuda::current_context().fault);
}

void adam_update(Cuda device, std::span<const AdamTensor> tensors, const AdamDecision* decision) {
  start_adam<Pass::kWhole>(device, tensors, decision, [](size_t) { return nullptr; });
}

int64_t adam_partials(Cuda, const AdamTensor& tensor) { return divide_up(tensor.count, kAdamChunk); }

void adam_moments(Cuda device, std::span<const AdamTensor> tensors, const AdamDecision* decision, double* partials,
                  double* sums, int64_t parameters) {
  const auto count = [&](const AdamTensor& tensor) { return adam_partials(device, tensor); };
  const std::vector<double*> place =
      places(tensors, partials, [&](const AdamTensor& tensor) { return 2 * count(tensor); });
  start_adam<Pass::kMoments>(device, tensors, decision, [&](size_t i) { return place[i]; });
  add_all_partials(device, 2 * tensors.size(), [&](size_t row) {
    const size_t i = row % tensors.size();
    const int64_t n = count(tensors[i]);
    const bool update = row >= tensors.size();
    return Partials{place[i] + (update ? n : 0), n, sums + (update ? parameters : 0) + tensors[i].number};
  });
}

void adam_rates(Cuda device, const double* sums, int64_t parameters, const AdamDecision* decision, double* rates) {
  if (parameters > 0) start(device, cuda::grid_for(parameters), rates_of_step, sums, parameters, decision, rates);
}

void adam_apply(Cuda device, std::span<const AdamTensor> tensors, const AdamDecision* decision) {
  start_adam<Pass::kApply>(device, tensors, decision, [](size_t) { return nullptr; });
}

void adam_follow(Cuda device, std::span<const AdamTensor> tensors) {
  const auto follow = [&]<class T>() {
    for_each_table<T>(
        tensors, kAdamChunk, [&](size_t i) { return entry_of<T>(tensors[i]); },
        [&](const Table<AdamEntry<T>>& table, const Grid& grid) { start(device, grid, follow_chunks<T>, table); });
  };
  follow.template operator()<BFloat16>();
  follow.template operator()<Half>();
}

}  // namespace weft::optim
