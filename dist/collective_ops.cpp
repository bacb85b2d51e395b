#include "dist/collective_ops.h"

#include "core/autograd.h"
#include "core/memory.h"

namespace weft::dist {
namespace {

using autograd::BackwardContext;

/// What a collective works on: the values alone, row by row.
Tensor plain(const Tensor& x) {
  const autograd::NoGrad no_grad;
  return x.detach().contiguous();
}

/// Communication of one function on tensors, and that of its derivative.
template <class Forward, class Backward>
Tensor function(const char* op, const Tensor& x, Group& group, Forward forward, Backward backward) {
  if (group.size() == 1) return x;
  Tensor y;
  {
    const autograd::NoGrad no_grad;
    y = forward(plain(x));
  }
  autograd::record(op, {x}, {y}, {}, [&group, backward](BackwardContext& context) {
    context.set(0, backward(plain(context.grad()), group));
  });
  return y;
}

Counts or_even(const Counts& counts, int64_t rows, const Group& group) {
  return counts.empty() ? even_counts(rows, group.size()) : counts;
}

int64_t rows_before(const Counts& counts, int rank) {
  int64_t before = 0;
  for (int r = 0; r < rank; ++r) before += counts[static_cast<size_t>(r)];
  return before;
}

Tensor own_rows(const Tensor& x, const Group& group, const Counts& counts) {
  return x.narrow(0, rows_before(counts, group.rank()), counts[static_cast<size_t>(group.rank())]).clone();
}

}  // namespace

Counts even_counts(int64_t total, int ranks) {
  if (total < 0 || ranks < 1)
    fail(ErrorKind::kValue, "even_counts", "needs total >= 0 and ranks >= 1, got ", total, " and ", ranks);
  Counts counts;
  for (int64_t rank = 0; rank < ranks; ++rank) counts.push_back(total / ranks + (rank < total % ranks ? 1 : 0));
  return counts;
}

Tensor replicate(const Tensor& x, Group& group) {
  return function(
      "replicate", x, group, [](const Tensor& values) { return values; },
      [](const Tensor& dy, Group& g) { return g.all_reduce(dy); });
}

Tensor sum_partial(const Tensor& x, Group& group) {
  return function(
      "sum_partial", x, group, [&](const Tensor& values) { return group.all_reduce(values); },
      [](const Tensor& dy, Group&) { return dy; });
}

Tensor gather_rows(const Tensor& x, Group& group, const Counts& counts) {
  return function(
      "gather_rows", x, group, [&](const Tensor& values) { return group.all_gather(values, counts); },
      [counts](const Tensor& dy, Group& g) { return g.reduce_scatter(dy, Reduction::sum, counts); });
}

Tensor sum_partial_rows(const Tensor& x, Group& group, const Counts& counts_) {
  const Counts counts = or_even(counts_, x.size(0), group);
  return function(
      "sum_partial_rows", x, group,
      [&](const Tensor& values) { return group.reduce_scatter(values, Reduction::sum, counts); },
      [counts](const Tensor& dy, Group& g) { return g.all_gather(dy, counts); });
}

Tensor take_rows(const Tensor& x, Group& group, const Counts& counts_) {
  const Counts counts = or_even(counts_, x.size(0), group);
  return function(
      "take_rows", x, group, [&](const Tensor& values) { return own_rows(values, group, counts); },
      [counts](const Tensor& dy, Group& g) { return g.all_gather(dy, counts); });
}

}  // namespace weft::dist
