#include <cmath>
#include <limits>

#include "ops/elementwise.h"
#include "ops/reduce.h"
#include "ops/softmax.h"
#include "tests/op_cases.h"

namespace weft::testing {
namespace {

using Reduce = Tensor (*)(const Tensor&, const Dims&, bool);
/// Folds the reduced elements, in row-major order, into one number.
using Fold = double (*)(const std::vector<double>&);

/// The fold of the elements of x that share an index in all other dimensions, computed the plain way.
Tensor reduce_plainly(const Tensor& x, const Dims& dims, bool keepdim, Fold fold) {
  Dims order, reduced = Dims::filled(x.rank(), 0);
  for (const int64_t dim : dims) reduced[normalize_dim(dim, x.rank(), "composed")] = 1;
  Shape shape;
  int64_t outputs = 1;
  for (int d = 0; d < x.rank(); ++d) {
    if (!reduced[d]) order.push_back(d), outputs *= x.size(d);
    if (!reduced[d] || keepdim) shape.push_back(reduced[d] ? 1 : x.size(d));
  }
  for (int d = 0; d < x.rank(); ++d) {
    if (reduced[d]) order.push_back(d);
  }
  const std::vector<double> values = x.permute(order).to_vector<double>();
  std::vector<double> results;
  const size_t terms = outputs == 0 ? 0 : values.size() / static_cast<size_t>(outputs);
  for (int64_t i = 0; i < outputs; ++i) {
    const auto begin = values.begin() + i * static_cast<int64_t>(terms);
    results.push_back(fold({begin, begin + static_cast<int64_t>(terms)}));
  }
  return Tensor::from(results, shape);
}

double fold_sum(const std::vector<double>& x) {
  long double total = 0;
  for (const double value : x) total += value;
  return static_cast<double>(total);
}
double fold_mean(const std::vector<double>& x) { return fold_sum(x) / static_cast<double>(x.size()); }
size_t first_extreme(const std::vector<double>& x, double sign) {
  size_t best = 0;
  for (size_t i = 1; i < x.size(); ++i) {
    if (sign * x[i] > sign * x[best]) best = i;
  }
  return best;
}
double fold_max(const std::vector<double>& x) { return x[first_extreme(x, 1)]; }
double fold_min(const std::vector<double>& x) { return x[first_extreme(x, -1)]; }
double fold_argmax(const std::vector<double>& x) { return static_cast<double>(first_extreme(x, 1)); }

OpCase reduce_case(const char* op, const char* name, Reduce run, Fold fold, const Shape& shape, const Dims& dims,
                   bool keepdim = false) {
  OpCase made = {
      .op = op,
      .name = name,
      .arguments = {{shape}},
      .run = [=](const Tensors& in) -> Tensors { return {run(in[0], dims, keepdim)}; },
      .composed = [=](const Tensors& in) -> Tensors { return {reduce_plainly(in[0], dims, keepdim, fold)}; },
      .tolerance_f32 = 1e-5,
      .tolerance_bf16 = 3.95e-3,
      .reason = "70 * 2^-24 of the sum of magnitudes, here at most 2 * 1000 over some 20; bf16 is rounded once, 2^-8"};
  return made;
}

void add_reduce(std::vector<OpCase>& cases, const char* op, Reduce run, Fold fold, bool sums) {
  const auto add_case = [&](const char* name, const Shape& shape, const Dims& dims, bool keepdim = false) {
    cases.push_back(reduce_case(op, name, run, fold, shape, dims, keepdim));
  };
  add_case("all", {7, 13}, {0, 1});
  add_case("last", {5, 19}, {-1});
  add_case("last_kept", {5, 19}, {-1}, true);
  add_case("first", {19, 5}, {0});
  add_case("first_of_many_columns", {11, 37}, {0}, true);
  add_case("middle", {3, 5, 7}, {1});
  add_case("outer_two", {3, 2, 17}, {0, 1});
  add_case("ends", {3, 5, 4}, {0, 2}, true);
  add_case("none", {3, 4}, {});
  add_case("number", {}, {});
  add_case("no_outputs", {0, 3}, {1});
  if (!sums) return;
  add_case("no_terms", {3, 0}, {1});
  add_case("long_row", {1031}, {0});
  add_case("beyond_one_stretch", {2, 1500}, {1});
  add_case("tall", {150, 17}, {0});
}

Tensor composed_softmax(const Tensor& x, int64_t dim) {
  const Tensor e = exp(x);
  return e / sum(e, {dim}, true);
}

OpCase softmax_case(const char* name, const Shape& shape, int64_t dim, bool log, double range = 4) {
  return {.op = log ? "log_softmax" : "softmax",
          .name = name,
          .arguments = {{shape, -range, range}},
          .run = [=](const Tensors& in) -> Tensors { return {log ? log_softmax(in[0], dim) : softmax(in[0], dim)}; },
          .composed = [=](const Tensors& in) -> Tensors {
            const Tensor y = composed_softmax(in[0], dim);
            return {log ? ln(y) : y};
          },
          .tolerance_f32 = 1e-6,
          .tolerance_bf16 = 3.95e-3,
          .reason = "f32: two ulp of the exponential and the bound of the sum; bf16: rounded once, 2^-8"};
}

}  // namespace

std::vector<OpCase> reduction_cases() {
  std::vector<OpCase> cases;
  add_reduce(cases, "sum", sum, fold_sum, true);
  add_reduce(cases, "mean", mean, fold_mean, true);
  std::erase_if(cases, [](const OpCase& made) { return made.op == "mean" && made.name == "no_terms"; });  // that is NaN
  add_reduce(cases, "max", max, fold_max, false);
  add_reduce(cases, "min", min, fold_min, false);
  for (const auto& [name, shape, dim] : {std::tuple("last", Shape{5, 19}, 1),
                                         {"first", {19, 5}, 0},
                                         {"middle", {2, 7, 3}, 1},
                                         {"beyond_one_vector", {3, 67}, 1},
                                         {"no_rows", {0, 3}, 1}}) {
    OpCase made = reduce_case(
        "argmax", name, [](const Tensor& x, const Dims& dims, bool keepdim) { return argmax(x, dims[0], keepdim); },
        fold_argmax, shape, {dim}, dim == 0);
    made.differentiable = false;
    made.tolerance_f32 = made.tolerance_bf16 = 0;
    made.reason = "an index";
    cases.push_back(made);
  }
  for (const bool log : {false, true}) {
    cases.push_back(softmax_case("two_rows_of_seven", {2, 7}, -1, log));
    cases.push_back(softmax_case("tokens", {2, 3, 16}, -1, log));
    cases.push_back(softmax_case("one_column", {5, 1}, -1, log));
    cases.push_back(softmax_case("beyond_one_vector", {3, 67}, 1, log));
    cases.push_back(softmax_case("beyond_one_stretch", {1, 1500}, 1, log));
    cases.push_back(softmax_case("first_dimension", {11, 5}, 0, log));
    cases.push_back(softmax_case("middle_dimension", {2, 7, 3}, 1, log));
    cases.push_back(softmax_case("one_dimension", {13}, 0, log));
    cases.push_back(softmax_case("far_apart", {3, 11}, -1, log, 40));
    cases.push_back(softmax_case("no_rows", {0, 4}, -1, log));
    cases.push_back(softmax_case("no_columns", {4, 0}, -1, log));
  }
  return cases;
}

}  // namespace weft::testing
