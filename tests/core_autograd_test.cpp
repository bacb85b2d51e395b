#include "core/autograd.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/thread_pool.h"
#include "tests/error_of.h"

namespace weft {
namespace {

using autograd::BackwardContext;
using autograd::Rule;
using Values = std::vector<double>;
using Tensors = std::vector<Tensor>;

// ---- a few functions, recorded here, so that the tape is tested without the operators that are built on it ----

Tensor tensor(const Values& values, const Shape& shape, DType dtype = DType::f64) {
  return Tensor::from(values, shape).to(dtype);
}
Tensor leaf(const Values& values, const Shape& shape, DType dtype = DType::f64) {
  Tensor made = tensor(values, shape, dtype);
  return made.requires_grad_();
}
Tensor leaf(double value) { return leaf(Values{value}, {1}); }

/// f(a, b) elementwise under broadcasting, not recorded.
template <class F>
Tensor zip(const Tensor& a, const Tensor& b, F f) {
  const autograd::NoGrad no_grad;
  const Shape shape = broadcast_shapes(a.shape(), b.shape(), "zip");
  const Values x = a.expand(shape).to_vector<double>(), y = b.expand(shape).to_vector<double>();
  Values out(x.size());
  for (size_t i = 0; i < out.size(); ++i) out[i] = f(x[i], y[i]);
  return tensor(out, shape, a.dtype());
}

Tensor add(const Tensor& a, const Tensor& b) {
  Tensor out = zip(a, b, std::plus<double>());
  autograd::record(
      "add", {a, b}, {out}, {}, [](BackwardContext& c) { c.set(0, c.grad()), c.set(1, c.grad()); },
      Rule::kDifferentiable);
  return out;
}

Tensor mul(const Tensor& a, const Tensor& b) {
  Tensor out = zip(a, b, std::multiplies<double>());
  autograd::record(
      "mul", {a, b}, {out}, {a, b},
      [](BackwardContext& c) {
        if (c.needs(0)) c.set(0, mul(c.grad(), c.saved(1)));
        if (c.needs(1)) c.set(1, mul(c.grad(), c.saved(0)));
      },
      Rule::kDifferentiable);
  return out;
}

Tensor sum(const Tensor& a) {
  double total = 0;
  for (const double value : a.to_vector<double>()) total += value;
  Tensor out = tensor({total}, {1}, a.dtype());
  autograd::record(
      "sum", {a}, {out}, {},
      [shape = a.shape()](BackwardContext& c) {
        // From [1] to any rank: a scalar first, which expands to every shape.
        c.set(0, c.grad().reshape({}).expand(shape));
      },
      Rule::kDifferentiable);
  return out;
}

/// Saves its output, and its rule can be differentiated.
Tensor exponential(const Tensor& a) {
  Tensor out = zip(a, a, [](double x, double) { return std::exp(x); });
  autograd::record(
      "exp", {a}, {out}, {out}, [](BackwardContext& c) { c.set(0, mul(c.grad(), c.saved(0))); }, Rule::kDifferentiable);
  return out;
}

/// A kernel of its own for a rule.
Tensor sine(const Tensor& a) {
  Tensor out = zip(a, a, [](double x, double) { return std::sin(x); });
  autograd::record("sine", {a}, {out}, {a}, [](BackwardContext& c) {
    c.set(0, zip(c.grad(), c.saved(0), [](double g, double x) { return g * std::cos(x); }));
  });
  return out;
}

/// Central differences of a scalar function of several f64 tensors.
std::vector<Values> differences(const std::function<Tensor(const Tensors&)>& f, const Tensors& at, double step = 1e-5) {
  std::vector<Values> all;
  for (size_t t = 0; t < at.size(); ++t) {
    Values result;
    for (int64_t i = 0; i < at[t].numel(); ++i) {
      double ends[2];
      for (const int side : {0, 1}) {
        Tensors moved;
        for (const Tensor& each : at) moved.push_back(each.detach().clone());
        moved[t].reshape({-1}).data<double>()[i] += side ? step : -step;
        ends[side] = f(moved).item();
      }
      result.push_back((ends[1] - ends[0]) / (2 * step));
    }
    all.push_back(result);
  }
  return all;
}

void expect_near(const Values& got, const Values& want, double tolerance) {
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < got.size(); ++i)
    EXPECT_NEAR(got[i], want[i], tolerance * (1 + std::abs(want[i]))) << "element " << i;
}

/// backward() against central differences. 1e-8: the truncation of a step of 1e-5 on functions of order 1.
void check_gradients(const std::function<Tensor(const Tensors&)>& f, const Tensors& leaves) {
  f(leaves).backward();
  const std::vector<Values> want = differences(f, leaves);
  for (size_t t = 0; t < leaves.size(); ++t) {
    SCOPED_TRACE(t);
    ASSERT_TRUE(leaves[t].grad().defined());
    EXPECT_EQ(leaves[t].grad().shape(), leaves[t].shape());
    expect_near(leaves[t].grad().to_vector<double>(), want[t], 1e-8);
  }
}

// ---- first derivatives ----

TEST(Autograd, ProductRule) {
  const Tensor a = leaf(3), b = leaf(4);
  mul(a, b).backward();
  EXPECT_EQ(a.grad().item(), 4);
  EXPECT_EQ(b.grad().item(), 3);
}

TEST(Autograd, DiamondsAddUpOverAllPaths) {
  const auto f = [](const Tensors& x) {
    const Tensor left = mul(x[0], x[0]), right = sine(x[0]);
    const Tensor middle = mul(left, right);
    return sum(add(mul(middle, left), add(middle, right)));
  };
  check_gradients(f, {leaf({0.3, -1.2, 0.7}, {3})});
}

TEST(Autograd, OneTensorInBothPlacesOfAnOp) {
  const Tensor x = leaf(5);
  mul(x, x).backward();
  EXPECT_EQ(x.grad().item(), 10);
}

TEST(Autograd, DeepDiamondsAreWalkedOnceForEachNode) {
  // 2^60 paths, 60 nodes.
  const Tensor x = leaf(1);
  Tensor y = x;
  for (int i = 0; i < 60; ++i) y = add(y, y);
  y.backward();
  EXPECT_EQ(x.grad().item(), 0x1p60);
}

TEST(Autograd, BroadcastGradientsAreSummedDown) {
  const auto f = [](const Tensors& x) { return sum(mul(mul(add(x[0], x[1]), x[2]), x[3])); };
  check_gradients(f, {leaf({1, 2, 3, 4, 5, 6}, {2, 3}), leaf({0.5, -1, 2}, {3}), leaf({2, -3}, {2, 1}), leaf(0.7)});
}

TEST(Autograd, BroadcastSumsAreAccumulatedInF64AndRoundedOnce) {
  // 1 and 100,000 times 2^-25: added one by one in f32 they would all be lost.
  Values terms(100001, 0x1p-25);
  terms[0] = 1;
  const Tensor bias = leaf({0}, {1}, DType::f32);
  add(bias, Tensor::zeros({100001})).backward(tensor(terms, {100001}, DType::f32));
  EXPECT_EQ(bias.grad().to_vector<float>()[0], static_cast<float>(1 + 100000 * 0x1p-25));
}

TEST(Autograd, BroadcastSumsOfEveryPatternMatchPlainLoops) {
  const Shape full = {3, 4, 5, 70};
  Values gradient(static_cast<size_t>(numel(full)));
  for (size_t i = 0; i < gradient.size(); ++i) gradient[i] = static_cast<double>(i * 2654435761u % 1000) / 64;
  for (unsigned mask = 0; mask < 16; ++mask) {
    Shape shape = full;
    for (int d = 0; d < 4; ++d) shape[d] = mask >> d & 1 ? 1 : full[d];
    Values want(static_cast<size_t>(numel(shape)), 0.0);
    for (int64_t i = 0; i < numel(full); ++i) {
      int64_t rest = i, to = 0, scale = 1;
      for (int d = 3; d >= 0; --d) {
        const int64_t index = rest % full[d];
        rest /= full[d];
        to += (shape[d] == 1 ? 0 : index) * scale;
        scale *= shape[d];
      }
      want[static_cast<size_t>(to)] += gradient[static_cast<size_t>(i)];
    }
    const Tensor x = leaf(Values(want.size(), 0.0), shape);
    x.expand(full).backward(tensor(gradient, full));
    EXPECT_EQ(x.grad().to_vector<double>(), want) << shape << ": sums of multiples of 1/64 are exact";
  }
}

TEST(Autograd, ViewsHaveTheGradientsOfTheirIndexMaps) {
  const auto f = [](const Tensors& x) {
    const Tensor t = x[0].transpose(0, 1).reshape({2, 6});  // a copy
    const Tensor s = t.slice(1, 1, 6, 2).expand({4, 2, 3}).permute({2, 0, 1});
    const Tensor u = cat({s.select(0, 2).unsqueeze(0), s.narrow(0, 0, 1)}, 0);
    const std::vector<Tensor> pieces = u.split(3, 1);
    return sum(mul(sum(mul(pieces[0], pieces[0])), sum(sine(pieces[1].clone().squeeze(1)))));
  };
  check_gradients(f, {leaf({0.1, -0.2, 0.3, 0.4, -0.5, 0.6, 0.7, 0.8, -0.9, 1.0, 1.1, 1.2}, {4, 3})});
}

TEST(Autograd, CastsCarryGradientsBackInTheDTypeOfTheirInput) {
  const Tensor x = leaf({1, 2}, {2}, DType::f32);
  sum(x.to(DType::bf16).to(DType::f64)).backward();
  EXPECT_EQ(x.grad().dtype(), DType::f32);
  EXPECT_EQ(x.grad().to_vector<double>(), (Values{1, 1}));
}

TEST(Autograd, SplitGivesZerosForPiecesThatNothingDependsOn) {
  const Tensor x = leaf({1, 2, 3, 4, 5}, {5});
  sum(x.split(2)[1]).backward();
  EXPECT_EQ(x.grad().to_vector<double>(), (Values{0, 0, 1, 1, 0}));
}

TEST(Autograd, GradientsAddUpOverBackwardPasses) {
  const Tensor x = leaf(2);
  for (int i = 1; i <= 3; ++i) {
    mul(x, x).backward();
    EXPECT_EQ(x.grad().item(), 4 * i);
  }
  x.clear_grad();
  EXPECT_FALSE(x.grad().defined());
}

TEST(Autograd, SeveralOutputsStartTogether) {
  const Tensor x = leaf(2), y = leaf(3);
  const Tensor a = mul(x, x), b = mul(x, y);
  autograd::backward({a, b, a}, {Tensor(), tensor({10}, {1}), Tensor()});
  EXPECT_EQ(x.grad().item(), 2 * 4 + 10 * 3);
  EXPECT_EQ(y.grad().item(), 10 * 2);
}

TEST(Autograd, ALeafIsAStartToo) {
  const Tensor x = leaf(2);
  const Tensor ones = tensor({3}, {1});
  autograd::backward({x, x, mul(x, x)}, {ones, ones, Tensor()});
  EXPECT_EQ(x.grad().item(), 3 + 3 + 4);
  EXPECT_EQ(ones.item(), 3) << "what was passed in is not added to";
  EXPECT_NE(x.grad().storage(), ones.storage());
}

TEST(Autograd, OutputsWithoutAGradientAreUndefinedInTheRule) {
  const Tensor x = leaf({1, 2}, {2});
  const Tensor first = Tensor::ones({2}, DType::f64), second = Tensor::ones({2}, DType::f64),
               whole = Tensor::ones({2}, DType::i64);
  std::vector<bool> defined;
  autograd::record("three", {x}, {first, whole, second}, {}, [&](BackwardContext& c) {
    for (int i = 0; i < 3; ++i) defined.push_back(c.grad(i).defined());
    c.set(0, c.grad(2));
  });
  EXPECT_FALSE(whole.requires_grad()) << "whole numbers have no gradient";
  sum(second).backward();
  EXPECT_EQ(defined, (std::vector<bool>{false, false, true}));
}

TEST(Autograd, RulesThatAnswerNothingLeaveGradientsUndefined) {
  const Tensor x = leaf(1), y = leaf(1);
  const Tensor out = Tensor::ones({1}, DType::f64);
  autograd::record("half", {x, y}, {out}, {}, [](BackwardContext& c) { c.set(1, c.grad()); });
  int calls = 0;
  x.register_grad_ready_hook([&](const Tensor&) { ++calls; });
  mul(out, out).backward();
  EXPECT_FALSE(x.grad().defined());
  EXPECT_EQ(y.grad().item(), 2);
  EXPECT_EQ(calls, 0) << "there is no gradient that could be ready";
}

TEST(Autograd, AFunctionOfYourOwn) {
  // y = x^3 with a rule by hand, and an undefined and a non-float input that the rule does not care for.
  const Tensor x = leaf({1, 2, -3}, {3}), indices = Tensor::arange(3);
  const Tensor y = zip(x, x, [](double v, double) { return v * v * v; });
  autograd::record("cube", {x, Tensor(), indices}, {y}, {x, Tensor()}, [](BackwardContext& c) {
    EXPECT_STREQ(c.op(), "cube");
    EXPECT_TRUE(c.needs(0));
    EXPECT_FALSE(c.needs(1));
    EXPECT_FALSE(c.needs(2));
    EXPECT_FALSE(c.saved(1).defined());
    EXPECT_FALSE(c.sink(1).has_value());
    c.set(0, zip(c.grad(), c.saved(0), [](double g, double v) { return 3 * g * v * v; }));
  });
  EXPECT_TRUE(y.requires_grad());
  EXPECT_FALSE(y.is_leaf());
  sum(y).backward();
  EXPECT_EQ(x.grad().to_vector<double>(), (Values{3, 12, 27}));
}

// ---- what is recorded ----

TEST(Autograd, NothingIsRecordedUnderNoGrad) {
  const Tensor x = leaf(2);
  {
    const autograd::NoGrad no_grad;
    EXPECT_FALSE(autograd::grad_mode());
    EXPECT_FALSE(autograd::needed({&x}));
    EXPECT_FALSE(mul(x, x).requires_grad());
    EXPECT_FALSE(x.reshape({1, 1}).requires_grad());
    {
      const autograd::GradMode on(true);
      EXPECT_TRUE(mul(x, x).requires_grad());
    }
    EXPECT_FALSE(autograd::grad_mode());
  }
  EXPECT_TRUE(autograd::grad_mode());
  EXPECT_TRUE(autograd::needed({&x}));
  EXPECT_FALSE(mul(x.detach(), x.detach()).requires_grad());
  EXPECT_ERROR(ErrorKind::kState,
               "[backward] the tensor does not depend on anything that requires a gradient (f64 [1])",
               x.detach().backward());
}

TEST(Autograd, OutputsMustBeNew) {
  Tensor x = leaf(2);
  EXPECT_ERROR(ErrorKind::kState,
               "[same] output 0 is already part of a graph; a recorded function must answer with new tensors",
               autograd::record("same", {x}, {x}, {}, [](BackwardContext&) {}));
  const Tensor y = mul(x, x);
  EXPECT_ERROR(ErrorKind::kState, "[same] output 1",
               autograd::record("same", {x}, {Tensor::ones({1}), y}, {}, [](BackwardContext&) {}));
  y.backward();
  EXPECT_EQ(x.grad().item(), 4) << "refused, it has changed nothing";
}

TEST(Autograd, TheGraphCanBePrinted) {
  const Tensor x = leaf(2);
  const Tensor y = mul(x, x);
  EXPECT_EQ(autograd::describe_graph(add(y, y)),
            "add f64 [1]\n mul f64 [1]\n  leaf f64 [1]\n  leaf f64 [1] (above)\n mul f64 [1] (above)\n");
  EXPECT_EQ(autograd::describe_graph(add(y, y), 2), "add f64 [1]\n mul f64 [1]\n");
  EXPECT_EQ(autograd::describe_graph(y.detach()), "");
  EXPECT_EQ(autograd::describe_graph(Tensor()), "");
}

// ---- errors ----

TEST(AutogradErrors, BackwardNeedsOneElementOrAGradientOfTheSameShape) {
  const Tensor x = leaf({1, 2}, {2});
  const Tensor y = mul(x, x);
  EXPECT_ERROR(ErrorKind::kShape, "[backward] starts from one element, got f64 [2]. Hint: sum() or mean() it",
               y.backward());
  EXPECT_ERROR(ErrorKind::kShape, "[backward] the gradient is f64 [1], the tensor f64 [2]",
               y.backward(tensor({1}, {1})));
  EXPECT_ERROR(ErrorKind::kDType, "[backward] the gradient of an input is f32 [2] on cpu; the input is f64 [2]",
               y.backward(Tensor::ones({2})));
  EXPECT_ERROR(ErrorKind::kState, "[backward] the tensor does not depend", Tensor().backward());
  EXPECT_ERROR(ErrorKind::kValue, "[backward] needs at least one tensor", autograd::backward({}));
  EXPECT_ERROR(ErrorKind::kValue, "[backward] 2 gradients for 1 tensors",
               autograd::backward({y}, {Tensor(), Tensor()}));
}

TEST(AutogradErrors, ASecondBackwardNamesTheOpAndTheWayOut) {
  const Tensor x = leaf(3);
  const Tensor y = mul(x, x);
  y.backward();
  EXPECT_ERROR(ErrorKind::kState,
               "[mul] this part of the graph was used by an earlier backward pass, which released what [mul] had "
               "saved. Hint: pass retain_graph",
               y.backward());
  EXPECT_EQ(x.grad().item(), 6) << "the failed pass adds nothing";
  EXPECT_ERROR(ErrorKind::kState, "[mul] this part of the graph was used", sum(y).backward());
}

TEST(AutogradErrors, RetainGraphAllowsBackwardAgain) {
  const Tensor x = leaf(3);
  const Tensor y = mul(exponential(x), x);
  y.backward({}, true);
  const double once = x.grad().item();
  y.backward({}, true);
  y.backward();
  EXPECT_EQ(x.grad().item(), 3 * once);
  EXPECT_THROW(y.backward(), Error);
}

TEST(AutogradErrors, AnInPlaceChangeOfASavedInputNamesBothOps) {
  const Tensor x = leaf(3);
  const Tensor factor = tensor({5}, {1});
  const Tensor y = mul(x, factor);
  Tensor(factor).fill_(6);
  EXPECT_ERROR(ErrorKind::kState,
               "[mul] the backward pass needs a tensor (f64 [1]) that [fill_] changed in place after [mul] saved it "
               "(version 1, saved at 0)",
               y.backward());
}

TEST(AutogradErrors, AnInPlaceChangeOfASavedOutputNamesBothOps) {
  const Tensor x = leaf(1);
  const Tensor y = exponential(x);
  y.detach().zero_();
  EXPECT_ERROR(ErrorKind::kState,
               "[exp] the backward pass needs a tensor (f64 [1]) that [fill_] changed in place after [exp] saved it",
               y.backward());
}

TEST(AutogradErrors, AChangeThroughAViewOrOfAParameterIsSeen) {
  Tensor w = leaf({1, 2}, {2});
  const Tensor y = sum(mul(w, w));
  {
    const autograd::NoGrad no_grad;
    w.slice(0, 1, 2).copy_(tensor({9}, {1}));
  }
  EXPECT_ERROR(ErrorKind::kState, "that [copy_] changed in place after [mul] saved it", y.backward());
}

TEST(AutogradErrors, AChangeOfWhatWasNotSavedIsFine) {
  const Tensor x = leaf(1);
  const Tensor y = add(x, x);
  y.detach().zero_();
  y.backward();
  EXPECT_EQ(x.grad().item(), 2);
}

TEST(AutogradErrors, AWrongGradientNamesTheOpThatAnsweredIt) {
  const auto bad = [](const Tensor& gradient) {
    const Tensor x = leaf({1, 2}, {2});
    const Tensor y = tensor({1}, {1});
    autograd::record("bad", {x}, {y}, {}, [gradient](BackwardContext& c) { c.set(0, gradient); });
    y.backward();
  };
  EXPECT_ERROR(ErrorKind::kShape,
               "[bad] the gradient of an input has shape [3]; the input is [2] and does not broadcast to that",
               bad(tensor({1, 2, 3}, {3})));
  EXPECT_ERROR(ErrorKind::kDType, "[bad] the gradient of an input is f32 [2] on cpu; the input is f64 [2] on cpu",
               bad(Tensor::ones({2})));
}

// ---- gradients() ----

TEST(Gradients, LeaveGradAlone) {
  const Tensor x = leaf(3), y = leaf(4), unused = leaf(1);
  x.set_grad(tensor({100}, {1}));
  const Tensors got = autograd::gradients({mul(mul(x, x), y)}, {y, x, unused});
  EXPECT_EQ(got[0].item(), 9);
  EXPECT_EQ(got[1].item(), 24);
  EXPECT_FALSE(got[2].defined());
  EXPECT_EQ(x.grad().item(), 100);
  EXPECT_FALSE(y.grad().defined());
}

TEST(Gradients, OfWhatIsNoLeafAndOfTheOutputItself) {
  const Tensor x = leaf(3);
  const Tensor middle = mul(x, x), out = mul(middle, middle);
  const Tensors got = autograd::gradients({out}, {middle, out, x});
  EXPECT_EQ(got[0].item(), 18);
  EXPECT_EQ(got[1].item(), 1);
  EXPECT_EQ(got[2].item(), 18 * 6);
}

TEST(Gradients, RunOnlyRulesBetweenOutputsAndInputs) {
  const Tensor x = leaf(3), y = leaf(2);
  int runs = 0;
  const Tensor aside = tensor({1}, {1});
  autograd::record("aside", {y}, {aside}, {}, [&](BackwardContext& c) { ++runs, c.set(0, c.grad()); });
  const Tensor middle = mul(x, x);
  EXPECT_EQ(autograd::gradients({mul(middle, aside)}, {middle})[0].item(), 1);
  EXPECT_EQ(runs, 0);
  middle.backward();
  EXPECT_EQ(x.grad().item(), 6) << "what was not run was not released";
}

TEST(Gradients, DoNotCallGradReadyHooks) {
  const Tensor x = leaf(3);
  int calls = 0;
  x.register_grad_ready_hook([&](const Tensor&) { ++calls; });
  autograd::gradients({mul(x, x)}, {x});
  EXPECT_EQ(calls, 0);
}

TEST(Gradients, RefuseInputsThatRequireNone) {
  const Tensor x = leaf(3);
  EXPECT_ERROR(ErrorKind::kState, "[gradients] input 1 (f64 [1]) does not require a gradient",
               autograd::gradients({mul(x, x)}, {x, x.detach()}));
  EXPECT_ERROR(ErrorKind::kState, "[gradients] input 0 (undefined) does not",
               autograd::gradients({mul(x, x)}, {Tensor()}));
}

TEST(Gradients, OfUnrelatedLeavesAreNeverMixedUp) {
  // Leaves that no graph refers to have no node of their own for long; another must not be taken for it.
  for (int i = 0; i < 100; ++i) {
    const Tensor x = leaf(3), stranger = leaf(1), other = leaf(1);
    const Tensors got = autograd::gradients({mul(x, x)}, {stranger, x, other});
    ASSERT_FALSE(got[0].defined());
    ASSERT_EQ(got[1].item(), 6);
    ASSERT_FALSE(got[2].defined());
    // The start is a leaf whose node is made only now.
    ASSERT_FALSE(autograd::gradients({leaf(1)}, {stranger}, {tensor({1}, {1})})[0].defined());
  }
}

// ---- second derivatives ----

TEST(DoubleBackward, OfAPolynomial) {
  const Tensor x = leaf(3);
  const Tensor y = mul(mul(x, x), x);
  const Tensor first = autograd::gradients({y}, {x}, {}, true, true)[0];
  EXPECT_EQ(first.item(), 27);
  EXPECT_TRUE(first.requires_grad());
  const Tensor second = autograd::gradients({first}, {x}, {}, true, true)[0];
  EXPECT_EQ(second.item(), 18);
  EXPECT_EQ(autograd::gradients({second}, {x})[0].item(), 6);
}

TEST(DoubleBackward, ThroughSavedOutputs) {
  const Tensor x = leaf(0.5);
  Tensor derivative = exponential(x);
  for (int order = 1; order <= 4; ++order) {
    derivative = autograd::gradients({derivative}, {x}, {}, true, true)[0];
    EXPECT_NEAR(derivative.item(), std::exp(0.5), 1e-14) << order;
  }
}

/// Gradient of |df/dx|^2 against central differences of the first gradient.
void check_second(const std::function<Tensor(const Tensors&)>& f, const Tensors& leaves) {
  const auto penalty = [&](const Tensors& at) {
    Tensors inputs;
    for (const Tensor& each : at) inputs.push_back(each.requires_grad() ? each : each.detach().requires_grad_());
    Tensor total = tensor({0}, {1});
    for (const Tensor& gradient : autograd::gradients({f(inputs)}, inputs, {}, true, true))
      total = add(total, sum(mul(gradient, gradient)));
    return total;
  };
  penalty(leaves).backward();
  const std::vector<Values> want = differences(penalty, leaves);
  for (size_t t = 0; t < leaves.size(); ++t) expect_near(leaves[t].grad().to_vector<double>(), want[t], 1e-8);
}

TEST(DoubleBackward, ThroughViewsBroadcastsSplitsAndCats) {
  const auto f = [](const Tensors& x) {
    const Tensor t = x[0].transpose(0, 1).reshape({6}).expand({2, 6});
    const Tensor u = add(t, x[1]);  // [2, 6] + [2, 1]
    const std::vector<Tensor> pieces = u.split(4, 1);
    const Tensor v = cat({pieces[1], pieces[0].slice(1, 0, 4, 2), pieces[0].select(1, 3).unsqueeze(1)}, 1);
    return sum(mul(exponential(v), mul(v, v.to(DType::f64).clone())));
  };
  check_second(f, {leaf({0.1, -0.2, 0.3, 0.4, -0.5, 0.6}, {2, 3}), leaf({0.2, -0.3}, {2, 1})});
}

TEST(DoubleBackward, ThroughAKernelNamesTheOp) {
  const Tensor x = leaf(3);
  EXPECT_ERROR(ErrorKind::kState, "[sine] has no second derivative: its backward rule is a kernel of its own",
               autograd::gradients({sine(x)}, {x}, {}, true, true));
  const Tensor y = leaf(2);
  EXPECT_EQ(autograd::gradients({add(sine(x), mul(y, y))}, {y}, {}, true, true)[0].item(), 4)
      << "no kernel lies on the way to y";
}

// ---- hooks ----

TEST(Hooks, SeeAndReplaceGradients) {
  const Tensor x = leaf(3);
  const Tensor y = mul(x, x);
  std::vector<double> seen;
  y.register_hook([&](const Tensor& gradient) {
    seen.push_back(gradient.item());
    return zip(gradient, gradient, [](double g, double) { return 10 * g; });
  });
  y.register_hook([&](const Tensor& gradient) {
    seen.push_back(gradient.item());
    return Tensor();
  });
  x.register_hook([&](const Tensor& gradient) {
    seen.push_back(gradient.item());
    return zip(gradient, gradient, [](double g, double) { return g + 1; });
  });
  add(y, y).backward();
  EXPECT_EQ(seen, (std::vector<double>{2, 20, 120})) << "each once, when all paths have been added";
  EXPECT_EQ(x.grad().item(), 121);
}

TEST(Hooks, MustAnswerWithTheSameShapeAndDType) {
  const Tensor x = leaf(3);
  const Tensor y = mul(x, x);
  y.register_hook([](const Tensor&) { return tensor({1, 2}, {2}); });
  EXPECT_ERROR(ErrorKind::kShape, "[mul] a gradient hook answered with f64 [2] for a gradient that is f64 [1]",
               y.backward());
  EXPECT_ERROR(ErrorKind::kState, "[register_hook] this tensor (f64 [1]) does not require a gradient",
               y.detach().register_hook({}));
}

TEST(Hooks, MayRegisterOtherHooks) {
  const Tensor x = leaf(3);
  int calls = 0;
  const std::function<Tensor(const Tensor&)> hook = [&](const Tensor&) {
    ++calls;
    for (int i = 0; i < 50; ++i) x.register_hook([](const Tensor&) { return Tensor(); });
    return Tensor();
  };
  x.register_hook(hook);
  x.register_grad_ready_hook([&](const Tensor& ready) {
    for (int i = 0; i < 50; ++i) ready.register_grad_ready_hook([](const Tensor&) {});
  });
  mul(x, x).backward();
  EXPECT_EQ(calls, 1);
}

TEST(Hooks, GradReadyFiresOncePerBackwardForEachLeafWithTheWholeGradient) {
  const Tensor a = leaf(2), b = leaf(3), unused = leaf(1);
  std::vector<std::string> log;
  for (const auto& [name, each] : {std::pair<std::string, Tensor>{"a", a}, {"b", b}, {"unused", unused}}) {
    each.register_grad_ready_hook([&log, name = name, &each = name == "a" ? a : b](const Tensor& ready) {
      EXPECT_TRUE(ready.is_same(each));
      log.push_back(concat(name, '=', ready.grad().item()));
    });
  }
  const auto loss = [&] { return add(mul(a, a), add(mul(a, b), mul(b, a))); };
  loss().backward();
  EXPECT_EQ(log.size(), 2u);
  EXPECT_EQ(std::count(log.begin(), log.end(), "a=10"), 1);
  EXPECT_EQ(std::count(log.begin(), log.end(), "b=4"), 1);
  loss().backward();
  EXPECT_EQ(log.size(), 4u);
  EXPECT_EQ(std::count(log.begin(), log.end(), "a=20"), 1);
  EXPECT_ERROR(ErrorKind::kState, "[register_grad_ready_hook] only a leaf that requires a gradient adds one up",
               mul(a, a).register_grad_ready_hook({}));
}

TEST(Hooks, GradReadyComesAsEarlyAsItCan) {
  // The last layer's parameter is done before the first layer's rule runs.
  const Tensor first = leaf(2), last = leaf(3), x = tensor({1}, {1});
  std::vector<std::string> log;
  first.register_grad_ready_hook([&](const Tensor&) { log.push_back("first"); });
  last.register_grad_ready_hook([&](const Tensor&) { log.push_back("last"); });
  const Tensor hidden = mul(first, x);
  hidden.register_hook([&](const Tensor&) { return log.push_back("hidden"), Tensor(); });
  mul(hidden, last).backward();
  EXPECT_EQ(log, (std::vector<std::string>{"last", "hidden", "first"}));
}

TEST(Hooks, RetainedGradientsOfWhatIsNoLeafAddUp) {
  const Tensor x = leaf(3);
  const Tensor y = mul(x, x);
  y.retain_grad();
  y.retain_grad();  // says nothing new
  const Tensor z = mul(y, y);
  z.backward({}, true);
  EXPECT_EQ(y.grad().item(), 18);
  z.backward();
  EXPECT_EQ(y.grad().item(), 36);
  EXPECT_ERROR(ErrorKind::kState, "[retain_grad] this tensor (f64 [1]) does not require", x.detach().retain_grad());
  x.retain_grad();
}

// ---- ownership and sinks ----

TEST(Ownership, LeavesThatGetTheSameGradientDoNotShareIt) {
  const Tensor a = leaf({1, 2}, {2}), b = leaf({3, 4}, {2});
  const Tensor gradient = tensor({1, 1}, {2});
  add(a, b).backward(gradient);
  EXPECT_NE(a.grad().storage(), b.grad().storage());
  EXPECT_NE(a.grad().storage(), gradient.storage());
  EXPECT_NE(b.grad().storage(), gradient.storage());
  add(a, a).backward(gradient);  // added in place to a's alone
  EXPECT_EQ(a.grad().to_vector<double>(), (Values{3, 3}));
  EXPECT_EQ(b.grad().to_vector<double>(), (Values{1, 1}));
  EXPECT_EQ(gradient.to_vector<double>(), (Values{1, 1}));
}

TEST(Ownership, GradientsOfLeavesAreRowMajorAndNotParts) {
  const Tensor a = leaf({1, 2, 3, 4}, {2, 2}), b = leaf({1}, {1});
  a.transpose(0, 1).backward(tensor({1, 2, 3, 4}, {2, 2}));
  EXPECT_TRUE(a.grad().is_contiguous());
  EXPECT_EQ(a.grad().to_vector<double>(), (Values{1, 3, 2, 4}));
  cat({b, tensor(Values(1000, 0), {1000})}).backward(tensor(Values(1001, 1), {1001}));
  EXPECT_EQ(b.grad().storage()->bytes(), 8) << "not a view that keeps a thousand others alive";
  const Tensor c = leaf({1, 2}, {2});
  sum(c).backward();
  EXPECT_TRUE(c.grad().is_contiguous()) << "not an expanded 1";
}

TEST(Ownership, AGradientThatAHookKeepsIsNotTakenFromIt) {
  const Tensor x = leaf(2);
  Tensor kept;
  x.register_hook([&](const Tensor& gradient) { return kept = gradient, Tensor(); });
  mul(x, x).backward();
  mul(x, x).backward();
  EXPECT_EQ(x.grad().item(), 8);
  EXPECT_EQ(kept.item(), 4);
  EXPECT_NE(kept.storage(), x.grad().storage());
}

TEST(Ownership, GradientsSetByHandMayBeExpanded) {
  const Tensor x = leaf({1, 2, 3}, {3});
  const Tensor one = tensor({1}, {1});
  x.set_grad(one.expand({3}));
  sum(mul(x, x)).backward();
  EXPECT_EQ(x.grad().to_vector<double>(), (Values{3, 5, 7}));
  EXPECT_EQ(one.item(), 1);
}

/// y = w * x elementwise, whose rule writes w's gradient where it lives if it may.
struct SinkLog {
  int offered = 0, accumulating = 0;
};
Tensor sinking(const Tensor& w, const Tensor& x, SinkLog& log) {
  Tensor out = zip(w, x, std::multiplies<double>());
  autograd::record("sinking", {w, x}, {out}, {w, x}, [&log](BackwardContext& c) {
    const Tensor gradient = zip(c.grad(), c.saved(1), std::multiplies<double>());
    if (const auto sink = c.sink(0)) {
      ++log.offered;
      log.accumulating += sink->accumulate;
      EXPECT_EQ(sink->tensor.shape(), gradient.shape());
      const Values add = gradient.to_vector<double>();
      for (size_t i = 0; i < add.size(); ++i) {
        double& at = sink->tensor.data<double>()[i];
        at = (sink->accumulate ? at : 0) + add[i];
      }
    } else if (c.needs(0)) {
      c.set(0, gradient);
    }
    if (c.needs(1)) c.set(1, zip(c.grad(), c.saved(0), std::multiplies<double>()));
  });
  return out;
}

TEST(Sinks, AreOfferedToLeavesAndSayWhetherToAdd) {
  SinkLog log;
  const Tensor w = leaf({2, 3}, {2}), x = tensor({5, 7}, {2});
  int ready = 0;
  w.register_grad_ready_hook([&](const Tensor& done) { ready += done.grad().defined(); });
  sum(sinking(w, x, log)).backward();
  EXPECT_EQ(log.offered, 1);
  EXPECT_EQ(log.accumulating, 0);
  EXPECT_EQ(w.grad().to_vector<double>(), (Values{5, 7}));
  const void* place = w.grad().raw();
  sum(sinking(w, x, log)).backward();
  EXPECT_EQ(log.accumulating, 1);
  EXPECT_EQ(w.grad().to_vector<double>(), (Values{10, 14}));
  EXPECT_EQ(w.grad().raw(), place);
  EXPECT_EQ(ready, 2) << "once per backward";
}

TEST(Sinks, OfATiedLeafAddUpWithOrdinaryGradientsInAnyOrder) {
  for (const bool sink_first : {true, false}) {
    SinkLog log;
    const Tensor w = leaf({2, 3}, {2}), x = tensor({5, 7}, {2});
    int ready = 0;
    w.register_grad_ready_hook([&](const Tensor&) { ++ready; });
    const Tensor a = sink_first ? mul(w, x) : sinking(w, x, log);
    const Tensor b = sink_first ? sinking(w, x, log) : mul(w, x);
    sum(add(add(a, b), sinking(w, x, log))).backward();
    EXPECT_EQ(log.offered, 2);
    EXPECT_EQ(log.accumulating, 1);
    EXPECT_EQ(w.grad().to_vector<double>(), (Values{15, 21}));
    EXPECT_EQ(ready, 1);
  }
}

TEST(Sinks, AreNotOfferedWhereTheGradientIsNotWrittenInPlace) {
  SinkLog log;
  const Tensor w = leaf({2, 3}, {2}), x = leaf({5, 7}, {2});
  EXPECT_EQ(autograd::gradients({sum(sinking(w, x, log))}, {w})[0].to_vector<double>(), (Values{5, 7}));
  EXPECT_FALSE(w.grad().defined());
  sum(sinking(mul(w, w), x, log)).backward();  // no leaf
  EXPECT_EQ(log.offered, 0);
  const Tensor hooked = leaf({2, 3}, {2});
  hooked.register_hook([](const Tensor& gradient) { return zip(gradient, gradient, std::plus<double>()); });
  sum(sinking(hooked, x, log)).backward();  // a hook must see the gradient first
  EXPECT_EQ(log.offered, 0);
  EXPECT_EQ(hooked.grad().to_vector<double>(), (Values{10, 14}));
}

TEST(Sinks, CountAsGradientMemory) {
  SinkLog log;
  const auto held = [] {
    return allocator(Device::cpu()).statistics().categories[static_cast<size_t>(MemoryCategory::gradients)].current;
  };
  const int64_t before = held();
  const Tensor w = leaf({2, 3}, {2}), x = tensor({5, 7}, {2});
  sum(sinking(w, x, log)).backward();
  EXPECT_EQ(held(), before + 64);
}

// ---- order and size ----

TEST(Order, GradientsAreAddedInReverseOrderOfRecordingWhateverTheThreads) {
  // Sums of f32 of very different sizes, whose bits show the order.
  const int before = num_threads();
  std::vector<std::vector<float>> runs;
  std::vector<std::vector<int>> logs;
  for (int run = 0; run < 6; ++run) {
    set_num_threads(1 + run % 3);
    std::vector<std::unique_ptr<char[]>> noise;  // other addresses in each run
    for (int i = 0; i < run * 7; ++i) noise.push_back(std::make_unique<char[]>(100));
    const Tensor x = leaf({1, 1e-3, 7}, {3}, DType::f32);
    Tensors leaves, outputs;
    std::vector<int> log;
    Tensor total = sum(x);
    for (int i = 0; i < 20; ++i) {
      leaves.push_back(leaf({std::pow(-1.7, i), 0.3 * i, 1e4}, {3}, DType::f32));
      leaves.back().register_grad_ready_hook([&log, i](const Tensor&) { log.push_back(i); });
      outputs.push_back(sum(mul(mul(x, leaves.back()), x)));
    }
    for (const Tensor& each : leaves) outputs.push_back(each);
    Tensors gradients(20);
    for (int i = 0; i < 20; ++i) gradients.push_back(Tensor::ones({3}));
    autograd::backward(outputs, gradients);
    runs.push_back(x.grad().to_vector<float>());
    logs.push_back(log);
  }
  set_num_threads(before);
  for (const auto& run : runs) EXPECT_EQ(run, runs[0]);
  for (const auto& log : logs) EXPECT_EQ(log, logs[0]);
  EXPECT_EQ(logs[0].size(), 20u);
}

TEST(Order, LeavesThatAreReadyTogetherComeInTheOrderOfTheInputs) {
  std::vector<int> log;
  Tensors leaves;
  for (int i = 0; i < 9; ++i) {
    leaves.push_back(leaf(i));
    leaves.back().register_grad_ready_hook([&log, i](const Tensor&) { log.push_back(i); });
  }
  sum(cat(leaves)).backward();
  EXPECT_EQ(log, (std::vector<int>{0, 1, 2, 3, 4, 5, 6, 7, 8}));
}

TEST(Size, ALongTapeIsWalkedAndFreedWithoutDeepRecursion) {
  constexpr int kNodes = 200000;
  const Tensor x = leaf(1), one = tensor({1}, {1});
  const auto chain = [&] {
    Tensor y = x;
    for (int i = 0; i < kNodes; ++i) {
      const Tensor next = Tensor::empty({1}, DType::f64);
      next.data<double>()[0] = 1;
      // Saves its input and its output, so that tensors, their places in the graph and nodes hang on each other.
      autograd::record("link", {y, one}, {next}, {y, next}, [](BackwardContext& c) { c.set(0, c.grad()); });
      y = next;
    }
    return y;
  };
  const int64_t before = allocator(Device::cpu()).statistics().total.current;
  {
    const Tensor forgotten = chain();
  }
  EXPECT_EQ(allocator(Device::cpu()).statistics().total.current, before) << "freed without a backward pass";
  {
    const Tensor y = chain();
    y.backward({}, true);
    y.backward();
  }
  EXPECT_EQ(x.grad().item(), 2);
  x.clear_grad();
  EXPECT_EQ(allocator(Device::cpu()).statistics().total.current, before);
}

TEST(Size, BackwardFreesWhatItHasUsedAsItGoes) {
  const Tensor x = leaf(Values(1000, 1.0), {1000});
  const auto current = [] { return allocator(Device::cpu()).statistics().total.current; };
  const int64_t before = current();
  const Tensor y = sum(exponential(exponential(exponential(mul(x, tensor(Values(1000, 1e-3), {1000}))))));
  EXPECT_GE(current() - before, 4 * 8000);
  y.backward();
  EXPECT_LE(current() - before, 8000 + 3 * 64) << "the gradient and a few scalars";
}

// ---- checkpoint ----

/// Three layers whose rules save inputs and outputs.
Tensors layers(const Tensors& in, const Tensor& w) {
  Tensor h = in[0];
  for (int i = 0; i < 3; ++i) h = sine(mul(exponential(mul(h, tensor({0.1}, {1}))), w));
  return {h};
}

struct CheckpointCase {
  Tensor x, w;
  CheckpointCase() {
    Values values(512);
    for (size_t i = 0; i < values.size(); ++i) values[i] = std::sin(static_cast<double>(i));
    x = leaf(values, {512});
    w = leaf(Values(512, 0.3), {512});
  }
  std::vector<Values> gradients() const { return {x.grad().to_vector<double>(), w.grad().to_vector<double>()}; }
};

TEST(Checkpoint, GivesTheSameNumbersBitForBit) {
  const CheckpointCase plain, saved;
  const Tensor want = sum(layers({layers({plain.x}, plain.w)[0]}, plain.w)[0]);
  const auto block = [&](const Tensors& in) { return layers(in, saved.w); };
  const Tensor got = sum(autograd::checkpoint(block, {autograd::checkpoint(block, {saved.x})[0]})[0]);
  EXPECT_EQ(got.item(), want.item());
  want.backward();
  got.backward();
  EXPECT_EQ(saved.gradients(), plain.gradients());
}

TEST(Checkpoint, NeedsLessMemory) {
  const auto peak = [](bool recompute) {
    const CheckpointCase c;
    Allocator& memory = allocator(Device::cpu());
    memory.reset_peak();
    const int64_t before = memory.statistics().total.current;
    Tensor h = c.x;
    for (int i = 0; i < 8; ++i) {
      const auto block = [&](const Tensors& in) { return layers(in, c.w); };
      h = recompute ? autograd::checkpoint(block, {h})[0] : block({h})[0];
    }
    sum(h).backward();
    return memory.statistics().total.peak - before;
  };
  const int64_t all = peak(false), less = peak(true);
  EXPECT_LT(less, all / 2) << "8 blocks of 10 activations against 8 inputs and one block";
}

TEST(Checkpoint, WorksWithARetainedGraph) {
  const CheckpointCase plain, saved;
  const Tensor y = sum(autograd::checkpoint([&](const Tensors& in) { return layers(in, saved.w); }, {saved.x})[0]);
  const Tensor z = sum(layers({plain.x}, plain.w)[0]);
  for (const bool retain : {true, true, false}) {
    y.backward({}, retain);
    z.backward({}, retain);
  }
  EXPECT_EQ(saved.gradients(), plain.gradients());
  EXPECT_THROW(y.backward(), Error);
}

TEST(Checkpoint, NestsAndThenKeepsOnlyTheOuterInput) {
  const CheckpointCase plain, saved;
  const Tensor want = sum(layers(layers(layers({plain.x}, plain.w), plain.w), plain.w)[0]);
  want.backward();
  int runs = 0;
  const auto inner = [&](const Tensors& in) { return ++runs, layers(in, saved.w); };
  const auto outer = [&](const Tensors& in) {
    return autograd::checkpoint(inner, autograd::checkpoint(inner, autograd::checkpoint(inner, in)));
  };
  const auto current = [] { return allocator(Device::cpu()).statistics().total.current; };
  const int64_t before = current();
  const Tensor y = sum(autograd::checkpoint(outer, {saved.x})[0]);
  EXPECT_LE(current() - before, 4096 + 2 * 64) << "at most the output: the inner inputs are computed again";
  EXPECT_EQ(runs, 3);
  y.backward({}, true);
  EXPECT_EQ(saved.gradients(), plain.gradients());
  EXPECT_EQ(runs, 9) << "3, 3 when the outer runs again, and 1 for each inner";
  plain.x.clear_grad(), plain.w.clear_grad(), saved.x.clear_grad(), saved.w.clear_grad();
  y.backward();
  sum(layers(layers(layers({plain.x}, plain.w), plain.w), plain.w)[0]).backward();
  EXPECT_EQ(saved.gradients(), plain.gradients());
}

TEST(Checkpoint, TakesInputsThatNeedNoGradientAndFunctionsOfSeveral) {
  const Tensor x = tensor({0.5, 0.7}, {2}), w = leaf({2, 3}, {2}), v = leaf({1, -1}, {2});
  const Tensors out =
      autograd::checkpoint([&](const Tensors& in) { return Tensors{mul(in[0], w), mul(in[1], in[1])}; }, {x, v});
  sum(mul(out[0], out[1])).backward();
  EXPECT_EQ(w.grad().to_vector<double>(), (Values{0.5, 0.7}));
  expect_near(v.grad().to_vector<double>(), {2 * 0.5 * 2, -2 * 0.7 * 3}, 1e-15);
}

TEST(Checkpoint, UnderNoGradJustRuns) {
  const CheckpointCase c;
  const autograd::NoGrad no_grad;
  int runs = 0;
  EXPECT_FALSE(
      autograd::checkpoint([&](const Tensors& in) { return ++runs, layers(in, c.w); }, {c.x})[0].requires_grad());
  EXPECT_EQ(runs, 1);
}

TEST(Checkpoint, TwiceDifferentiable) {
  const auto f = [](const Tensors& x) {
    return autograd::checkpoint(
        [](const Tensors& in) { return Tensors{sum(mul(exponential(in[0]), mul(in[0], in[0])))}; }, {x[0]})[0];
  };
  check_second(f, {leaf({0.3, -0.4, 1.0}, {3})});
}

TEST(Checkpoint, AnImpureFunctionIsAnError) {
  const Tensor x = leaf({1, 2}, {2});
  int run = 0;
  const Tensor more = autograd::checkpoint(
      [&](const Tensors& in) { return Tensors{++run == 1 ? mul(in[0], in[0]) : exponential(in[0])}; }, {x})[0];
  EXPECT_ERROR(ErrorKind::kState,
               "[checkpoint] the function saved 2 tensors the first time and 1 the second: it is not a pure function "
               "of its inputs",
               sum(more).backward());
  run = 0;
  const Tensor other = autograd::checkpoint(
      [&](const Tensors& in) {
        const Tensor factor = ++run == 1 ? tensor({1, 2}, {2}) : tensor({1}, {1});
        return Tensors{mul(in[0], factor)};
      },
      {x})[0];
  EXPECT_ERROR(ErrorKind::kState, "[checkpoint] the function saved f64 [2] the first time and f64 [1] the second",
               sum(other).backward());
}

TEST(Checkpoint, AChangedInputOrParameterIsAnError) {
  Tensor x = tensor({1, 2}, {2});
  Tensor w = leaf({3, 4}, {2});
  const auto block = [&](const Tensors& in) { return Tensors{mul(in[0], w)}; };
  const Tensor first = sum(autograd::checkpoint(block, {x})[0]);
  x.fill_(7);
  EXPECT_ERROR(ErrorKind::kState,
               "[checkpoint] input 0 (f64 [2]) was changed in place by [fill_] before the backward pass",
               first.backward());
  const Tensor second = sum(autograd::checkpoint(block, {x})[0]);
  w.detach().fill_(1);
  EXPECT_ERROR(ErrorKind::kState,
               "[checkpoint] a tensor (f64 [2]) that the function uses was changed in place by [fill_]",
               second.backward());
}

TEST(Checkpoint, AFunctionThatThrowsTheSecondTimeLeavesAGraphThatCanBeUsed) {
  const Tensor x = leaf({1, 2}, {2});
  int run = 0;
  const Tensor y = sum(autograd::checkpoint(
      [&](const Tensors& in) {
        const Tensor h = exponential(in[0]);
        if (++run == 2) throw std::runtime_error("no");
        return Tensors{mul(h, in[0])};
      },
      {x})[0]);
  EXPECT_THROW(y.backward({}, true), std::runtime_error);
  EXPECT_TRUE(autograd::grad_mode());
  y.backward({}, true);
  EXPECT_NEAR(x.grad().to_vector<double>()[0], 2 * std::exp(1.0), 1e-14);
}

TEST(SavedTensorHooks, MayKeepTensorsElsewhere) {
  const Tensor x = leaf({1, 2, 3}, {3});
  int packed = 0, unpacked = 0;
  Tensor y;
  {
    const autograd::SavedTensorHooks hooks([&](const Tensor& saved) {
      ++packed;
      EXPECT_FALSE(saved.requires_grad());
      return [&unpacked, bytes = saved.to_vector<double>(), shape = saved.shape()] {
        return ++unpacked, tensor(bytes, shape);
      };
    });
    y = sum(mul(x, exponential(x)));
  }
  EXPECT_EQ(autograd::SavedTensorHooks::current(), nullptr);
  y.backward();
  EXPECT_EQ(packed, 3);
  EXPECT_EQ(unpacked, 3);
  EXPECT_NEAR(x.grad().to_vector<double>()[1], 3 * std::exp(2.0), 1e-12);
}

}  // namespace
}  // namespace weft
