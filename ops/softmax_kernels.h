#pragma once
#include "core/backend.h"
#include "ops/kernel_device.h"

// Kernels of softmax and log_softmax along dimension `dim`; all views have one shape and dtype. Numerics:
// ops/softmax.h.

namespace weft {

void softmax(Cpu, const StridedView& y, const StridedView& x, int dim);
void softmax(Cuda, const StridedView& y, const StridedView& x, int dim);
void log_softmax(Cpu, const StridedView& y, const StridedView& x, int dim);
void log_softmax(Cuda, const StridedView& y, const StridedView& x, int dim);
/// dx = y (dy - sum_j dy_j y_j)
void softmax_backward(Cpu, const StridedView& dx, const StridedView& dy, const StridedView& y, int dim);
void softmax_backward(Cuda, const StridedView& dx, const StridedView& dy, const StridedView& y, int dim);
/// dx = dy - e^y sum_j dy_j
void log_softmax_backward(Cpu, const StridedView& dx, const StridedView& dy, const StridedView& y, int dim);
void log_softmax_backward(Cuda, const StridedView& dx, const StridedView& dy, const StridedView& y, int dim);

}  // namespace weft
