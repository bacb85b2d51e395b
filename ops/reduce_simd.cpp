// Sums and extremes of rows of f32 for every instruction set of the build.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/reduce_simd.cpp"
#include "hwy/foreach_target.h"  // must come before highway.h
//
#include <algorithm>

#include "hwy/highway.h"
#include "ops/lanes-inl.h"
#include "ops/norm_lanes-inl.h"
#include "ops/reduce_simd.h"

HWY_BEFORE_NAMESPACE();
namespace weft::detail {
namespace HWY_NAMESPACE {

using F32 = Lanes<float>;

/// Elements whose sum is kept in f32: each of four vectors adds up 64 of them at most.
constexpr int64_t kStretch = 1024;

double sum(const float* x, int64_t n) {
  const F32::D d;
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kStretch) {
    Sums sums(d);
    for_lanes(d, std::min(kStretch, n - begin), [&](auto k, int64_t i, auto which) HWY_ATTR {
      sums.part[k] = hn::Add(sums.part[k], load<float>(d, x + begin + i, which));
    });
    total += static_cast<double>(sums.total(d));
  }
  return total;
}

double dot(const float* a, const float* b, int64_t n) {
  const F32::D d;
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kStretch) {
    Sums sums(d);
    for_lanes(d, std::min(kStretch, n - begin), [&](auto k, int64_t i, auto which) HWY_ATTR {
      sums.part[k] =
          hn::MulAdd(load<float>(d, a + begin + i, which), load<float>(d, b + begin + i, which), sums.part[k]);
    });
    total += static_cast<double>(sums.total(d));
  }
  return total;
}

struct Larger {
  template <class T>
  HWY_INLINE T operator()(T a, T b) const {
    return larger(a, b);
  }
  HWY_INLINE float operator()(float a, float b) const { return a > b || a != a ? a : b; }
};
struct Smaller {
  template <class T>
  HWY_INLINE T operator()(T a, T b) const {
    return smaller(a, b);
  }
  HWY_INLINE float operator()(float a, float b) const { return a < b || a != a ? a : b; }
};

template <class Better>
HWY_INLINE float extreme(const Better& better, const float* x, int64_t n) {
  const F32::D d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  float best = x[0];
  if (n < lanes) {
    for (int64_t i = 1; i < n; ++i) best = better(x[i], best);
    return best;
  }
  F32 first = F32::load(x), second = first;
  int64_t i = 0;
  for (; i + 2 * lanes <= n; i += 2 * lanes) {
    first = better(F32::load(x + i), first);
    second = better(F32::load(x + i + lanes), second);
  }
  if (i + lanes <= n) first = better(F32::load(x + i), first);
  first = better(better(first, second), F32::load(x + n - lanes));  // what is left, some of it for a second time
  HWY_ALIGN float each[hn::MaxLanes(d)];
  hn::Store(first.v, d, each);
  for (size_t k = 0; k < hn::Lanes(d); ++k) best = better(each[k], best);
  return best;
}

float max_of(const float* x, int64_t n) { return extreme(Larger(), x, n); }
float min_of(const float* x, int64_t n) { return extreme(Smaller(), x, n); }

void add_row(const float* x, float* sums, int64_t n) {
  const F32::D d;
  for_lanes(d, n, [&](auto, int64_t i, auto which) HWY_ATTR {
    store<float>(d, hn::Add(load<float>(d, sums + i, which), load<float>(d, x + i, which)), sums + i, which);
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace weft::detail
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace weft::detail {
HWY_EXPORT(sum);
HWY_EXPORT(dot);
HWY_EXPORT(max_of);
HWY_EXPORT(min_of);
HWY_EXPORT(add_row);
double sum_f32(const float* x, int64_t n) { return HWY_DYNAMIC_DISPATCH(sum)(x, n); }
double dot_f32(const float* a, const float* b, int64_t n) { return HWY_DYNAMIC_DISPATCH(dot)(a, b, n); }
float max_f32(const float* x, int64_t n) { return HWY_DYNAMIC_DISPATCH(max_of)(x, n); }
float min_f32(const float* x, int64_t n) { return HWY_DYNAMIC_DISPATCH(min_of)(x, n); }
void add_row_f32(const float* x, float* sums, int64_t n) { HWY_DYNAMIC_DISPATCH(add_row)(x, sums, n); }
}  // namespace weft::detail
#endif
