#include "dist/sequence_layout.h"

#include <algorithm>

namespace weft::dist {

SequenceLayout::SequenceLayout(int64_t tokens, int ranks) : tokens_(tokens), ranks_(ranks) {
  if (tokens < 0 || ranks < 1) {
    fail(ErrorKind::kValue, "sequence_layout", "needs tokens >= 0 and ranks >= 1, got ", tokens, " and ", ranks);
  }
}

int64_t SequenceLayout::chunk_begin(int64_t chunk) const {
  const int64_t chunks = 2 * static_cast<int64_t>(ranks_);
  return chunk * (tokens_ / chunks) + std::min(chunk, tokens_ % chunks);
}

std::array<IndexRange, 2> SequenceLayout::ranges(int rank) const {
  if (rank < 0 || rank >= ranks_) fail(ErrorKind::kIndex, "sequence_layout", "no rank ", rank, " of ", ranks_);
  const int64_t front = rank, back = 2 * static_cast<int64_t>(ranks_) - 1 - rank;
  return {IndexRange{chunk_begin(front), chunk_begin(front + 1)}, IndexRange{chunk_begin(back), chunk_begin(back + 1)}};
}

int64_t SequenceLayout::count(int rank) const {
  const auto [front, back] = ranges(rank);
  return front.count() + back.count();
}

int64_t SequenceLayout::keys_seen(int rank, int range, int owner) const {
  const IndexRange queries = ranges(rank)[static_cast<size_t>(range)];
  int64_t seen = 0;
  for (const IndexRange& keys : ranges(owner)) seen += keys.begin < queries.end ? keys.count() : 0;
  return seen;
}

int64_t SequenceLayout::pairs(int rank) const {
  int64_t pairs = 0;
  for (const IndexRange& range : ranges(rank)) pairs += range.count() * (range.begin + range.end + 1) / 2;
  return pairs;
}

Tensor SequenceLayout::take(const Tensor& x, int64_t dim, int rank) const {
  const auto [front, back] = ranges(rank);
  if (x.size(dim) != tokens_) {
    fail(ErrorKind::kShape, "sequence_layout", "needs all ", tokens_, " tokens along dimension ", dim, ", got ",
         x.describe());
  }
  if (front.end == back.begin) return x.narrow(dim, front.begin, front.count() + back.count());
  return cat({x.narrow(dim, front.begin, front.count()), x.narrow(dim, back.begin, back.count())}, dim);
}

}  // namespace weft::dist
