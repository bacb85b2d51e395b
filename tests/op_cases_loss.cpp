#include <algorithm>
#include <numeric>
#include <optional>

#include "core/autograd.h"
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

/// The head with its classes cut into slices, as processes have them, one after the other. A first run gathers what
/// each contributes to the chunks; the second gives every slice all of it. The result has the loss's value once and the
/// gradients of all slices.
Tensor head_in_slices(const Tensor& x, const Tensor& weight, const Tensor& targets, const std::vector<int64_t>& counts,
                      const LinearCrossEntropyOptions& options) {
  std::vector<std::vector<Tensor>> parts(counts.size());  // [slice][chunk]
  const auto run = [&](size_t number, int64_t first, const std::function<Tensor(const Tensor&)>& gather) {
    LinearCrossEntropyOptions with = options;
    with.slice = {first, weight.size(0), *std::max_element(counts.begin(), counts.end()), gather};
    return linear_cross_entropy(x, weight.narrow(0, first, counts[number]), targets, with);
  };
  Tensor loss;
  for (const bool first_run : {true, false}) {
    int64_t first = 0;
    for (size_t i = 0; i < counts.size(); first += counts[i++]) {
      std::optional<autograd::NoGrad> no_grad;
      if (first_run) no_grad.emplace();
      size_t chunk = 0;
      const Tensor of_slice = run(i, first, [&](const Tensor& own) {
        if (first_run) parts[i].push_back(own.clone());
        const Tensor all =
            Tensor::empty({static_cast<int64_t>(counts.size()) * own.size(0), 2}, DType::f64, own.device());
        for (size_t s = 0; s < counts.size(); ++s) {
          all.narrow(0, static_cast<int64_t>(s) * own.size(0), own.size(0)).copy_(first_run ? own : parts[s][chunk]);
        }
        ++chunk;
        return all;
      });
      if (!first_run) loss = i == 0 ? of_slice : loss + (of_slice - of_slice.detach());
    }
  }
  return loss;
}

OpCase sliced_case(const char* name, const Shape& x, const std::vector<int64_t>& counts, int64_t chunk_rows,
                   const CrossEntropyOptions& options = kMeanOptions) {
  OpCase sliced = head_case(name, x, std::accumulate(counts.begin(), counts.end(), int64_t{0}), chunk_rows, options);
  sliced.run = [=](const Tensors& in) -> Tensors {
    return {head_in_slices(in[0], in[1], in[2], counts, {options, chunk_rows})};
  };
  return sliced;
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
      sliced_case("one_chunk_of_slices", {7, 3}, {2, 3}, 0),
      sliced_case("chunks_of_slices", {7, 3}, {3, 1, 1}, 3),
      sliced_case("uneven_slices", {13, 17}, {13, 12, 12}, 0),
      sliced_case("slices_of_whole_packs", {5, 8}, {16, 8}, 2, kGivenOptions),
      sliced_case("sum_of_slices_of_no_rows", {0, 3}, {2, 3}, 0, kSumOptions),
  };
}

}  // namespace weft::testing
