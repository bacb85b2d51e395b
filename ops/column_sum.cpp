#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/column_sum.cpp"
#include <hwy/foreach_target.h>  // reads this file again for each target
#include <hwy/highway.h>

#include <algorithm>

#include "core/thread_pool.h"
#include "ops/column_sum.h"
#include "ops/norm_lanes-inl.h"

HWY_BEFORE_NAMESPACE();
namespace weft::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;
using detail::HWY_NAMESPACE::Full;
using detail::HWY_NAMESPACE::load;

/// Rows summed in registers before they are added to the running total: bounds the growth of rounding errors.
constexpr int64_t kBlock = 64;

template <class S, class T = Accumulate<S>>
void strip(const S* x, int64_t rows, int64_t columns, int64_t row_stride, T* out, bool accumulate) {
  const hn::ScalableTag<T> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t j = 0;
  for (; j + 2 * lanes <= columns; j += 2 * lanes) {
    auto total0 = accumulate ? hn::LoadU(d, out + j) : hn::Zero(d),
         total1 = accumulate ? hn::LoadU(d, out + j + lanes) : hn::Zero(d);
    for (int64_t begin = 0; begin < rows; begin += kBlock) {
      const int64_t end = std::min(rows, begin + kBlock);
      auto sum0 = hn::Zero(d), sum1 = hn::Zero(d);
      for (int64_t i = begin; i < end; ++i) {
        sum0 = hn::Add(sum0, load<S>(d, x + i * row_stride + j, Full()));
        sum1 = hn::Add(sum1, load<S>(d, x + i * row_stride + j + lanes, Full()));
      }
      total0 = hn::Add(total0, sum0);
      total1 = hn::Add(total1, sum1);
    }
    hn::StoreU(total0, d, out + j);
    hn::StoreU(total1, d, out + j + lanes);
  }
  for (; j < columns; ++j) {
    T total = accumulate ? out[j] : T(0);
    for (int64_t begin = 0; begin < rows; begin += kBlock) {
      const int64_t end = std::min(rows, begin + kBlock);
      T sum = 0;
      for (int64_t i = begin; i < end; ++i) sum += static_cast<T>(x[i * row_stride + j]);
      total += sum;
    }
    out[j] = total;
  }
}

void strip_f32(const float* x, int64_t rows, int64_t columns, int64_t row_stride, float* out, bool accumulate) {
  strip(x, rows, columns, row_stride, out, accumulate);
}
void strip_f64(const double* x, int64_t rows, int64_t columns, int64_t row_stride, double* out, bool accumulate) {
  strip(x, rows, columns, row_stride, out, accumulate);
}

void strip_bf16(const BFloat16* x, int64_t rows, int64_t columns, int64_t row_stride, float* out, bool accumulate) {
  strip(x, rows, columns, row_stride, out, accumulate);
}

}  // namespace
}  // namespace weft::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace weft {
namespace {
HWY_EXPORT(strip_f32);
HWY_EXPORT(strip_f64);
HWY_EXPORT(strip_bf16);

/// Columns of a piece of work: whole cache lines, and wide enough that reading a row's part is a burst.
constexpr int64_t kStrip = 128;

template <class S, class T, class Strip>
void in_strips(Strip strip, const S* x, int64_t rows, int64_t columns, int64_t row_stride, T* out, bool accumulate) {
  parallel_for(columns, kStrip, [&](int64_t begin, int64_t end) {
    strip(x + begin, rows, end - begin, row_stride, out + begin, accumulate);
  });
}
}  // namespace

template <>
void column_sum(Cpu, const float* x, int64_t rows, int64_t columns, int64_t row_stride, float* out, bool accumulate) {
  in_strips([](auto... arguments) { HWY_DYNAMIC_DISPATCH(strip_f32)(arguments...); }, x, rows, columns, row_stride, out,
            accumulate);
}
template <>
void column_sum(Cpu, const double* x, int64_t rows, int64_t columns, int64_t row_stride, double* out, bool accumulate) {
  in_strips([](auto... arguments) { HWY_DYNAMIC_DISPATCH(strip_f64)(arguments...); }, x, rows, columns, row_stride, out,
            accumulate);
}
void column_sum(Cpu, const BFloat16* x, int64_t rows, int64_t columns, int64_t row_stride, float* out,
                bool accumulate) {
  in_strips([](auto... arguments) { HWY_DYNAMIC_DISPATCH(strip_bf16)(arguments...); }, x, rows, columns, row_stride,
            out, accumulate);
}

}  // namespace weft
#endif
