#pragma once
#include "dist/group.h"
#include "optim/norm.h"

namespace weft::dist {

/// Norms of tensors whose ranges the ranks of a group hold: their squares are added up over the group. The sums are the
/// same on all ranks and have the bits that one rank has, if ranges are cut where the blocks of exact sums end
/// (optim::kSquareBlock). The group must outlive this.
class ShardedNorms final : public optim::NormReducer {
 public:
  explicit ShardedNorms(Group& group) : group_(group) {}
  void reduce(std::span<double> squares, const Parameters& parameters) override;
  bool exact() const override { return true; }
  void reduce(std::span<optim::ExactSum> squares, const Parameters& parameters) override;

 private:
  Group& group_;
};

}  // namespace weft::dist
