#pragma once
#include <algorithm>
#include <array>
#include <cstdint>

#include "core/shape.h"
#include "core/thread_pool.h"

namespace weft::detail {

/// Elements a piece of parallel work has: some microseconds, far above the cost of handing it out.
inline constexpr int64_t kElementwiseGrain = 1 << 14;

/// N arrays walked together in row-major order of one shape, with neighbouring dimensions merged where every array
/// allows it. Strides of 0 repeat.
template <size_t N>
class Walk {
 public:
  Walk(const Shape& shape, const std::array<Strides, N>& strides) {
    for (int d = 0; d < shape.rank(); ++d) {
      if (shape[d] == 1) continue;
      const int last = shape_.rank() - 1;
      bool merge = last >= 0;
      for (size_t a = 0; a < N && merge; ++a) merge = strides_[a][last] == strides[a][d] * shape[d];
      if (merge) {
        shape_[last] *= shape[d];
        for (size_t a = 0; a < N; ++a) strides_[a][last] = strides[a][d];
      } else {
        shape_.push_back(shape[d]);
        for (size_t a = 0; a < N; ++a) strides_[a].push_back(strides[a][d]);
      }
    }
    if (!shape_.empty()) return;
    shape_.push_back(1);
    for (Strides& each : strides_) each.push_back(1);
  }

  int64_t columns() const { return shape_.back(); }
  int64_t rows() const {
    int64_t n = 1;
    for (int d = 0; d + 1 < shape_.rank(); ++d) n *= shape_[d];
    return n;
  }
  /// Strides of the last dimension.
  std::array<int64_t, N> steps() const {
    std::array<int64_t, N> out;
    for (size_t a = 0; a < N; ++a) out[a] = strides_[a].back();
    return out;
  }

  /// body(offsets, count) over `columns` elements from `column` of each of the rows [first, last).
  template <class Body>
  void visit(int64_t first, int64_t last, int64_t column, int64_t columns, Body&& body) const {
    Dims index = Dims::filled(shape_.rank(), 0);
    std::array<int64_t, N> at;
    for (size_t a = 0; a < N; ++a) at[a] = column * strides_[a].back();
    int64_t rest = first;
    for (int d = shape_.rank() - 2; d >= 0; --d) {
      index[d] = rest % shape_[d];
      rest /= shape_[d];
      for (size_t a = 0; a < N; ++a) at[a] += index[d] * strides_[a][d];
    }
    for (int64_t row = first; row < last; ++row) {
      body(at, columns);
      for (int d = shape_.rank() - 2; d >= 0; --d) {
        for (size_t a = 0; a < N; ++a) at[a] += strides_[a][d];
        if (++index[d] < shape_[d]) break;
        for (size_t a = 0; a < N; ++a) at[a] -= shape_[d] * strides_[a][d];
        index[d] = 0;
      }
    }
  }

  /// body(offsets, count) over the elements [begin, end) in row-major order, which are split at the ends of rows.
  template <class Body>
  void visit_elements(int64_t begin, int64_t end, Body&& body) const {
    const int64_t n = columns();
    while (begin < end) {
      const int64_t row = begin / n, column = begin % n;
      if (column == 0 && end - begin >= n) {
        const int64_t last = end / n;
        visit(row, last, 0, n, body);
        begin = last * n;
      } else {
        const int64_t count = std::min(end - begin, n - column);
        visit(row, row + 1, column, count, body);
        begin += count;
      }
    }
  }

  /// body(offsets, count) over all elements, in parallel. Pieces depend on shape and strides only.
  template <class Body>
  void run(Body&& body) const {
    const int64_t n = columns(), count = rows();
    if (n == 0 || count == 0) return;
    if (n < kElementwiseGrain) {
      return parallel_for(count, std::max<int64_t>(1, kElementwiseGrain / n),
                          [&](int64_t begin, int64_t end) { visit(begin, end, 0, n, body); });
    }
    const int64_t strips = (n + kElementwiseGrain - 1) / kElementwiseGrain;
    parallel_tasks(count * strips, [&](int64_t task) {
      const int64_t row = task / strips, column = task % strips * kElementwiseGrain;
      visit(row, row + 1, column, std::min(kElementwiseGrain, n - column), body);
    });
  }

 private:
  Shape shape_;
  std::array<Strides, N> strides_;
};

}  // namespace weft::detail
