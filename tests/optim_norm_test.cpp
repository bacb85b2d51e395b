#include "optim/norm.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "core/random.h"
#include "core/thread_pool.h"
#include "optim/optimizer_kernels.h"
#include "tests/error_of.h"

namespace weft::optim {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

Parameter with_gradient(const std::string& name, const std::vector<double>& gradient, DType dtype = DType::f32) {
  const auto n = static_cast<int64_t>(gradient.size());
  Tensor tensor = Tensor::zeros({n}, dtype);
  tensor.requires_grad_();
  tensor.set_grad(Tensor::from(gradient, {n}).to(dtype));
  return {name, tensor, ParameterRole::weight};
}

Parameter random_gradient(const std::string& name, int64_t n, DType dtype) {
  const Tensor values = Tensor::empty({n}, dtype);
  fill_normal(values, RandomStream(1, name), 0, 1);
  return with_gradient(name, values.to_vector<double>(), dtype);
}

/// In long double, for reference.
double plain_norm(const Parameters& parameters) {
  long double total = 0;
  for (const Parameter& parameter : parameters) {
    if (!parameter.tensor.grad().defined()) continue;
    for (const double g : parameter.tensor.grad().to_vector<double>())
      total += static_cast<long double>(g) * static_cast<long double>(g);
  }
  return static_cast<double>(std::sqrt(total));
}

class DoublingNorms final : public NormReducer {
 public:
  void reduce(std::span<double> squares, const Parameters& parameters) override {
    ++calls;
    EXPECT_EQ(squares.size(), parameters.size());
    for (double& square : squares) square *= 2;
  }
  int calls = 0;
};

TEST(GradNorm, IsTheEuclideanNormOverAllParameters) {
  EXPECT_EQ(grad_norm({}), 0);
  EXPECT_EQ(grad_norm({with_gradient("a", {3}), with_gradient("b", {0, 4})}), 5);
  Parameter none = with_gradient("none", {7});
  none.tensor.clear_grad();
  EXPECT_EQ(grad_norm({with_gradient("a", {3, -4}), none}), 5) << "no gradient counts as 0";
  EXPECT_EQ(grad_norm({with_gradient("empty", {})}), 0);
}

TEST(GradNorm, AgreesWithLongDoubleInEveryDTypeAndLength) {
  for (const DType dtype : {DType::f32, DType::f64, DType::f16, DType::bf16}) {
    // Around the width of vectors, of blocks and of pieces.
    for (const int64_t n : {1, 3, 15, 16, 17, 31, 33, 1023, 1024, 1025, 65535, 65537, 200001}) {
      const Parameters parameters = {random_gradient("x", n, dtype), random_gradient("y", 7, dtype)};
      const double want = plain_norm(parameters);
      // Squares are summed in f32 over blocks of 1,024 in at least 8 partial sums.
      EXPECT_NEAR(grad_norm(parameters), want, want * (dtype == DType::f64 ? 1e-14 : 2e-6)) << dtype << ' ' << n;
    }
  }
}

TEST(GradNorm, OfValuesWhoseSquaresOverflowOrUnderflowF32) {
  for (const double value : {1e20, 3e38, 1e-23, 1e-38, 1e-44}) {
    const double exact = static_cast<double>(static_cast<float>(value));
    const double norm = grad_norm({with_gradient("x", std::vector<double>(2500, value))});
    EXPECT_NEAR(norm, 50 * exact, 50 * exact * 1e-12) << value;
  }
  const double mixed = grad_norm({with_gradient("x", {1e20, 1}), with_gradient("y", {1e30})});
  EXPECT_NEAR(mixed, 1e30, 1e30 * 1e-7);
  EXPECT_NEAR(grad_norm({with_gradient("b", std::vector<double>(4, 1e25), DType::bf16)}), 2e25, 2e25 * 4e-3);
}

TEST(GradNorm, DoesNotDependOnTheNumberOfThreads) {
  const Parameters parameters = {random_gradient("a", 300001, DType::f32), random_gradient("b", 70000, DType::f64),
                                 random_gradient("c", 5, DType::bf16)};
  const int before = num_threads();
  set_num_threads(1);
  const double one = grad_norm(parameters);
  for (const int threads : {2, 3, 5}) {
    set_num_threads(threads);
    EXPECT_EQ(grad_norm(parameters), one) << threads;
  }
  set_num_threads(before);
}

TEST(GradNorm, ReadsGradientsInAnyLayout) {
  Tensor tensor = Tensor::zeros({300, 400});
  tensor.requires_grad_();
  const Tensor gradient = random_gradient("g", 300 * 400, DType::f32).tensor.grad().reshape({400, 300});
  tensor.set_grad(gradient.transpose(0, 1));
  EXPECT_NEAR(grad_norm({{"t", tensor}}), plain_norm({{"t", tensor}}), 1e-3);
  tensor.set_grad(Tensor::full({1, 1}, 2).expand({300, 400}));
  EXPECT_NEAR(grad_norm({{"t", tensor}}), 2 * std::sqrt(120000.0), 1e-3);
}

TEST(GradNorm, NamesTheFirstTensorThatIsNotFiniteAndWhere) {
  for (const double bad : {kInfinity, -kInfinity, std::numeric_limits<double>::quiet_NaN()}) {
    for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16}) {
      std::vector<double> values(2000, 1.0);
      values[1234] = bad;
      const Parameters parameters = {with_gradient("fine", {1}), with_gradient("h.0.weight", values, dtype),
                                     with_gradient("later", {bad}, dtype)};
      EXPECT_ERROR(
          ErrorKind::kValue,
          concat("[grad_norm] the gradient of \"h.0.weight\" (", dtype, " [2000]) is ", bad, " at element 1,234"),
          grad_norm(parameters));
    }
  }
}

TEST(GradNorm, BeyondF64IsAnErrorAndNotInfinity) {
  EXPECT_ERROR(ErrorKind::kValue,
               "[grad_norm] the squares of the gradient of \"x\" (f64 [1]) do not add up to a finite number",
               grad_norm({with_gradient("x", {1e200}, DType::f64)}));
}

TEST(GradNorm, AsksTheReducerOnceEvenIfAGradientIsNotFinite) {
  DoublingNorms norms;
  EXPECT_NEAR(grad_norm({with_gradient("a", {3}), with_gradient("b", {4})}, norms), 5 * std::sqrt(2.0), 1e-15);
  EXPECT_EQ(norms.calls, 1);
  EXPECT_THROW(grad_norm({with_gradient("a", {kInfinity})}, norms), Error);
  EXPECT_EQ(norms.calls, 2) << "a group in which one process does not ask would wait for it";
}

TEST(GradNorm, WhatTheReducerFindsElsewhereIsAnErrorToo) {
  class Elsewhere final : public NormReducer {
    void reduce(std::span<double> squares, const Parameters&) override { squares[1] = std::nan(""); }
  } norms;
  EXPECT_ERROR(
      ErrorKind::kValue,
      "the squares of the gradient of \"b\" (f32 [1]) do not add up to a finite number, here or in another part",
      grad_norm({with_gradient("a", {3}), with_gradient("b", {4})}, norms));
}

TEST(ClipFactor, IsOneUpToTheLimitAndTheirRatioBeyond) {
  EXPECT_EQ(clip_factor(0, 1), 1);
  EXPECT_EQ(clip_factor(1, 1), 1);
  EXPECT_EQ(clip_factor(4, 1), 0.25);
  EXPECT_EQ(clip_factor(4, kInfinity), 1);
  for (const double bad : {0.0, -1.0, std::nan("")}) {
    EXPECT_ERROR(ErrorKind::kValue, "[clip_factor] the largest norm must be positive, got", clip_factor(1, bad));
  }
}

TEST(ClipGradNorm, ScalesAllGradientsByOneFactorAndAnswersTheNormBefore) {
  const Parameters parameters = {with_gradient("a", {3, 0}), with_gradient("b", {-4}, DType::f64),
                                 with_gradient("c", {12}, DType::bf16)};
  EXPECT_EQ(clip_grad_norm(parameters, 6.5), 13);
  EXPECT_EQ(parameters[0].tensor.grad().to_vector<double>(), (std::vector<double>{1.5, 0}));
  EXPECT_EQ(parameters[1].tensor.grad().item(), -2);
  EXPECT_EQ(parameters[2].tensor.grad().item(), 6);
  EXPECT_EQ(clip_grad_norm(parameters, 6.5), 6.5);
  EXPECT_EQ(parameters[2].tensor.grad().item(), 6) << "small enough: left as it is";
}

TEST(ClipGradNorm, HonoursTheReducer) {
  DoublingNorms norms;
  const Parameters parameters = {with_gradient("a", {3, 4})};
  EXPECT_NEAR(clip_grad_norm(parameters, 1, norms), 5 * std::sqrt(2.0), 1e-15);
  EXPECT_NEAR(parameters[0].tensor.grad().to_vector<double>()[1], 4 / (5 * std::sqrt(2.0)), 1e-7);
}

TEST(ClipGradNorm, ChangesNothingIfItFails) {
  const Parameters parameters = {with_gradient("a", {3, 4}), with_gradient("b", {kInfinity})};
  EXPECT_ERROR(ErrorKind::kValue, "\"b\"", clip_grad_norm(parameters, 1));
  EXPECT_EQ(parameters[0].tensor.grad().to_vector<double>(), (std::vector<double>{3, 4}));
  parameters[1].tensor.set_grad(Tensor::ones({2}).slice(0, 0, 2, 2));
  EXPECT_ERROR(ErrorKind::kValue, "[clip_factor]", clip_grad_norm(parameters, 0));
  Tensor wide = Tensor::zeros({2, 2});
  wide.requires_grad_().set_grad(Tensor::ones({2, 2}).transpose(0, 1));
  EXPECT_ERROR(ErrorKind::kValue, "[clip_grad_norm] the gradient of \"wide\" is not contiguous",
               clip_grad_norm({parameters[0], {"wide", wide}}, 1));
  EXPECT_EQ(parameters[0].tensor.grad().to_vector<double>(), (std::vector<double>{3, 4}));
}

TEST(ExactSquares, OfPartsAddUpToThoseOfTheWhole) {
  for (const DType dtype : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
    Tensor x = Tensor::empty({300'000}, dtype);
    fill_normal(x, RandomStream(8, "squares"), 0, 1e-3);
    const auto squares = [&](int64_t begin, int64_t end) {
      const Tensor part = x.narrow(0, begin, end - begin);
      return exact_squares(std::vector<TensorData>{{part.raw(), part.numel(), dtype}}).front();
    };
    const double whole = squares(0, x.numel()).value();
    for (const int64_t cut : {0, 1024, 65536, 66560, 204800, 300'000}) {
      ExactSum sum = squares(cut, x.numel());
      sum.add(squares(0, cut));
      EXPECT_EQ(sum.value(), whole) << dtype << ", cut at " << cut;
    }
    double plain = 0;
    for (const double value : x.to_vector<double>()) plain += value * value;
    EXPECT_NEAR(whole / plain, 1, 1e-5) << dtype;
  }
}

}  // namespace
}  // namespace weft::optim
