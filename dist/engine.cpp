#include "dist/engine.h"

namespace weft::dist {

Pieces Pieces::even(int64_t numel, int n) {
  Pieces pieces;
  for (int r = 0; r <= n; ++r) {
    // numel * r / n without overflow.
    pieces.begin.push_back(numel / n * r + std::min<int64_t>(r, numel % n));
  }
  return pieces;
}

Pieces Pieces::rows(const std::vector<int64_t>& counts, int64_t row) {
  Pieces pieces;
  pieces.begin.push_back(0);
  for (const int64_t count : counts) pieces.begin.push_back(pieces.begin.back() + count * row);
  return pieces;
}

int64_t row_elements(const Shape& shape) {
  int64_t elements = 1;
  for (int d = 1; d < shape.rank(); ++d) elements *= shape[d];
  return elements;
}

int64_t bytes_sent(const Operation& op) {
  if (op.stamp.op == Collective::barrier) return 0;
  const int64_t each = size_of(op.stamp.dtype), others = op.size() - 1, numel = op.input.numel();
  const auto outside = [&](const Pieces& pieces) { return (numel - pieces.size(op.rank)) * each; };
  switch (op.stamp.op) {
    case Collective::all_reduce: {
      const Pieces pieces = Pieces::even(numel, op.size());
      return outside(pieces) + others * pieces.size(op.rank) * each;
    }
    case Collective::reduce_scatter:
    case Collective::all_to_all:
      return outside(Pieces::rows(op.stamp.send_counts, row_elements(op.stamp.shape)));
    case Collective::all_gather:
      return others * op.stamp.send_counts[static_cast<size_t>(op.rank)] * row_elements(op.stamp.shape) * each;
    case Collective::broadcast: {
      const bool root = op.rank == op.stamp.root;
      if (numel * each <= kDirectBroadcastBytes) return root ? others * numel * each : 0;
      const Pieces pieces = Pieces::even(numel, op.size());
      // The root has every piece and passes its own on to all; the others have theirs from the root, who needs none
      // back.
      return root ? outside(pieces) + others * pieces.size(op.rank) * each : (others - 1) * pieces.size(op.rank) * each;
    }
    case Collective::send:
      return numel * each;
    default:
      return 0;
  }
}

void Engine::claim_name(const std::string& name) {
  const std::lock_guard lock(names_mutex_);
  if (!names_.insert(name).second) {
    fail(ErrorKind::kState, "group", "a group named ", quoted(name), " is alive on rank ", rank_,
         ". Hint: give each its own name, or keep the first");
  }
}

void Engine::release_name(const std::string& name) {
  const std::lock_guard lock(names_mutex_);
  names_.erase(name);
}

}  // namespace weft::dist
