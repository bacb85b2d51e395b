#pragma once
#include <cstdint>

#include "core/random.h"
#include "ops/kernel_device.h"

namespace weft {

/// y[i] = x[i] / (1 - p), or 0 where stream.bits(first + i) < round(p 2^32). The factor is rounded to f32 (f64 for
/// f64). *step, if there is one, stands for the stream's step; it lies on the device.
template <class T>
void dropout_forward(Cpu, const T* x, T* y, int64_t count, double p, const RandomStream& stream, uint64_t first,
                     const double* step);
template <class T>
void dropout_forward(Cuda, const T* x, T* y, int64_t count, double p, const RandomStream& stream, uint64_t first,
                     const double* step);

}  // namespace weft
