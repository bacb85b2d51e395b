#pragma once
#include <functional>

#include "cuda_runtime_api.h"

namespace weft_emulation {

/// What every call of the runtime returns through: an error becomes the calling thread's last one.
cudaError_t result(cudaError_t error);

enum class Kind { kKernel, kCopy };
/// Does `work` now, after all that is left on this stream and what other threads have on it; or leaves it (see Late),
/// or records it if the stream is being captured.
cudaError_t submit(cudaStream_t stream, std::function<void()> work, Kind kind = Kind::kKernel);

/// Does all that is left on a stream.
void finish_stream(cudaStream_t stream);
/// Does all that is left on any stream.
void finish_all();

/// An error, and captures spoilt, if the calling thread may not make a call now that waits or allocates.
cudaError_t refuse_while_capturing();

}  // namespace weft_emulation
