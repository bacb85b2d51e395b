#pragma once
#include <cstdint>

// Sums and extremes of rows of f32, with the instruction set chosen at run time. Internal to reductions and softmax.

namespace weft::detail {

/// Sum of x[0..n): over stretches of 1024 elements in f32 in a few sums side by side, their totals in f64.
double sum_f32(const float* x, int64_t n);

/// Sum of a[i] * b[i], in the same way.
double dot_f32(const float* a, const float* b, int64_t n);

/// Largest (or smallest) of n >= 1 elements; NaN if there is one.
float max_f32(const float* x, int64_t n);
float min_f32(const float* x, int64_t n);

/// sums[j] += x[j], j < n.
void add_row_f32(const float* x, float* sums, int64_t n);

}  // namespace weft::detail
