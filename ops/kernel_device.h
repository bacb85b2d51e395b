#pragma once

namespace weft {

// Which device a kernel is for: kernels are overloads on these tags, so that a missing one does not link.

struct Cpu {};

/// Kernels are queued on `stream`, a cudaStream_t of the current device, and may run after their function has returned.
/// They allocate nothing and wait for nothing.
struct Cuda {
  void* stream = nullptr;
  const char* op = "";  ///< the op that queues them: for what they find wrong with its input
};

}  // namespace weft
