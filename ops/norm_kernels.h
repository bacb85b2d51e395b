#pragma once
#include <cstdint>

#include "core/dtype.h"
#include "ops/kernel_device.h"

namespace weft {

/// Arguments of the normalisation kernels; matrices are row-major [rows, columns] without gaps.
template <class T>
struct NormForward {
  const T* x;
  const T* residual;  ///< null: none; else the row that is normalised is x + residual, rounded to T
  const T* weight;
  const T* bias;  ///< layer norm only; null: none
  T* sum;         ///< takes x + residual
  T* y;
  Accumulate<T>* mean;  ///< [rows]; null: RMS norm
  Accumulate<T>* rstd;  ///< [rows]: 1 / sqrt(variance + eps), or 1 / sqrt(mean square + eps)
  int64_t rows, columns;
  double eps;
};

template <class T>
struct NormBackward {
  const T* dy;
  const T* x;  ///< what was normalised
  const T* weight;
  const Accumulate<T>* mean;  ///< null: RMS norm
  const Accumulate<T>* rstd;
  const T* added;           ///< null, or a gradient to add to dx
  T* dx;                    ///< null: not wanted
  Accumulate<T>* partials;  ///< [norm_blocks(device, rows), 2, columns]: sums over a block's rows for weight and bias
  int64_t rows, columns;
};

/// Rows are summed for the weight's and the bias's gradient in this many blocks: a function of the device's kind and
/// `rows` alone.
int64_t norm_blocks(Cpu, int64_t rows);
int64_t norm_blocks(Cuda, int64_t rows);

template <class T>
void norm_forward(Cpu, const NormForward<T>& arguments);
template <class T>
void norm_forward(Cuda, const NormForward<T>& arguments);
template <class T>
void norm_backward(Cpu, const NormBackward<T>& arguments);
template <class T>
void norm_backward(Cuda, const NormBackward<T>& arguments);

}  // namespace weft
