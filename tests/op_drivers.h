#pragma once
#include <string>
#include <string_view>

#include "tests/op_cases.h"

// What the drivers and the benchmark do with an OpCase.

namespace weft::testing {

/// "layer_norm_two_rows_of_seven".
std::string full_name(const OpCase& made);

/// The case's arguments: a function of the case's name and the argument's number alone. Floats are drawn in f64 and
/// cast to `dtype`.
Tensors make_arguments(const OpCase& made, DType dtype);

/// Random numbers in [-1, 1) in the shape of each tensor.
Tensors make_cotangents(const OpCase& made, const Tensors& outputs);

/// The float tensors of `in` cast to `dtype`, without a graph.
Tensors cast(const Tensors& in, DType dtype);

/// How the same values lie in memory.
enum class Layout { kContiguous, kTransposed, kSliced };
/// A copy of x in that layout, within a buffer whose other elements are NaN (or far beyond every index).
struct Placed {
  Tensor buffer;
  Tensor view;
};
Placed place(const Tensor& x, Layout layout);

/// Which arguments a gradient is asked for.
std::vector<size_t> differentiable_arguments(const OpCase& made);

using OpFunction = std::function<Tensors(const Tensors&)>;

/// Gradients of sum(outputs * cotangents) with respect to the differentiable arguments.
Tensors gradients_of(const OpCase& made, const OpFunction& run, const Tensors& arguments, const Tensors& cotangents);

/// Largest |got - want| / (1 + |want|); infinity where one is NaN and the other is not. Equal infinities agree.
double worst_error(const std::vector<double>& got, const std::vector<double>& want);

/// An identity whose derivative is wrong: 1.01 for all elements, or -1 for the element of the largest gradient.
enum class Plant { kScaled, kFlipped };
Tensor planted(const Tensor& x, Plant plant);

}  // namespace weft::testing
