#pragma once
#include "core/backend.h"
#include "ops/kernel_device.h"

// Kernels of the backend; their meaning is core/backend.h's.

namespace weft::cuda {

void copy(Cuda, const StridedView& dst, const StridedView& src);
void fill(Cuda, const StridedView& dst, double value);
void add(Cuda, const StridedView& dst, const StridedView& src);

}  // namespace weft::cuda
