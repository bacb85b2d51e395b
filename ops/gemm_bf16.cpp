// Kernels with bfloat16 operands and float sums, for every instruction set of the build.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/gemm_bf16.cpp"
#include "hwy/foreach_target.h"  // must come before highway.h
//
#include "hwy/highway.h"
#define WEFT_GEMM_LINKS_FLOAT_TILES
#include "ops/gemm_tile-inl.h"

#define WEFT_GEMM_TYPES(X) \
  X(uint16_t, uint16_t, float) X(uint16_t, uint16_t, uint16_t) X(float, uint16_t, float)
#include "ops/gemm_instances-inl.h"
