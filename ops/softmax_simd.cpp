// What softmax does to rows of f32, for every instruction set of the build.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/softmax_simd.cpp"
#include "hwy/foreach_target.h"  // must come before highway.h
//
#include <algorithm>

#include "hwy/highway.h"
#include "ops/lanes-inl.h"
#include "ops/norm_lanes-inl.h"
#include "ops/softmax_simd.h"

HWY_BEFORE_NAMESPACE();
namespace weft::detail {
namespace HWY_NAMESPACE {

using D32 = hn::ScalableTag<float>;

template <bool kStore>
HWY_INLINE double exp_sum_rows(const float* x, float shift, float* y, int64_t n) {
  constexpr int64_t kStretch = 1024;  // elements whose sum is kept in f32
  const D32 d;
  const auto shifts = hn::Set(d, shift);
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kStretch) {
    Sums sums(d);
    for_lanes(d, std::min(kStretch, n - begin), [&](auto k, int64_t i, auto which) HWY_ATTR {
      const auto e = fast_exp(d, hn::Sub(load<float>(d, x + begin + i, which), shifts));
      if constexpr (kStore) store<float>(d, e, y + begin + i, which);
      sums.part[k] = hn::Add(sums.part[k], existing(d, e, which));
    });
    total += static_cast<double>(sums.total(d));
  }
  return total;
}

double exp_sum(const float* x, float shift, float* y, int64_t n) {
  return y == nullptr ? exp_sum_rows<false>(x, shift, y, n) : exp_sum_rows<true>(x, shift, y, n);
}

void subtract(const float* x, float a, float b, float* y, int64_t n) {
  const D32 d;
  const auto as = hn::Set(d, a), bs = hn::Set(d, b);
  for_lanes(d, n, [&](auto, int64_t i, auto which) HWY_ATTR {
    store<float>(d, hn::Sub(hn::Sub(load<float>(d, x + i, which), as), bs), y + i, which);
  });
}

void softmax_backward_row(const float* dy, const float* y, float shift, float* dx, int64_t n) {
  const D32 d;
  const auto shifts = hn::Set(d, shift);
  for_lanes(d, n, [&](auto, int64_t i, auto which) HWY_ATTR {
    const auto centred = hn::Sub(load<float>(d, dy + i, which), shifts);
    store<float>(d, hn::Mul(load<float>(d, y + i, which), centred), dx + i, which);
  });
}

void log_softmax_backward_row(const float* dy, const float* y, float sum, float* dx, int64_t n) {
  const D32 d;
  const auto sums = hn::Set(d, sum);
  for_lanes(d, n, [&](auto, int64_t i, auto which) HWY_ATTR {
    const auto p = fast_exp(d, load<float>(d, y + i, which));
    store<float>(d, hn::NegMulAdd(p, sums, load<float>(d, dy + i, which)), dx + i, which);
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace weft::detail
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace weft::detail {
HWY_EXPORT(exp_sum);
HWY_EXPORT(subtract);
HWY_EXPORT(softmax_backward_row);
HWY_EXPORT(log_softmax_backward_row);
double exp_sum_f32(const float* x, float shift, float* y, int64_t n) {
  return HWY_DYNAMIC_DISPATCH(exp_sum)(x, shift, y, n);
}
void subtract_f32(const float* x, float a, float b, float* y, int64_t n) {
  HWY_DYNAMIC_DISPATCH(subtract)(x, a, b, y, n);
}
void softmax_backward_f32(const float* dy, const float* y, float shift, float* dx, int64_t n) {
  HWY_DYNAMIC_DISPATCH(softmax_backward_row)(dy, y, shift, dx, n);
}
void log_softmax_backward_f32(const float* dy, const float* y, float sum, float* dx, int64_t n) {
  HWY_DYNAMIC_DISPATCH(log_softmax_backward_row)(dy, y, sum, dx, n);
}
}  // namespace weft::detail
#endif
