// Comparison and choice: elements are looked at and moved, not computed with.
#include <type_traits>

#include "cuda/device.cuh"
#include "cuda/launch.cuh"
#include "cuda/strided.cuh"
#include "ops/elementwise_kernels.h"

namespace weft {
namespace {

using cuda::grid_for;
using cuda::Strided;
using cuda::thread_count;
using cuda::thread_index;

/// In what elements of T are compared.
template <class T>
__device__ auto comparable(T x) {
  if constexpr (std::is_arithmetic_v<T>)
    return x;
  else
    return static_cast<float>(x);
}

template <class X>
__device__ bool holds(Comparison comparison, X a, X b) {
  switch (comparison) {
    case Comparison::kEq:
      return a == b;
    case Comparison::kNe:
      return a != b;
    case Comparison::kLt:
      return a < b;
    case Comparison::kLe:
      return a <= b;
    case Comparison::kGt:
      return a > b;
    default:
      return a >= b;
  }
}

template <class T>
__global__ void compare_strided(const __grid_constant__ Strided<3> arrays, Comparison comparison, bool* y, const T* a,
                                const T* b, double number) {
  for (int64_t i = thread_index(); i < arrays.count; i += thread_count()) {
    int64_t offset[3];
    arrays.offsets(i, offset);
    const auto left = comparable(a[offset[1]]);
    y[offset[0]] = b == nullptr ? holds(comparison, static_cast<double>(left), number)
                                : holds(comparison, left, comparable(b[offset[2]]));
  }
}

/// By bits: a chosen NaN keeps its payload.
template <class Bits>
__global__ void select_strided(const __grid_constant__ Strided<4> arrays, Bits* y, const bool* condition, const Bits* a,
                               Bits a_number, const Bits* b, Bits b_number) {
  for (int64_t i = thread_index(); i < arrays.count; i += thread_count()) {
    int64_t offset[4];
    arrays.offsets(i, offset);
    y[offset[0]] =
        condition[offset[1]] ? (a == nullptr ? a_number : a[offset[2]]) : (b == nullptr ? b_number : b[offset[3]]);
  }
}

const Strides& strides_of(const Operand& operand, const StridedView& y) {
  return operand.is_number ? y.strides : operand.view.strides;
}

}  // namespace

void compare(Cuda device, Comparison comparison, const StridedView& y, const Operand& a, const Operand& b) {
  const Strided<3> arrays(y.shape, {&y.strides, &a.view.strides, &strides_of(b, y)});
  if (arrays.count == 0) return;
  dispatch_all(a.view.dtype, [&]<class T>() {
    start(device, grid_for(arrays.count), compare_strided<T>, arrays, comparison, static_cast<bool*>(y.data),
          static_cast<const T*>(a.view.data), b.is_number ? nullptr : static_cast<const T*>(b.view.data), b.number);
  });
}

void select(Cuda device, const StridedView& y, const StridedView& condition, const Operand& a, const Operand& b) {
  const Strided<4> arrays(y.shape, {&y.strides, &condition.strides, &strides_of(a, y), &strides_of(b, y)});
  if (arrays.count == 0) return;
  dispatch_float(y.dtype, "where", [&]<class T>() {
    using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
    const auto data = [](const Operand& x) { return x.is_number ? nullptr : static_cast<const Bits*>(x.view.data); };
    const auto number = [](const Operand& x) { return std::bit_cast<Bits>(T(x.number)); };
    start(device, grid_for(arrays.count), select_strided<Bits>, arrays, static_cast<Bits*>(y.data),
          static_cast<const bool*>(condition.data), data(a), number(a), data(b), number(b));
  });
}

}  // namespace weft
