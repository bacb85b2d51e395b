#pragma once
#include <string>
#include <string_view>

#include "models/checkpoint/tensors.h"

/// Rules about pieces of tensors that writing and reading of checkpoints share. Private to models/checkpoint*.cpp.
namespace weft::checkpoint {

/// The same elements in the one way in which checkpoints say it: no empty ranges, none that touch, and dimension 0
/// where nothing is cut.
TensorPart normalized(TensorPart part);

/// What keeps the pieces of a tensor from making up each of its elements once, or "". They do if all are cut along one
/// dimension, their ranges are equal or apart and together make the dimension, and the elements of the pieces of the
/// same ranges follow each other from the first to the last. A tensor of 0 elements is one piece.
std::string cover_problem(const CheckpointTensor& tensor);

/// The order of tensors in files and manifests: by size of element, largest first, then by name.
bool before(DType a, std::string_view a_name, DType b, std::string_view b_name);

}  // namespace weft::checkpoint
