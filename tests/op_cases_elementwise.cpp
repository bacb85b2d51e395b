#include <algorithm>
#include <cmath>
#include <numbers>

#include "ops/elementwise.h"
#include "tests/op_cases.h"

namespace weft::testing {
namespace {

constexpr const char* kReason = "f32: some ulp; bf16: computed in f32 from rounded inputs and rounded once, 2^-8";
constexpr double kF32 = 5e-7, kBf16 = 3.95e-3;

/// function of each element, with nothing of the library's own arithmetic.
template <class Function>
Tensor map(const Tensor& x, Function function) {
  std::vector<double> values = x.to_vector<double>();
  std::transform(values.begin(), values.end(), values.begin(), function);
  return Tensor::from(values, x.shape());
}

template <class Function>
Tensor map(const Tensor& a, const Tensor& b, Function function) {
  const Shape shape = broadcast_shapes(a.shape(), b.shape(), "composed");
  std::vector<double> x = a.expand(shape).to_vector<double>();
  const std::vector<double> y = b.expand(shape).to_vector<double>();
  std::transform(x.begin(), x.end(), y.begin(), x.begin(), function);
  return Tensor::from(x, shape);
}

std::string number_name(double x) {
  std::string text = std::to_string(static_cast<int64_t>(std::abs(x)));
  return x < 0 ? "minus_" + text : text;
}

/// An op of one element: a vector and a bit, a matrix of primes, one number, nothing.
void add_unary(std::vector<OpCase>& cases, const char* op, Tensor (*run)(const Tensor&), double (*exact)(double),
               double low, double high) {
  const auto add_case = [&](std::string name, const Shape& shape) {
    cases.push_back({.op = op,
                     .name = std::move(name),
                     .arguments = {{shape, low, high}},
                     .run = [run](const Tensors& in) -> Tensors { return {run(in[0])}; },
                     .composed = [exact](const Tensors& in) -> Tensors { return {map(in[0], exact)}; },
                     .tolerance_f32 = kF32,
                     .tolerance_bf16 = kBf16,
                     .reason = kReason});
  };
  const std::string range = "from_" + number_name(low) + "_to_" + number_name(high);
  add_case(range, {67});
  add_case("prime_sizes", {7, 13});
  add_case("three_dimensions", {3, 2, 5});
  add_case("number", {});
  add_case("nothing", {0, 3});
}

using Function2 = Tensor (*)(const Tensor&, const Tensor&);

/// An op of two elements: shapes that broadcast in every way.
void add_binary(std::vector<OpCase>& cases, const char* op, Function2 run, double (*exact)(double, double),
                bool differentiable = true, double low_b = -2) {
  const auto add_case = [&](const char* name, const Shape& a, const Shape& b) {
    cases.push_back({.op = op,
                     .name = name,
                     .arguments = {{a}, {b, low_b}},
                     .run = [run](const Tensors& in) -> Tensors { return {run(in[0], in[1])}; },
                     .composed = [exact](const Tensors& in) -> Tensors { return {map(in[0], in[1], exact)}; },
                     .tolerance_f32 = kF32,
                     .tolerance_bf16 = kBf16,
                     .reason = kReason,
                     .differentiable = differentiable});
  };
  add_case("prime_sizes", {7, 13}, {7, 13});
  add_case("row", {5, 19}, {19});
  add_case("column", {5, 19}, {5, 1});
  add_case("row_with_column", {1, 11}, {3, 1});
  add_case("number", {3, 7}, {});
  add_case("outer_dimension", {2, 3, 5}, {2, 1, 5});
  add_case("nothing", {0, 3}, {3});
}

/// An op with a number as one of its arguments.
template <class Run, class Exact>
void add_number(std::vector<OpCase>& cases, const char* op, const char* name, Run run, Exact exact,
                bool differentiable = true, double low = -2) {
  cases.push_back({.op = op,
                   .name = name,
                   .arguments = {{{5, 7}, low}},
                   .run = [run](const Tensors& in) -> Tensors { return {run(in[0])}; },
                   .composed = [exact](const Tensors& in) -> Tensors { return {map(in[0], exact)}; },
                   .tolerance_f32 = kF32,
                   .tolerance_bf16 = kBf16,
                   .reason = kReason,
                   .differentiable = differentiable});
}

double logistic(double x) { return 1 / (1 + std::exp(-x)); }

double gelu_of(double x) {
  return 0.5 * x * (1 + std::tanh(std::sqrt(2 / std::numbers::pi) * (x + 0.044715 * x * x * x)));
}

void add_all_unary(std::vector<OpCase>& cases) {
  add_unary(cases, "neg", neg, [](double x) { return -x; }, -2, 2);
  add_unary(cases, "abs", abs, [](double x) { return std::abs(x); }, -2, 2);
  add_unary(cases, "square", square, [](double x) { return x * x; }, -3, 3);
  add_unary(cases, "sqrt", sqrt, [](double x) { return std::sqrt(x); }, 1, 90);
  add_unary(cases, "rsqrt", rsqrt, [](double x) { return 1 / std::sqrt(x); }, 1, 9);
  add_unary(cases, "reciprocal", reciprocal, [](double x) { return 1 / x; }, 1, 5);
  add_unary(cases, "exp", exp, [](double x) { return std::exp(x); }, -10, 10);
  add_unary(cases, "ln", ln, [](double x) { return std::log(x); }, 1, 50);
  add_unary(cases, "tanh", tanh, [](double x) { return std::tanh(x); }, -4, 4);
  add_unary(cases, "sigmoid", sigmoid, logistic, -9, 9);
  add_unary(cases, "relu", relu, [](double x) { return x > 0 ? x : 0; }, -2, 2);
  add_unary(cases, "silu", silu, [](double x) { return x * logistic(x); }, -9, 9);
  add_unary(cases, "gelu", gelu, gelu_of, -6, 6);
  add_unary(cases, "sin", sin, [](double x) { return std::sin(x); }, -9, 9);
  add_unary(cases, "cos", cos, [](double x) { return std::cos(x); }, -9, 9);
}

void add_all_binary(std::vector<OpCase>& cases) {
  add_binary(cases, "add", add, [](double a, double b) { return a + b; });
  add_binary(cases, "sub", sub, [](double a, double b) { return a - b; });
  add_binary(cases, "mul", mul, [](double a, double b) { return a * b; });
  add_binary(cases, "div", div, [](double a, double b) { return a / b; }, true, 0.5);
  add_binary(cases, "maximum", maximum, [](double a, double b) { return std::max(a, b); });
  add_binary(cases, "minimum", minimum, [](double a, double b) { return std::min(a, b); });
  add_binary(cases, "eq", eq, [](double a, double b) { return a == b ? 1.0 : 0.0; }, false);
  add_binary(cases, "ne", ne, [](double a, double b) { return a != b ? 1.0 : 0.0; }, false);
  add_binary(cases, "lt", lt, [](double a, double b) { return a < b ? 1.0 : 0.0; }, false);
  add_binary(cases, "le", le, [](double a, double b) { return a <= b ? 1.0 : 0.0; }, false);
  add_binary(cases, "gt", gt, [](double a, double b) { return a > b ? 1.0 : 0.0; }, false);
  add_binary(cases, "ge", ge, [](double a, double b) { return a >= b ? 1.0 : 0.0; }, false);
}

void add_all_numbers(std::vector<OpCase>& cases) {
  constexpr static double c = 0.75;  // exact in every dtype
  add_number(cases, "add", "and_number", [](const Tensor& x) { return x + c; }, [](double x) { return x + c; });
  add_number(cases, "sub", "number_from", [](const Tensor& x) { return x - c; }, [](double x) { return x - c; });
  add_number(cases, "sub", "from_number", [](const Tensor& x) { return c - x; }, [](double x) { return c - x; });
  add_number(cases, "mul", "and_number", [](const Tensor& x) { return c * x; }, [](double x) { return c * x; });
  add_number(cases, "div", "by_number", [](const Tensor& x) { return x / c; }, [](double x) { return x / c; });
  add_number(
      cases, "div", "number_by", [](const Tensor& x) { return c / x; }, [](double x) { return c / x; }, true, 0.5);
  add_number(
      cases, "maximum", "and_number", [](const Tensor& x) { return maximum(x, c); },
      [](double x) { return std::max(x, c); });
  add_number(
      cases, "minimum", "and_number", [](const Tensor& x) { return minimum(x, c); },
      [](double x) { return std::min(x, c); });
  add_number(
      cases, "clamp", "both_sides", [](const Tensor& x) { return clamp(x, -c, c); },
      [](double x) { return std::clamp(x, -c, c); });
  add_number(
      cases, "gt", "with_number", [](const Tensor& x) { return gt(x, c); }, [](double x) { return x > c ? 1.0 : 0.0; },
      false);
  add_number(
      cases, "add_", "number", [](const Tensor& x) { return add_(x.clone(), c); }, [](double x) { return x + c; },
      false);
  add_number(
      cases, "mul_", "number", [](const Tensor& x) { return mul_(x.clone(), c); }, [](double x) { return x * c; },
      false);
}

OpCase in_place_case(const char* op, const char* name, Function2 run, double (*exact)(double, double)) {
  return {.op = op,
          .name = name,
          .arguments = {{{7, 13}}, {{7, 13}}},
          .run = [run](const Tensors& in) -> Tensors { return {run(in[0].clone(), in[1])}; },
          .composed = [exact](const Tensors& in) -> Tensors { return {map(in[0], in[1], exact)}; },
          .tolerance_f32 = kF32,
          .tolerance_bf16 = kBf16,
          .reason = kReason,
          .differentiable = false};
}

/// Where the third argument is positive, the first, else the second; arguments broadcast.
OpCase where_case(const char* name, const Shape& condition, const Shape& a, const Shape& b) {
  return {.op = "where",
          .name = name,
          .arguments = {{a}, {b}, {condition, -1, 1, false, false}},
          .run = [](const Tensors& in) -> Tensors { return {where(gt(in[2], 0), in[0], in[1])}; },
          .composed = [](const Tensors& in) -> Tensors {
            const Tensor take = map(in[2], [](double x) { return x > 0 ? 1.0 : 0.0; });
            return {take * in[0] + (1.0 - take) * in[1]};
          },
          .tolerance_f32 = 0,
          .tolerance_bf16 = 0,
          .reason = "elements are copied"};
}

OpCase masked_fill_case(const char* name, const Shape& x, const Shape& mask) {
  return {.op = "masked_fill",
          .name = name,
          .arguments = {{x}, {mask, -1, 1, false, false}},
          .run = [](const Tensors& in) -> Tensors { return {masked_fill(in[0], gt(in[1], 0), -0.5)}; },
          .composed = [](const Tensors& in) -> Tensors {
            return {map(in[0], in[1], [](double value, double mask) { return mask > 0 ? -0.5 : value; })};
          },
          .tolerance_f32 = 0,
          .tolerance_bf16 = 0,
          .reason = "elements are copied"};
}

}  // namespace

std::vector<OpCase> elementwise_cases() {
  std::vector<OpCase> cases;
  add_all_unary(cases);
  add_all_binary(cases);
  add_all_numbers(cases);
  cases.push_back(in_place_case(
      "add_", "tensor", [](const Tensor& x, const Tensor& y) { return add_(x, y); },
      [](double x, double y) { return x + y; }));
  cases.push_back(in_place_case(
      "add_", "scaled", [](const Tensor& x, const Tensor& y) { return add_(x, y, -0.5); },
      [](double x, double y) { return x - 0.5 * y; }));
  cases.push_back(in_place_case(
      "mul_", "tensor", [](const Tensor& x, const Tensor& y) { return mul_(x, y); },
      [](double x, double y) { return x * y; }));
  cases.push_back(where_case("prime_sizes", {7, 13}, {7, 13}, {7, 13}));
  cases.push_back(where_case("broadcast", {5, 1}, {11}, {}));
  cases.push_back(where_case("nothing", {0}, {0}, {1}));
  cases.push_back(masked_fill_case("prime_sizes", {7, 13}, {7, 13}));
  cases.push_back(masked_fill_case("row", {3, 5, 7}, {5, 1}));
  return cases;
}

}  // namespace weft::testing
