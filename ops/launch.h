#pragma once
#include "core/backend.h"
#include "core/memory.h"
#include "core/tensor.h"
#include "ops/kernel_device.h"

namespace weft {

/// Calls kernel(Cpu{}) or kernel(Cuda{...}) for tensors on `device`; nothing in a dry run. The one way in which ops
/// start kernels.
template <class Kernel>
void launch(Device device, const char* op, Kernel&& kernel) {
  if (DryRun::active()) return;
  if (device.kind == DeviceKind::cuda) {
    const Range range(op);
    return kernel(Cuda{backend(device).use(), op});
  }
  kernel(Cpu{});
}

/// f(Cpu{}) or f(Cuda{}), in a dry run too: for what a kernel of `device` wants to be given.
template <class F>
auto ask(Device device, F&& f) {
  return device.kind == DeviceKind::cuda ? f(Cuda{}) : f(Cpu{});
}

/// @throws Error kDType, kDevice: every defined tensor must be on one device and have the dtype of the first.
void check_same(const char* op, std::initializer_list<const Tensor*> tensors);

}  // namespace weft
