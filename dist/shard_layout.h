#pragma once
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

// Which elements of which tensors a rank keeps where tensors are spread over a group: pure values, the same on every
// rank.

namespace weft::dist {

/// A range of elements of a flattened tensor.
struct ShardPiece {
  size_t tensor = 0;  ///< its number in the list that was laid out
  int64_t begin = 0, end = 0;
  int64_t count() const { return end - begin; }
  bool operator==(const ShardPiece&) const = default;
};

/// Tensors laid end to end and cut into one range for each rank. Ranges differ by less than what `align` elements or
/// one small tensor make; a rank may have nothing.
class ShardBucket {
 public:
  /// Lays out `tensors` (numbers in `sizes`, which are in elements). A tensor is cut only at multiples of `align` of
  /// its own elements, so that what is computed over aligned blocks does not depend on the number of ranks.
  /// Tensors begin at multiples of `spacing`; what lies between them is nobody's, but counts as elements of a rank.
  /// @throws Error kValue for a negative size, ranks, align or spacing below 1, or an align that is no multiple of the
  /// spacing; kIndex for a number outside `sizes`.
  ShardBucket(std::vector<size_t> tensors, std::span<const int64_t> sizes, int ranks, int64_t align,
              int64_t spacing = 1);

  const std::vector<size_t>& tensors() const { return tensors_; }
  int64_t elements() const { return starts_.back(); }
  int ranks() const { return static_cast<int>(cuts_.size()) - 1; }
  /// Where the i-th of tensors() begins in the bucket.
  int64_t start(size_t i) const { return starts_[i]; }
  /// First element of the bucket that rank r has; cut(ranks()) is the end.
  int64_t cut(int rank) const { return cuts_[static_cast<size_t>(rank)]; }
  int64_t count(int rank) const { return cut(rank + 1) - cut(rank); }
  /// Elements of every rank.
  std::vector<int64_t> counts() const;
  /// What rank r has, in order: at most one range of each tensor.
  std::vector<ShardPiece> pieces(int rank) const;
  /// Calls each(piece, at) for them; `at` is where a piece begins in what rank r has.
  void for_each_piece(int rank, const std::function<void(const ShardPiece& piece, int64_t at)>& each) const;

 private:
  std::vector<size_t> tensors_;
  std::vector<int64_t> sizes_;
  std::vector<int64_t> starts_, cuts_;
};

/// Groups tensors for transfers that overlap with the backward pass: from the last to the first, as gradients become
/// ready, into buckets of `bytes` (the last may be smaller, and a larger tensor has one of its own). A bucket has one
/// element size.
/// @param sizes, widths  elements of each tensor and bytes of one
std::vector<std::vector<size_t>> transfer_buckets(std::span<const int64_t> sizes, std::span<const int64_t> widths,
                                                  int64_t bytes);

}  // namespace weft::dist
