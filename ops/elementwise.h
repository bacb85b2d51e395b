#pragma once
#include "core/tensor.h"

// Functions of one element, or of two that broadcast, and their operators.
//
// All take f32, f64, f16 and bf16. f64 is computed in f64, everything else in f32; the result is rounded once to its
// dtype. Two tensors of different dtypes are cast to promote(a, b) first; a number takes part with the tensor's dtype,
// unrounded for f16 and bf16. Results are row-major and do not depend on the number of threads. The f32 kernels keep
// within 4 ulp of the exact value (sin and cos: 2^-22 absolute; gelu and silu: 4e-7 (1 + |y|)).
//
// Every function is differentiable any number of times.
// @throws Error  kDType for other dtypes; kDevice for two devices; kShape naming both shapes if they do not broadcast.

namespace weft {

// ---- of one element ----

/// y = -x.
Tensor neg(const Tensor& x);
/// y = |x|; the derivative at 0 is 0.
Tensor abs(const Tensor& x);
/// y = x^2. Saved for backward: x.
Tensor square(const Tensor& x);
/// y = sqrt(x); NaN for x < 0. Saved for backward: y.
Tensor sqrt(const Tensor& x);
/// y = 1 / sqrt(x). Saved for backward: y.
Tensor rsqrt(const Tensor& x);
/// y = 1 / x. Saved for backward: y.
Tensor reciprocal(const Tensor& x);
/// y = e^x. In f32, results below the smallest normal number (x < -87.34) are 0. Saved for backward: y.
Tensor exp(const Tensor& x);
/// y = ln(x), the natural logarithm; -inf at 0, NaN below. (weft::log is the logger.) Saved for backward: x.
Tensor ln(const Tensor& x);
/// y = tanh(x). Saved for backward: y.
Tensor tanh(const Tensor& x);
/// y = 1 / (1 + e^-x). Saved for backward: y.
Tensor sigmoid(const Tensor& x);
/// y = max(x, 0); the derivative at 0 is 0. Saved for backward: y.
Tensor relu(const Tensor& x);
/// Sigmoid linear unit (Elfwing et al. 2017): y = x / (1 + e^-x). Saved for backward: x.
Tensor silu(const Tensor& x);
/// Gaussian error linear unit, tanh form (Hendrycks & Gimpel 2016), GPT-2's:
///
///   y = 0.5 x (1 + tanh(u)) = x / (1 + e^(-2u)),  u = sqrt(2/pi) (x + 0.044715 x^3)
///
/// Saved for backward: x.
Tensor gelu(const Tensor& x);
Tensor sin(const Tensor& x);
Tensor cos(const Tensor& x);

// ---- of two elements ----

Tensor add(const Tensor& a, const Tensor& b);
Tensor add(const Tensor& a, double b);
Tensor sub(const Tensor& a, const Tensor& b);
Tensor sub(const Tensor& a, double b);
Tensor sub(double a, const Tensor& b);
/// Saved for backward: a, b.
Tensor mul(const Tensor& a, const Tensor& b);
Tensor mul(const Tensor& a, double b);
/// Saved for backward: b and the result.
Tensor div(const Tensor& a, const Tensor& b);
Tensor div(const Tensor& a, double b);
Tensor div(double a, const Tensor& b);
/// The larger one; NaN if either is NaN. The gradient goes to a where a >= b, else to b.
Tensor maximum(const Tensor& a, const Tensor& b);
Tensor maximum(const Tensor& a, double b);
/// The smaller one; NaN if either is NaN. The gradient goes to a where a <= b, else to b.
Tensor minimum(const Tensor& a, const Tensor& b);
Tensor minimum(const Tensor& a, double b);
/// min(max(x, low), high). The gradient passes where low <= x <= high. @throws Error kValue unless low <= high.
Tensor clamp(const Tensor& x, double low, double high);

inline Tensor operator+(const Tensor& a, const Tensor& b) { return add(a, b); }
inline Tensor operator+(const Tensor& a, double b) { return add(a, b); }
inline Tensor operator+(double a, const Tensor& b) { return add(b, a); }
inline Tensor operator-(const Tensor& a, const Tensor& b) { return sub(a, b); }
inline Tensor operator-(const Tensor& a, double b) { return sub(a, b); }
inline Tensor operator-(double a, const Tensor& b) { return sub(a, b); }
inline Tensor operator*(const Tensor& a, const Tensor& b) { return mul(a, b); }
inline Tensor operator*(const Tensor& a, double b) { return mul(a, b); }
inline Tensor operator*(double a, const Tensor& b) { return mul(b, a); }
inline Tensor operator/(const Tensor& a, const Tensor& b) { return div(a, b); }
inline Tensor operator/(const Tensor& a, double b) { return div(a, b); }
inline Tensor operator/(double a, const Tensor& b) { return div(a, b); }
inline Tensor operator-(const Tensor& x) { return neg(x); }

// ---- comparison and choice ----

// Elementwise truth as a bool tensor, after broadcasting and promotion; any dtype but f8e4m3 and f8e5m2. Not
// differentiable. Integers are compared exactly with each other, and as f64 with a number.
Tensor eq(const Tensor& a, const Tensor& b);
Tensor eq(const Tensor& a, double b);
Tensor ne(const Tensor& a, const Tensor& b);
Tensor ne(const Tensor& a, double b);
Tensor lt(const Tensor& a, const Tensor& b);
Tensor lt(const Tensor& a, double b);
Tensor le(const Tensor& a, const Tensor& b);
Tensor le(const Tensor& a, double b);
Tensor gt(const Tensor& a, const Tensor& b);
Tensor gt(const Tensor& a, double b);
Tensor ge(const Tensor& a, const Tensor& b);
Tensor ge(const Tensor& a, double b);

/// y = condition ? a : b, elementwise. `condition` is bool; all three broadcast. Values that are not chosen get a zero
/// gradient, whatever they are. Saved for backward: condition.
Tensor where(const Tensor& condition, const Tensor& a, const Tensor& b);
Tensor where(const Tensor& condition, const Tensor& a, double b);
Tensor where(const Tensor& condition, double a, const Tensor& b);
/// x with `value` where the mask is true.
Tensor masked_fill(const Tensor& x, const Tensor& mask, double value);

// ---- in place ----
// These change x and answer with it. Shapes must be equal (no implicit broadcasting); the other tensor is cast to x's
// dtype. Refused on a tensor that takes part in a graph, as Tensor::begin_change says; no gradient is recorded.

/// x += alpha * y.
const Tensor& add_(const Tensor& x, const Tensor& y, double alpha = 1);
/// x += value.
const Tensor& add_(const Tensor& x, double value);
/// x *= y.
const Tensor& mul_(const Tensor& x, const Tensor& y);
/// x *= value.
const Tensor& mul_(const Tensor& x, double value);

}  // namespace weft
