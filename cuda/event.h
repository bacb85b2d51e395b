#pragma once
#include <cuda_runtime.h>

#include "cuda/error.h"

namespace weft::cuda {

/// A point in a stream, with its time.
class Event {
 public:
  Event() { WEFT_CUDA(cudaEventCreate(&event_)); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  ~Event() { cudaEventDestroy(event_); }

  cudaEvent_t get() const { return event_; }
  /// From this event to a later one, both of which the device has passed; resolution about half a microsecond.
  double seconds_until(const Event& later) const {
    float milliseconds = 0;
    WEFT_CUDA(cudaEventElapsedTime(&milliseconds, event_, later.event_));
    return 1e-3 * static_cast<double>(milliseconds);
  }

 private:
  cudaEvent_t event_ = nullptr;
};

}  // namespace weft::cuda
