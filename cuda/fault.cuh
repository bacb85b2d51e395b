#pragma once
#include <cuda_runtime.h>

#include "cuda/fault.h"

namespace weft::cuda {

/// Writes down what is wrong, if nothing is yet.
__device__ inline void report(Fault* fault, Fault::Kind kind, const char* op, const char* what, int64_t position,
                              int64_t value, int64_t limit) {
  if (atomicCAS(&fault->kind, static_cast<unsigned>(Fault::kNone), static_cast<unsigned>(kind)) != Fault::kNone) return;
  fault->op = op;
  fault->what = what;
  fault->position = position;
  fault->value = value;
  fault->limit = limit;
  __threadfence_system();
}

/// Whether an id may be used.
__device__ inline bool is_inside(int64_t id, int64_t limit) { return id >= 0 && id < limit; }

}  // namespace weft::cuda
