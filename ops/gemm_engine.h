#pragma once
// Inner interface of the GEMM: what ops/gemm.cpp (plan and threads) asks of the kernels compiled for one instruction
// set.
#include <cstdint>

#include "ops/gemm.h"

namespace weft::detail {

/// The part of C that one task computes: rows [row0, row1), columns [col0, col1), all of k.
struct GemmTile {
  int64_t row0, row1, col0, col1;
};

/// Two bfloat16 numbers that follow one another along k: an element of an operand for instructions that multiply and
/// add pairs. At an odd end of k, `second` is 0.
struct Bf16Pair {
  uint16_t first, second;
};

/// Sizes that the plan of a product depends on.
struct GemmShape {
  int rows;   ///< rows of a register tile
  int cols;   ///< columns of a register tile
  int lanes;  ///< multiply-adds of an instruction
};

template <class TA, class TB, class TC>
struct GemmKernels {
  GemmShape shape;
  void (*tile)(const Gemm<TA, TB, TC>& product, const GemmTile& tile);
};

/// Shorter dot products are not worth the sum over the lanes of a vector.
inline constexpr int64_t kMinDotK = 32;

/// True when rows of A meet rows of B^T as dot products along k instead of register tiles: with so few rows the product
/// is bound by reading B, which is then read once, in place.
template <class TA, class TB, class TC>
bool uses_dot_kernel(const Gemm<TA, TB, TC>& g) {
  constexpr int64_t kMaxRows = 8;
  return g.m <= kMaxRows && g.b.row_stride == 1 && g.k >= kMinDotK && g.alpha != 0;
}

enum class GemmScratch : uint8_t { kA, kB, kSums };

/// At least `count` elements, aligned to 64 bytes, of this thread's scratch memory for one use. Kept until the thread
/// ends.
template <class T>
T* gemm_scratch(GemmScratch use, int64_t count);

enum class GemmIsa : uint8_t { kPortable, kAvx2, kAvx512, kAvx512Bf16 };

/// Whether the instruction set in use multiplies pairs of bfloat16.
bool gemm_multiplies_pairs();

/// Kernels of an instruction set, or null if this build does not have it.
template <class TA, class TB, class TC>
const GemmKernels<TA, TB, TC>* gemm_kernels(GemmIsa isa);

}  // namespace weft::detail
