#include "models/split.h"

#include "core/autograd.h"
#include "dist/collective_ops.h"

namespace weft::models {

bool Split::active() const { return ranks() > 1; }

int Split::ranks() const { return group_ == nullptr ? 1 : group_->size(); }

IndexRange Split::share(int64_t total) const {
  if (!active()) return {0, total};
  const dist::Counts counts = dist::even_counts(total, ranks());
  IndexRange range;
  for (int r = 0; r < group_->rank(); ++r) range.begin += counts[static_cast<size_t>(r)];
  range.end = range.begin + counts[static_cast<size_t>(group_->rank())];
  return range;
}

Tensor Split::enter(const Tensor& x, int64_t rows) const {
  if (!active()) return x;
  if (!sequence_) return dist::replicate(x, *group_);
  const dist::Counts counts = dist::even_counts(rows, ranks());
  const Tensor all = dist::gather_rows(x, *group_, counts);
  const auto again = [group = group_, counts](const std::vector<Tensor>& own) {
    return group->all_gather(own[0].contiguous(), counts);
  };
  autograd::remade("gather_rows", all, again, {x});
  return all;
}

Tensor Split::leave(const Tensor& partial) const {
  if (!active()) return partial;
  return sequence_ ? dist::sum_partial_rows(partial, *group_) : dist::sum_partial(partial, *group_);
}

Tensor Split::shared(const Tensor& parameter) const {
  return sequence() ? dist::replicate(parameter, *group_) : parameter;
}

}  // namespace weft::models
