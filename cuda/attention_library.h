#pragma once
#include "ops/attention_kernels.h"

namespace weft::cuda {

// Where attention on a device is chosen between our own kernels and cuDNN's (ops/attention_library.h). True: cuDNN's
// pass was queued; false: the caller's own kernels are to. @throws Error kDevice where cuDNN was asked for and does not
// compute this.
template <class T>
bool library_attention(Cuda device, const AttentionForward<T>& arguments);
template <class T>
bool library_attention(Cuda device, const AttentionBackward<T>& arguments);

}  // namespace weft::cuda
