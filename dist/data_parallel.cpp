#include "dist/data_parallel.h"

#include "core/autograd.h"
#include "dist/data_parallel_state.h"
#include "dist/mesh_norms.h"

namespace weft::dist {
namespace {

constexpr const char* kWhere = "data parallel";

}  // namespace

std::vector<int64_t> micro_batch_shares(int64_t total, int ranks) {
  if (ranks < 1 || total < ranks)
    fail(ErrorKind::kValue, kWhere, total, " micro-batches cannot be shared out among ", ranks,
         " ranks: each needs at least one");
  std::vector<int64_t> shares(static_cast<size_t>(ranks), total / ranks);
  for (int64_t rank = 0; rank < total % ranks; ++rank) ++shares[static_cast<size_t>(rank)];
  return shares;
}

DataParallel::DataParallel(Group& group, Parameters parameters, const DataParallelOptions& options)
    : state_(std::make_shared<State>(group, std::move(parameters), options)) {
  for (size_t leaf = 0; leaf < state_->leaves.size(); ++leaf) {
    state_->leaves[leaf].register_grad_ready_hook([state = std::weak_ptr<State>(state_), leaf](const Tensor&) {
      // Backward passes outside of a step are left alone.
      if (const auto alive = state.lock(); alive != nullptr && alive->sums->in_step()) alive->sums->take(leaf);
    });
  }
}

DataParallel::~DataParallel() = default;

Zero DataParallel::zero() const { return state_->zero; }
const Parameters& DataParallel::parameters() const { return state_->own; }
const std::vector<ShardPiece>& DataParallel::pieces() const { return state_->pieces; }

std::vector<TensorPart> DataParallel::parts() const {
  std::vector<TensorPart> parts;
  for (size_t p = 0; p < state_->model.size(); ++p) {
    const Parameter& whole = state_->model[p];
    const TensorPart slices = whole.part ? *whole.part : TensorPart::all(whole.tensor.shape());
    parts.push_back(slices.elements(state_->pieces[p].begin, state_->pieces[p].end));
  }
  return parts;
}

std::shared_ptr<optim::NormReducer> DataParallel::norms() const {
  if (state_->zero == Zero::kNone) return std::make_shared<optim::LocalNorms>();
  return std::make_shared<MeshNorms>(MeshNorms::Groups{.shards = &state_->group});
}

void DataParallel::begin_step(std::span<const int64_t> micro_batches) {
  State& s = *state_;
  if (s.units) {
    s.require_units_ended("a step begins");
    for (const Parameter& own : s.own) {
      if (own.tensor.numel() > 0 && own.tensor.storage()->version() == 0)
        fail(ErrorKind::kState, kWhere, "parameter ", quoted(own.name),
             " has no values yet. Hint: draw or load parameters() first");
    }
  }
  s.sums->begin(micro_batches);
}

void DataParallel::begin_unit(size_t unit, Pass pass) {
  State& s = *state_;
  if (!s.units) return;
  s.units->begin(unit, pass);
  s.started_before = s.sums->started();
}

void DataParallel::end_unit(size_t unit, Pass pass) {
  State& s = *state_;
  if (!s.units) return;
  // The last unit's backward passes follow its forward passes.
  const bool stays = pass == Pass::kForward && unit + 1 == s.units->size() && s.sums->in_step();
  s.units->end(unit, stays);
  // What this unit has sent goes on beside the next one; what was sent before it has had its time.
  if (pass == Pass::kBackward) s.sums->settle(s.started_before);
}

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
  if (s.units) s.require_units_ended("gradients are reduced");
  const autograd::NoGrad no_grad;
  const bool whole = s.zero == Zero::kNone;
  std::vector<Tensor> flat;
  std::vector<Work> gathers;
  for (size_t b = 0; b < s.buckets; ++b) {
    Tensor sum = s.finish(b);
    if (whole && !s.sums->came_whole(b)) {
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
    layout.for_each_piece(s.group.rank(), [&](const ShardPiece& piece, int64_t at) {
      s.own[piece.tensor].tensor.set_grad(flat[b].narrow(0, at, piece.count()));
    });
  }
  s.sums->end();
}

void DataParallel::gather() {
  State& s = *state_;
  if (s.units) {
    // Nobody has them whole; but what was computed from them before is of other values from now on.
    for (const Parameter& parameter : s.model) parameter.tensor.storage()->bump("an update of its shards");
    return;
  }
  if (s.zero == Zero::kNone || s.group.size() == 1) return;
  for (const size_t bucket : s.forward_order) s.gather(bucket);
}

}  // namespace weft::dist
