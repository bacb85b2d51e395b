#pragma once
#include "ops/gemm.h"

namespace weft {

/// The product of 16-bit matrices, and beside it the sums over k of A's rows, sums[m]: with A = dy^T the gradient of a
/// bias beside that of its weight. From the product's epilogue, added up in f32, or by a kernel of its own where
/// cuBLASLt has no such product (it is asked once). T is uint16_t, for bfloat16, or Half.
/// @throws Error kValue for a product with a bias or an activation.
template <class T>
void gemm_with_sums(Cuda, const Gemm<T>& product, T* sums);

}  // namespace weft
