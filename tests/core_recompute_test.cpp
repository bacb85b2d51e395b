// Saved tensors that are made again: autograd::remade, alone and with what else acts on saved tensors.
#include <gtest/gtest.h>

#include <cmath>

#include "core/autograd.h"
#include "core/random.h"
#include "ops/attention.h"
#include "ops/elementwise.h"
#include "ops/matmul.h"
#include "ops/norm.h"
#include "ops/reduce.h"
#include "tests/error_of.h"

namespace weft {
namespace {

using Values = std::vector<double>;
using Tensors = std::vector<Tensor>;

Tensor random(const Shape& shape, const char* name) {
  const Tensor out = Tensor::empty(shape, DType::f64);
  fill_normal(out, RandomStream(11, name), 0, 0.7);
  return out;
}

/// linear(gelu(x w)) with GELU's output kept or made again; counts how often it is.
struct Mlp {
  Tensor x = random({6, 4}, "x").requires_grad_();
  Tensor w = random({8, 4}, "w").requires_grad_(), v = random({3, 8}, "v").requires_grad_();
  int made = 0;

  Tensor operator()(bool remakes) {
    const Tensor before = linear(x, w, {}), after = gelu(before);
    if (remakes) {
      autograd::remade("gelu", after, [this](const Tensors& in) { return ++made, gelu(in[0]); }, {before});
    }
    return sum(linear(after, v, {}));
  }
  std::vector<Values> gradients() {
    std::vector<Values> out;
    for (Tensor* each : {&x, &w, &v}) {
      out.push_back(each->grad().to_vector<double>());
      each->clear_grad();
    }
    return out;
  }
};

TEST(Remade, GivesTheSameGradientsAndFreesTheTensorMeanwhile) {
  Mlp mlp;
  mlp(false).backward();
  const auto want = mlp.gradients();
  const auto current = [] { return allocator(Device::cpu()).statistics().total.current; };
  const int64_t before = current();
  Tensor loss = mlp(false);
  const int64_t plain = current() - before;
  loss = Tensor();
  loss = mlp(true);
  EXPECT_EQ(plain - (current() - before), 6 * 8 * 8) << "GELU's output, [6, 8] in f64";
  EXPECT_EQ(mlp.made, 0);
  loss.backward();
  EXPECT_EQ(mlp.made, 1);
  EXPECT_EQ(mlp.gradients(), want);
}

TEST(Remade, GradientsMatchFiniteDifferences) {
  const Tensor w = random({5}, "weight").requires_grad_(), b = random({5}, "bias").requires_grad_();
  const Tensor v = random({15, 5}, "v").requires_grad_();
  const Tensor x = random({1, 4, 5}, "input").requires_grad_(), seed = random({1, 4, 5}, "seed");
  const auto f = [&](bool remakes) {
    const Tensor normed = layer_norm(x, w, b);
    if (remakes) {
      autograd::remade("layer_norm", normed, [](const Tensors& in) { return layer_norm(in[0], in[1], in[2]); },
                       {x, w, b});
    }
    return sum(mul(
        causal_attention(linear(normed, v, {}), 1, remakes ? autograd::Keep::kRecipe : autograd::Keep::kValue), seed));
  };
  f(true).backward();
  for (const Tensor& leaf : {x, w, b, v}) {
    const Values gradient = leaf.grad().to_vector<double>();
    for (int64_t i = 0; i < leaf.numel(); ++i) {
      const autograd::NoGrad no_grad;
      constexpr double kStep = 1e-5;
      double* value = leaf.data<double>() + i;
      const double middle = *value;
      *value = middle + kStep;
      const double above = f(false).item();
      *value = middle - kStep;
      const double below = f(false).item();
      *value = middle;
      // Central differences err by step^2 times a third derivative of about 10.
      ASSERT_NEAR(gradient[static_cast<size_t>(i)], (above - below) / (2 * kStep), 1e-7) << i;
    }
  }
}

TEST(Remade, RulesThatFollowOneAnotherShareOneResult) {
  const Tensor qkv = random({2, 5, 12}, "qkv").requires_grad_(), w = random({3, 4}, "w").requires_grad_();
  int made = 0;
  const Tensor y = exp(sum(linear(causal_attention(qkv, 2, autograd::Keep::kRecipe), w, {})));
  const Tensor z = gelu(qkv);
  autograd::remade("gelu", z, [&](const Tensors& in) { return ++made, gelu(in[0]); }, {qkv});
  add(y, sum(add(mul(z, z), linear(z, random({12, 12}, "square"), {})))).backward({}, true);
  EXPECT_EQ(made, 1) << "two factors and a linear layer";
  const Values first = qkv.grad().to_vector<double>();
  qkv.clear_grad();
  add(y, sum(add(mul(z, z), linear(z, random({12, 12}, "square"), {})))).backward();
  EXPECT_EQ(qkv.grad().to_vector<double>(), first);
}

TEST(Remade, WorksWithARetainedGraph) {
  Mlp mlp;
  const Tensor loss = mlp(true);
  loss.backward({}, true);
  const auto first = mlp.gradients();
  loss.backward();
  EXPECT_EQ(mlp.gradients(), first);
  EXPECT_EQ(mlp.made, 2);
}

TEST(Remade, CanBeDifferentiatedTwice) {
  const auto second = [](bool remakes) {
    const Tensor x = random({4}, "x").requires_grad_();
    const Tensor y = exp(x);
    const Tensor z = mul(y, x);
    if (remakes) autograd::remade("mul", z, [](const Tensors& in) { return mul(in[0], in[1]); }, {y, x});
    const Tensor first = autograd::gradients({sum(mul(z, z))}, {x}, {}, false, true)[0];
    sum(mul(first, first)).backward();
    return x.grad().to_vector<double>();
  };
  EXPECT_EQ(second(true), second(false));
}

TEST(Remade, ViewsOfTheTensorAreRemadeToo) {
  const auto gradient = [](bool remakes) {
    const Tensor x = random({4, 6}, "x").requires_grad_();
    const Tensor y = gelu(x);
    if (remakes) autograd::remade("gelu", y, [](const Tensors& in) { return gelu(in[0]); }, {x});
    const Tensor part = y.narrow(1, 2, 3).transpose(0, 1);
    const int64_t before = allocator(Device::cpu()).statistics().total.current;
    sum(mul(part, part)).backward();
    EXPECT_LE(allocator(Device::cpu()).statistics().total.current, before + 192 + 64) << "only the gradient stays";
    return x.grad().to_vector<double>();
  };
  EXPECT_EQ(gradient(true), gradient(false));
}

TEST(Remade, ComposesWithCheckpointAndHooks) {
  Mlp mlp;
  mlp(false).backward();
  const auto want = mlp.gradients();
  autograd::checkpoint([&](const Tensors&) { return Tensors{mlp(true)}; }, {mlp.x})[0].backward();
  EXPECT_EQ(mlp.gradients(), want);
  EXPECT_EQ(mlp.made, 1);
  Tensor loss;
  std::vector<Shape> packed;
  {
    const autograd::SavedTensorHooks hooks([&](const Tensor& saved) {
      packed.push_back(saved.shape());
      return [saved = saved.clone()] { return saved; };
    });
    loss = mlp(true);
  }
  loss.backward();
  EXPECT_EQ(mlp.gradients(), want);
  // x and w of the first layer; the recipe's input and GELU's; v of the second, whose input is not packed.
  EXPECT_EQ(packed, (std::vector<Shape>{{6, 4}, {8, 4}, {6, 8}, {6, 8}, {3, 8}}));
}

TEST(Remade, AnInputThatIsChangedInPlaceIsAnErrorThatNamesBothFunctions) {
  const Tensor x = random({4}, "x"), w = random({2, 4}, "w").requires_grad_();
  Tensor changed = x.clone();
  const Tensor y = gelu(changed);
  autograd::remade("gelu", y, [](const Tensors& in) { return gelu(in[0]); }, {changed});
  const Tensor loss = sum(linear(y, w, {}));
  changed.fill_(1);
  EXPECT_ERROR(ErrorKind::kState,
               "[gelu] the backward pass needs a tensor (f64 [4]) that [fill_] changed in place after [gelu] saved it",
               loss.backward());
}

TEST(Remade, ATensorThatIsChangedBeforeItIsSavedIsKept) {
  const Tensor x = random({4}, "x"), w = random({2, 4}, "w").requires_grad_();
  Tensor y = gelu(x);
  int made = 0;
  autograd::remade("gelu", y, [&](const Tensors& in) { return ++made, gelu(in[0]); }, {x});
  y.fill_(3);
  sum(linear(y, w, {})).backward();
  EXPECT_EQ(w.grad().to_vector<double>(), Values(8, 3.0));
  EXPECT_EQ(made, 0);
}

TEST(Remade, AnotherResultTheSecondTimeIsAnError) {
  const Tensor x = random({4}, "x"), w = random({2, 4}, "w").requires_grad_();
  const Tensor y = gelu(x);
  autograd::remade("gelu", y, [](const Tensors& in) { return gelu(in[0]).narrow(0, 0, 3); }, {x});
  const Tensor loss = sum(linear(y, w, {}));
  EXPECT_ERROR(ErrorKind::kState, "[gelu] the result was f64 [4] the first time and f64 [3] when it was made again",
               loss.backward());
}

TEST(Remade, WantsAWholeTensor) {
  const Tensor x = random({4, 2}, "x");
  EXPECT_ERROR(ErrorKind::kState, "[part] only a whole row-major tensor can be made again, got f64 [2, 4]",
               autograd::remade("part", x.transpose(0, 1), [](const Tensors& in) { return in[0]; }, {x}));
}

}  // namespace
}  // namespace weft
