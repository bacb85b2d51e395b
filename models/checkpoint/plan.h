#pragma once
#include <array>
#include <string>
#include <vector>

#include "models/checkpoint/tensors.h"

/// Who writes what of a checkpoint that several ranks save. Private to models/checkpoint*.cpp.
namespace weft::checkpoint {

enum class Kind : uint8_t { model, optimizer };
inline constexpr std::array<Kind, 2> kKinds = {Kind::model, Kind::optimizer};
/// "model", "optimizer".
const char* to_string(Kind kind);

/// A tensor, or part of one, that a rank holds.
struct HeldPiece {
  Kind kind = Kind::model;
  std::string name;
  DType dtype = DType::f32;
  TensorPart part;
};

struct SavePlan {
  /// [kind]: the whole tensors, with the file of each piece.
  std::array<std::vector<CheckpointTensor>, 2> tensors;
  /// [rank][kind]: the file that the rank writes, or "".
  std::vector<std::array<std::string, 2>> files;
};

/// Each element is written by one of the ranks that hold it: first what only one rank holds, by that one; then the
/// other slices, largest first, from their first element on by the rank that has least to write so far, to the end of
/// what it holds. A pure function, so that ranks that know what all of them hold agree without another word.
/// @param held  [rank]: no name of a kind twice
/// @throws Error kValue naming tensor and ranks, if ranks differ about a dtype or a whole shape, or if the pieces do
/// not make each element of a tensor once.
SavePlan plan_save(const std::vector<std::vector<HeldPiece>>& held);

}  // namespace weft::checkpoint
