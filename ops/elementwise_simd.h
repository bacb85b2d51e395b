#pragma once
#include <cstdint>

#include "core/float_types.h"

// Kernels over rows of f32, with the instruction set chosen at run time. Internal to the elementwise and reduction ops.

namespace weft::detail {

/// Consecutive floats, or one that is repeated.
struct Run {
  const float* data = nullptr;
  bool repeated = false;
};

/// y = Op::value(x). y may be x.data; so in all of these.
template <class Op>
void map_f32(Run x, float* y, int64_t n);

/// dx = dy * Op::derivative(saved).
template <class Op>
void map_backward_f32(Run dy, Run saved, float* dx, int64_t n);

/// y = Op::value(a, b).
template <class Op>
void map2_f32(Run a, Run b, float* y, int64_t n);

/// y = a + alpha * b.
void add_scaled_f32(Run a, Run b, float alpha, float* y, int64_t n);

/// Casts of consecutive elements; to the small type with one rounding, to nearest even.
void widen(const BFloat16* from, float* to, int64_t n);
void widen(const Half* from, float* to, int64_t n);
void narrow(const float* from, BFloat16* to, int64_t n);
void narrow(const float* from, Half* to, int64_t n);

}  // namespace weft::detail
