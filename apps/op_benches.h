#pragma once
#include <functional>
#include <string>
#include <vector>

#include "apps/bench_table.h"
#include "core/tensor.h"

namespace weft::apps {

/// One argument of a benchmarked op: floats in [low, high), or whole numbers of dtype i64, or bools that are true
/// where a number of [low, high) is positive.
struct BenchArgument {
  enum class Kind : uint8_t { kFloat, kIndex, kBool };
  Shape shape;
  double low = -2, high = 2;
  Kind kind = Kind::kFloat;
};

/// An op of ops/ at a size whose arrays no cache holds, and the least work of one call. The elementwise ops come from
/// ops/op_list.def; a test compares the names with the ops that the headers of ops/ declare, so none can be missing.
struct OpBench {
  std::string op;    ///< the public name, "layer_norm"
  std::string size;  ///< "[65536, 768]"
  std::vector<BenchArgument> arguments;
  std::function<std::vector<Tensor>(const std::vector<Tensor>&)> run;
  Work forward;
  /// Of the backward pass alone, or with `training` of both together; zero where there is none, or none that touches
  /// memory (a sum hands its gradient on, spread by strides).
  Work backward;
  bool training = false;
};

/// @param dtype  of the float tensors: what bytes are counted in
/// @param tiny   sizes for a look at whether everything runs
std::vector<OpBench> op_benches(Device device, DType dtype, bool tiny);

/// The arguments on the device.
std::vector<Tensor> make_arguments(const OpBench& bench, DType dtype, Device device);

}  // namespace weft::apps
