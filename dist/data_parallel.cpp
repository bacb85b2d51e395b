#include "dist/data_parallel.h"

#include <algorithm>
#include <optional>

#include "core/autograd.h"
#include "dist/gradient_sums.h"
#include "dist/mesh_norms.h"

namespace weft::dist {
namespace {

constexpr const char* kWhere = "data parallel";

/// Tensors are cut where the blocks end over which optimizers add up squares.
constexpr int64_t kAlign = optim::kSquareBlock;

bool is_trained_leaf(const Tensor& tensor) {
  return tensor.defined() && tensor.is_leaf() && tensor.requires_grad() && tensor.is_contiguous();
}

}  // namespace

std::vector<int64_t> micro_batch_shares(int64_t total, int ranks) {
  if (ranks < 1 || total < ranks)
    fail(ErrorKind::kValue, kWhere, total, " micro-batches cannot be shared out among ", ranks,
         " ranks: each needs at least one");
  std::vector<int64_t> shares(static_cast<size_t>(ranks), total / ranks);
  for (int64_t rank = 0; rank < total % ranks; ++rank) ++shares[static_cast<size_t>(rank)];
  return shares;
}

struct DataParallel::State {
  struct Use {
    size_t parameter;
    Group* pair = nullptr;
    size_t bucket = 0;  ///< of the second leaf's gradients, if there is no pair
  };

  State(Group& group, Parameters all, const DataParallelOptions& options)
      : group(group), zero(options.zero), model(std::move(all)) {}

  Group& group;
  Zero zero;
  Parameters model, own;
  std::vector<ShardPiece> pieces;
  std::vector<Use> uses;
  std::vector<size_t> bucket_of;  ///< [parameter]
  size_t buckets = 0;             ///< of parameters; those of second leaves follow
  std::optional<GradientSums> sums;

  const ShardBucket& layout(size_t bucket) const { return sums->layout(bucket); }

  /// Checks the second uses; the leaves that they add.
  std::vector<GradientSums::Leaf> add_uses(const std::vector<SecondUse>& given) {
    std::vector<GradientSums::Leaf> leaves;
    for (const SecondUse& use : given) {
      const auto found = std::find_if(model.begin(), model.end(),
                                      [&](const Parameter& parameter) { return parameter.name == use.parameter; });
      const auto refuse = [&](const auto&... rule) {
        fail(ErrorKind::kValue, kWhere, "the second use of parameter ", quoted(use.parameter), rule...);
      };
      if (found == model.end()) refuse(" is of none that this rank has");
      const auto p = static_cast<size_t>(found - model.begin());
      if (std::any_of(uses.begin(), uses.end(), [&](const Use& other) { return other.parameter == p; }))
        refuse(" is given twice");
      if (use.leaf.defined() == (use.pair != nullptr)) refuse(" must be either a leaf or a pair of ranks");
      if (use.pair != nullptr && use.pair->size() != 2) refuse(" is on a pair of ranks, got ", use.pair->size());
      if (use.leaf.defined()) {
        if (!is_trained_leaf(use.leaf) || use.leaf.is_same(found->tensor) ||
            use.leaf.storage() != found->tensor.storage() || !(use.leaf.shape() == found->tensor.shape()))
          refuse(" must be another leaf on its memory that requires a gradient, got ", use.leaf.describe());
        leaves.push_back({use.parameter + " (second use)", use.leaf});
      }
      uses.push_back({p, use.pair});
    }
    return leaves;
  }

  /// Parameters that travel together. One with two uses is alone, so that its cuts depend on its size and the number of
  /// ranks only: ranks with other parameters cut it in the same way.
  std::vector<std::vector<size_t>> transfers(const std::vector<int64_t>& sizes, int64_t bytes) const {
    std::vector<size_t> numbers;
    std::vector<int64_t> lengths, widths;
    std::vector<std::vector<size_t>> buckets;
    for (size_t p = 0; p < model.size(); ++p) {
      if (std::any_of(uses.begin(), uses.end(), [&](const Use& use) { return use.parameter == p; })) {
        buckets.push_back({p});
        continue;
      }
      numbers.push_back(p);
      lengths.push_back(sizes[p]);
      widths.push_back(size_of(model[p].tensor.dtype()));
    }
    for (std::vector<size_t>& bucket : transfer_buckets(lengths, widths, bytes)) {
      for (size_t& number : bucket) number = numbers[number];
      buckets.push_back(std::move(bucket));
    }
    return buckets;
  }

  /// This rank's range of a bucket's gradients of the whole step.
  Tensor finish(size_t bucket) {
    const Tensor sum = sums->finish(bucket);
    const size_t first = layout(bucket).tensors().front();
    const auto use =
        std::find_if(uses.begin(), uses.end(), [&](const Use& candidate) { return candidate.parameter == first; });
    if (use == uses.end()) return sum;
    if (use->pair != nullptr) {
      use->pair->all_reduce_(sum);
    } else {
      const Tensor second = sums->finish(use->bucket);
      if (!DryRun::active()) backend(sum.device()).add(sum.view(), second.view());
    }
    const MemoryScope scope(MemoryCategory::gradients);
    return sum.to(model[first].tensor.dtype());
  }
};

DataParallel::DataParallel(Group& group, Parameters parameters, const DataParallelOptions& options)
    : state_(std::make_shared<State>(group, std::move(parameters), options)) {
  State& s = *state_;
  const autograd::NoGrad no_grad;
  std::vector<int64_t> sizes;
  std::vector<GradientSums::Leaf> leaves;
  for (const Parameter& parameter : s.model) {
    if (!is_trained_leaf(parameter.tensor))
      fail(ErrorKind::kValue, kWhere, "parameter ", quoted(parameter.name),
           " must be a contiguous leaf that requires a gradient");
    sizes.push_back(parameter.tensor.numel());
    leaves.push_back({parameter.name, parameter.tensor});
  }
  const std::vector<GradientSums::Leaf> second = s.add_uses(options.second_uses);
  for (const Parameter& parameter : s.model) group.broadcast_(parameter.tensor.detach(), 0);
  for (const State::Use& use : s.uses) {
    if (use.pair != nullptr) use.pair->broadcast_(s.model[use.parameter].tensor.detach(), 0);
  }
  s.bucket_of.resize(sizes.size());
  s.pieces.resize(sizes.size());
  for (size_t p = 0; p < sizes.size(); ++p) s.pieces[p] = {p, 0, 0};
  std::vector<GradientSums::Bucket> buckets;
  for (std::vector<size_t>& tensors : s.transfers(sizes, options.bucket_bytes)) {
    const bool shared = std::any_of(s.uses.begin(), s.uses.end(),
                                    [&](const State::Use& use) { return use.parameter == tensors.front(); });
    ShardBucket layout(std::move(tensors), sizes, group.size(), kAlign);
    for (const size_t p : layout.tensors()) s.bucket_of[p] = buckets.size();
    for (const ShardPiece& piece : layout.pieces(group.rank())) s.pieces[piece.tensor] = piece;
    buckets.push_back({std::move(layout), shared});
  }
  s.buckets = buckets.size();
  for (State::Use& use : s.uses) {
    if (use.pair != nullptr) continue;
    use.bucket = buckets.size();
    sizes.push_back(sizes[use.parameter]);
    buckets.push_back({ShardBucket({sizes.size() - 1}, sizes, group.size(), kAlign), true});
  }
  leaves.insert(leaves.end(), second.begin(), second.end());
  for (size_t leaf = 0; leaf < leaves.size(); ++leaf) {
    leaves[leaf].tensor.register_grad_ready_hook([state = std::weak_ptr<State>(state_), leaf](const Tensor&) {
      // Backward passes outside of a step are left alone.
      if (const auto alive = state.lock(); alive != nullptr && alive->sums->in_step()) alive->sums->take(leaf);
    });
  }
  s.sums.emplace(group, s.zero == Zero::kGradients, std::move(leaves), std::move(buckets));
  for (size_t p = 0; p < s.model.size(); ++p) {
    Parameter own = s.model[p];
    if (s.zero != Zero::kNone) {
      own.tensor = own.tensor.detach().reshape({-1}).narrow(0, s.pieces[p].begin, s.pieces[p].count());
      own.tensor.requires_grad_();
    } else {
      s.pieces[p] = {p, 0, sizes[p]};
    }
    s.own.push_back(std::move(own));
  }
}

DataParallel::~DataParallel() = default;

Zero DataParallel::zero() const { return state_->zero; }
const Parameters& DataParallel::parameters() const { return state_->own; }
const std::vector<ShardPiece>& DataParallel::pieces() const { return state_->pieces; }

std::shared_ptr<optim::NormReducer> DataParallel::norms() const {
  if (state_->zero == Zero::kNone) return std::make_shared<optim::LocalNorms>();
  return std::make_shared<MeshNorms>(MeshNorms::Groups{.shards = &state_->group});
}

void DataParallel::begin_step(std::span<const int64_t> micro_batches) { state_->sums->begin(micro_batches); }

int64_t DataParallel::micro_batch(int64_t i) const {
  const GradientSums& sums = *state_->sums;
  if (!sums.in_step()) fail(ErrorKind::kState, kWhere, "no step has begun");
  if (i < 0 || i >= sums.count())
    fail(ErrorKind::kIndex, kWhere, "this rank has ", sums.count(), " micro-batches in the step, and ", i,
         " is not one of them");
  return sums.number(state_->group.rank(), i);
}

void DataParallel::reduce() {
  State& s = *state_;
  if (!s.sums->in_step()) fail(ErrorKind::kState, kWhere, "no step has begun");
  s.sums->check_complete();
  const autograd::NoGrad no_grad;
  const bool whole = s.zero == Zero::kNone;
  std::vector<Tensor> flat;
  std::vector<Work> gathers;
  for (size_t b = 0; b < s.buckets; ++b) {
    Tensor sum = s.finish(b);
    if (whole && s.group.size() > 1) {
      const MemoryScope scope(MemoryCategory::gradients);
      const Tensor all = Tensor::empty({s.layout(b).elements()}, sum.dtype(), sum.device());
      gathers.push_back(s.group.all_gather_async(sum, all, s.layout(b).counts()));
      sum = all;
    }
    flat.push_back(sum);
  }
  for (const Work& work : gathers) work.wait();
  for (size_t b = 0; b < s.buckets; ++b) {
    const ShardBucket& layout = s.layout(b);
    if (whole) {
      for (size_t i = 0; i < layout.tensors().size(); ++i) {
        const Tensor& t = s.model[layout.tensors()[i]].tensor;
        t.set_grad(flat[b].narrow(0, layout.start(i), t.numel()).reshape(t.shape()));
      }
      continue;
    }
    int64_t at = 0;
    for (const ShardPiece& piece : layout.pieces(s.group.rank())) {
      s.own[piece.tensor].tensor.set_grad(flat[b].narrow(0, at, piece.count()));
      at += piece.count();
    }
  }
  s.sums->end();
}

void DataParallel::gather() {
  State& s = *state_;
  if (s.zero == Zero::kNone || s.group.size() == 1) return;
  const autograd::NoGrad no_grad;
  const MemoryScope scope(MemoryCategory::communication);
  const auto range = [&](const ShardPiece& piece) {
    return s.model[piece.tensor].tensor.detach().reshape({-1}).narrow(0, piece.begin, piece.count());
  };
  std::vector<Tensor> flat;
  std::vector<Work> works;
  for (size_t b = 0; b < s.buckets; ++b) {
    const ShardBucket& layout = s.layout(b);
    const Tensor& first = s.model[layout.tensors().front()].tensor;
    flat.push_back(Tensor::empty({layout.elements()}, first.dtype(), first.device()));
    int64_t at = layout.cut(s.group.rank());
    for (const ShardPiece& piece : layout.pieces(s.group.rank())) {
      flat.back().narrow(0, at, piece.count()).copy_(range(piece));
      at += piece.count();
    }
    works.push_back(s.group.all_gather_async_(flat.back(), layout.counts()));
  }
  for (size_t b = 0; b < s.buckets; ++b) {
    works[b].wait();
    const ShardBucket& layout = s.layout(b);
    for (int rank = 0; rank < s.group.size(); ++rank) {
      if (rank == s.group.rank()) continue;
      int64_t at = layout.cut(rank);
      for (const ShardPiece& piece : layout.pieces(rank)) {
        range(piece).copy_(flat[b].narrow(0, at, piece.count()));
        at += piece.count();
      }
    }
  }
}

}  // namespace weft::dist
