// Layers split over ranks are the plain layers: values and gradients, uneven splits included.
#include "dist/collective_ops.h"

#include <gtest/gtest.h>

#include <cmath>

#include "core/autograd.h"
#include "core/random.h"
#include "dist/threads.h"
#include "ops/elementwise.h"
#include "ops/matmul.h"
#include "ops/norm.h"
#include "tests/error_of.h"

namespace weft::dist {
namespace {

Tensor random(const std::string& name, const Shape& shape, DType dtype = DType::f64) {
  Tensor t = Tensor::empty(shape, dtype);
  fill_normal(t, RandomStream(4, name), 0, 1);
  return t;
}

Tensor leaf(Tensor t) { return std::move(t.requires_grad_()); }

/// Rows (or columns) of a weight that a rank has.
Tensor part(const Tensor& weight, int64_t dim, const Counts& counts, int rank) {
  int64_t before = 0;
  for (int r = 0; r < rank; ++r) before += counts[static_cast<size_t>(r)];
  return weight.narrow(dim, before, counts[static_cast<size_t>(rank)]).clone();
}

double distance(const Tensor& a, const Tensor& b) {
  const std::vector<double> x = a.to_vector<double>(), y = b.to_vector<double>();
  EXPECT_EQ(x.size(), y.size());
  double most = 0;
  for (size_t i = 0; i < x.size() && i < y.size(); ++i) most = std::max(most, std::abs(x[i] - y[i]));
  return most;
}

constexpr int64_t kRows = 7, kWidth = 6, kHidden = 11;

/// y = gelu(norm(x) W1^T) W2^T and the gradients of x, W1, W2, norm weight for the cotangent "dy".
struct Mlp {
  Tensor x = leaf(random("x", {kRows, kWidth})), w1 = leaf(random("w1", {kHidden, kWidth})),
         w2 = leaf(random("w2", {kWidth, kHidden})), scale = leaf(random("scale", {kWidth})),
         shift = leaf(random("shift", {kWidth}));
  Tensor y;
  Mlp() {
    y = linear(gelu(linear(layer_norm(x, scale, shift, 1e-5), w1, {})), w2, {});
    y.backward(random("dy", {kRows, kWidth}));
  }
};

TEST(CollectiveOps, AnMlpSplitByColumnsThenRowsIsTheWholeMlp) {
  const Mlp whole;
  for (const int ranks : {1, 2, 3, 4}) {
    run_threads(ranks, [&](Group& world) {
      const Counts hidden = even_counts(kHidden, ranks);
      const Tensor x = leaf(random("x", {kRows, kWidth})), scale = leaf(random("scale", {kWidth})),
                   shift = leaf(random("shift", {kWidth})),
                   w1 = leaf(part(random("w1", {kHidden, kWidth}), 0, hidden, world.rank())),
                   w2 = leaf(part(random("w2", {kWidth, kHidden}), 1, hidden, world.rank()));
      const Tensor h = replicate(layer_norm(x, scale, shift, 1e-5), world);
      const Tensor y = sum_partial(linear(gelu(linear(h, w1, {})), w2, {}), world);
      y.backward(random("dy", {kRows, kWidth}));
      EXPECT_LT(distance(y, whole.y), 1e-12);
      EXPECT_LT(distance(x.grad(), whole.x.grad()), 1e-12);
      EXPECT_LT(distance(scale.grad(), whole.scale.grad()), 1e-12);
      EXPECT_LT(distance(w1.grad(), part(whole.w1.grad(), 0, hidden, world.rank())), 1e-12);
      EXPECT_LT(distance(w2.grad(), part(whole.w2.grad(), 1, hidden, world.rank())), 1e-12);
    });
  }
}

TEST(CollectiveOps, WithRowsSharedOutInBetweenItStillIs) {
  const Mlp whole;
  for (const int ranks : {1, 2, 3, 4}) {
    run_threads(ranks, [&](Group& world) {
      const Counts hidden = even_counts(kHidden, ranks), rows = even_counts(kRows, ranks);
      const Tensor x = leaf(random("x", {kRows, kWidth})), scale = leaf(random("scale", {kWidth})),
                   shift = leaf(random("shift", {kWidth})),
                   w1 = leaf(part(random("w1", {kHidden, kWidth}), 0, hidden, world.rank())),
                   w2 = leaf(part(random("w2", {kWidth, kHidden}), 1, hidden, world.rank()));
      // The norm is of this rank's rows alone; its weights' gradients are parts of a sum.
      const Tensor normed = layer_norm(take_rows(x, world), replicate(scale, world), replicate(shift, world), 1e-5);
      const Tensor hidden_part = gelu(linear(gather_rows(normed, world, rows), w1, {}));
      const Tensor y = sum_partial_rows(linear(hidden_part, w2, {}), world, rows);
      y.backward(part(random("dy", {kRows, kWidth}), 0, rows, world.rank()));
      EXPECT_LT(distance(y, part(whole.y, 0, rows, world.rank())), 1e-12);
      EXPECT_LT(distance(x.grad(), whole.x.grad()), 1e-12);
      EXPECT_LT(distance(scale.grad(), whole.scale.grad()), 1e-12);
      EXPECT_LT(distance(w1.grad(), part(whole.w1.grad(), 0, hidden, world.rank())), 1e-12);
      EXPECT_LT(distance(w2.grad(), part(whole.w2.grad(), 1, hidden, world.rank())), 1e-12);
    });
  }
}

TEST(CollectiveOps, LeavingOneOutIsSeen) {
  const Mlp whole;
  run_threads(2, [&](Group& world) {
    const Counts hidden = even_counts(kHidden, 2);
    const Tensor x = leaf(random("x", {kRows, kWidth})),
                 w1 = leaf(part(random("w1", {kHidden, kWidth}), 0, hidden, world.rank())),
                 w2 = leaf(part(random("w2", {kWidth, kHidden}), 1, hidden, world.rank()));
    const Tensor h = layer_norm(x, random("scale", {kWidth}), random("shift", {kWidth}), 1e-5);  // no replicate()
    const Tensor y = sum_partial(linear(gelu(linear(h, w1, {})), w2, {}), world);
    y.backward(random("dy", {kRows, kWidth}));
    EXPECT_LT(distance(y, whole.y), 1e-12);
    EXPECT_GT(distance(x.grad(), whole.x.grad()), 1e-2);
  });
}

TEST(CollectiveOps, OneRankAloneGetsItsOwnTensorBack) {
  Group self = self_group();
  const Tensor x = leaf(random("x", {3, 2}));
  EXPECT_TRUE(replicate(x, self).is_same(x));
  EXPECT_TRUE(sum_partial(x, self).is_same(x));
  EXPECT_TRUE(gather_rows(x, self).is_same(x));
  EXPECT_TRUE(sum_partial_rows(x, self).is_same(x));
  EXPECT_TRUE(take_rows(x, self).is_same(x));
}

TEST(CollectiveOps, SharesAreEven) {
  EXPECT_EQ(even_counts(11, 4), (Counts{3, 3, 3, 2}));
  EXPECT_EQ(even_counts(2, 3), (Counts{1, 1, 0}));
  EXPECT_ERROR(ErrorKind::kValue, "ranks >= 1, got 3 and 0", even_counts(3, 0));
}

}  // namespace
}  // namespace weft::dist
