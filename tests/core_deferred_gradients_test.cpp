// Gradients of weights that are computed after the gradients of inputs.
#include <gtest/gtest.h>

#include "core/autograd.h"
#include "core/random.h"
#include "ops/elementwise.h"
#include "ops/matmul.h"
#include "ops/reduce.h"

namespace weft {
namespace {

using autograd::DeferredGradients;

Tensor random_leaf(const char* name, const Shape& shape) {
  Tensor t = Tensor::empty(shape);
  fill_normal(t, RandomStream(6, name), 0, 1);
  return t.requires_grad_();
}

struct Net {
  Tensor x = random_leaf("x", {5, 4}), w1 = random_leaf("w1", {6, 4}), b1 = random_leaf("b1", {6}),
         w2 = random_leaf("w2", {4, 6});
  /// w1 serves twice, and w2 in an elementwise function too.
  Tensor loss() const {
    const Tensor h = linear(gelu(linear(x, w1, b1)), w2, {});
    return sum(linear(h, w1, b1)) + sum(w2 * w2);
  }
};

TEST(DeferredGradients, AreThoseThatWouldHaveComeAtOnce) {
  const Net at_once, once, later;
  for (int pass = 0; pass < 2; ++pass) at_once.loss().backward();
  once.loss().backward();
  std::vector<float> first;
  for (int pass = 0; pass < 2; ++pass) {  // the second adds to the first
    DeferredGradients deferred;
    {
      const DeferredGradients::Scope scope(deferred);
      later.loss().backward();
    }
    EXPECT_FALSE(deferred.empty());
    deferred.run();
    EXPECT_TRUE(deferred.empty());
    if (pass == 0) first = later.w2.grad().to_vector<float>();
  }
  EXPECT_EQ(later.x.grad().to_vector<float>(), at_once.x.grad().to_vector<float>());
  EXPECT_EQ(later.w1.grad().to_vector<float>(), at_once.w1.grad().to_vector<float>());
  EXPECT_EQ(later.b1.grad().to_vector<float>(), at_once.b1.grad().to_vector<float>());
  // Its other part now comes first, which is another order of sums from the second pass on.
  EXPECT_EQ(first, once.w2.grad().to_vector<float>());
  const std::vector<float> a = later.w2.grad().to_vector<float>(), b = at_once.w2.grad().to_vector<float>();
  for (size_t i = 0; i < a.size(); ++i) EXPECT_NEAR(a[i], b[i], 1e-5);
}

TEST(DeferredGradients, OfInputsAreThereBeforeThoseOfWeights) {
  const Net net;
  DeferredGradients deferred;
  {
    const DeferredGradients::Scope scope(deferred);
    net.loss().backward();
  }
  EXPECT_TRUE(net.x.grad().defined());
  EXPECT_FALSE(net.w1.grad().defined());
  deferred.run();
  EXPECT_TRUE(net.w1.grad().defined());
}

TEST(DeferredGradients, LeavesAreReadyOnceAndWhenAllOfTheirGradientIsThere) {
  const Net net;
  int ready1 = 0, ready2 = 0;
  net.w1.register_grad_ready_hook([&](const Tensor&) { ++ready1; });
  net.w2.register_grad_ready_hook([&](const Tensor&) { ++ready2; });
  DeferredGradients deferred;
  {
    const DeferredGradients::Scope scope(deferred);
    net.loss().backward();
  }
  EXPECT_EQ(ready1, 0);
  EXPECT_EQ(ready2, 0);  // though a part of its gradient is there
  deferred.run();
  EXPECT_EQ(ready1, 1);
  EXPECT_EQ(ready2, 1);
}

TEST(DeferredGradients, OfALeafWithAHookAreNotPutOff) {
  const Net net;
  net.w1.register_hook([](const Tensor& gradient) { return gradient * 2.0; });
  DeferredGradients deferred;
  {
    const DeferredGradients::Scope scope(deferred);
    net.loss().backward();
  }
  const Net plain;
  plain.loss().backward();
  const std::vector<float> twice = net.w1.grad().to_vector<float>(), once = plain.w1.grad().to_vector<float>();
  for (size_t i = 0; i < once.size(); ++i) EXPECT_EQ(twice[i], 2 * once[i]);
}

TEST(DeferredGradients, OutsideOfTheScopeNothingIsPutOff) {
  const Net net;
  DeferredGradients deferred;
  {
    const DeferredGradients::Scope scope(deferred);
  }
  net.loss().backward();
  EXPECT_TRUE(deferred.empty());
  EXPECT_TRUE(net.w1.grad().defined());
}

}  // namespace
}  // namespace weft
