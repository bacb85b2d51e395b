#pragma once
#include <functional>
#include <string>
#include <vector>

#include "core/tensor.h"

namespace weft::testing {

using Tensors = std::vector<Tensor>;

/// One argument of an op in a case. Float arguments are drawn uniformly from [low, high) in f64 and cast; index
/// arguments are whole numbers in [low, high) of dtype i64 and have no gradient.
struct Argument {
  Shape shape;
  double low = -2;
  double high = 2;
  bool index = false;
  bool gradient = true;  ///< false: a float that no gradient is asked for (a mask, say)
};

/// One call of an op, written once and used by every driver: forward (against the composed definition, in every dtype
/// and memory layout), gradient (f64, against central differences) and support matrix. A benchmark of
/// the op stands in apps/op_benches.cpp.
struct OpCase {
  std::string op;    ///< the op's public name, "layer_norm"
  std::string name;  ///< what this case is about, "two_rows_of_seven"
  std::vector<Argument> arguments;
  std::function<Tensors(const Tensors&)> run;       ///< the op
  std::function<Tensors(const Tensors&)> composed;  ///< the same from basic ops, called with f64 tensors
  double tolerance_f32 = 1e-5;                      ///< on |got - want| / (1 + |want|), elementwise
  double tolerance_bf16 = 2e-2;
  const char* reason = "";     ///< why these tolerances
  bool differentiable = true;  ///< whether the op has a backward rule
};

/// Cases by family; each is defined in its own file, tests/op_cases_<family>.cpp.
std::vector<OpCase> elementwise_cases();
std::vector<OpCase> reduction_cases();
std::vector<OpCase> matmul_cases();
std::vector<OpCase> norm_cases();
std::vector<OpCase> attention_cases();
std::vector<OpCase> loss_cases();
std::vector<OpCase> index_cases();

/// All of them.
std::vector<OpCase> all_op_cases();

}  // namespace weft::testing
