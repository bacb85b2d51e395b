#pragma once
#include <functional>
#include <memory>

#include "core/backend.h"
#include "cuda/context.h"

namespace weft::cuda {

/// Backend::capture() of the device of `context`.
std::unique_ptr<Graph> capture(Context& context, const std::function<void()>& queue);

/// While it lives, the calling thread may make calls that a capture of its own forbids: for memory from the system,
/// which does not touch what is queued.
class AllowWhileCapturing {
 public:
  AllowWhileCapturing();
  ~AllowWhileCapturing();
  AllowWhileCapturing(const AllowWhileCapturing&) = delete;
  AllowWhileCapturing& operator=(const AllowWhileCapturing&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace weft::cuda
