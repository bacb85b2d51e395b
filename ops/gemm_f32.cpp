// Kernels of float, for every instruction set of the build.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/gemm_f32.cpp"
#include "hwy/foreach_target.h"  // must come before highway.h
//
#include "hwy/highway.h"
#include "ops/gemm_tile-inl.h"

#define WEFT_GEMM_TYPES(X) X(float, float, float)
#include "ops/gemm_instances-inl.h"
