#pragma once
#include <cmath>

#include "core/float_types.h"

// The functors of scalar_math.inc for float and double, on the CPU and on a GPU, and for any class that brings the
// functions it calls.

namespace weft::scalar_math {

using std::abs;
using std::cos;
using std::exp;
using std::sin;
using std::sqrt;
using std::tanh;

WEFT_HD inline float ln(float x) { return std::log(x); }
WEFT_HD inline double ln(double x) { return std::log(x); }

#define WEFT_SCALAR(T)                                                     \
  WEFT_HD inline T larger(T a, T b) { return a > b || a != a ? a : b; }    \
  WEFT_HD inline T smaller(T a, T b) { return a < b || a != a ? a : b; }   \
  WEFT_HD inline T where_positive(T x, T a, T b) { return x > 0 ? a : b; } \
  WEFT_HD inline T where_negative(T x, T a, T b) { return x < 0 ? a : b; }
WEFT_SCALAR(float)
WEFT_SCALAR(double)
#undef WEFT_SCALAR

#include "ops/scalar_math.inc"

}  // namespace weft::scalar_math
