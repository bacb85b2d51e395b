#pragma once
#include <cublasLt.h>

#include <array>
#include <cstdint>
#include <string>

#include "cuda/context.h"

namespace weft::cuda {

/// A product as it will be given to cublasLtMatmul(), D being C.
struct GemmCall {
  cublasLtMatmulDesc_t product;
  cublasLtMatrixLayout_t a, b, c;
  const void *alpha, *a_data, *b_data, *beta;
  void* c_data;
  std::array<uint32_t, 3> alignment;  ///< of the three matrices, in bytes
  bool accumulates;                   ///< C is read
  size_t c_bytes;                     ///< from the first to the last element of C
  double flops;
};

/// Grows with every change of the choices: what was chosen before must then be asked for again.
int64_t gemm_algorithm_epoch();

/// Whether the library has an algorithm for the product.
bool has_gemm_algorithm(Context& context, const GemmCall& call);

/// The algorithm for a product: by the list that use_gemm_algorithms() was given, by timing under tune_gemm(), else the
/// library's first choice. @param name  what the choice depends on, in words
cublasLtMatmulAlgo_t choose_gemm_algorithm(Context& context, const std::string& name, const GemmCall& call);

}  // namespace weft::cuda
