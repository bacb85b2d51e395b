#pragma once
#include <cstdint>
#include <vector>

#include "core/tensor.h"

namespace weft::dist {

/// Micro-batches [begin, end) of a step.
struct MicroBatchRange {
  int64_t begin = 0, end = 0;
  bool operator==(const MicroBatchRange&) const = default;
};

/// The order in which micro-batches are added up, whoever computed them: the binary tree over their numbers in the
/// step, whose nodes are [i 2^k, (i + 1) 2^k), cut off at the number of micro-batches n:
///
///   n = 6:  ((0 + 1) + (2 + 3)) + (4 + 5)
///
/// A rank that has some of them adds what makes whole nodes; the rest is added where those nodes meet. So one process,
/// any number of ranks and any pipeline give the same bits. Adding the ranks' sums in a binary tree over the ranks is
/// the same thing where each rank has 2^k micro-batches, all the same number.
class CanonicalSum {
 public:
  struct Part {
    MicroBatchRange range;
    Tensor tensor;  ///< undefined: only the ranges are of interest
  };

  /// @throws Error kValue for total < 1.
  explicit CanonicalSum(int64_t total);

  /// Adds the sum over a node of the tree (one micro-batch, say). Nodes come in increasing order. The tensor is taken
  /// over: it may be changed in place.
  /// @throws Error kValue for a range outside the step, one that does not come after the last, or one that is no node.
  void add(MicroBatchRange range, Tensor tensor);

  /// The largest nodes that could be made of what was added.
  const std::vector<Part>& parts() const { return parts_; }
  /// The sum over all of the step, once everything was added; forgets it. @throws Error kState if something is missing.
  Tensor take();

  /// The nodes that micro-batches [begin, end) of `total` add up to.
  static std::vector<MicroBatchRange> nodes(MicroBatchRange range, int64_t total);

 private:
  int64_t total_;
  std::vector<Part> parts_;
};

}  // namespace weft::dist
