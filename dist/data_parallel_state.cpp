#include "dist/data_parallel_state.h"

#include <algorithm>
#include <map>
#include <numeric>

#include "core/autograd.h"
#include "optim/exact_sum.h"

namespace weft::dist {
namespace {

constexpr const char* kWhere = "data parallel";

/// Tensors are cut where the blocks end over which optimizers add up squares.
constexpr int64_t kAlign = optim::kSquareBlock;
/// Gathered parameters begin at multiples of this many bytes, as all that an allocator gives does: no kernel is chosen
/// by where a parameter lies.
constexpr int64_t kParameterBytes = 256;

bool is_trained_leaf(const Tensor& tensor) {
  return tensor.defined() && tensor.is_leaf() && tensor.requires_grad() && tensor.is_contiguous();
}

}  // namespace

DataParallel::State::State(Group& group, Parameters parameters, const DataParallelOptions& options)
    : group(group),
      replicas(options.replicas),
      zero(options.zero),
      model(std::move(parameters)),
      bucket_of(model.size()) {
  const autograd::NoGrad no_grad;
  check_parameters();
  std::vector<GradientSums::Leaf> all;
  std::vector<int64_t> sizes;
  for (const Parameter& parameter : model) {
    all.push_back({parameter.name, parameter.tensor});
    sizes.push_back(parameter.tensor.numel());
  }
  for (GradientSums::Leaf& leaf : add_uses(options.second_uses)) all.push_back(std::move(leaf));
  for (const GradientSums::Leaf& leaf : all) leaves.push_back(leaf.tensor);
  const bool spread = zero == Zero::kParameters;
  if (!spread && !options.units.empty())
    fail(ErrorKind::kValue, kWhere, "units are for parameters that are spread over ranks (ZeRO-3)");
  // Otherwise everything is one unit, which is always there.
  std::vector<std::vector<size_t>> members;
  if (spread) {
    members = check_units(options.units);
  } else {
    members.emplace_back(model.size());
    std::iota(members.front().begin(), members.front().end(), size_t{0});
  }
  share_values();

  const auto lay_out = [&](std::vector<size_t> tensors, DType dtype) {
    return ShardBucket(std::move(tensors), sizes, group.size(), kAlign, spread ? kParameterBytes / size_of(dtype) : 1);
  };
  std::vector<GradientSums::Bucket> all_buckets;
  std::vector<ShardBucket> layouts;
  for (const std::vector<size_t>& tensors : transfers(members, options.bucket_bytes)) {
    for (const size_t p : tensors) bucket_of[p] = layouts.size();
    layouts.push_back(lay_out(tensors, model[tensors.front()].tensor.dtype()));
    const bool shared = use_of(tensors.front()) != nullptr;
    all_buckets.push_back({layouts.back(), shared, zero == Zero::kNone && !shared});
  }
  buckets = layouts.size();
  forward_order.resize(buckets);
  std::iota(forward_order.begin(), forward_order.end(), size_t{0});
  const auto first = [&](size_t bucket) { return std::ranges::min(layouts[bucket].tensors()); };
  std::ranges::sort(forward_order, std::ranges::less(), first);
  for (Use& use : uses) {
    if (use.pair != nullptr) continue;
    use.bucket = all_buckets.size();
    sizes.push_back(sizes[use.parameter]);
    all_buckets.push_back({lay_out({sizes.size() - 1}, model[use.parameter].tensor.dtype()), true});
  }
  for (size_t p = 0; p < model.size(); ++p) pieces.push_back({p, 0, zero == Zero::kNone ? sizes[p] : 0});
  if (zero != Zero::kNone) {
    for (const ShardBucket& layout : layouts) {
      for (const ShardPiece& piece : layout.pieces(group.rank())) pieces[piece.tensor] = piece;
    }
  }
  make_own();
  sums.emplace(group, replicas, zero == Zero::kGradients, std::move(all), std::move(all_buckets));
  if (!spread) return;
  std::vector<std::vector<size_t>> unit_buckets;
  for (const std::vector<size_t>& unit : members) {
    std::vector<size_t>& needed = unit_buckets.emplace_back();
    for (const size_t p : unit) {
      if (std::find(needed.begin(), needed.end(), bucket_of[p]) == needed.end()) needed.push_back(bucket_of[p]);
    }
  }
  units.emplace(group, model, own, std::move(layouts), std::move(unit_buckets));
}

void DataParallel::State::check_parameters() const {
  for (const Parameter& parameter : model) {
    const Tensor& t = parameter.tensor;
    if (!is_trained_leaf(t))
      fail(ErrorKind::kValue, kWhere, "parameter ", quoted(parameter.name),
           " must be a contiguous leaf that requires a gradient");
    if (zero == Zero::kParameters && (t.offset() != 0 || t.storage()->bytes() != t.numel() * size_of(t.dtype()))) {
      fail(ErrorKind::kValue, kWhere, "parameter ", quoted(parameter.name),
           " must have memory of its own, which can be given back; it is a view of more");
    }
  }
}

std::optional<size_t> DataParallel::State::find(const std::string& parameter) const {
  const auto found = std::find_if(model.begin(), model.end(), [&](const Parameter& p) { return p.name == parameter; });
  if (found == model.end()) return std::nullopt;
  return static_cast<size_t>(found - model.begin());
}

const DataParallel::State::Use* DataParallel::State::use_of(size_t parameter) const {
  const auto found = std::find_if(uses.begin(), uses.end(), [&](const Use& use) { return use.parameter == parameter; });
  return found == uses.end() ? nullptr : &*found;
}

/// Checks the second uses; the leaves that they add.
std::vector<GradientSums::Leaf> DataParallel::State::add_uses(const std::vector<SecondUse>& given) {
  std::vector<GradientSums::Leaf> more;
  for (const SecondUse& use : given) {
    const auto refuse = [&](const auto&... rule) {
      fail(ErrorKind::kValue, kWhere, "the second use of parameter ", quoted(use.parameter), rule...);
    };
    const std::optional<size_t> p = find(use.parameter);
    if (!p) {
      refuse(" is of none that this rank has");
      continue;
    }
    const Tensor& tensor = model[*p].tensor;
    if (use_of(*p) != nullptr) refuse(" is given twice");
    if (use.leaf.defined() == (use.pair != nullptr)) refuse(" must be either a leaf or a pair of ranks");
    if (use.pair != nullptr && use.pair->size() != 2) refuse(" is on a pair of ranks, got ", use.pair->size());
    if (use.leaf.defined()) {
      if (!is_trained_leaf(use.leaf) || use.leaf.is_same(tensor) || use.leaf.storage() != tensor.storage() ||
          !(use.leaf.shape() == tensor.shape()))
        refuse(" must be another leaf on its memory that requires a gradient, got ", use.leaf.describe());
      more.push_back({use.parameter + " (second use)", use.leaf});
    }
    uses.push_back({*p, use.pair});
  }
  return more;
}

/// The parameters of each unit.
std::vector<std::vector<size_t>> DataParallel::State::check_units(
    const std::vector<std::vector<std::string>>& names) const {
  std::vector<std::vector<size_t>> members;
  std::vector<size_t> times(model.size(), 0);
  for (const std::vector<std::string>& unit : names) {
    members.emplace_back();
    for (const std::string& name : unit) {
      const std::optional<size_t> p = find(name);
      if (!p) fail(ErrorKind::kValue, kWhere, "unit ", members.size() - 1, " has no parameter ", quoted(name));
      members.back().push_back(*p);
      ++times[*p];
    }
  }
  for (size_t p = 0; p < model.size(); ++p) {
    const Use* use = use_of(p);
    const size_t most = use != nullptr && use->pair == nullptr ? 2 : 1;
    if (times[p] >= 1 && times[p] <= most) continue;
    fail(ErrorKind::kValue, kWhere, "parameter ", quoted(model[p].name), " must be in one unit, or two if it has a ",
         "second leaf; it is in ", times[p]);
  }
  return members;
}

/// Parameters that travel together, of one unit each. One with two uses is alone, so that its cuts depend on its size
/// and the number of ranks only: ranks with other parameters cut it in the same way.
std::vector<std::vector<size_t>> DataParallel::State::transfers(const std::vector<std::vector<size_t>>& members,
                                                                int64_t bytes) const {
  std::vector<std::vector<size_t>> all;
  for (const Use& use : uses) all.push_back({use.parameter});
  for (const std::vector<size_t>& unit : members) {
    std::vector<size_t> numbers;
    std::vector<int64_t> lengths, widths;
    for (const size_t p : unit) {
      if (use_of(p) != nullptr) continue;
      numbers.push_back(p);
      lengths.push_back(model[p].tensor.numel());
      widths.push_back(size_of(model[p].tensor.dtype()));
    }
    for (std::vector<size_t>& bucket : transfer_buckets(lengths, widths, bytes)) {
      for (size_t& number : bucket) number = numbers[number];
      all.push_back(std::move(bucket));
    }
  }
  return all;
}

/// What the first rank has, all have, but for parameters without memory: those wait for their values.
void DataParallel::State::share_values() const {
  for (size_t p = 0; p < model.size(); ++p) {
    const Tensor& tensor = model[p].tensor;
    if (zero == Zero::kParameters && tensor.storage()->is_released()) continue;
    group.broadcast_(tensor.detach(), 0);
    if (replicas != nullptr) replicas->broadcast_(tensor.detach(), 0);
    if (const Use* use = use_of(p); use != nullptr && use->pair != nullptr) use->pair->broadcast_(tensor.detach(), 0);
  }
}

/// What this rank's optimizer updates: views of the parameters, or memory of its own where they are not kept whole.
void DataParallel::State::make_own() {
  own = model;
  if (zero == Zero::kNone) return;
  const MemoryScope scope(MemoryCategory::parameters);
  for (size_t p = 0; p < model.size(); ++p) {
    const Tensor& tensor = model[p].tensor;
    const auto range = [&] { return tensor.detach().reshape({-1}).narrow(0, pieces[p].begin, pieces[p].count()); };
    if (zero == Zero::kParameters) {
      own[p].tensor = Tensor::empty({pieces[p].count()}, tensor.dtype(), tensor.device());
      if (!tensor.storage()->is_released()) own[p].tensor.copy_(range());
    } else {
      own[p].tensor = range();
    }
    own[p].tensor.requires_grad_();
  }
}

Tensor DataParallel::State::finish(size_t bucket) {
  const Tensor sum = sums->finish(bucket);
  const size_t first = layout(bucket).tensors().front();
  const Use* use = use_of(first);
  if (use == nullptr) return sum;
  if (use->pair != nullptr) {
    use->pair->all_reduce_(sum);
  } else {
    const Tensor second = sums->finish(use->bucket);
    if (!DryRun::active()) backend(sum.device()).add(sum.view(), second.view());
  }
  const MemoryScope scope(MemoryCategory::gradients);
  return sum.to(model[first].tensor.dtype());
}

void DataParallel::State::gather(size_t bucket) const {
  const autograd::NoGrad no_grad;
  const MemoryScope scope(MemoryCategory::communication);
  const ShardBucket& at = layout(bucket);
  const Tensor& first = model[at.tensors().front()].tensor;
  const Tensor flat = Tensor::empty({at.elements()}, first.dtype(), first.device());
  struct Copy {
    StridedView to, from;
  };
  std::map<size_t, std::vector<Copy>> coming;  // [parameter]
  for (int rank = 0; rank < group.size(); ++rank) {
    at.for_each_piece(rank, [&](const ShardPiece& piece, int64_t begin) {
      const Tensor& parameter = model[piece.tensor].tensor;
      Tensor there = flat.narrow(0, at.cut(rank) + begin, piece.count());
      const Tensor here = parameter.detach().reshape({-1}).narrow(0, piece.begin, piece.count());
      if (rank == group.rank())
        there.copy_(here);
      else
        coming[piece.tensor].push_back({here.view(), there.view()});
    });
  }
  const Work work = group.all_gather_async_(flat, at.counts());
  for (auto& [parameter, copies] : coming) {
    Storage& storage = *model[parameter].tensor.storage();
    // Now, and not when the values are there: what a function saves of them in between is of this version.
    storage.bump("an update by other ranks");
    storage.defer([flat, work, copies = std::move(copies)] {
      work.wait();
      if (DryRun::active()) return;
      for (const Copy& copy : copies) backend(flat.device()).copy(copy.to, copy.from);
    });
  }
}

void DataParallel::State::require_units_ended(const char* before) const {
  if (const auto unit = units->first_held())
    fail(ErrorKind::kState, kWhere, "unit ", *unit, " must have ended before ", before);
}

}  // namespace weft::dist
