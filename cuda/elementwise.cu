// Elementwise ops: one kernel for arrays in order, one for any strides, filled in with the functors of scalar_math.inc.
#include <type_traits>

#include "cuda/device.cuh"
#include "cuda/launch.cuh"
#include "cuda/strided.cuh"
#include "ops/elementwise_kernels.h"

namespace weft {
namespace {

using cuda::divide_up;
using cuda::grid_for;
using cuda::kFull;
using cuda::load_pack;
using cuda::Pack;
using cuda::store_pack;
using cuda::Strided;
using cuda::thread_count;
using cuda::thread_index;

/// What a kernel reads: an array, or (null) one number for all elements.
template <class T>
struct Source {
  const T* data;
  Accumulate<T> number;
};
template <class T, int N>
struct Sources {
  Source<T> at[N];
};

template <class T, int N, class Function>
__global__ void map_strided(const __grid_constant__ Strided<N + 1> arrays, T* y, Sources<T, N> sources,
                            Function function) {
  using A = Accumulate<T>;
  for (int64_t i = thread_index(); i < arrays.count; i += thread_count()) {
    int64_t offset[N + 1];
    arrays.offsets(i, offset);
    A x[N];
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const Source<T>& source = sources.at[k];
      x[k] = source.data == nullptr ? source.number : cuda::widen(source.data[offset[k + 1]]);
    }
    y[offset[0]] = cuda::narrow<T>(function(x));
  }
}

/// Everything in order and aligned: 16 bytes of each array at a time, each byte moved once.
template <class T, int N, class Function>
__global__ void map_flat(int64_t count, T* y, Sources<T, N> sources, Function function) {
  using A = Accumulate<T>;
  constexpr int kCount = kFull<T>;
  for (int64_t i = thread_index(); i * kCount < count; i += thread_count()) {
    const int64_t first = i * kCount;
    const bool whole = first + kCount <= count;
    Pack<T, kCount> in[N];
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const T* from = sources.at[k].data;
      if (from == nullptr) continue;
      if (whole) {
        in[k] = load_pack<kCount>(from + first);
      } else {
#pragma unroll
        for (int e = 0; e < kCount; ++e) in[k].at[e] = first + e < count ? from[first + e] : T(0.0f);
      }
    }
    Pack<T, kCount> out;
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      A x[N];
#pragma unroll
      for (int k = 0; k < N; ++k)
        x[k] = sources.at[k].data == nullptr ? sources.at[k].number : cuda::widen(in[k].at[e]);
      out.at[e] = cuda::narrow<T>(function(x));
    }
    if (whole) {
      store_pack(y + first, out);
    } else {
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        if (first + e < count) y[first + e] = out.at[e];
      }
    }
  }
}

template <int N, class Function>
void map(Cuda device, const char* op, const StridedView& y, const Operand* const (&operands)[N], Function function) {
  const Strides* strides[N + 1] = {&y.strides};
  // A number has no strides; with the output's it is never in the way of the walk.
  for (int k = 0; k < N; ++k) strides[k + 1] = operands[k]->is_number ? &y.strides : &operands[k]->view.strides;
  const auto walk = [&]<size_t... I>(std::index_sequence<I...>) { return Strided<N + 1>(y.shape, {strides[I]...}); };
  const Strided<N + 1> arrays = walk(std::make_index_sequence<N + 1>());
  if (arrays.count == 0) return;
  dispatch_float(y.dtype, op, [&]<class T>() {
    T* to = static_cast<T*>(y.data);
    Sources<T, N> sources;
    bool flat = arrays.is_flat(0) && cuda::packs_fit<kFull<T>>(to);
    for (int k = 0; k < N; ++k) {
      const T* from = operands[k]->is_number ? nullptr : static_cast<const T*>(operands[k]->view.data);
      sources.at[k] = {from, static_cast<Accumulate<T>>(operands[k]->number)};
      flat = flat && arrays.is_flat(k + 1) && cuda::packs_fit<kFull<T>>(from);
    }
    if constexpr (!std::is_same_v<T, double>) {
      if (flat)
        return start(device, grid_for(divide_up(arrays.count, kFull<T>)), map_flat<T, N, Function>, arrays.count, to,
                     sources, function);
    }
    start(device, grid_for(arrays.count), map_strided<T, N, Function>, arrays, to, sources, function);
  });
}

template <class Op>
struct Value1 {
  template <class A>
  __device__ A operator()(const A (&x)[1]) const {
    return Op::value(x[0]);
  }
};
template <class Op>
struct Derivative1 {
  template <class A>
  __device__ A operator()(const A (&x)[2]) const {
    return x[0] * Op::derivative(x[1]);
  }
};
template <class Op>
struct Value2 {
  template <class A>
  __device__ A operator()(const A (&x)[2]) const {
    return Op::value(x[0], x[1]);
  }
};
struct AddScaled {
  double alpha;
  template <class A>
  __device__ A operator()(const A (&x)[2]) const {
    return fma(static_cast<A>(alpha), x[1], x[0]);
  }
};

}  // namespace

template <class Op>
void unary(Cuda device, const StridedView& y, const Operand& x) {
  map<1>(device, Op::name, y, {&x}, Value1<Op>{});
}

template <class Op>
void unary_backward(Cuda device, const StridedView& dx, const Operand& dy, const Operand& saved) {
  map<2>(device, Op::name, dx, {&dy, &saved}, Derivative1<Op>{});
}

template <class Op>
void binary(Cuda device, const StridedView& y, const Operand& a, const Operand& b) {
  map<2>(device, Op::name, y, {&a, &b}, Value2<Op>{});
}

void add_scaled(Cuda device, const StridedView& y, const Operand& a, const Operand& b, double alpha) {
  map<2>(device, "add_", y, {&a, &b}, AddScaled{alpha});
}

#define WEFT_UNARY(Op, function)                                                  \
  template void unary<scalar_math::Op>(Cuda, const StridedView&, const Operand&); \
  template void unary_backward<scalar_math::Op>(Cuda, const StridedView&, const Operand&, const Operand&);
#define WEFT_BINARY(Op, function) \
  template void binary<scalar_math::Op>(Cuda, const StridedView&, const Operand&, const Operand&);
#include "ops/op_list.def"

}  // namespace weft
