#pragma once
#include <cstdint>

#include "core/float_types.h"
#include "ops/kernel_device.h"

namespace weft {

/// out[j] (+)= sum over rows i of x[i * row_stride + j], j < columns: the bias gradient. On the CPU summed in blocks of
/// 64 rows in order, f32 for f32, f64 for f64, on the pool's threads; bits do not depend on their number. On CUDA up to
/// four rows are summed in the dtype and their totals in f64, in an order that is a function of the shape.
template <class T>
void column_sum(Cpu, const T* x, int64_t rows, int64_t columns, int64_t row_stride, T* out, bool accumulate);
/// The same for rows of bfloat16, with sums in f32.
void column_sum(Cpu, const BFloat16* x, int64_t rows, int64_t columns, int64_t row_stride, float* out, bool accumulate);
template <class T>
void column_sum(Cuda, const T* x, int64_t rows, int64_t columns, int64_t row_stride, T* out, bool accumulate);

}  // namespace weft
