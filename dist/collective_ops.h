#pragma once
#include "dist/group.h"

// Collectives that are functions on tensors: each has the other's direction as its derivative. Between them, layers
// whose weights are split over a group are ordinary layers (Shoeybi et al. 2019; Korthikanti et al. 2022). In a group
// of one rank they are the identity. The group must outlive the graph.

namespace weft::dist {

/// y = x, which is equal on all ranks and goes into a different computation on each.  dx = sum over ranks of dy.
Tensor replicate(const Tensor& x, Group& group);

/// y = sum over ranks of x, equal on all ranks and used by the same computation on each.  dx = dy.
Tensor sum_partial(const Tensor& x, Group& group);

/// y = the ranks' x [counts[r], ...] joined along dimension 0, which goes into a different computation on each.
/// dx = this rank's rows of the sum over ranks of dy.
Tensor gather_rows(const Tensor& x, Group& group, const Counts& counts = {});

/// y = this rank's counts[r] rows of the sum over ranks of x [sum of counts, ...].  dx = the ranks' dy joined.
Tensor sum_partial_rows(const Tensor& x, Group& group, const Counts& counts = {});

/// y = this rank's counts[r] rows of x, which is equal on all ranks.  dx = the ranks' dy joined.
Tensor take_rows(const Tensor& x, Group& group, const Counts& counts = {});

/// The number of things, of `total`, that each of `ranks` has: as equal as can be, the first ones have one more.
Counts even_counts(int64_t total, int ranks);

}  // namespace weft::dist
