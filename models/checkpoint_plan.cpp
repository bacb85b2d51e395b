#include "models/checkpoint_plan.h"

#include <algorithm>
#include <map>

#include "models/checkpoint_manifest.h"
#include "models/checkpoint_pieces.h"

namespace weft::checkpoint {
namespace {

/// What orders the pieces of a tensor: along the cut dimension, then along the elements.
using PieceKey = std::vector<int64_t>;
PieceKey key_of(const TensorPart& part) {
  PieceKey key = {part.dim};
  for (const IndexRange& range : part.ranges) key.insert(key.end(), {range.begin, range.end});
  key.insert(key.end(), {part.begin, part.end});
  return key;
}

struct Piece {
  TensorPart part;
  std::vector<size_t> holders;  ///< increasing
  size_t writer = 0;
};

struct Whole {
  DType dtype = DType::f32;
  Shape shape;
  size_t first_rank = 0;  ///< that said so
  std::map<PieceKey, Piece> pieces;
};

using Wholes = std::map<std::string, Whole>;

void add(Wholes& wholes, const HeldPiece& piece, size_t rank) {
  const TensorPart part = normalized(piece.part);
  const auto [found, is_new] = wholes.try_emplace(piece.name, Whole{piece.dtype, part.whole, rank, {}});
  Whole& whole = found->second;
  if (whole.dtype != piece.dtype || !(whole.shape == part.whole)) {
    fail(ErrorKind::kValue, "save_checkpoint", "tensor ", quoted(piece.name), " is ", whole.dtype, ' ', whole.shape,
         " on rank ", whole.first_rank, " and ", piece.dtype, ' ', part.whole, " on rank ", rank);
  }
  if (part.count() == 0 && numel(part.whole) > 0) return;
  const TensorPart stored = part.count() == 0 ? TensorPart::all(part.whole) : part;
  Piece& same = whole.pieces.try_emplace(key_of(stored), Piece{stored, {}, 0}).first->second;
  same.holders.push_back(rank);
}

}  // namespace

const char* to_string(Kind kind) { return kind == Kind::model ? "model" : "optimizer"; }

SavePlan plan_save(const std::vector<std::vector<HeldPiece>>& held) {
  std::array<Wholes, 2> wholes;
  for (size_t rank = 0; rank < held.size(); ++rank) {
    for (const HeldPiece& piece : held[rank]) add(wholes[static_cast<size_t>(piece.kind)], piece, rank);
  }
  std::vector<int64_t> load(held.size(), 0);
  std::vector<std::pair<int64_t, Piece*>> shared;
  for (Wholes& kind : wholes) {
    for (auto& [name, whole] : kind) {
      for (auto& [key, piece] : whole.pieces) {
        const int64_t bytes = piece.part.count() * size_of(whole.dtype);
        piece.writer = piece.holders.front();
        if (piece.holders.size() > 1) {
          shared.emplace_back(bytes, &piece);
        } else {
          load[piece.writer] += bytes;
        }
      }
    }
  }
  // Stable: the order of names decides among equals, on all ranks alike.
  std::stable_sort(shared.begin(), shared.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
  for (const auto& [bytes, piece] : shared) {
    piece->writer = *std::min_element(piece->holders.begin(), piece->holders.end(),
                                      [&](size_t a, size_t b) { return load[a] < load[b]; });
    load[piece->writer] += bytes;
  }

  SavePlan plan;
  plan.files.resize(held.size());
  for (const Kind kind : kKinds) {
    const auto k = static_cast<size_t>(kind);
    std::vector<bool> writes(held.size(), false);
    for (const auto& [name, whole] : wholes[k]) {
      for (const auto& [key, piece] : whole.pieces) writes[piece.writer] = true;
    }
    const auto of = static_cast<int>(std::count(writes.begin(), writes.end(), true));
    int number = 0;
    for (size_t rank = 0; rank < held.size(); ++rank) {
      if (writes[rank]) plan.files[rank][k] = file_name(to_string(kind), ++number, of);
    }
    for (const auto& [name, whole] : wholes[k]) {
      CheckpointTensor tensor{.name = name, .dtype = whole.dtype, .shape = whole.shape, .pieces = {}};
      for (const auto& [key, piece] : whole.pieces) tensor.pieces.push_back({plan.files[piece.writer][k], piece.part});
      if (const std::string problem = cover_problem(tensor); !problem.empty())
        fail(ErrorKind::kValue, "save_checkpoint", "what the ranks hold does not make whole tensors: ", problem);
      plan.tensors[k].push_back(std::move(tensor));
    }
    std::sort(plan.tensors[k].begin(), plan.tensors[k].end(), [](const CheckpointTensor& a, const CheckpointTensor& b) {
      return before(a.dtype, a.name, b.dtype, b.name);
    });
  }
  return plan;
}

}  // namespace weft::checkpoint
