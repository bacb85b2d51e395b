#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "core/device.h"
#include "core/dtype.h"
#include "ops/attention_kernels.h"

// Which kernels compute attention on a GPU: our own, or those of cuDNN, whose graph API has attention forward and
// backward. Both keep the same logarithm of each softmax's sum, so that either can do the backward pass of the other.

namespace weft {

enum class AttentionChoice : uint8_t {
  automatic,  ///< cuDNN where it is there and has a plan for the shape, from kAttentionAutomaticFrom tokens on
  flash,      ///< our own
  cudnn,      ///< cuDNN, or an error that says why it cannot be had
};

/// Below so many tokens `automatic` takes our own kernels: making cuDNN's plan for a length takes longer than the work.
inline constexpr int64_t kAttentionAutomaticFrom = 128;

/// From now on, sequences that attend to themselves as a whole (as many queries as keys, no query_offset) are computed
/// so on the device; without this call by our own kernels. All other attention, new tokens over a cache say, always is.
/// @throws Error kDevice without a CUDA device; for `cudnn`, naming why, where this build or machine has no cuDNN.
void use_attention(Device device, AttentionChoice choice);

/// What has computed such attention in this program: passes that were queued, a recorded one counted once.
struct AttentionUse {
  int64_t cudnn = 0, own = 0;
  std::vector<std::string> why_own;  ///< where cuDNN might have been taken: each reason once
};
AttentionUse attention_use(Device device);

/// What will compute causal_attention() of this shape on the device, forward and backward, in words: "cuDNN 9.19.0", or
/// "our own kernels: " and why. Makes the plans, which the first call would make otherwise.
std::string describe_attention(Device device, const AttentionShape& shape, DType dtype);

}  // namespace weft
