#include "ops/elementwise.h"
#include "ops/loss.h"
#include "ops/reduce.h"
#include "ops/softmax.h"
#include "tests/op_cases.h"

namespace weft::testing {
namespace {

constexpr int64_t kIgnored = -1;  // so that targets drawn from [-1, V) have ignored rows among them

Tensor composed_cross_entropy(const Tensor& logits, const Tensor& targets, const CrossEntropyOptions& options) {
  const Tensor chosen = eq(targets.unsqueeze(-1), Tensor::arange(logits.size(-1)));
  const Tensor total = sum(where(chosen, -log_softmax(logits), 0));
  if (options.reduction == Reduction::kSum) return total;
  if (options.valid_tokens > 0) return total / options.valid_tokens;
  return total / sum(ge(targets, 0).to(DType::f64));
}

const CrossEntropyOptions kMeanOptions = {.ignore_index = kIgnored};
const CrossEntropyOptions kSumOptions = {.ignore_index = kIgnored, .reduction = Reduction::kSum};
const CrossEntropyOptions kGivenOptions = {.ignore_index = kIgnored, .valid_tokens = 7.5};
constexpr const char* kReason =
    "the loss is f32 for bf16 too: inputs are rounded, the sum of V exponentials in f32 has a relative error of a few "
    "2^-24";

OpCase loss_case(const char* name, const Shape& logits, const CrossEntropyOptions& options = kMeanOptions) {
  Shape rows = logits;
  rows.erase(rows.rank() - 1);
  return {
      .op = "cross_entropy",
      .name = name,
      .arguments = {{logits, -4, 4}, {rows, -1, static_cast<double>(logits.back()), true}},
      .run = [options](const Tensors& in) -> Tensors { return {cross_entropy(in[0], in[1], options)}; },
      .composed = [options](const Tensors& in) -> Tensors { return {composed_cross_entropy(in[0], in[1], options)}; },
      .reason = kReason};
}

OpCase head_case(const char* name, const Shape& x, int64_t classes, int64_t chunk_rows,
                 const CrossEntropyOptions& options = kMeanOptions) {
  Shape rows = x;
  rows.erase(rows.rank() - 1);
  return {.op = "linear_cross_entropy",
          .name = name,
          .arguments = {{x}, {{classes, x.back()}}, {rows, -1, static_cast<double>(classes), true}},
          .run = [options, chunk_rows](const Tensors& in) -> Tensors {
            return {linear_cross_entropy(in[0], in[1], in[2], {options, chunk_rows})};
          },
          .composed = [options](const Tensors& in) -> Tensors {
            const Tensor logits = sum(in[0].unsqueeze(-2) * in[1], {-1});
            return {composed_cross_entropy(logits, in[2], options)};
          },
          .reason = kReason};
}

}  // namespace

std::vector<OpCase> loss_cases() {
  return {
      loss_case("rows", {7, 5}),
      loss_case("tokens", {2, 3, 11}),
      loss_case("prime_sizes", {13, 37}),
      loss_case("sum", {7, 5}, kSumOptions),
      loss_case("given_valid_tokens", {7, 5}, kGivenOptions),
      loss_case("sum_of_no_rows", {0, 5}, kSumOptions),
      head_case("one_chunk", {7, 3}, 5, 0),
      head_case("a_row_at_a_time", {7, 3}, 5, 1),
      head_case("ragged_chunks", {7, 3}, 5, 3),
      head_case("tokens", {2, 5, 4}, 11, 4),
      head_case("prime_sizes", {13, 17}, 37, 0),
      head_case("sum", {7, 3}, 5, 2, kSumOptions),
      head_case("given_valid_tokens", {7, 3}, 5, 2, kGivenOptions),
      head_case("sum_of_no_rows", {0, 3}, 5, 0, kSumOptions),
  };
}

}  // namespace weft::testing
