#include "dist/group.h"

#include <algorithm>
#include <exception>
#include <map>
#include <mutex>

#include "core/autograd.h"
#include "dist/engine.h"
#include "dist/mesh.h"
#include "dist/operation_queue.h"

namespace weft::dist {
namespace {

uint64_t hash_of(const std::vector<int>& ranks) {
  uint64_t hash = 14695981039346656037u;  // FNV-1a
  for (const int rank : ranks) hash = (hash ^ static_cast<uint64_t>(rank)) * 1099511628211u;
  return hash;
}

bool reduces(Collective op) { return op == Collective::all_reduce || op == Collective::reduce_scatter; }

bool can_reduce(DType dtype) {
  return is_float(dtype) ? size_of(dtype) > 1 : dtype == DType::i32 || dtype == DType::i64 || dtype == DType::u8;
}

/// Counts as given, or equal ones of `rows` rows in all.
Counts counts_or_even(Collective op, const Counts& counts, int64_t rows, int n, const char* what) {
  if (counts.empty()) {
    if (rows % n != 0) {
      fail(ErrorKind::kShape, name(op), "dimension 0 of the ", what, ", ", rows, ", does not divide by the ", n,
           " ranks. Hint: give the rows for each rank");
    }
    return Counts(static_cast<size_t>(n), rows / n);
  }
  if (counts.size() != static_cast<size_t>(n)) {
    fail(ErrorKind::kValue, name(op), counts.size(), " counts for ", n, " ranks");
  }
  int64_t sum = 0;
  for (const int64_t count : counts) {
    if (count < 0) fail(ErrorKind::kValue, name(op), "a count is ", count, "; counts must not be negative");
    sum += count;
  }
  if (rows >= 0 && sum != rows) {
    fail(ErrorKind::kShape, name(op), "the counts add up to ", sum, " rows, but the ", what, " has ", rows);
  }
  return counts;
}

void check_has_rows(Collective op, const Tensor& t) {
  if (t.defined() && t.rank() == 0) {
    fail(ErrorKind::kShape, name(op), "takes tensors of rows, got ", t.describe(), ". Hint: reshape({1})");
  }
}

void check_shape(Collective op, const Tensor& output, const Shape& wanted) {
  if (!(output.shape() == wanted)) {
    fail(ErrorKind::kShape, name(op), "the output must be ", wanted, ", got ", output.describe());
  }
}

Shape with_rows(Shape shape, int64_t rows) {
  shape[0] = rows;
  return shape;
}

int64_t sum(const Counts& counts) {
  int64_t total = 0;
  for (const int64_t count : counts) total += count;
  return total;
}

Stamp reducing(Reduction reduction) {
  Stamp stamp;
  stamp.reduction = reduction;
  return stamp;
}

Stamp rooted(int root) {
  Stamp stamp;
  stamp.root = root;
  return stamp;
}

bool overlap(const Tensor& a, const Tensor& b) {
  if (a.storage() != b.storage() || a.numel() == 0 || b.numel() == 0) return false;
  return a.offset() * size_of(a.dtype()) < (b.offset() + b.numel()) * size_of(b.dtype()) &&
         b.offset() * size_of(b.dtype()) < (a.offset() + a.numel()) * size_of(a.dtype());
}

void check_tensor(Collective op, const Tensor& t, Device device, const char* implementation) {
  if (!t.defined()) fail(ErrorKind::kValue, name(op), "got an undefined tensor");
  if (t.device() != device) {
    fail(ErrorKind::kDevice, name(op), t.describe(), " is on ", t.device(), "; this group of kind ", implementation,
         " takes tensors on ", device);
  }
  if (!t.is_contiguous()) {
    fail(ErrorKind::kShape, name(op), t.describe(), " is not contiguous (strides ", t.strides(),
         "). Hint: .contiguous()");
  }
  // Elements that are on their way come first, before anything of this operation is queued on a device.
  (void)t.raw();
}

}  // namespace

struct Group::Impl {
  std::shared_ptr<Engine> engine;
  std::string name;
  std::shared_ptr<const std::vector<int>> members;
  uint64_t members_hash = 0;
  int rank = -1;
  std::mutex issue_mutex;  ///< operations are issued and queued in one order
  std::map<std::string, OperationQueue> queues;
  /// Shared with operations, which may end after the group.
  struct Totals {
    std::mutex mutex;
    std::array<Traffic, kCollectives> of = {};
  };
  std::shared_ptr<Totals> totals = std::make_shared<Totals>();
};

Group::Group(std::shared_ptr<Engine> engine, std::string name, std::vector<int> ranks)
    : impl_(std::make_unique<Impl>()) {
  const auto mine = std::find(ranks.begin(), ranks.end(), engine->rank());
  if (mine == ranks.end()) {
    fail(ErrorKind::kValue, "group", "rank ", engine->rank(), " is not a member of ", quoted(name),
         ". Hint: only members make a group");
  }
  impl_->rank = static_cast<int>(mine - ranks.begin());
  impl_->members_hash = hash_of(ranks);
  impl_->members = std::make_shared<const std::vector<int>>(std::move(ranks));
  engine->claim_name(name);
  impl_->name = std::move(name);
  impl_->engine = std::move(engine);
}

Group::Group(Group&&) noexcept = default;
Group& Group::operator=(Group&& other) noexcept {
  std::swap(impl_, other.impl_);  // what this was ends with `other`
  return *this;
}

Group::~Group() {
  if (!impl_) return;
  Engine& engine = *impl_->engine;
  for (auto& [lane, queue] : impl_->queues) {
    while (const std::shared_ptr<Work::State> last = queue.last()) {
      if (std::uncaught_exceptions() > 0) {
        engine.board().fail_all(ErrorKind::kState, engine.rank(),
                                concat("rank ", engine.rank(), " of ", engine.board().size(),
                                       " left by an exception, with ", last->op.stamp.describe(), " under way"));
      }
      try {
        Work(last).wait();
      } catch (const std::exception&) {  // whoever holds the Work, or calls again, gets it
      }
      if (queue.last() == last) std::this_thread::yield();
    }
  }
  impl_->queues.clear();
  engine.release_name(impl_->name);
}

int Group::rank() const { return impl_->rank; }
int Group::size() const { return static_cast<int>(impl_->members->size()); }
const std::string& Group::name() const { return impl_->name; }
const std::vector<int>& Group::world_ranks() const { return *impl_->members; }
Device Group::device() const { return impl_->engine->device(); }
const char* Group::implementation() const { return impl_->engine->name(); }

Group Group::subgroup(std::span<const int> ranks, const std::string& name) const {
  std::vector<int> world;
  for (const int rank : ranks) {
    if (rank < 0 || rank >= size()) {
      fail(ErrorKind::kValue, "group", quoted(name), " names rank ", rank, "; ", quoted(impl_->name), " has ", size(),
           " ranks");
    }
    world.push_back((*impl_->members)[static_cast<size_t>(rank)]);
    if (std::count(ranks.begin(), ranks.end(), rank) > 1) {
      fail(ErrorKind::kValue, "group", quoted(name), " names rank ", rank, " twice");
    }
  }
  return Group(impl_->engine, impl_->name == "world" ? name : impl_->name + "/" + name, std::move(world));
}

Group Group::subgroup(const Mesh& mesh, std::span<const Axis> axes) const {
  if (mesh.size() != size()) {
    fail(ErrorKind::kValue, "group", "a mesh of ", mesh.size(), " ranks does not cover group ", quoted(impl_->name),
         " of ", size());
  }
  std::string title;
  for (const Axis axis : axes) title += concat(title.empty() ? "" : ",", dist::name(axis));
  return subgroup(mesh.members(rank(), axes), title);
}

/// Checks what all operations have in common, issues it, and runs or queues it.
Work Group::start(Collective op, const Tensor& input, const Tensor& output, Stamp stamp, int peer, bool asynchronous,
                  Place place) const {
  Impl& impl = *impl_;
  const bool in_place = input.defined() && input.is_same(output);
  if (op != Collective::barrier) {
    for (const Tensor* t : {&input, &output}) check_tensor(op, *t, impl.engine->device(), implementation());
    if (input.dtype() != output.dtype()) {
      fail(ErrorKind::kDType, dist::name(op), "the input is ", input.describe(), ", the output ", output.describe());
    }
    if (reduces(op) && !can_reduce(input.dtype())) {
      fail(ErrorKind::kDType, dist::name(op), "reduces f32, f64, bf16, f16, i32, i64 and u8, got ", input.describe());
    }
    if (reduces(op) && stamp.reduction == Reduction::avg &&
        (!is_float(input.dtype()) || (size() & (size() - 1)) != 0)) {
      fail(ErrorKind::kValue, dist::name(op), "avg is for float dtypes and numbers of ranks that are powers of two, ",
           "where the division is exact; got ", input.dtype(), " on ", size(),
           " ranks. Hint: take the sum and divide by what the mean is over");
    }
    if (!in_place && overlap(input, output)) {
      fail(ErrorKind::kValue, dist::name(op), "input and output share memory. Hint: the form whose name ends in _");
    }
    if ((!in_place || op == Collective::send) && autograd::grad_mode() && input.requires_grad()) {
      fail(ErrorKind::kState, dist::name(op), "the input (", input.describe(),
           ") takes part in a graph, and an operation between ranks records no gradient. Hint: call it under NoGrad, "
           "or on detach()");
    }
    if (op != Collective::send) output.begin_change(dist::name(op));
    if (DryRun::active()) fail(ErrorKind::kState, dist::name(op), "there is no data to move in a dry run");
    stamp.dtype = input.dtype();
    stamp.shape = input.shape();
  }
  stamp.op = op;
  stamp.lane = impl.name;
  stamp.members = impl.members_hash;
  stamp.place = place_name(place);

  const auto work = std::make_shared<Work::State>();
  work->op.members = impl.members;
  work->op.rank = impl.rank;
  if (peer >= 0) {
    const bool sends = op == Collective::send;
    const int from = sends ? impl.rank : peer, to = sends ? peer : impl.rank;
    stamp.lane += concat(' ', from, '>', to);
    const std::vector<int>& world = *impl.members;
    work->op.members = std::make_shared<const std::vector<int>>(
        std::vector<int>{world[static_cast<size_t>(from)], world[static_cast<size_t>(to)]});
    work->op.rank = sends ? 0 : 1;
  }
  work->op.input = input;
  work->op.output = output;
  work->op.stamp = std::move(stamp);
  work->engine = impl.engine;
  work->count = [totals = impl.totals](const Operation& done, int64_t bytes) {
    const std::lock_guard lock(totals->mutex);
    Traffic& traffic = totals->of[static_cast<size_t>(done.stamp.op)];
    ++traffic.calls;
    traffic.bytes_sent += bytes;
  };
  work->waited = [totals = impl.totals, op](double seconds) {
    const std::lock_guard lock(totals->mutex);
    totals->of[static_cast<size_t>(op)].waited += seconds;
  };

  OperationQueue* queue = nullptr;
  {
    const std::lock_guard lock(impl.issue_mutex);
    Board& board = impl.engine->board();
    board.issue(impl.engine->rank(), work->op.stamp, *work->op.members);
    work->record = board.recorder().issued(impl.engine->rank(), work->op.stamp);
    queue = &impl.queues[work->op.stamp.lane];
    if (asynchronous) queue->push(work);
  }
  if (!asynchronous) queue->run(work);
  return Work(work);
}

// ---- all_reduce ----

Work Group::all_reduce_async_(const Tensor& t, Reduction reduction, Place place) {
  return start(Collective::all_reduce, t, t, reducing(reduction), -1, true, place);
}

void Group::all_reduce_(const Tensor& t, Reduction reduction, Place place) {
  start(Collective::all_reduce, t, t, reducing(reduction), -1, false, place);
}

Work Group::all_reduce_async(const Tensor& input, const Tensor& output, Reduction reduction, Place place) {
  if (input.defined() && output.defined()) check_shape(Collective::all_reduce, output, input.shape());
  return start(Collective::all_reduce, input, output, reducing(reduction), -1, true, place);
}

Tensor Group::all_reduce(const Tensor& input, Reduction reduction, Place place) {
  const Tensor output = Tensor::empty_like(input);
  start(Collective::all_reduce, input, output, reducing(reduction), -1, false, place);
  return output;
}

// ---- reduce_scatter ----

Work Group::reduce_scatter_async(const Tensor& input, const Tensor& output, Reduction reduction, const Counts& counts,
                                 Place place) {
  constexpr Collective kOp = Collective::reduce_scatter;
  check_has_rows(kOp, input);
  Stamp stamp = reducing(reduction);
  stamp.send_counts = counts_or_even(kOp, counts, input.size(0), size(), "input");
  check_shape(kOp, output, with_rows(input.shape(), stamp.send_counts[static_cast<size_t>(rank())]));
  return start(kOp, input, output, std::move(stamp), -1, true, place);
}

Tensor Group::reduce_scatter(const Tensor& input, Reduction reduction, const Counts& counts, Place place) {
  constexpr Collective kOp = Collective::reduce_scatter;
  check_has_rows(kOp, input);
  Stamp stamp = reducing(reduction);
  stamp.send_counts = counts_or_even(kOp, counts, input.size(0), size(), "input");
  const Shape shape = with_rows(input.shape(), stamp.send_counts[static_cast<size_t>(rank())]);
  const Tensor output = Tensor::empty(shape, input.dtype(), input.device());
  start(kOp, input, output, std::move(stamp), -1, false, place);
  return output;
}

// ---- all_gather ----

namespace {

/// Counts of an all_gather whose input has `rows` rows on rank `rank`.
Counts gathered(const Counts& counts, int64_t rows, int rank, int n) {
  if (counts.empty()) return Counts(static_cast<size_t>(n), rows);
  const Counts checked = counts_or_even(Collective::all_gather, counts, -1, n, "input");
  if (checked[static_cast<size_t>(rank)] != rows) {
    fail(ErrorKind::kShape, "all_gather", "the count of rank ", rank, " is ", checked[static_cast<size_t>(rank)],
         ", but its input has ", rows, " rows");
  }
  return checked;
}

}  // namespace

Work Group::all_gather_async(const Tensor& input, const Tensor& output, const Counts& counts, Place place) {
  check_has_rows(Collective::all_gather, input);
  Stamp stamp;
  stamp.send_counts = gathered(counts, input.size(0), rank(), size());
  check_shape(Collective::all_gather, output, with_rows(input.shape(), sum(stamp.send_counts)));
  return start(Collective::all_gather, input, output, std::move(stamp), -1, true, place);
}

Tensor Group::all_gather(const Tensor& input, const Counts& counts, Place place) {
  check_has_rows(Collective::all_gather, input);
  Stamp stamp;
  stamp.send_counts = gathered(counts, input.size(0), rank(), size());
  const Tensor output = Tensor::empty(with_rows(input.shape(), sum(stamp.send_counts)), input.dtype(), input.device());
  start(Collective::all_gather, input, output, std::move(stamp), -1, false, place);
  return output;
}

Work Group::all_gather_async_(const Tensor& t, const Counts& counts, Place place) {
  check_has_rows(Collective::all_gather, t);
  Stamp stamp;
  stamp.send_counts = counts_or_even(Collective::all_gather, counts, t.size(0), size(), "tensor");
  return start(Collective::all_gather, t, t, std::move(stamp), -1, true, place);
}

void Group::all_gather_(const Tensor& t, const Counts& counts, Place place) {
  check_has_rows(Collective::all_gather, t);
  Stamp stamp;
  stamp.send_counts = counts_or_even(Collective::all_gather, counts, t.size(0), size(), "tensor");
  start(Collective::all_gather, t, t, std::move(stamp), -1, false, place);
}

// ---- broadcast ----

namespace {

void check_rank(Collective op, int rank, const Group& group) {
  if (rank < 0 || rank >= group.size()) {
    fail(ErrorKind::kValue, name(op), "rank ", rank, " is not one of the ", group.size(), " ranks of group ",
         quoted(group.name()));
  }
}

}  // namespace

Work Group::broadcast_async_(const Tensor& t, int root, Place place) {
  check_rank(Collective::broadcast, root, *this);
  return start(Collective::broadcast, t, t, rooted(root), -1, true, place);
}

void Group::broadcast_(const Tensor& t, int root, Place place) {
  check_rank(Collective::broadcast, root, *this);
  start(Collective::broadcast, t, t, rooted(root), -1, false, place);
}

// ---- all_to_all ----

namespace {

Stamp exchanged(const Tensor& input, const Counts& send, const Counts& receive, int n) {
  check_has_rows(Collective::all_to_all, input);
  Stamp stamp;
  stamp.send_counts = counts_or_even(Collective::all_to_all, send, input.size(0), n, "input");
  if (receive.empty() && !send.empty()) {
    fail(ErrorKind::kValue, "all_to_all", "counts to send need counts to receive. Hint: exchange them first");
  }
  stamp.receive_counts =
      receive.empty() ? stamp.send_counts : counts_or_even(Collective::all_to_all, receive, -1, n, "output");
  return stamp;
}

}  // namespace

Work Group::all_to_all_async(const Tensor& input, const Tensor& output, const Counts& send, const Counts& receive,
                             Place place) {
  Stamp stamp = exchanged(input, send, receive, size());
  check_shape(Collective::all_to_all, output, with_rows(input.shape(), sum(stamp.receive_counts)));
  return start(Collective::all_to_all, input, output, std::move(stamp), -1, true, place);
}

Tensor Group::all_to_all(const Tensor& input, const Counts& send, const Counts& receive, Place place) {
  Stamp stamp = exchanged(input, send, receive, size());
  const Tensor output =
      Tensor::empty(with_rows(input.shape(), sum(stamp.receive_counts)), input.dtype(), input.device());
  start(Collective::all_to_all, input, output, std::move(stamp), -1, false, place);
  return output;
}

// ---- send, recv, barrier ----

namespace {

void check_peer(Collective op, int peer, const Group& group) {
  check_rank(op, peer, group);
  if (peer == group.rank()) fail(ErrorKind::kValue, name(op), "rank ", peer, " is this rank itself");
}

}  // namespace

Work Group::send_async(const Tensor& t, int to, Place place) {
  check_peer(Collective::send, to, *this);
  // Nothing is written: the input stands for the output too.
  return start(Collective::send, t, t, {}, to, true, place);
}

void Group::send(const Tensor& t, int to, Place place) {
  check_peer(Collective::send, to, *this);
  start(Collective::send, t, t, {}, to, false, place);
}

Work Group::recv_async_(const Tensor& t, int from, Place place) {
  check_peer(Collective::recv, from, *this);
  return start(Collective::recv, t, t, {}, from, true, place);
}

void Group::recv_(const Tensor& t, int from, Place place) {
  check_peer(Collective::recv, from, *this);
  start(Collective::recv, t, t, {}, from, false, place);
}

Work Group::barrier_async(Place place) { return start(Collective::barrier, {}, {}, {}, -1, true, place); }

void Group::barrier(Place place) { start(Collective::barrier, {}, {}, {}, -1, false, place); }

// ---- traffic ----

std::array<Group::Traffic, kCollectives> Group::traffic() const {
  const std::lock_guard lock(impl_->totals->mutex);
  return impl_->totals->of;
}

Group::Traffic Group::traffic(Collective op) const { return traffic()[static_cast<size_t>(op)]; }

}  // namespace weft::dist
