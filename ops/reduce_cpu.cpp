// CPU kernels of the reductions.
#include <algorithm>
#include <vector>

#include "core/dtype.h"
#include "ops/elementwise_simd.h"
#include "ops/elementwise_walk.h"
#include "ops/reduce_kernels.h"
#include "ops/reduce_simd.h"

namespace weft {
namespace {

using detail::Walk;

/// Elements of a task; tasks are cut from the problem alone.
constexpr int64_t kTask = 1 << 15;
/// Elements that are cast or gathered at a time.
constexpr int64_t kChunk = 1024;

template <class T>
void widen(const T* from, int64_t step, float* to, int64_t n) {
  if constexpr (!std::is_same_v<T, float>) {
    if (step == 1) return detail::widen(from, to, n);
  }
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(from[i * step]);
}

/// A sum with its kept and its summed dimensions apart.
class Sum {
 public:
  Sum(const StridedView& y, const StridedView& x, double divisor) : y_(y), x_(x), divisor_(divisor) {
    for (int d = 0; d < y.shape.rank(); ++d) {
      const bool summed = y.strides[d] == 0 && y.shape[d] != 1;
      (summed ? summed_ : kept_).push_back(y.shape[d]);
      (summed ? summed_x_ : kept_x_).push_back(x.strides[d]);
      if (!summed) kept_y_.push_back(y.strides[d]);
    }
  }

  template <class T>
  void run() const {
    const int64_t outputs = numel(kept_), terms = numel(summed_);
    if (outputs == 0) return;
    const Walk<2> out(kept_, {kept_y_, kept_x_});
    const Walk<1> in(summed_, {summed_x_});
    // Where neighbours in memory go to different sums, a strip of sums is added up side by side.
    const bool side_by_side = out.steps()[1] == 1 && out.columns() >= 16 && in.steps()[0] != 1 && terms > 1;
    side_by_side ? columns<T>(out, in, terms) : rows<T>(out, in, outputs, terms);
  }

 private:
  template <class T>
  void put(int64_t offset, double total) const {
    static_cast<T*>(y_.data)[offset] = T(static_cast<Accumulate<T>>(total / divisor_));
  }

  template <class T>
  void rows(const Walk<2>& out, const Walk<1>& in, int64_t outputs, int64_t terms) const {
    const T* x = static_cast<const T*>(x_.data);
    if (terms <= kTask) {
      return parallel_for(
          outputs, std::max<int64_t>(1, kTask / std::max<int64_t>(1, terms)), [&](int64_t begin, int64_t end) {
            out.visit_elements(begin, end, [&](const auto& at, int64_t n) {
              for (int64_t i = 0; i < n; ++i) {
                put<T>(at[0] + i * out.steps()[0], sum_terms(x + at[1] + i * out.steps()[1], in, 0, terms));
              }
            });
          });
    }
    const int64_t pieces = (terms + kTask - 1) / kTask;
    std::vector<double> parts(static_cast<size_t>(outputs * pieces));
    parallel_tasks(outputs * pieces, [&](int64_t task) {
      const int64_t output = task / pieces, begin = task % pieces * kTask;
      out.visit_elements(output, output + 1, [&](const auto& at, int64_t) {
        parts[static_cast<size_t>(task)] = sum_terms(x + at[1], in, begin, std::min(terms, begin + kTask));
      });
    });
    int64_t part = 0;
    out.visit_elements(0, outputs, [&](const auto& at, int64_t n) {
      for (int64_t i = 0; i < n; ++i) {
        double total = 0;
        for (int64_t p = 0; p < pieces; ++p) total += parts[static_cast<size_t>(part++)];
        put<T>(at[0] + i * out.steps()[0], total);
      }
    });
  }

  /// Sum of the terms [begin, end) of one output, whose first term is at x.
  template <class T>
  static double sum_terms(const T* x, const Walk<1>& in, int64_t begin, int64_t end) {
    const int64_t step = in.steps()[0];
    double total = 0;
    if constexpr (std::is_same_v<T, double>) {
      in.visit_elements(begin, end, [&](const auto& at, int64_t n) {
        for (int64_t i = 0; i < n; ++i) total += x[at[0] + i * step];
      });
      return total;
    } else {
      if constexpr (std::is_same_v<T, float>) {
        if (step == 1 && in.columns() >= 64) {
          in.visit_elements(begin, end, [&](const auto& at, int64_t n) { total += detail::sum_f32(x + at[0], n); });
          return total;
        }
      }
      alignas(64) float buffer[kChunk];
      int64_t filled = 0;
      in.visit_elements(begin, end, [&](const auto& at, int64_t n) {
        for (int64_t i = 0; i < n;) {
          const int64_t count = std::min(kChunk - filled, n - i);
          widen(x + at[0] + i * step, step, buffer + filled, count);
          filled += count, i += count;
          if (filled < kChunk) continue;
          total += detail::sum_f32(buffer, filled);
          filled = 0;
        }
      });
      return total + detail::sum_f32(buffer, filled);
    }
  }

  template <class T>
  void columns(const Walk<2>& out, const Walk<1>& in, int64_t terms) const {
    constexpr int64_t kWidth = 512;
    const int64_t n = out.columns(), rows = out.rows(), strips = (n + kWidth - 1) / kWidth;
    // Terms are split only where there are few strips to share out.
    const int64_t most = rows * strips >= 64 ? terms : std::max<int64_t>(64, 2 * kTask / std::min(n, kWidth));
    const int64_t pieces = (terms + most - 1) / most;
    std::vector<double> parts(pieces > 1 ? static_cast<size_t>(pieces * rows * n) : 0);
    parallel_tasks(rows * strips * pieces, [&](int64_t task) {
      const int64_t piece = task % pieces, strip = task / pieces % strips, row = task / pieces / strips;
      const int64_t first = strip * kWidth, width = std::min(kWidth, n - first);
      double totals[kWidth] = {};
      out.visit(row, row + 1, first, width, [&](const auto& at, int64_t) {
        sum_strip(static_cast<const T*>(x_.data) + at[1], in, piece * most, std::min(terms, (piece + 1) * most), width,
                  totals);
        if (pieces > 1) {
          std::copy_n(totals, width, parts.data() + (piece * rows + row) * n + first);
        } else {
          for (int64_t i = 0; i < width; ++i) put<T>(at[0] + i * out.steps()[0], totals[i]);
        }
      });
    });
    if (pieces == 1) return;
    int64_t output = 0;
    out.visit_elements(0, rows * n, [&](const auto& at, int64_t count) {
      for (int64_t i = 0; i < count; ++i, ++output) {
        double total = 0;
        for (int64_t p = 0; p < pieces; ++p) total += parts[static_cast<size_t>(p * rows * n + output)];
        put<T>(at[0] + i * out.steps()[0], total);
      }
    });
  }

  /// totals[j] = sum of the terms [begin, end) of `width` neighbouring outputs.
  template <class T>
  static void sum_strip(const T* x, const Walk<1>& in, int64_t begin, int64_t end, int64_t width, double* totals) {
    const int64_t step = in.steps()[0];
    if constexpr (std::is_same_v<T, double>) {
      in.visit_elements(begin, end, [&](const auto& at, int64_t n) {
        for (int64_t i = 0; i < n; ++i) {
          const double* row = x + at[0] + i * step;
          for (int64_t j = 0; j < width; ++j) totals[j] += row[j];
        }
      });
    } else {
      constexpr int64_t kStretch = 64;  // terms whose sum is kept in f32
      alignas(64) float sums[512], buffer[512];
      int64_t added = 0;
      const auto flush = [&] {
        for (int64_t j = 0; j < width && added > 0; ++j) totals[j] += static_cast<double>(sums[j]);
        added = 0;
      };
      in.visit_elements(begin, end, [&](const auto& at, int64_t n) {
        for (int64_t i = 0; i < n; ++i) {
          const T* row = x + at[0] + i * step;
          const float* wide = buffer;
          if constexpr (std::is_same_v<T, float>) {
            wide = row;
          } else {
            detail::widen(row, buffer, width);
          }
          if (added == 0) {
            std::copy_n(wide, width, sums);
          } else {
            detail::add_row_f32(wide, sums, width);
          }
          if (++added == kStretch) flush();
        }
      });
      flush();
    }
  }

  StridedView y_, x_;
  double divisor_;
  Shape kept_, summed_;
  Strides kept_y_, kept_x_, summed_x_;
};

/// In what elements of T are compared.
template <class T>
using Compared = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
int64_t find_extreme(const T* x, int64_t step, int64_t n, bool largest) {
  using C = Compared<T>;
  if constexpr (std::is_same_v<T, float>) {
    if (step == 1) {
      const float best = largest ? detail::max_f32(x, n) : detail::min_f32(x, n);
      return std::find_if(x, x + n, [&](float v) { return v == best || v != v; }) - x;
    }
  }
  int64_t at = 0;
  C best = static_cast<C>(x[0]);
  for (int64_t i = 1; i < n && best == best; ++i) {
    const C v = static_cast<C>(x[i * step]);
    if ((largest ? v > best : v < best) || v != v) best = v, at = i;
  }
  return at;
}

}  // namespace

void sum_over(Cpu, const StridedView& y, const StridedView& x, double divisor) {
  const Sum sum(y, x, divisor);
  dispatch_float(y.dtype, "sum", [&]<class T>() { sum.run<T>(); });
}

void extreme_index(Cpu, const StridedView& x, bool largest, int64_t* index) {
  const int64_t rows = x.shape[0], n = x.shape[1];
  dispatch_float(x.dtype, largest ? "max" : "min", [&]<class T>() {
    parallel_for(rows, std::max<int64_t>(1, kTask / n), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        index[r] = find_extreme(static_cast<const T*>(x.data) + r * x.strides[0], x.strides[1], n, largest);
      }
    });
  });
}

void pick(Cpu, const StridedView& y, const StridedView& x, const int64_t* index) {
  dispatch_float(x.dtype, "max", [&]<class T>() {
    for (int64_t r = 0; r < x.shape[0]; ++r) {
      static_cast<T*>(y.data)[r] = static_cast<const T*>(x.data)[r * x.strides[0] + index[r] * x.strides[1]];
    }
  });
}

void mark(Cpu, const int64_t* index, bool* mask, int64_t rows, int64_t n) {
  parallel_for(rows, std::max<int64_t>(1, kTask / n), [&](int64_t begin, int64_t end) {
    std::fill(mask + begin * n, mask + end * n, false);
    for (int64_t r = begin; r < end; ++r) mask[r * n + index[r]] = true;
  });
}

}  // namespace weft
