#pragma once
#include <cstdint>
#include <span>

#include "dist/group.h"

namespace weft::dist::testing {

/// What every implementation of a group must do: a program that all ranks run. Each compares what it gets with values
/// that it computes itself, bit by bit, and throws where they differ; the answer is a digest of all of them, for
/// comparing implementations.
struct Program {
  const char* name;
  uint64_t (*run)(Group& world);
};
std::span<const Program> programs();
const Program& program(std::string_view name);

/// The tensor that rank `rank` brings: a function of its arguments.
Tensor values(int rank, const Shape& shape, DType dtype, uint64_t seed);

}  // namespace weft::dist::testing
