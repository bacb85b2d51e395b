#include "ops/dropout.h"
#include "ops/elementwise.h"
#include "ops/index.h"
#include "ops/reduce.h"
#include "tests/op_cases.h"

namespace weft::testing {
namespace {

/// [..., n]: 1 where the index is, as f64.
Tensor one_hot(const Tensor& index, int64_t n) { return eq(index.unsqueeze(-1), Tensor::arange(n)).to(DType::f64); }

OpCase embedding_case(const char* name, const Shape& ids, const Shape& table) {
  return {.op = "embedding",
          .name = name,
          .arguments = {{ids, 0, static_cast<double>(table[0]), true}, {table}},
          .run = [](const Tensors& in) -> Tensors { return {embedding(in[0], in[1])}; },
          .composed = [](const Tensors& in) -> Tensors {
            return {sum(one_hot(in[0], in[1].size(0)).unsqueeze(-1) * in[1], {-2})};
          },
          .tolerance_f32 = 0,
          .tolerance_bf16 = 0,
          .reason = "rows are copied"};
}

/// Rows [first, first + table rows) of a table of `all` rows.
OpCase embedding_part_case(const char* name, const Shape& ids, const Shape& table, int64_t first, int64_t all) {
  OpCase part = embedding_case(name, ids, table);
  part.arguments[0] = {ids, 0, static_cast<double>(all), true};
  part.run = [first, all](const Tensors& in) -> Tensors { return {embedding(in[0], in[1], first, all)}; };
  part.composed = [first, all](const Tensors& in) -> Tensors {
    const Tensor here = one_hot(in[0], all).narrow(-1, first, in[1].size(0));
    return {sum(here.unsqueeze(-1) * in[1], {-2})};
  };
  return part;
}

/// Column j of the one-hot index against x moved so that `dim` is last: sum_v [index = v] x[..., v, ...].
Tensor composed_gather(const Tensor& x, int dim, const Tensor& index) {
  Tensor part = x;
  for (int d = 0; d < x.rank(); ++d) {
    if (d != dim) part = part.narrow(d, 0, index.size(d));
  }
  Dims order;
  for (int d = 0; d < x.rank(); ++d) {
    if (d != dim) order.push_back(d);
  }
  order.push_back(dim);
  return sum(one_hot(index, x.size(dim)) * part.permute(order).unsqueeze(dim), {-1});
}

OpCase gather_case(const char* name, const Shape& x, int dim, const Shape& index) {
  return {.op = "gather",
          .name = name,
          .arguments = {{x}, {index, 0, static_cast<double>(x[dim]), true}},
          .run = [dim](const Tensors& in) -> Tensors { return {gather(in[0], dim, in[1])}; },
          .composed = [dim](const Tensors& in) -> Tensors { return {composed_gather(in[0], dim, in[1])}; },
          .tolerance_f32 = 0,
          .tolerance_bf16 = 0,
          .reason = "elements are copied"};
}

OpCase dropout_case(const char* name, const Shape& shape, double p) {
  return {.op = "dropout",
          .name = name,
          .arguments = {{shape}},
          .run = [p](const Tensors& in) -> Tensors { return {dropout(in[0], p, RandomStream(1, "dropout"))}; },
          .composed = [p](const Tensors& in) -> Tensors {
            const RandomStream stream(1, "dropout");
            std::vector<double> mask;
            for (int64_t i = 0; i < in[0].numel(); ++i) {
              mask.push_back(stream.bits(static_cast<uint64_t>(i)) >= p * 0x1p32 ? 1 / (1 - p) : 0);
            }
            return {in[0] * Tensor::from(mask, in[0].shape())};
          },
          .tolerance_f32 = 2e-7,
          .reason = "one product with a rounded factor"};
}

}  // namespace

std::vector<OpCase> index_cases() {
  return {
      embedding_case("repeated_ids", {13}, {5, 3}),
      embedding_case("tokens", {2, 7}, {11, 17}),
      embedding_case("one_id", {1}, {1, 1}),
      embedding_case("number", {}, {3, 4}),
      embedding_case("no_ids", {0}, {3, 4}),
      embedding_part_case("first_part_of_a_table", {13}, {5, 3}, 0, 8),
      embedding_part_case("middle_part_of_a_table", {3, 7}, {4, 17}, 5, 11),
      gather_case("last_dimension", {3, 5}, 1, {3, 7}),
      gather_case("first_dimension", {5, 3}, 0, {2, 2}),
      gather_case("middle_dimension", {2, 4, 3}, 1, {2, 5, 3}),
      gather_case("one_dimension", {7}, 0, {11}),
      gather_case("nothing", {3, 5}, 1, {3, 0}),
      dropout_case("a_tenth", {7, 13}, 0.1),
      dropout_case("most", {3, 5, 11}, 0.9),
      dropout_case("nothing_dropped", {5}, 0),
      dropout_case("no_elements", {0, 3}, 0.5),
  };
}

}  // namespace weft::testing
