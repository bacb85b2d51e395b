#pragma once
#include "core/memory.h"
#include "core/tensor.h"

namespace weft {

/// Which device a kernel is for: kernels are overloads on this tag, so that a missing one does not link.
struct Cpu {};

/// Calls kernel(Cpu{}) for tensors on the CPU; nothing in a dry run. The one way in which ops start kernels.
template <class Kernel>
void launch(Device device, const char* op, Kernel&& kernel) {
  if (DryRun::active()) return;
  if (device.kind != DeviceKind::cpu) fail(ErrorKind::kDevice, op, "has no kernel for ", device);
  kernel(Cpu{});
}

/// @throws Error kDType, kDevice: every defined tensor must be on one device and have the dtype of the first.
void check_same(const char* op, std::initializer_list<const Tensor*> tensors);

}  // namespace weft
