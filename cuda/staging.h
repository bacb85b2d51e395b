#pragma once
#include <cuda_runtime.h>

#include <array>
#include <cstddef>

namespace weft::cuda {

/// Pinned host memory through which small copies go to a device without anybody waiting: the bytes are taken at once,
/// and the copy is queued. Slots are used in turn; one is waited for only if its last copy is still under way. Not
/// thread-safe.
class Staging {
 public:
  static constexpr size_t kSlotBytes = size_t{1} << 20;

  Staging() = default;
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;
  ~Staging();

  /// Queues the copy of at most kSlotBytes bytes on `stream`; `src` may be used again on return.
  void copy(void* dst, const void* src, size_t bytes, cudaStream_t stream);

 private:
  struct Slot {
    void* data = nullptr;
    cudaEvent_t copied = nullptr;
  };
  std::array<Slot, 8> slots_;
  size_t next_ = 0;
};

}  // namespace weft::cuda
