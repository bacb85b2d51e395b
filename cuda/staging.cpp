#include "cuda/staging.h"

#include <cstring>

#include "cuda/error.h"

namespace weft::cuda {

Staging::~Staging() {
  for (const Slot& slot : slots_) {
    if (slot.copied != nullptr) cudaEventDestroy(slot.copied);
    if (slot.data != nullptr) cudaFreeHost(slot.data);
  }
}

void Staging::copy(void* dst, const void* src, size_t bytes, cudaStream_t stream) {
  Slot& slot = slots_[next_++ % slots_.size()];
  if (slot.data == nullptr) WEFT_CUDA(cudaHostAlloc(&slot.data, kSlotBytes, cudaHostAllocDefault));
  if (slot.copied == nullptr) {
    WEFT_CUDA(cudaEventCreateWithFlags(&slot.copied, cudaEventDisableTiming));
  } else {
    WEFT_CUDA(cudaEventSynchronize(slot.copied));
  }
  std::memcpy(slot.data, src, bytes);
  WEFT_CUDA(cudaMemcpyAsync(dst, slot.data, bytes, cudaMemcpyHostToDevice, stream));
  WEFT_CUDA(cudaEventRecord(slot.copied, stream));
}

}  // namespace weft::cuda
