#include "dist/shard_layout.h"

#include <algorithm>

#include "core/error.h"

namespace weft::dist {

ShardBucket::ShardBucket(std::vector<size_t> tensors, std::span<const int64_t> sizes, int ranks, int64_t align,
                         int64_t spacing)
    : tensors_(std::move(tensors)), starts_{0}, cuts_{0} {
  constexpr const char* kWhere = "shard layout";
  if (ranks < 1) fail(ErrorKind::kValue, kWhere, "ranks must be at least 1, got ", ranks);
  if (align < 1) fail(ErrorKind::kValue, kWhere, "align must be at least 1, got ", align);
  if (spacing < 1 || align % spacing != 0)
    fail(ErrorKind::kValue, kWhere, "align must be a multiple of a spacing of at least 1, got ", align, " and ",
         spacing);
  for (const size_t tensor : tensors_) {
    if (tensor >= sizes.size())
      fail(ErrorKind::kIndex, kWhere, "there are ", sizes.size(), " tensors, and ", tensor, " is not one of them");
    if (sizes[tensor] < 0) fail(ErrorKind::kValue, kWhere, "tensor ", tensor, " has a negative size: ", sizes[tensor]);
    sizes_.push_back(sizes[tensor]);
    starts_.push_back(starts_.back() + (sizes[tensor] + spacing - 1) / spacing * spacing);
  }
  for (int rank = 1; rank < ranks; ++rank) {
    // The allowed place nearest to an even share, which is in the tensor that has it.
    const int64_t share = elements() / ranks * rank + elements() % ranks * rank / ranks;
    const auto behind = std::upper_bound(starts_.begin(), starts_.end(), share);
    int64_t cut = elements();
    if (behind != starts_.end()) {
      const int64_t begin = *(behind - 1), below = begin + (share - begin) / align * align;
      const int64_t above = std::min(*behind, below + align);
      cut = share - below <= above - share ? below : above;
    }
    cuts_.push_back(std::max(cut, cuts_.back()));
  }
  cuts_.push_back(elements());
}

std::vector<int64_t> ShardBucket::counts() const {
  std::vector<int64_t> counts;
  for (int rank = 0; rank < ranks(); ++rank) counts.push_back(count(rank));
  return counts;
}

std::vector<ShardPiece> ShardBucket::pieces(int rank) const {
  std::vector<ShardPiece> pieces;
  for_each_piece(rank, [&](const ShardPiece& piece, int64_t) { pieces.push_back(piece); });
  return pieces;
}

void ShardBucket::for_each_piece(int rank, const std::function<void(const ShardPiece&, int64_t)>& each) const {
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const int64_t begin = std::max(cut(rank), starts_[i]), end = std::min(cut(rank + 1), starts_[i] + sizes_[i]);
    if (begin < end) each({tensors_[i], begin - starts_[i], end - starts_[i]}, begin - cut(rank));
  }
}

std::vector<std::vector<size_t>> transfer_buckets(std::span<const int64_t> sizes, std::span<const int64_t> widths,
                                                  int64_t bytes) {
  if (sizes.size() != widths.size())
    fail(ErrorKind::kValue, "shard layout", "there are ", sizes.size(), " sizes and ", widths.size(), " widths");
  if (bytes < 1) fail(ErrorKind::kValue, "shard layout", "a bucket must have at least 1 byte, got ", bytes);
  std::vector<std::vector<size_t>> buckets;
  int64_t filled = 0;
  for (size_t i = sizes.size(); i-- > 0;) {
    const int64_t more = sizes[i] * widths[i];
    if (buckets.empty() || widths[buckets.back().back()] != widths[i] || filled + more > bytes) {
      buckets.emplace_back();
      filled = 0;
    }
    buckets.back().push_back(i);
    filled += more;
  }
  return buckets;
}

}  // namespace weft::dist
