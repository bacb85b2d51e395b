#pragma once
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "core/random.h"
#include "core/tensor.h"

// Making and comparing values in tests of ops.

namespace weft::testing {

using Values = std::vector<double>;

/// Uniform in [low, high), drawn in f64 from the stream of that name, then cast.
inline Tensor random(const Shape& shape, DType dtype, const char* name, double low = -2, double high = 2) {
  const Tensor values = Tensor::empty(shape, DType::f64);
  fill_uniform(values, RandomStream(7, name), low, high);
  return values.to(dtype);
}

/// A copy that wants a gradient.
inline Tensor leaf(const Tensor& values) { return values.clone().requires_grad_(); }

/// Largest |got - want| / (1 + |want|); infinite if a NaN is in the way.
inline double distance(const Tensor& got, const Values& want) {
  const Values values = got.to_vector<double>();
  EXPECT_EQ(values.size(), want.size());
  double worst = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double error = std::abs(values[i] - want[i]) / (1 + std::abs(want[i]));
    if (!(error <= worst)) worst = std::isnan(error) ? INFINITY : error;
  }
  return worst;
}

inline bool same_bits(const Tensor& a, const Tensor& b) {
  return a.shape() == b.shape() && a.dtype() == b.dtype() &&
         std::memcmp(a.raw(), b.raw(), static_cast<size_t>(a.numel() * size_of(a.dtype()))) == 0;
}

}  // namespace weft::testing
