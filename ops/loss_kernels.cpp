// Softmax cross-entropy by rows. A row of f32 logits of a 50,257-word vocabulary is 200 KB: the passes over it after
// the first find it in the L2 cache.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/loss_kernels.cpp"
#include "hwy/foreach_target.h"  // must come before highway.h
//
#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "core/thread_pool.h"
#include "hwy/highway.h"
#include "ops/lanes-inl.h"
#include "ops/loss_kernels.h"
#include "ops/norm_lanes-inl.h"

#ifndef WEFT_OPS_LOSS_KERNELS_ONCE
#define WEFT_OPS_LOSS_KERNELS_ONCE
namespace weft::detail {
template <class T>
struct LossKernels {
  using A = Accumulate<T>;
  double (*log_sum)(const T* logits, int64_t classes);
  void (*gradient)(const T* logits, int64_t classes, A lse, A scale, T* out);
  double (*in_place)(A* logits, int64_t classes, A scale, T* out);
  void (*slice_in_place)(A* logits, int64_t classes, A lse, A scale, T* out);
  void (*scale)(const A* x, int64_t count, A scale, T* out, bool accumulate);
};
using LossTable = std::tuple<LossKernels<float>, LossKernels<double>, LossKernels<Half>, LossKernels<BFloat16>>;
}  // namespace weft::detail
#endif

HWY_BEFORE_NAMESPACE();
namespace weft::detail {
namespace HWY_NAMESPACE {

template <class T>
Accumulate<T> row_max(const T* row, int64_t n) {
  const Tag<T> d;
  const auto lowest = hn::Set(d, -std::numeric_limits<Accumulate<T>>::infinity());
  Vector<T> largest[4] = {lowest, lowest, lowest, lowest};
  for_lanes(d, n, [&](auto k, int64_t i, auto which) HWY_ATTR {
    largest[k] = hn::Max(largest[k], existing(d, load<T>(d, row + i, which), which, lowest));
  });
  return hn::GetLane(hn::MaxOfLanes(d, hn::Max(hn::Max(largest[0], largest[1]), hn::Max(largest[2], largest[3]))));
}

template <class T>
double log_sum(const T* logits, int64_t classes) {
  const Tag<T> d;
  const auto max = row_max(logits, classes);
  const auto shift = hn::Set(d, max);
  Sums sums(d);
  for_lanes(d, classes, [&](auto k, int64_t i, auto which) HWY_ATTR {
    const auto e = fast_exp(d, hn::Sub(load<T>(d, logits + i, which), shift));
    sums.part[k] = hn::Add(sums.part[k], existing(d, e, which));
  });
  return static_cast<double>(max) + std::log(static_cast<double>(sums.total(d)));
}

template <class T>
void gradient(const T* logits, int64_t classes, Accumulate<T> lse, Accumulate<T> scale, T* out) {
  const Tag<T> d;
  const auto shift = hn::Set(d, lse), factor = hn::Set(d, scale);
  for_lanes(d, classes, [&](auto, int64_t i, auto which) HWY_ATTR {
    store<T>(d, hn::Mul(fast_exp(d, hn::Sub(load<T>(d, logits + i, which), shift)), factor), out + i, which);
  });
}

/// One exponential per logit: it is kept while the sum grows, then scaled.
template <class T>
double in_place(Accumulate<T>* logits, int64_t classes, Accumulate<T> scale, T* out) {
  using A = Accumulate<T>;
  const Tag<T> d;
  const A max = row_max(logits, classes);
  const auto shift = hn::Set(d, max);
  Sums sums(d);
  for_lanes(d, classes, [&](auto k, int64_t i, auto which) HWY_ATTR {
    const auto e = fast_exp(d, hn::Sub(load<A>(d, logits + i, which), shift));
    store<A>(d, e, logits + i, which);
    sums.part[k] = hn::Add(sums.part[k], existing(d, e, which));
  });
  const A sum = sums.total(d);
  const auto factor = hn::Set(d, scale / sum);
  // A narrower `out` shares memory with logits: vector by vector, what is written lies behind what is still to be read.
  for_lanes(d, classes, [&](auto, int64_t i, auto which) HWY_ATTR {
    store<T>(d, hn::Mul(load<A>(d, logits + i, which), factor), out + i, which);
  });
  return static_cast<double>(max) + std::log(static_cast<double>(sum));
}

template <class T>
void slice_in_place(Accumulate<T>* logits, int64_t classes, Accumulate<T> lse, Accumulate<T> scale, T* out) {
  using A = Accumulate<T>;
  const Tag<T> d;
  const auto shift = hn::Set(d, lse), factor = hn::Set(d, scale);
  // Memory is shared as in in_place().
  for_lanes(d, classes, [&](auto, int64_t i, auto which) HWY_ATTR {
    store<T>(d, hn::Mul(fast_exp(d, hn::Sub(load<A>(d, logits + i, which), shift)), factor), out + i, which);
  });
}

template <class T>
void scale(const Accumulate<T>* x, int64_t count, Accumulate<T> by, T* out, bool accumulate) {
  using A = Accumulate<T>;
  const Tag<T> d;
  const auto factor = hn::Set(d, by);
  for_lanes(d, count, [&](auto, int64_t i, auto which) HWY_ATTR {
    auto v = hn::Mul(load<A>(d, x + i, which), factor);
    if (accumulate) v = hn::Add(v, load<T>(d, out + i, which));
    store<T>(d, v, out + i, which);
  });
}

template <class T>
constexpr LossKernels<T> kKernels = {log_sum<T>, gradient<T>, in_place<T>, slice_in_place<T>, scale<T>};

const LossTable* loss_table() {
  static constexpr LossTable kTable{kKernels<float>, kKernels<double>, kKernels<Half>, kKernels<BFloat16>};
  return &kTable;
}

}  // namespace HWY_NAMESPACE
}  // namespace weft::detail
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace weft {
namespace detail {
HWY_EXPORT(loss_table);

template <class T>
const LossKernels<T>& loss_kernels() {
  return std::get<LossKernels<T>>(*HWY_DYNAMIC_DISPATCH(loss_table)());
}
}  // namespace detail

namespace {
/// Logits of a piece of work.
constexpr int64_t kGrain = 16384;

/// Calls row(n, target) for the valid rows and ignored(n) for the others, on all threads.
template <class Row, class Ignored>
void for_rows(const LossTargets& t, Row row, Ignored ignored) {
  parallel_for(t.rows, std::max<int64_t>(1, kGrain / t.classes), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) t.targets[n] == t.ignored ? ignored(n) : row(n, t.targets[n]);
  });
}

template <class A>
double value_of(const LossScale<A>& scale) {
  return (scale.gradient == nullptr ? 1 : static_cast<double>(*scale.gradient)) / *scale.denominator;
}

/// The gradient of the target's class, probability - 1, without the cancellation that a subtraction would have.
template <class T>
T target_gradient(double log_probability, double scale) {
  return T(static_cast<Accumulate<T>>(std::expm1(log_probability) * scale));
}
}  // namespace

template <class T>
void loss_forward(Cpu, const LossTargets& t, const T* logits, Accumulate<T>* lse, double* loss) {
  const auto& kernels = detail::loss_kernels<T>();
  for_rows(
      t,
      [&](int64_t n, int64_t target) {
        const double value = kernels.log_sum(logits + n * t.classes, t.classes);
        if (lse != nullptr) lse[n] = static_cast<Accumulate<T>>(value);
        loss[n] = value - static_cast<double>(logits[n * t.classes + target]);
      },
      [&](int64_t n) {
        if (lse != nullptr) lse[n] = 0;
        loss[n] = 0;
      });
}

template <class T>
void loss_backward(Cpu, const LossTargets& t, const T* logits, const Accumulate<T>* lse,
                   const LossScale<Accumulate<T>>& by, T* dlogits) {
  using A = Accumulate<T>;
  const double scale = value_of(by);
  const auto& kernels = detail::loss_kernels<T>();
  const A factor = static_cast<A>(scale);
  for_rows(
      t,
      [&](int64_t n, int64_t target) {
        const T* row = logits + n * t.classes;
        T* out = dlogits + n * t.classes;
        const double log_probability = static_cast<double>(row[target]) - static_cast<double>(lse[n]);
        kernels.gradient(row, t.classes, lse[n], factor, out);
        out[target] = target_gradient<T>(log_probability, scale);
      },
      [&](int64_t n) { std::fill_n(dlogits + n * t.classes, t.classes, T(0.0f)); });
}

template <class T>
void loss_in_place(Cpu, const LossTargets& t, Accumulate<T>* logits, const LossScale<Accumulate<T>>& by, double* loss) {
  using A = Accumulate<T>;
  const double scale = value_of(by);
  const auto& kernels = detail::loss_kernels<T>();
  const A factor = static_cast<A>(scale);
  for_rows(
      t,
      [&](int64_t n, int64_t target) {
        A* row = logits + n * t.classes;
        T* out = reinterpret_cast<T*>(row);
        const A logit = row[target];
        const double lse = kernels.in_place(row, t.classes, factor, out);
        loss[n] = lse - static_cast<double>(logit);
        out[target] = target_gradient<T>(-loss[n], scale);
      },
      [&](int64_t n) {
        std::fill_n(reinterpret_cast<T*>(logits + n * t.classes), t.classes, T(0.0f));
        loss[n] = 0;
      });
}

template <class A>
void loss_parts(Cpu, const LossTargets& t, int64_t first, const A* logits, double* parts) {
  const auto& kernels = detail::loss_kernels<A>();
  for_rows(
      t,
      [&](int64_t n, int64_t target) {
        const A* row = logits + n * t.classes;
        const int64_t here = target - first;
        parts[2 * n] = kernels.log_sum(row, t.classes);
        parts[2 * n + 1] = here >= 0 && here < t.classes ? static_cast<double>(row[here]) : 0;
      },
      [&](int64_t n) { parts[2 * n] = parts[2 * n + 1] = 0; });
}

template <class A>
void join_loss_parts(Cpu, const LossTargets& t, int64_t slices, const double* parts, A* lse, double* loss) {
  for (int64_t n = 0; n < t.rows; ++n) {
    const LossParts joined = t.targets[n] == t.ignored ? LossParts{} : join(parts + 2 * n, slices, 2 * t.rows);
    lse[n] = static_cast<A>(joined.lse);
    loss[n] = joined.lse - joined.logit;
  }
}

template <class T>
void loss_slice_in_place(Cpu, const LossTargets& t, int64_t first, const Accumulate<T>* lse, const double* loss,
                         Accumulate<T>* logits, const LossScale<Accumulate<T>>& by) {
  using A = Accumulate<T>;
  const double scale = value_of(by);
  const auto& kernels = detail::loss_kernels<T>();
  const A factor = static_cast<A>(scale);
  for_rows(
      t,
      [&](int64_t n, int64_t target) {
        A* row = logits + n * t.classes;
        T* out = reinterpret_cast<T*>(row);
        const int64_t here = target - first;
        kernels.slice_in_place(row, t.classes, lse[n], factor, out);
        if (here >= 0 && here < t.classes) out[here] = target_gradient<T>(-loss[n], scale);
      },
      [&](int64_t n) { std::fill_n(reinterpret_cast<T*>(logits + n * t.classes), t.classes, T(0.0f)); });
}
template void loss_parts(Cpu, const LossTargets&, int64_t, const float*, double*);
template void loss_parts(Cpu, const LossTargets&, int64_t, const double*, double*);
template void join_loss_parts(Cpu, const LossTargets&, int64_t, const double*, float*, double*);
template void join_loss_parts(Cpu, const LossTargets&, int64_t, const double*, double*, double*);

template <class T>
void scale_to(Cpu, const Accumulate<T>* x, int64_t count, const Accumulate<T>* scale, T* out, bool accumulate) {
  const auto kernel = detail::loss_kernels<T>().scale;
  parallel_for(count, kGrain,
               [&](int64_t begin, int64_t end) { kernel(x + begin, end - begin, *scale, out + begin, accumulate); });
}

#define WEFT_LOSS_INSTANCE(T)                                                                                        \
  template void loss_forward(Cpu, const LossTargets&, const T*, Accumulate<T>*, double*);                            \
  template void loss_backward(Cpu, const LossTargets&, const T*, const Accumulate<T>*,                               \
                              const LossScale<Accumulate<T>>&, T*);                                                  \
  template void loss_in_place<T>(Cpu, const LossTargets&, Accumulate<T>*, const LossScale<Accumulate<T>>&, double*); \
  template void loss_slice_in_place<T>(Cpu, const LossTargets&, int64_t, const Accumulate<T>*, const double*,        \
                                       Accumulate<T>*, const LossScale<Accumulate<T>>&);                             \
  template void scale_to(Cpu, const Accumulate<T>*, int64_t, const Accumulate<T>*, T*, bool);
WEFT_LOSS_INSTANCE(float)
WEFT_LOSS_INSTANCE(double)
WEFT_LOSS_INSTANCE(Half)
WEFT_LOSS_INSTANCE(BFloat16)
#undef WEFT_LOSS_INSTANCE

}  // namespace weft
#endif
