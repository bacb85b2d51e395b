#pragma once
#include <functional>

#include "cuda_runtime_api.h"

namespace weft_emulation {

/// What every call of the runtime returns through: an error becomes the calling thread's last one.
cudaError_t result(cudaError_t error);

/// Does `work` now, after what other threads have on this stream, or records it if the stream is being captured.
cudaError_t submit(cudaStream_t stream, std::function<void()> work);

/// An error, and captures spoilt, if the calling thread may not make a call now that waits or allocates.
cudaError_t refuse_while_capturing();

}  // namespace weft_emulation
