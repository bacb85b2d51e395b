#include "ops/elementwise.h"
#include "ops/norm.h"
#include "ops/reduce.h"
#include "tests/op_cases.h"

namespace weft::testing {
namespace {

constexpr double kEps =
    1e-2;  // so large that rows of nearly equal elements have a derivative which differences can see

Tensor composed_rms_norm(const Tensor& x, const Tensor& weight) {
  return x * rsqrt(mean(square(x), {-1}, true) + kEps) * weight;
}

Tensor composed_layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const Tensor centered = x - mean(x, {-1}, true);
  const Tensor y = centered * rsqrt(mean(square(centered), {-1}, true) + kEps) * weight;
  return bias.defined() ? y + bias : y;
}

constexpr const char* kReason =
    "f32: a dozen roundings of numbers up to 10; bf16: computed in f32 from rounded inputs, rounded once";

OpCase norm_case(const char* name, const Shape& x, bool bias = true) {
  std::vector<Argument> arguments = {{x}, {{x.back()}}};
  if (bias) arguments.push_back({{x.back()}});
  return {.op = "layer_norm",
          .name = name,
          .arguments = arguments,
          .run = [](const Tensors& in) -> Tensors {
            return {layer_norm(in[0], in[1], in.size() > 2 ? in[2] : Tensor(), kEps)};
          },
          .composed = [](const Tensors& in) -> Tensors {
            return {composed_layer_norm(in[0], in[1], in.size() > 2 ? in[2] : Tensor())};
          },
          .reason = kReason};
}

OpCase rms_case(const char* name, const Shape& x) {
  return {.op = "rms_norm",
          .name = name,
          .arguments = {{x}, {{x.back()}}},
          .run = [](const Tensors& in) -> Tensors { return {rms_norm(in[0], in[1], kEps)}; },
          .composed = [](const Tensors& in) -> Tensors { return {composed_rms_norm(in[0], in[1])}; },
          .reason = kReason};
}

OpCase residual_case(const char* name, const Shape& x) {
  return {.op = "residual_layer_norm",
          .name = name,
          .arguments = {{x}, {x}, {{x.back()}}, {{x.back()}}},
          .run = [](const Tensors& in) -> Tensors {
            const ResidualNorm out = residual_layer_norm(in[0], in[1], in[2], in[3], kEps);
            return {out.sum, out.normed};
          },
          .composed = [](const Tensors& in) -> Tensors {
            const Tensor sum = in[0] + in[1];
            return {sum, composed_layer_norm(sum, in[2], in[3])};
          },
          .tolerance_bf16 = 4e-2,
          .reason = "as layer_norm; the sum is rounded to bf16 before it is normalised, a second rounding"};
}

}  // namespace

std::vector<OpCase> norm_cases() {
  return {
      norm_case("two_rows_of_seven", {2, 7}),
      norm_case("one_row", {13}),
      norm_case("one_column", {3, 1}),
      norm_case("tokens", {2, 3, 16}),
      norm_case("without_bias", {5, 11}, false),
      norm_case("beyond_one_block", {37, 5}),
      norm_case("beyond_one_vector", {3, 67}),
      norm_case("no_rows", {0, 4}),
      residual_case("two_rows_of_seven", {2, 7}),
      residual_case("tokens", {2, 3, 16}),
      residual_case("beyond_one_block", {37, 5}),
      residual_case("beyond_one_vector", {3, 67}),
      residual_case("no_rows", {0, 4}),
      rms_case("two_rows_of_seven", {2, 7}),
      rms_case("one_row", {13}),
      rms_case("tokens", {2, 3, 16}),
      rms_case("beyond_one_block", {37, 5}),
      rms_case("beyond_one_vector", {3, 67}),
      rms_case("no_rows", {0, 4}),
  };
}

}  // namespace weft::testing
