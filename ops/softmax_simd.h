#pragma once
#include <cstdint>

// What softmax does to rows of f32, with the instruction set chosen at run time. Internal. The output may be the input.

namespace weft::detail {

/// y = e^(x - shift); returns the sum of y, added up as in reduce_simd.h. y may be null.
double exp_sum_f32(const float* x, float shift, float* y, int64_t n);

/// y = (x - a) - b.
void subtract_f32(const float* x, float a, float b, float* y, int64_t n);

/// dx = y * (dy - shift).
void softmax_backward_f32(const float* dy, const float* y, float shift, float* dx, int64_t n);

/// dx = dy - e^y * sum.
void log_softmax_backward_f32(const float* dy, const float* y, float sum, float* dx, int64_t n);

}  // namespace weft::detail
