// Layer norm and RMS norm by rows: a row stays in the L1 cache between the passes over it, so that memory is read and
// written once.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/norm_kernels.cpp"
#include "hwy/foreach_target.h"  // must come before highway.h
//
#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "core/thread_pool.h"
#include "hwy/highway.h"
#include "ops/norm_kernels.h"
#include "ops/norm_lanes-inl.h"

#ifndef WEFT_OPS_NORM_KERNELS_ONCE
#define WEFT_OPS_NORM_KERNELS_ONCE
namespace weft::detail {
template <class T>
struct NormKernels {
  void (*forward)(const NormForward<T>&, int64_t begin, int64_t end);
  void (*backward)(const NormBackward<T>&, int64_t begin, int64_t end, Accumulate<T>* partial);
};
using NormTable = std::tuple<NormKernels<float>, NormKernels<double>, NormKernels<Half>, NormKernels<BFloat16>>;
}  // namespace weft::detail
#endif

HWY_BEFORE_NAMESPACE();
namespace weft::detail {
namespace HWY_NAMESPACE {

template <class T, bool kCentered, bool kStream>
void forward_rows(const NormForward<T>& a, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const Tag<T> d;
  const int64_t columns = a.columns;
  const A scale = A(1) / static_cast<A>(columns);
  std::vector<T> kept(kStream && a.residual != nullptr ? static_cast<size_t>(columns) : 0);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = a.x + row * columns;
    T* y = a.y + row * columns;
    // The passes after the first touch no memory beyond the L1 cache: they fetch the next row meanwhile.
    const int64_t ahead = row + 1 < end ? columns : 0;
    const T* next = x + ahead;
    const T* next_residual = x + ahead;
    if (a.residual != nullptr) {
      const T* residual = a.residual + row * columns;
      next_residual = residual + ahead;
      T* sum = a.sum + row * columns;
      T* again = kStream ? kept.data() : sum;  // what went past the caches must not be read again
      for_lanes(d, columns, [&](auto, int64_t j, auto which) HWY_ATTR {
        const auto v = hn::Add(load<T>(d, x + j, which), load<T>(d, residual + j, which));
        if constexpr (kStream) put<T, true>(d, v, sum + j, which);
        store<T>(d, v, again + j, which);
      });
      x = again;
    }
    A mean = 0;
    if constexpr (kCentered) {
      Sums sums(d);
      for_lanes(d, columns, [&](auto k, int64_t j, auto which) HWY_ATTR {
        sums.part[k] = hn::Add(sums.part[k], load<T>(d, x + j, which));
      });
      mean = sums.total(d) * scale;
    }
    const auto center = hn::Set(d, mean);
    Sums squares(d);
    for_lanes(d, columns, [&](auto k, int64_t j, auto which) HWY_ATTR {
      hwy::Prefetch(next + j);
      const auto deviation = existing(d, hn::Sub(load<T>(d, x + j, which), center), which);
      squares.part[k] = hn::MulAdd(deviation, deviation, squares.part[k]);
    });
    const A rstd = A(1) / std::sqrt(squares.total(d) * scale + static_cast<A>(a.eps));
    const auto factor = hn::Set(d, rstd);
    for_lanes(d, columns, [&](auto, int64_t j, auto which) HWY_ATTR {
      hwy::Prefetch(next_residual + j);
      const auto normal = hn::Mul(hn::Sub(load<T>(d, x + j, which), center), factor);
      const auto weight = load<T>(d, a.weight + j, which);
      if (a.bias != nullptr) {
        put<T, kStream>(d, hn::MulAdd(normal, weight, load<T>(d, a.bias + j, which)), y + j, which);
      } else {
        put<T, kStream>(d, hn::Mul(normal, weight), y + j, which);
      }
    });
    if constexpr (kCentered) a.mean[row] = mean;
    a.rstd[row] = rstd;
  }
  if constexpr (kStream) hwy::FlushStream();
}

template <class T, bool kCentered, bool kStream>
void backward_rows(const NormBackward<T>& a, int64_t begin, int64_t end, Accumulate<T>* partial) {
  using A = Accumulate<T>;
  const Tag<T> d;
  const int64_t columns = a.columns;
  const A scale = A(1) / static_cast<A>(columns);
  A* dweight = partial;
  A* dbias = partial + columns;
  std::fill(partial, partial + 2 * columns, A(0));
  for (int64_t row = begin; row < end; ++row) {
    const T* x = a.x + row * columns;
    const T* dy = a.dy + row * columns;
    const auto center = hn::Set(d, kCentered ? a.mean[row] : A(0));
    const auto factor = hn::Set(d, a.rstd[row]);
    Sums plain(d), weighted(d);
    for_lanes(d, columns, [&](auto k, int64_t j, auto which) HWY_ATTR {
      const auto g = load<T>(d, dy + j, which);
      const auto normal = hn::Mul(hn::Sub(load<T>(d, x + j, which), center), factor);
      const auto scaled = hn::Mul(g, load<T>(d, a.weight + j, which));
      weighted.part[k] = hn::MulAdd(scaled, normal, weighted.part[k]);
      store<A>(d, hn::MulAdd(g, normal, load<A>(d, dweight + j, which)), dweight + j, which);
      if constexpr (kCentered) {
        plain.part[k] = hn::Add(plain.part[k], scaled);
        store<A>(d, hn::Add(g, load<A>(d, dbias + j, which)), dbias + j, which);
      }
    });
    if (a.dx == nullptr) continue;
    const auto mean_plain = hn::Set(d, plain.total(d) * scale);
    const auto mean_weighted = hn::Set(d, weighted.total(d) * scale);
    const T* added = a.added == nullptr ? nullptr : a.added + row * columns;
    T* dx = a.dx + row * columns;
    const int64_t ahead = row + 1 < end ? columns : 0;
    for_lanes(d, columns, [&](auto, int64_t j, auto which) HWY_ATTR {
      hwy::Prefetch(x + ahead + j);
      hwy::Prefetch(dy + ahead + j);
      const auto normal = hn::Mul(hn::Sub(load<T>(d, x + j, which), center), factor);
      auto g = hn::Mul(load<T>(d, dy + j, which), load<T>(d, a.weight + j, which));
      if constexpr (kCentered) g = hn::Sub(g, mean_plain);
      g = hn::Mul(hn::NegMulAdd(normal, mean_weighted, g), factor);
      if (added != nullptr) g = hn::Add(g, load<T>(d, added + j, which));
      put<T, kStream>(d, g, dx + j, which);
    });
  }
  if constexpr (kStream) hwy::FlushStream();
}

/// Calls f<kCentered, kStream>().
template <class F>
void choose(bool centered, bool stream, F f) {
  if (centered) return stream ? f.template operator()<true, true>() : f.template operator()<true, false>();
  return stream ? f.template operator()<false, true>() : f.template operator()<false, false>();
}

template <class T>
void forward(const NormForward<T>& a, int64_t begin, int64_t end) {
  choose(a.mean != nullptr, worth_streaming(a.y, a.rows, a.columns),
         [&]<bool kCentered, bool kStream>() { forward_rows<T, kCentered, kStream>(a, begin, end); });
}
template <class T>
void backward(const NormBackward<T>& a, int64_t begin, int64_t end, Accumulate<T>* partial) {
  choose(a.mean != nullptr, worth_streaming(a.dx, a.rows, a.columns),
         [&]<bool kCentered, bool kStream>() { backward_rows<T, kCentered, kStream>(a, begin, end, partial); });
}

const NormTable* norm_table() {
  static constexpr NormTable kTable{{forward<float>, backward<float>},
                                    {forward<double>, backward<double>},
                                    {forward<Half>, backward<Half>},
                                    {forward<BFloat16>, backward<BFloat16>}};
  return &kTable;
}

}  // namespace HWY_NAMESPACE
}  // namespace weft::detail
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace weft {
namespace detail {
HWY_EXPORT(norm_table);

template <class T>
const NormKernels<T>& norm_kernels() {
  return std::get<NormKernels<T>>(*HWY_DYNAMIC_DISPATCH(norm_table)());
}
}  // namespace detail

namespace {
/// Rows of a block: at least 16, so that adding up the partial sums costs little, and at most 128 blocks.
int64_t block_rows(int64_t rows) { return std::max<int64_t>(16, (rows + 127) / 128); }
/// Elements of a piece of work in the forward pass.
constexpr int64_t kGrain = 16384;
}  // namespace

int64_t norm_blocks(Cpu, int64_t rows) { return (rows + block_rows(rows) - 1) / block_rows(rows); }

template <class T>
void norm_forward(Cpu, const NormForward<T>& arguments) {
  const auto rows = detail::norm_kernels<T>().forward;
  parallel_for(arguments.rows, std::max<int64_t>(1, kGrain / arguments.columns),
               [&](int64_t begin, int64_t end) { rows(arguments, begin, end); });
}

template <class T>
void norm_backward(Cpu, const NormBackward<T>& arguments) {
  const auto rows = detail::norm_kernels<T>().backward;
  const int64_t block = block_rows(arguments.rows);
  parallel_for(arguments.rows, block, [&](int64_t begin, int64_t end) {
    rows(arguments, begin, end, arguments.partials + begin / block * 2 * arguments.columns);
  });
}

#define WEFT_NORM_INSTANCE(T)                             \
  template void norm_forward(Cpu, const NormForward<T>&); \
  template void norm_backward(Cpu, const NormBackward<T>&);
WEFT_NORM_INSTANCE(float)
WEFT_NORM_INSTANCE(double)
WEFT_NORM_INSTANCE(Half)
WEFT_NORM_INSTANCE(BFloat16)
#undef WEFT_NORM_INSTANCE

}  // namespace weft
#endif
