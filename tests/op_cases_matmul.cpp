#include "ops/elementwise.h"
#include "ops/matmul.h"
#include "ops/reduce.h"
#include "tests/op_cases.h"

namespace weft::testing {
namespace {

/// Sum over k of a[..., i, k] b[..., k, j], by broadcasting: the definition, with no product kernel in it.
Tensor composed_matmul(const Tensor& a, const Tensor& b) { return sum(a.unsqueeze(-1) * b.unsqueeze(-3), {-2}); }

Tensors run_matmul(const Tensors& in) { return {matmul(in[0], in[1])}; }
Tensors compose_matmul(const Tensors& in) { return {composed_matmul(in[0], in[1])}; }
Tensors run_linear(const Tensors& in) { return {linear(in[0], in[1], in.size() > 2 ? in[2] : Tensor())}; }
Tensors compose_linear(const Tensors& in) {
  const Tensor x = in[0].rank() == 1 ? in[0].unsqueeze(0) : in[0];
  Tensor y = composed_matmul(x, in[1].transpose(0, 1));
  if (in.size() > 2) y = y + in[2];
  return {in[0].rank() == 1 ? y.squeeze(0) : y};
}

Tensors run_gelu_linear(const Tensors& in) { return {gelu_linear(in[0], in[1], in.size() > 2 ? in[2] : Tensor())}; }
Tensors compose_gelu_linear(Tensors in) {
  const Tensor x = in[0];
  in[0] = x * sigmoid((x + x * x * x * 0.044715) * 1.5957691216057307);  // 2 sqrt(2 / pi)
  return compose_linear(in);
}

constexpr const char* kReason =
    "a sum of K products of numbers below 2 in f32: K * 4 * 2^-24; one rounding of inputs and result in bf16";

OpCase matmul_case(const char* name, const Shape& a, const Shape& b) {
  return {.op = "matmul",
          .name = name,
          .arguments = {{a}, {b}},
          .run = run_matmul,
          .composed = compose_matmul,
          .tolerance_f32 = 2e-5,
          .reason = kReason};
}

OpCase linear_case(const char* name, const Shape& x, int64_t out, bool bias) {
  std::vector<Argument> arguments = {{x}, {{out, x.back()}}};
  if (bias) arguments.push_back({{out}});
  return {.op = "linear",
          .name = name,
          .arguments = arguments,
          .run = run_linear,
          .composed = compose_linear,
          .tolerance_f32 = 2e-5,
          .reason = kReason};
}

OpCase gelu_linear_case(const char* name, const Shape& x, int64_t out, bool bias) {
  OpCase made = linear_case(name, x, out, bias);
  made.op = "gelu_linear";
  made.arguments[1].low = -0.5, made.arguments[1].high = 0.5;  // gelu(x) is rounded too
  made.run = run_gelu_linear;
  made.composed = compose_gelu_linear;
  return made;
}

}  // namespace

std::vector<OpCase> matmul_cases() {
  return {
      matmul_case("two_matrices", {5, 7}, {7, 3}),
      matmul_case("one_element", {1, 1}, {1, 1}),
      matmul_case("row_times_column", {1, 13}, {13, 1}),
      matmul_case("batch", {3, 5, 2}, {3, 2, 4}),
      matmul_case("batch_times_matrix", {2, 3, 5}, {5, 4}),
      matmul_case("matrix_times_batch", {3, 5}, {2, 5, 4}),
      matmul_case("broadcast_batches", {2, 1, 3, 4}, {3, 4, 2}),
      matmul_case("no_rows", {0, 4}, {4, 3}),
      matmul_case("no_terms", {3, 0}, {0, 2}),
      matmul_case("no_batch", {0, 2, 3}, {0, 3, 2}),
      matmul_case("beyond_one_tile", {67, 37}, {37, 71}),
      linear_case("rows", {5, 7}, 3, true),
      linear_case("without_bias", {5, 7}, 3, false),
      linear_case("tokens", {2, 3, 8}, 5, true),
      linear_case("one_vector", {6}, 4, true),
      linear_case("no_rows", {0, 4}, 3, true),
      linear_case("beyond_one_strip", {65, 17}, 131, true),
      gelu_linear_case("rows", {5, 7}, 3, true),
      gelu_linear_case("rows_of_sixteen", {6, 16}, 8, true),
      gelu_linear_case("without_bias", {5, 8}, 3, false),
      gelu_linear_case("tokens", {2, 3, 24}, 5, true),
      gelu_linear_case("one_vector", {8}, 4, true),
      gelu_linear_case("no_rows", {0, 4}, 3, true),
      gelu_linear_case("no_outputs", {3, 8}, 0, false),
      gelu_linear_case("beyond_one_strip", {65, 136}, 17, true),
  };
}

}  // namespace weft::testing
