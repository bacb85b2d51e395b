#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "optim/optimizer_simd.cpp"
#include <hwy/foreach_target.h>  // reads this file again for each target
#include <hwy/highway.h>

#include <algorithm>

#include "optim/optimizer_simd.h"

HWY_BEFORE_NAMESPACE();
namespace weft::optim::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

/// Constants as vectors, and the two halves of the rule.
template <class T>
struct Rule {
  using D = hn::ScalableTag<T>;
  using V = hn::Vec<D>;
  D d;
  V scale, beta1, beta2, rest1, rest2, bias1, bias2, eps, decay, lr;
  bool slow1, slow2;  ///< whether the mean, and the mean square, keep the larger part of what they were

  Rule(const AdamConstants<T>& c, const AdamRates<T>& rates)
      : scale(hn::Set(d, c.grad_scale)),
        beta1(hn::Set(d, c.beta1)),
        beta2(hn::Set(d, c.beta2)),
        rest1(hn::Set(d, c.rest1)),
        rest2(hn::Set(d, c.rest2)),
        bias1(hn::Set(d, c.inverse_bias1)),
        bias2(hn::Set(d, c.inverse_bias2)),
        eps(hn::Set(d, c.eps)),
        decay(hn::Set(d, rates.weight_decay)),
        lr(hn::Set(d, rates.lr)),
        slow1(c.rest1 < T{0.5}),
        slow2(c.rest2 < T{0.5}) {}

  /// beta * mean + (1 - beta) * x as mean + (1 - beta)(x - mean): 0.999 in f32 is so far from 0.999 that v would settle
  /// 5e-5 off. With a small beta the same is counted from x: an old mean much larger than x would swallow it.
  static HWY_INLINE V blend(bool slow, V beta, V rest, V mean, V x) {
    return slow ? hn::MulAdd(rest, hn::Sub(x, mean), mean) : hn::MulAdd(beta, hn::Sub(mean, x), x);
  }
  HWY_INLINE void moments(V gradient, V& m, V& v) const {
    const V g = hn::Mul(gradient, scale);
    m = blend(slow1, beta1, rest1, m, g);
    v = blend(slow2, beta2, rest2, v, hn::Mul(g, g));
  }
  HWY_INLINE V direction(V w, V m, V v) const {
    const V root = hn::Add(hn::Sqrt(hn::Mul(v, bias2)), eps);
    return hn::MulAdd(decay, w, hn::Div(hn::Mul(m, bias1), root));
  }
};

/// body(offset, count): whole vectors, then the rest through buffers padded with zeros.
template <class T, class Body>
HWY_INLINE void for_each_vector(int64_t n, Body body) {
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(hn::ScalableTag<T>()));
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) body(i, lanes);
  if (i < n) body(i, n - i);
}

template <class T>
HWY_INLINE hn::Vec<hn::ScalableTag<T>> load(const T* from, int64_t count) {
  const hn::ScalableTag<T> d;
  if (count == static_cast<int64_t>(hn::Lanes(d))) return hn::LoadU(d, from);
  HWY_ALIGN T buffer[hn::MaxLanes(d)] = {};
  std::copy_n(from, count, buffer);
  return hn::Load(d, buffer);
}

template <class T>
HWY_INLINE void store(hn::Vec<hn::ScalableTag<T>> v, T* to, int64_t count) {
  const hn::ScalableTag<T> d;
  if (count == static_cast<int64_t>(hn::Lanes(d))) return hn::StoreU(v, d, to);
  HWY_ALIGN T buffer[hn::MaxLanes(d)];
  hn::Store(v, d, buffer);
  std::copy_n(buffer, count, to);
}

template <class T>
void update(int64_t n, T* w, const T* g, T* m, T* v, const AdamConstants<T>& c, const AdamRates<T>& rates) {
  const Rule<T> rule(c, rates);
  for_each_vector<T>(n, [&](int64_t i, int64_t count) {
    auto mean = load(m + i, count), square = load(v + i, count);
    const auto weight = load(w + i, count);
    rule.moments(load(g + i, count), mean, square);
    store(mean, m + i, count);
    store(square, v + i, count);
    store(hn::NegMulAdd(rule.lr, rule.direction(weight, mean, square), weight), w + i, count);
  });
}

template <class T>
SquareSums moments(int64_t n, const T* w, const T* g, T* m, T* v, const AdamConstants<T>& c,
                   const AdamRates<T>& rates) {
  const Rule<T> rule(c, rates);
  SquareSums sums;
  for (int64_t begin = 0; begin < n; begin += kSumBlock) {
    auto weights = hn::Zero(rule.d), updates = hn::Zero(rule.d);
    for_each_vector<T>(std::min(kSumBlock, n - begin), [&](int64_t offset, int64_t count) {
      const int64_t i = begin + offset;
      auto mean = load(m + i, count), square = load(v + i, count);
      const auto weight = load(w + i, count);
      rule.moments(load(g + i, count), mean, square);
      store(mean, m + i, count);
      store(square, v + i, count);
      const auto u = rule.direction(weight, mean, square);
      weights = hn::MulAdd(weight, weight, weights);
      updates = hn::MulAdd(u, u, updates);
    });
    sums.weight += static_cast<double>(hn::GetLane(hn::SumOfLanes(rule.d, weights)));
    sums.update += static_cast<double>(hn::GetLane(hn::SumOfLanes(rule.d, updates)));
  }
  return sums;
}

template <class T>
void apply(int64_t n, T* w, const T* m, const T* v, const AdamConstants<T>& c, const AdamRates<T>& rates) {
  const Rule<T> rule(c, rates);
  for_each_vector<T>(n, [&](int64_t i, int64_t count) {
    const auto weight = load(w + i, count);
    store(hn::NegMulAdd(rule.lr, rule.direction(weight, load(m + i, count), load(v + i, count)), weight), w + i, count);
  });
}

template <class T>
double squares(int64_t n, const T* x) {
  const hn::ScalableTag<T> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kSumBlock) {
    const int64_t end = std::min(n, begin + kSumBlock);
    auto a = hn::Zero(d), b = hn::Zero(d);
    int64_t i = begin;
    for (; i + 2 * lanes <= end; i += 2 * lanes) {
      const auto p = hn::LoadU(d, x + i), q = hn::LoadU(d, x + i + lanes);
      a = hn::MulAdd(p, p, a);
      b = hn::MulAdd(q, q, b);
    }
    for (; i < end; i += lanes) {
      const auto p = load(x + i, std::min(lanes, end - i));
      a = hn::MulAdd(p, p, a);
    }
    total += static_cast<double>(hn::GetLane(hn::SumOfLanes(d, hn::Add(a, b))));
  }
  return total;
}

// clang-format off
#define WEFT_INSTANCES(T, suffix) \
  void update_##suffix(int64_t n, T* w, const T* g, T* m, T* v, const AdamConstants<T>& c, const AdamRates<T>& rates) { update(n, w, g, m, v, c, rates); } \
  SquareSums moments_##suffix(int64_t n, const T* w, const T* g, T* m, T* v, const AdamConstants<T>& c, const AdamRates<T>& rates) { return moments(n, w, g, m, v, c, rates); } \
  void apply_##suffix(int64_t n, T* w, const T* m, const T* v, const AdamConstants<T>& c, const AdamRates<T>& rates) { apply(n, w, m, v, c, rates); } \
  double squares_##suffix(int64_t n, const T* x) { return squares(n, x); }
WEFT_INSTANCES(float, f32)
WEFT_INSTANCES(double, f64)
#undef WEFT_INSTANCES
// clang-format on

}  // namespace
}  // namespace weft::optim::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace weft::optim {

// clang-format off
#define WEFT_DISPATCH(T, suffix) \
  HWY_EXPORT(update_##suffix); \
  HWY_EXPORT(moments_##suffix); \
  HWY_EXPORT(apply_##suffix); \
  HWY_EXPORT(squares_##suffix); \
  template <> void update_piece(int64_t n, T* w, const T* g, T* m, T* v, const AdamConstants<T>& c, const AdamRates<T>& rates) { HWY_DYNAMIC_DISPATCH(update_##suffix)(n, w, g, m, v, c, rates); } \
  template <> SquareSums moments_piece(int64_t n, const T* w, const T* g, T* m, T* v, const AdamConstants<T>& c, const AdamRates<T>& rates) { return HWY_DYNAMIC_DISPATCH(moments_##suffix)(n, w, g, m, v, c, rates); } \
  template <> void apply_piece(int64_t n, T* w, const T* m, const T* v, const AdamConstants<T>& c, const AdamRates<T>& rates) { HWY_DYNAMIC_DISPATCH(apply_##suffix)(n, w, m, v, c, rates); } \
  template <> double sum_of_squares(int64_t n, const T* x) { return HWY_DYNAMIC_DISPATCH(squares_##suffix)(n, x); }
WEFT_DISPATCH(float, f32)
WEFT_DISPATCH(double, f64)
#undef WEFT_DISPATCH
// clang-format on

}  // namespace weft::optim
#endif
