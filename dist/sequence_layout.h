#pragma once
#include <array>

#include "core/tensor.h"
#include "core/tensor_part.h"

namespace weft::dist {

/// Which tokens of a sequence each rank of a group has, for causal attention: the sequence is cut into 2 n chunks, and
/// rank r of n has chunks r and 2 n - 1 - r, one from the front and one from the back (Llama Team 2024, section 3.3.2).
/// Queries at the front see few keys and those at the back many, so that every rank has the same work. A pure value,
/// the same on every rank; with one rank it is the whole sequence.
///
/// Chunks differ by one token at most, the first ones are the longer; with fewer tokens than chunks some are empty.
class SequenceLayout {
 public:
  /// @throws Error kValue for tokens < 0 or ranks < 1.
  SequenceLayout(int64_t tokens, int ranks);

  int64_t tokens() const { return tokens_; }
  int ranks() const { return ranks_; }
  /// Global positions of a rank's tokens, in the order in which it holds them. @throws Error kIndex for no such rank.
  std::array<IndexRange, 2> ranges(int rank) const;
  /// Number of a rank's tokens.
  int64_t count(int rank) const;
  /// How many of the tokens that `owner` holds the queries of ranges(rank)[range] attend to: always its first ones. Of
  /// its own, that is the number for the range's last query.
  int64_t keys_seen(int rank, int range, int owner) const;
  /// Pairs of query and key that a rank computes: its share of tokens (tokens + 1) / 2.
  int64_t pairs(int rank) const;
  /// A rank's slice of x, which has the whole sequence along `dim`: ids, targets, positions. Differentiable.
  /// @throws Error kShape if x has another number of tokens there.
  Tensor take(const Tensor& x, int64_t dim, int rank) const;

  bool operator==(const SequenceLayout&) const = default;

 private:
  int64_t chunk_begin(int64_t chunk) const;

  int64_t tokens_;
  int ranks_;
};

}  // namespace weft::dist
