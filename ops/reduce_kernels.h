#pragma once
#include "core/backend.h"
#include "ops/kernel_device.h"

// Kernels of the reductions. Accumulation and order: ops/reduce.h.

namespace weft {

/// y = sum of x over the dimensions in which y has stride 0, divided by `divisor`; y has x's shape and dtype.
void sum_over(Cpu, const StridedView& y, const StridedView& x, double divisor);
void sum_over(Cuda, const StridedView& y, const StridedView& x, double divisor);

/// index[r] = which element of row r of x [rows, n] is the first largest (or smallest) one, the first NaN before all.
void extreme_index(Cpu, const StridedView& x, bool largest, int64_t* index);
void extreme_index(Cuda, const StridedView& x, bool largest, int64_t* index);

/// y[r] = x[r, index[r]]; y [rows] is contiguous.
void pick(Cpu, const StridedView& y, const StridedView& x, const int64_t* index);
void pick(Cuda, const StridedView& y, const StridedView& x, const int64_t* index);

/// mask[r, i] = (i == index[r]), contiguous [rows, n].
void mark(Cpu, const int64_t* index, bool* mask, int64_t rows, int64_t n);
void mark(Cuda, const int64_t* index, bool* mask, int64_t rows, int64_t n);

}  // namespace weft
