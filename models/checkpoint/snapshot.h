#pragma once
#include <vector>

#include "core/tensor.h"

/// What a save in the background writes. Private to models/checkpoint*.cpp.
namespace weft::checkpoint {

/// Copies in the host's memory, contiguous, which share none with the tensors. Those that lie contiguous there are
/// copied together by all threads, past the caches, whose content is the next training step's.
std::vector<Tensor> snapshot(const std::vector<Tensor>& tensors);

}  // namespace weft::checkpoint
