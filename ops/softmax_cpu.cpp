// CPU kernels of softmax: rows of any strides and dtype brought to the f32 kernels, and f64 by plain loops.
#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "core/dtype.h"
#include "ops/elementwise_simd.h"
#include "ops/elementwise_walk.h"
#include "ops/reduce_simd.h"
#include "ops/scalar_math.h"
#include "ops/softmax_kernels.h"
#include "ops/softmax_simd.h"

namespace weft {
namespace {

using detail::Walk;

template <class C, class T>
void gather(const T* from, int64_t step, C* to, int64_t n) {
  if constexpr (!std::is_same_v<C, T>) {
    if (step == 1) return detail::widen(from, to, n);
  }
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<C>(from[i * step]);
}

template <class C, class T>
void scatter(const C* from, T* to, int64_t step, int64_t n) {
  if constexpr (!std::is_same_v<C, T>) {
    if (step == 1) return detail::narrow(from, to, n);
  }
  for (int64_t i = 0; i < n; ++i) to[i * step] = static_cast<T>(from[i]);
}

/// The row itself where the kernels can read it, which is where there is no buffer; else a copy in that buffer.
template <class C, class T>
const C* row_of(const T* from, int64_t step, std::vector<C>& buffer, int64_t n) {
  if constexpr (std::is_same_v<C, T>) {
    if (buffer.empty()) return from;
  }
  gather(from, step, buffer.data(), n);
  return buffer.data();
}

/// Calls kernel(inputs, output, n) for every row along `dim`, with rows as consecutive elements of type C.
template <class T, size_t N, class Kernel>
void rows(const StridedView& y, const std::array<StridedView, N>& inputs, int dim, const Kernel& kernel) {
  using C = Accumulate<T>;
  Shape shape = y.shape;
  const int64_t n = shape[dim];
  shape.erase(dim);
  std::array<Strides, N + 1> strides;
  std::array<int64_t, N + 1> step;
  for (size_t a = 0; a <= N; ++a) {
    strides[a] = a == 0 ? y.strides : inputs[a - 1].strides;
    step[a] = strides[a][dim];
    strides[a].erase(dim);
  }
  const Walk<N + 1> walk(shape, strides);
  const auto steps = walk.steps();
  const int64_t count = numel(shape);
  if (count == 0 || n == 0) return;
  parallel_for(count, std::max<int64_t>(1, detail::kElementwiseGrain / n), [&](int64_t begin, int64_t end) {
    std::array<std::vector<C>, N + 1> buffers;
    for (size_t a = 0; a <= N; ++a) {
      if (step[a] != 1 || !std::is_same_v<C, T>) buffers[a].resize(static_cast<size_t>(n));
    }
    walk.visit_elements(begin, end, [&](const auto& at, int64_t stretch) {
      for (int64_t r = 0; r < stretch; ++r) {
        std::array<const C*, N> in;
        for (size_t a = 0; a < N; ++a) {
          const T* from = static_cast<const T*>(inputs[a].data) + at[a + 1] + r * steps[a + 1];
          in[a] = row_of(from, step[a + 1], buffers[a + 1], n);
        }
        T* to = static_cast<T*>(y.data) + at[0] + r * steps[0];
        if constexpr (std::is_same_v<C, T>) {
          if (buffers[0].empty()) {
            kernel(in, to, n);
            continue;
          }
        }
        kernel(in, buffers[0].data(), n);
        scatter(buffers[0].data(), to, step[0], n);
      }
    });
  });
}

/// Calls rows() with the kernel's overload for the dtype.
template <size_t N, class Kernel>
void dispatch_rows(const char* op, const StridedView& y, const std::array<StridedView, N>& inputs, int dim,
                   const Kernel& kernel) {
  dispatch_float(y.dtype, op, [&]<class T>() { rows<T>(y, inputs, dim, kernel); });
}

double largest(const double* x, int64_t n) {
  double best = x[0];
  for (int64_t i = 1; i < n; ++i) best = scalar_math::larger(x[i], best);
  return best;
}

struct Softmax {
  void operator()(const std::array<const float*, 1>& in, float* y, int64_t n) const {
    const double sum = detail::exp_sum_f32(in[0], detail::max_f32(in[0], n), y, n);
    const float factor = static_cast<float>(1 / sum);
    detail::map2_f32<scalar_math::Mul>({y, false}, {&factor, true}, y, n);
  }
  void operator()(const std::array<const double*, 1>& in, double* y, int64_t n) const {
    const double shift = largest(in[0], n);
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += y[i] = std::exp(in[0][i] - shift);
    for (int64_t i = 0; i < n; ++i) y[i] /= sum;
  }
};

struct LogSoftmax {
  void operator()(const std::array<const float*, 1>& in, float* y, int64_t n) const {
    const float shift = detail::max_f32(in[0], n);
    const double sum = detail::exp_sum_f32(in[0], shift, nullptr, n);
    detail::subtract_f32(in[0], shift, static_cast<float>(std::log(sum)), y, n);
  }
  void operator()(const std::array<const double*, 1>& in, double* y, int64_t n) const {
    const double shift = largest(in[0], n);
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += std::exp(in[0][i] - shift);
    const double log_sum = std::log(sum);
    for (int64_t i = 0; i < n; ++i) y[i] = in[0][i] - shift - log_sum;
  }
};

struct SoftmaxBackward {
  void operator()(const std::array<const float*, 2>& in, float* dx, int64_t n) const {
    const auto [dy, y] = in;
    detail::softmax_backward_f32(dy, y, static_cast<float>(detail::dot_f32(dy, y, n)), dx, n);
  }
  void operator()(const std::array<const double*, 2>& in, double* dx, int64_t n) const {
    const auto [dy, y] = in;
    double shift = 0;
    for (int64_t i = 0; i < n; ++i) shift += dy[i] * y[i];
    for (int64_t i = 0; i < n; ++i) dx[i] = y[i] * (dy[i] - shift);
  }
};

struct LogSoftmaxBackward {
  void operator()(const std::array<const float*, 2>& in, float* dx, int64_t n) const {
    const auto [dy, y] = in;
    detail::log_softmax_backward_f32(dy, y, static_cast<float>(detail::sum_f32(dy, n)), dx, n);
  }
  void operator()(const std::array<const double*, 2>& in, double* dx, int64_t n) const {
    const auto [dy, y] = in;
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += dy[i];
    for (int64_t i = 0; i < n; ++i) dx[i] = dy[i] - std::exp(y[i]) * sum;
  }
};

}  // namespace

void softmax(Cpu, const StridedView& y, const StridedView& x, int dim) {
  dispatch_rows("softmax", y, std::array{x}, dim, Softmax());
}
void log_softmax(Cpu, const StridedView& y, const StridedView& x, int dim) {
  dispatch_rows("log_softmax", y, std::array{x}, dim, LogSoftmax());
}
void softmax_backward(Cpu, const StridedView& dx, const StridedView& dy, const StridedView& y, int dim) {
  dispatch_rows("softmax", dx, std::array{dy, y}, dim, SoftmaxBackward());
}
void log_softmax_backward(Cpu, const StridedView& dx, const StridedView& dy, const StridedView& y, int dim) {
  dispatch_rows("log_softmax", dx, std::array{dy, y}, dim, LogSoftmaxBackward());
}

}  // namespace weft
