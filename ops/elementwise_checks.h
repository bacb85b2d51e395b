#pragma once
#include "ops/elementwise_kernels.h"

// Checks and views that the elementwise ops have in common. Internal.

namespace weft::detail {

/// @throws Error kDType unless x is f32, f64, f16 or bf16.
inline void check_float(const char* op, const Tensor& x) {
  dispatch_float(x.dtype(), op, []<class T>() {});
}

/// @throws Error kDevice.
inline void check_device(const char* op, const Tensor& a, const Tensor& b) {
  if (a.device() == b.device()) return;
  fail(ErrorKind::kDevice, op, "tensors must be on one device, got ", a.describe(), " on ", a.device(), " and ",
       b.describe(), " on ", b.device());
}

/// x read as `shape`.
inline StridedView broadcast(const char* op, const Tensor& x, const Shape& shape) {
  return {x.raw(), shape, broadcast_strides(x.shape(), x.strides(), shape, op), x.dtype()};
}

}  // namespace weft::detail
