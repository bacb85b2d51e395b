#include "models/checkpoint/plan.h"

#include <algorithm>
#include <map>

#include "models/checkpoint/manifest.h"
#include "models/checkpoint/pieces.h"

namespace weft::checkpoint {
namespace {

/// Elements [begin, end) of a slice that a rank holds, or is to write.
struct Stretch {
  int64_t begin, end;
  size_t rank;
};

/// Slices of a tensor, with the ranks that have elements of them.
struct Slice {
  TensorPart all;  ///< of its elements
  std::vector<Stretch> held, written;
};

struct Whole {
  DType dtype = DType::f32;
  Shape shape;
  size_t first_rank = 0;  ///< that said so
  std::map<std::vector<int64_t>, Slice> slices;
};

using Wholes = std::map<std::string, Whole>;

void add(Wholes& wholes, const HeldPiece& piece, size_t rank) {
  const TensorPart part = normalized(piece.part);
  Whole& whole = wholes.try_emplace(piece.name, Whole{piece.dtype, part.whole, rank, {}}).first->second;
  if (whole.dtype != piece.dtype || !(whole.shape == part.whole)) {
    fail(ErrorKind::kValue, "save_checkpoint", "tensor ", quoted(piece.name), " is ", whole.dtype, ' ', whole.shape,
         " on rank ", whole.first_rank, " and ", piece.dtype, ' ', part.whole, " on rank ", rank);
  }
  const bool empty = numel(part.whole) == 0;
  if (part.count() == 0 && !empty) return;
  TensorPart all = empty ? TensorPart::all(part.whole) : part;
  all.begin = 0, all.end = numel(all.sliced());
  std::vector<int64_t> key = {all.dim};
  for (const IndexRange& range : all.ranges) key.insert(key.end(), {range.begin, range.end});
  Slice& slice = whole.slices.try_emplace(key, Slice{all, {}, {}}).first->second;
  slice.held.push_back({empty ? 0 : part.begin, empty ? 0 : part.end, rank});
}

/// Whether no element is held by two ranks.
bool is_exclusive(std::vector<Stretch> held) {
  std::sort(held.begin(), held.end(), [](const Stretch& a, const Stretch& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < held.size(); ++i) {
    if (held[i].begin < held[i - 1].end || held[i].end == held[i].begin) return false;
  }
  return true;
}

/// Each element once. Whoever has begun writes to the end of what it holds, so that a rank has at most one stretch.
void share_out(Slice& slice, int64_t size, std::vector<int64_t>& load) {
  int64_t at = 0;
  do {
    const Stretch* next = nullptr;
    int64_t later = slice.all.end;  // where somebody begins
    for (const Stretch& each : slice.held) {
      if (each.begin > at) later = std::min(later, each.begin);
      if (each.begin > at || (each.end <= at && slice.all.end > 0)) continue;
      if (next == nullptr || load[each.rank] < load[next->rank]) next = &each;
    }
    if (next == nullptr) {
      at = later;  // a hole, which is found later
      continue;
    }
    slice.written.push_back({at, next->end, next->rank});
    load[next->rank] += (next->end - at) * size;
    at = next->end;
  } while (at < slice.all.end);
}

}  // namespace

const char* to_string(Kind kind) { return kind == Kind::model ? "model" : "optimizer"; }

SavePlan plan_save(const std::vector<std::vector<HeldPiece>>& held) {
  std::array<Wholes, 2> wholes;
  for (size_t rank = 0; rank < held.size(); ++rank) {
    for (const HeldPiece& piece : held[rank]) add(wholes[static_cast<size_t>(piece.kind)], piece, rank);
  }
  std::vector<int64_t> load(held.size(), 0);
  struct Job {
    Slice* slice;
    int64_t size, bytes;
  };
  std::vector<Job> shared;
  for (Wholes& kind : wholes) {
    for (auto& [name, whole] : kind) {
      for (auto& [key, slice] : whole.slices) {
        const Job job{&slice, size_of(whole.dtype), slice.all.end * size_of(whole.dtype)};
        if (is_exclusive(slice.held)) {
          share_out(slice, job.size, load);
        } else {
          shared.push_back(job);
        }
      }
    }
  }
  // Stable: the order of names decides among equals, on all ranks alike.
  std::stable_sort(shared.begin(), shared.end(), [](const Job& a, const Job& b) { return a.bytes > b.bytes; });
  for (const Job& job : shared) share_out(*job.slice, job.size, load);

  SavePlan plan;
  plan.files.resize(held.size());
  for (const Kind kind : kKinds) {
    const auto k = static_cast<size_t>(kind);
    std::vector<bool> writes(held.size(), false);
    for (const auto& [name, whole] : wholes[k]) {
      for (const auto& [key, slice] : whole.slices) {
        for (const Stretch& each : slice.written) writes[each.rank] = true;
      }
    }
    const auto of = static_cast<int>(std::count(writes.begin(), writes.end(), true));
    int number = 0;
    for (size_t rank = 0; rank < held.size(); ++rank) {
      if (writes[rank]) plan.files[rank][k] = file_name(to_string(kind), ++number, of);
    }
    for (const auto& [name, whole] : wholes[k]) {
      CheckpointTensor tensor{.name = name, .dtype = whole.dtype, .shape = whole.shape, .pieces = {}};
      for (const auto& [key, slice] : whole.slices) {
        for (const Stretch& each : slice.written)
          tensor.pieces.push_back({plan.files[each.rank][k], slice.all.elements(each.begin, each.end)});
      }
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
