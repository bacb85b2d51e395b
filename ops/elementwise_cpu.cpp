// CPU kernels of the elementwise ops: rows of any strides and dtype brought to the f32 kernels, and f64 by plain loops.
#include <array>
#include <bit>
#include <cstring>
#include <type_traits>

#include "core/dtype.h"
#include "ops/elementwise_kernels.h"
#include "ops/elementwise_simd.h"
#include "ops/elementwise_walk.h"

namespace weft {
namespace {

using detail::Run;
using detail::Walk;

template <size_t N>
Walk<N + 1> make_walk(const StridedView& y, const std::array<const Operand*, N>& operands) {
  std::array<Strides, N + 1> strides;
  strides[0] = y.strides;
  for (size_t i = 0; i < N; ++i) {
    strides[i + 1] = operands[i]->is_number ? Dims::filled(y.shape.rank(), 0) : operands[i]->view.strides;
  }
  return Walk<N + 1>(y.shape, strides);
}

/// Elements that are cast or gathered at a time; they stay in the first-level cache.
constexpr int64_t kChunk = 512;

template <class T>
void gather(const T* from, int64_t step, float* to, int64_t n) {
  if constexpr (!std::is_same_v<T, float>) {
    if (step == 1) return detail::widen(from, to, n);
  }
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(from[i * step]);
}

template <class T>
void scatter(const float* from, T* to, int64_t step, int64_t n) {
  if constexpr (!std::is_same_v<T, float>) {
    if (step == 1) return detail::narrow(from, to, n);
  }
  for (int64_t i = 0; i < n; ++i) to[i * step] = static_cast<T>(from[i]);
}

/// Calls kernel(runs, y, n) over all elements of an output of type T, runs and y as the f32 kernels want them.
template <class T, size_t N, class Kernel>
void rows_f32(const StridedView& y, const std::array<const Operand*, N>& operands, const Kernel& kernel) {
  const Walk<N + 1> walk = make_walk(y, operands);
  const auto steps = walk.steps();
  std::array<float, N> numbers;
  bool direct = std::is_same_v<T, float> && steps[0] == 1;
  for (size_t i = 0; i < N; ++i) {
    numbers[i] = static_cast<float>(operands[i]->number);
    direct &= operands[i]->is_number || steps[i + 1] == 0 || steps[i + 1] == 1;
  }
  const auto array = [&](size_t i, int64_t offset) { return static_cast<const T*>(operands[i]->view.data) + offset; };
  if constexpr (std::is_same_v<T, float>) {
    if (direct) {
      return walk.run([&](const auto& at, int64_t n) {
        std::array<Run, N> runs;
        for (size_t i = 0; i < N; ++i) {
          const bool number = operands[i]->is_number;
          runs[i] = {number ? &numbers[i] : array(i, at[i + 1]), number || steps[i + 1] == 0};
        }
        kernel(runs, static_cast<float*>(y.data) + at[0], n);
      });
    }
  }
  walk.run([&](const auto& at, int64_t n) {
    alignas(64) float buffers[N][kChunk];
    alignas(64) float result[kChunk];
    std::array<Run, N> runs;
    for (int64_t begin = 0; begin < n; begin += kChunk) {
      const int64_t count = std::min(kChunk, n - begin);
      for (size_t i = 0; i < N; ++i) {
        const int64_t step = steps[i + 1];
        if (operands[i]->is_number) {
          runs[i] = {&numbers[i], true};
          continue;
        }
        gather(array(i, at[i + 1] + begin * step), step, buffers[i], step == 0 ? 1 : count);
        runs[i] = {buffers[i], step == 0};
      }
      kernel(runs, result, count);
      scatter(result, static_cast<T*>(y.data) + at[0] + begin * steps[0], steps[0], count);
    }
  });
}

/// y = function(operands...) in f64.
template <size_t N, class Function>
void rows_f64(const StridedView& y, const std::array<const Operand*, N>& operands, const Function& function) {
  const Walk<N + 1> walk = make_walk(y, operands);
  const auto steps = walk.steps();
  walk.run([&](const auto& at, int64_t n) {
    std::array<const double*, N> from;
    for (size_t i = 0; i < N; ++i) {
      from[i] = operands[i]->is_number ? &operands[i]->number
                                       : static_cast<const double*>(operands[i]->view.data) + at[i + 1];
    }
    double* to = static_cast<double*>(y.data) + at[0];
    for (int64_t k = 0; k < n; ++k) {
      std::array<double, N> x;
      for (size_t i = 0; i < N; ++i) x[i] = from[i][k * steps[i + 1]];
      to[k * steps[0]] = function(x);
    }
  });
}

template <size_t N, class Kernel, class Function>
void rows(const char* op, const StridedView& y, const std::array<const Operand*, N>& operands, const Kernel& kernel,
          const Function& function) {
  dispatch_float(y.dtype, op, [&]<class T>() {
    if constexpr (std::is_same_v<T, double>) {
      rows_f64(y, operands, function);
    } else {
      rows_f32<T>(y, operands, kernel);
    }
  });
}

using One = std::array<const Operand*, 1>;
using Two = std::array<const Operand*, 2>;

}  // namespace

template <class Op>
void unary(Cpu, const StridedView& y, const Operand& x) {
  rows(
      Op::name, y, One{&x}, [](const auto& in, float* out, int64_t n) { detail::map_f32<Op>(in[0], out, n); },
      [](const auto& in) { return Op::value(in[0]); });
}

template <class Op>
void unary_backward(Cpu, const StridedView& dx, const Operand& dy, const Operand& saved) {
  rows(
      Op::name, dx, Two{&dy, &saved},
      [](const auto& in, float* out, int64_t n) { detail::map_backward_f32<Op>(in[0], in[1], out, n); },
      [](const auto& in) { return in[0] * Op::derivative(in[1]); });
}

template <class Op>
void binary(Cpu, const StridedView& y, const Operand& a, const Operand& b) {
  rows(
      Op::name, y, Two{&a, &b},
      [](const auto& in, float* out, int64_t n) { detail::map2_f32<Op>(in[0], in[1], out, n); },
      [](const auto& in) { return Op::value(in[0], in[1]); });
}

void add_scaled(Cpu, const StridedView& y, const Operand& a, const Operand& b, double alpha) {
  rows(
      "add_", y, Two{&a, &b},
      [alpha](const auto& in, float* out, int64_t n) {
        detail::add_scaled_f32(in[0], in[1], static_cast<float>(alpha), out, n);
      },
      [alpha](const auto& in) { return in[0] + alpha * in[1]; });
}

#define WEFT_UNARY(Op, function)                                                 \
  template void unary<scalar_math::Op>(Cpu, const StridedView&, const Operand&); \
  template void unary_backward<scalar_math::Op>(Cpu, const StridedView&, const Operand&, const Operand&);
#define WEFT_BINARY(Op, function) \
  template void binary<scalar_math::Op>(Cpu, const StridedView&, const Operand&, const Operand&);
#include "ops/op_list.def"

// ---- comparison and choice: no arithmetic, so no f32 in between ----

namespace {

/// In what elements of T are compared.
template <class T>
auto comparable(T x) {
  if constexpr (std::is_arithmetic_v<T>) {
    return x;
  } else {
    return static_cast<float>(x);
  }
}

template <class T, class Compare>
void compare_rows(const StridedView& y, const Operand& a, const Operand& b, Compare holds) {
  const Walk<3> walk = make_walk(y, Two{&a, &b});
  const auto steps = walk.steps();
  walk.run([&](const auto& at, int64_t n) {
    bool* to = static_cast<bool*>(y.data) + at[0];
    const T* x = static_cast<const T*>(a.view.data) + at[1];
    if (b.is_number) {
      for (int64_t i = 0; i < n; ++i)
        to[i * steps[0]] = holds(static_cast<double>(comparable(x[i * steps[1]])), b.number);
      return;
    }
    const T* z = static_cast<const T*>(b.view.data) + at[2];
    for (int64_t i = 0; i < n; ++i) to[i * steps[0]] = holds(comparable(x[i * steps[1]]), comparable(z[i * steps[2]]));
  });
}

}  // namespace

void compare(Cpu, Comparison comparison, const StridedView& y, const Operand& a, const Operand& b) {
  dispatch_all(a.view.dtype, [&]<class T>() {
    switch (comparison) {
      case Comparison::kEq:
        return compare_rows<T>(y, a, b, [](auto p, auto q) { return p == q; });
      case Comparison::kNe:
        return compare_rows<T>(y, a, b, [](auto p, auto q) { return p != q; });
      case Comparison::kLt:
        return compare_rows<T>(y, a, b, [](auto p, auto q) { return p < q; });
      case Comparison::kLe:
        return compare_rows<T>(y, a, b, [](auto p, auto q) { return p <= q; });
      case Comparison::kGt:
        return compare_rows<T>(y, a, b, [](auto p, auto q) { return p > q; });
      case Comparison::kGe:
        return compare_rows<T>(y, a, b, [](auto p, auto q) { return p >= q; });
    }
  });
}

namespace {

template <size_t kBytes>
using Bits = std::conditional_t<kBytes == 2, uint16_t, std::conditional_t<kBytes == 4, uint32_t, uint64_t>>;

}  // namespace

void select(Cpu, const StridedView& y, const StridedView& condition, const Operand& a, const Operand& b) {
  const Operand conditions(condition);
  const Walk<4> walk = make_walk(y, std::array<const Operand*, 3>{&conditions, &a, &b});
  const auto steps = walk.steps();
  dispatch_float(y.dtype, "where", [&]<class T>() {
    using B = Bits<sizeof(T)>;
    const T numbers[2] = {T(a.number), T(b.number)};
    walk.run([&](const auto& at, int64_t n) {
      const bool* chosen = static_cast<const bool*>(condition.data) + at[1];
      const T* p = a.is_number ? &numbers[0] : static_cast<const T*>(a.view.data) + at[2];
      const T* q = b.is_number ? &numbers[1] : static_cast<const T*>(b.view.data) + at[3];
      T* to = static_cast<T*>(y.data) + at[0];
      for (int64_t i = 0; i < n; ++i) {
        // By bits, without a branch: the processor would guess random conditions wrong half of the time.
        const B x = std::bit_cast<B>(p[i * steps[2]]), z = std::bit_cast<B>(q[i * steps[3]]);
        const B mask = static_cast<B>(-static_cast<B>(chosen[i * steps[1]]));
        to[i * steps[0]] = std::bit_cast<T>(static_cast<B>(z ^ ((x ^ z) & mask)));
      }
    });
  });
}

}  // namespace weft
