#pragma once
#include <vector>

#include "core/tensor_part.h"

namespace weft::dist {
class Group;
}

namespace weft::models {

/// How layers are cut over a group of processes. Tensor parallelism (Shoeybi et al. 2019): each has some heads, hidden
/// channels and words, and a sum over the group makes their results whole. Sequence parallelism (Korthikanti et al.
/// 2022): between such layers each has some rows of the activations instead of a copy of all. Without a group, or with
/// one of one rank, nothing is cut and all functions are the identity. The group must outlive the model and its graphs.
///
/// docs/parallelism/tensor.md has the picture and the bytes.
class Split {
 public:
  Split() = default;
  Split(dist::Group* group, bool sequence) : group_(group), sequence_(sequence) {}

  /// Whether anything is cut.
  bool active() const;
  /// Whether rows of activations are.
  bool sequence() const { return sequence_ && active(); }
  int ranks() const;
  dist::Group& group() const { return *group_; }

  /// This rank's indices of `total`: as many for each rank as can be, the first ones have one more.
  IndexRange share(int64_t total) const;

  /// In front of layers that compute a part of their outputs from the whole x. Forward: nothing, or with sequence() the
  /// ranks' rows [share of rows, C] joined to [rows, C], which are not kept for the backward pass but gathered again.
  /// Backward: the sum over the ranks, or this rank's rows of it.
  /// @param rows  of all ranks together; sequence() only
  Tensor enter(const Tensor& x, int64_t rows) const;

  /// Behind layers that compute a part of a sum for all outputs. Forward: the sum over the ranks, or of [rows, C] this
  /// rank's rows of it. Backward: nothing, or the ranks' rows joined.
  Tensor leave(const Tensor& partial) const;

  /// A parameter that every rank has and, with sequence(), uses for its own rows: the backward pass sums its gradient
  /// over the ranks, so that all of them have all of it.
  Tensor shared(const Tensor& parameter) const;

 private:
  dist::Group* group_ = nullptr;
  bool sequence_ = false;
};

}  // namespace weft::models
