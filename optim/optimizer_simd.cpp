#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "optim/optimizer_simd.cpp"
#include <hwy/foreach_target.h>  // reads this file again for each target
#include <hwy/highway.h>

#include <algorithm>
#include <type_traits>

#include "ops/norm_lanes-inl.h"
#include "optim/optimizer_simd.h"

HWY_BEFORE_NAMESPACE();
namespace weft::optim::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;
using namespace weft::detail::HWY_NAMESPACE;  // rows of any float type as vectors

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

/// Stores w where it lives and, rounded, in the parameter that follows it.
template <class T, class Which>
HWY_INLINE void store_weight(Tag<T> d, Vector<T> w, Accumulate<T>* to, T* rounded, Which which) {
  store<Accumulate<T>>(d, w, to, which);
  if constexpr (!std::is_same_v<T, Accumulate<T>>) store<T>(d, w, rounded, which);
}

template <class T, class A>
void update(int64_t n, A* w, const T* g, A* m, A* v, T* rounded, const AdamConstants<A>& c, const AdamRates<A>& rates) {
  const Rule<A> rule(c, rates);
  const Tag<T> d;
  for_lanes(d, n, [&](auto, int64_t i, auto which) HWY_ATTR {
    auto mean = load<A>(d, m + i, which), square = load<A>(d, v + i, which);
    const auto weight = load<A>(d, w + i, which);
    rule.moments(load<T>(d, g + i, which), mean, square);
    store<A>(d, mean, m + i, which);
    store<A>(d, square, v + i, which);
    store_weight<T>(d, hn::NegMulAdd(rule.lr, rule.direction(weight, mean, square), weight), w + i, rounded + i, which);
  });
}

template <class T, class A>
SquareSums moments(int64_t n, const A* w, const T* g, A* m, A* v, const AdamConstants<A>& c,
                   const AdamRates<A>& rates) {
  const Rule<A> rule(c, rates);
  const Tag<T> d;
  SquareSums sums;
  for (int64_t begin = 0; begin < n; begin += kSumBlock) {
    auto weights = hn::Zero(d), updates = hn::Zero(d);
    for_lanes(d, std::min(kSumBlock, n - begin), [&](auto, int64_t offset, auto which) HWY_ATTR {
      const int64_t i = begin + offset;
      auto mean = load<A>(d, m + i, which), square = load<A>(d, v + i, which);
      const auto weight = load<A>(d, w + i, which);
      rule.moments(load<T>(d, g + i, which), mean, square);
      store<A>(d, mean, m + i, which);
      store<A>(d, square, v + i, which);
      const auto u = rule.direction(weight, mean, square);
      weights = hn::MulAdd(weight, weight, weights);
      updates = hn::MulAdd(u, u, updates);
    });
    sums.weight += static_cast<double>(hn::GetLane(hn::SumOfLanes(d, weights)));
    sums.update += static_cast<double>(hn::GetLane(hn::SumOfLanes(d, updates)));
  }
  return sums;
}

template <class T, class A>
void apply(int64_t n, A* w, const A* m, const A* v, T* rounded, const AdamConstants<A>& c, const AdamRates<A>& rates) {
  const Rule<A> rule(c, rates);
  const Tag<T> d;
  for_lanes(d, n, [&](auto, int64_t i, auto which) HWY_ATTR {
    const auto weight = load<A>(d, w + i, which);
    const auto u = rule.direction(weight, load<A>(d, m + i, which), load<A>(d, v + i, which));
    store_weight<T>(d, hn::NegMulAdd(rule.lr, u, weight), w + i, rounded + i, which);
  });
}

template <class T>
double squares(int64_t n, const T* x) {
  const Tag<T> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kSumBlock) {
    const int64_t end = std::min(n, begin + kSumBlock);
    auto a = hn::Zero(d), b = hn::Zero(d);
    int64_t i = begin;
    for (; i + 2 * lanes <= end; i += 2 * lanes) {
      const auto p = load<T>(d, x + i, Full()), q = load<T>(d, x + i + lanes, Full());
      a = hn::MulAdd(p, p, a);
      b = hn::MulAdd(q, q, b);
    }
    for (; i < end; i += lanes) {
      const auto p = load<T>(d, x + i, Part{std::min(lanes, end - i)});
      a = hn::MulAdd(p, p, a);
    }
    total += static_cast<double>(hn::GetLane(hn::SumOfLanes(d, hn::Add(a, b))));
  }
  return total;
}

// clang-format off
#define WEFT_INSTANCES(T, A, suffix) \
  void update_##suffix(int64_t n, A* w, const T* g, A* m, A* v, T* rounded, const AdamConstants<A>& c, const AdamRates<A>& rates) { update(n, w, g, m, v, rounded, c, rates); } \
  SquareSums moments_##suffix(int64_t n, const A* w, const T* g, A* m, A* v, const AdamConstants<A>& c, const AdamRates<A>& rates) { return moments(n, w, g, m, v, c, rates); } \
  void apply_##suffix(int64_t n, A* w, const A* m, const A* v, T* rounded, const AdamConstants<A>& c, const AdamRates<A>& rates) { apply(n, w, m, v, rounded, c, rates); } \
  double squares_##suffix(int64_t n, const T* x) { return squares(n, x); }
WEFT_INSTANCES(float, float, f32)
WEFT_INSTANCES(double, double, f64)
WEFT_INSTANCES(Half, float, f16)
WEFT_INSTANCES(BFloat16, float, bf16)
#undef WEFT_INSTANCES
// clang-format on

}  // namespace
}  // namespace weft::optim::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace weft::optim {

// clang-format off
#define WEFT_DISPATCH(T, A, suffix) \
  HWY_EXPORT(update_##suffix); \
  HWY_EXPORT(moments_##suffix); \
  HWY_EXPORT(apply_##suffix); \
  HWY_EXPORT(squares_##suffix); \
  template <> void update_piece(int64_t n, A* w, const T* g, A* m, A* v, T* rounded, const AdamConstants<A>& c, const AdamRates<A>& rates) { HWY_DYNAMIC_DISPATCH(update_##suffix)(n, w, g, m, v, rounded, c, rates); } \
  template <> SquareSums moments_piece(int64_t n, const A* w, const T* g, A* m, A* v, const AdamConstants<A>& c, const AdamRates<A>& rates) { return HWY_DYNAMIC_DISPATCH(moments_##suffix)(n, w, g, m, v, c, rates); } \
  template <> void apply_piece(int64_t n, A* w, const A* m, const A* v, T* rounded, const AdamConstants<A>& c, const AdamRates<A>& rates) { HWY_DYNAMIC_DISPATCH(apply_##suffix)(n, w, m, v, rounded, c, rates); } \
  template <> double sum_of_squares(int64_t n, const T* x) { return HWY_DYNAMIC_DISPATCH(squares_##suffix)(n, x); }
WEFT_DISPATCH(float, float, f32)
WEFT_DISPATCH(double, double, f64)
WEFT_DISPATCH(Half, float, f16)
WEFT_DISPATCH(BFloat16, float, bf16)
#undef WEFT_DISPATCH
// clang-format on

}  // namespace weft::optim
#endif
