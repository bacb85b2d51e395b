#include "dist/data_parallel.h"

#include <algorithm>
#include <bit>
#include <optional>

#include "core/autograd.h"
#include "dist/canonical_sum.h"

namespace weft::dist {
namespace {

constexpr const char* kWhere = "data parallel";

/// Tensors are cut where the blocks end over which optimizers add up squares.
constexpr int64_t kAlign = optim::kSquareBlock;

/// Sums of the ranks' squares, the same on all ranks and the same as one rank has.
class ShardedNorms final : public optim::NormReducer {
 public:
  explicit ShardedNorms(Group& group) : group_(group) {}
  void reduce(std::span<double> squares, const Parameters&) override {
    const MemoryScope scope(MemoryCategory::communication);
    const Tensor all = Tensor::from(std::span<const double>(squares), {static_cast<int64_t>(squares.size())});
    group_.all_reduce_(all);
    const std::vector<double> sums = all.to_vector<double>();
    std::copy(sums.begin(), sums.end(), squares.begin());
  }
  bool exact() const override { return true; }
  /// Their words are whole numbers, which add up to the same in any order.
  void reduce(std::span<optim::ExactSum> squares, const Parameters&) override {
    const MemoryScope scope(MemoryCategory::communication);
    std::vector<int64_t> words;
    for (const optim::ExactSum& sum : squares) words.insert(words.end(), sum.words.begin(), sum.words.end());
    const Tensor all = Tensor::from(words, {static_cast<int64_t>(words.size())});
    group_.all_reduce_(all);
    words = all.to_vector<int64_t>();
    for (size_t i = 0; i < squares.size(); ++i) {
      std::copy_n(words.begin() + static_cast<int64_t>(i * squares[i].words.size()), squares[i].words.size(),
                  squares[i].words.begin());
    }
  }

 private:
  Group& group_;
};

/// Whether sums over these nodes, one a rank, add up in the order of the ranks to one node of the tree.
std::optional<MicroBatchRange> joined(const std::vector<std::vector<MicroBatchRange>>& nodes, int64_t total) {
  CanonicalSum sum(total);
  const int64_t size = nodes.front().empty() ? 0 : nodes.front().front().end - nodes.front().front().begin;
  for (size_t rank = 0; rank < nodes.size(); ++rank) {
    if (nodes[rank].size() != 1) return std::nullopt;
    const MicroBatchRange& node = nodes[rank].front();
    // Nodes of other sizes would be added in another order by the tree over the ranks.
    if (node.end - node.begin != size || !std::has_single_bit(static_cast<uint64_t>(size))) return std::nullopt;
    if (rank > 0 && node.begin != nodes[rank - 1].front().end) return std::nullopt;
    sum.add(node, {});
  }
  if (sum.parts().size() != 1) return std::nullopt;
  return sum.parts().front().range;
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
  /// Gradients that travel together.
  struct Bucket {
    explicit Bucket(ShardBucket layout) : layout(std::move(layout)) {}
    ShardBucket layout;
    DType dtype = DType::f32;         ///< of the parameters and their gradients
    DType sum_dtype = DType::f32;     ///< in which the gradients of this step are added up
    size_t ready = 0;                 ///< tensors whose gradient of the present micro-batch is there
    std::optional<CanonicalSum> sum;  ///< of this rank's range
    /// A transfer under way, and the nodes that it brings, in order.
    struct Transfer {
      Work work;
      Tensor output;
      std::vector<MicroBatchRange> nodes;
    };
    std::vector<Transfer> transfers;
  };

  State(Group& group, Parameters all, const DataParallelOptions& options)
      : group(group), options(options), model(std::move(all)) {}

  Group& group;
  DataParallelOptions options;
  Parameters model, own;
  std::vector<ShardPiece> pieces;
  std::vector<Bucket> buckets;
  std::vector<size_t> bucket_of;  ///< [parameter]
  // of the present step
  std::vector<int64_t> counts;  ///< micro-batches of each rank; empty between steps
  int64_t total = 0, done = 0;  ///< micro-batches of the step; of this rank, whose backward pass is over
  std::vector<std::optional<CanonicalSum>> sums;  ///< [parameter], over this rank's micro-batches
  std::vector<int64_t> seen;                      ///< [parameter], gradients so far

  bool every_micro_batch() const { return options.zero == Zero::kGradients; }

  int64_t number(int rank, int64_t i) const {
    // Reduced once in a step, a rank's micro-batches follow each other, so that it can add up most of them itself;
    // reduced one by one, those of all ranks that are reduced together do.
    if (every_micro_batch()) return i * group.size() + rank;
    int64_t before = 0;
    for (int r = 0; r < rank; ++r) before += counts[static_cast<size_t>(r)];
    return before + i;
  }

  /// The parameter that "<parameter>.<name of the state>" belongs to.
  std::optional<size_t> parameter_of(const std::string& name) const {
    const std::string parameter = name.substr(0, name.rfind('.'));
    for (size_t p = 0; p < model.size(); ++p) {
      if (model[p].name == parameter) return p;
    }
    return std::nullopt;
  }

  /// The nodes that each rank brings to the reduction after its micro-batch i.
  std::vector<std::vector<MicroBatchRange>> nodes_of_round(int64_t i) const {
    std::vector<std::vector<MicroBatchRange>> nodes;
    for (int rank = 0; rank < group.size(); ++rank) {
      const int64_t first = number(rank, every_micro_batch() ? i : 0);
      const int64_t count = every_micro_batch() ? 1 : counts[static_cast<size_t>(rank)];
      nodes.push_back(CanonicalSum::nodes({first, first + count}, total));
    }
    return nodes;
  }

  /// A gradient of the present micro-batch is there: it is taken from its leaf.
  void take(size_t p) {
    if (counts.empty()) return;  // a backward pass outside of a step
    const Tensor gradient = model[p].tensor.grad();
    model[p].tensor.clear_grad();
    const auto own_rank = static_cast<size_t>(group.rank());
    if (seen[p] >= counts[own_rank]) {
      fail(ErrorKind::kState, kWhere, "the gradient of ", quoted(model[p].name), " is there more often than for the ",
           counts[own_rank], " micro-batches of this rank");
    }
    const int64_t j = number(group.rank(), seen[p]);
    if (!sums[p]) sums[p].emplace(total);
    sums[p]->add({j, j + 1}, gradient.contiguous().to(buckets[bucket_of[p]].sum_dtype));
    ++seen[p];
    const bool last = every_micro_batch() || seen[p] == counts[own_rank];
    Bucket& bucket = buckets[bucket_of[p]];
    // One rank alone has all of every sum.
    if (group.size() > 1 && last && ++bucket.ready == bucket.layout.tensors().size()) start(bucket, seen[p] - 1);
  }

  /// Sends a bucket's sums to the ranks that keep them.
  void start(Bucket& bucket, int64_t round) {
    const MemoryScope scope(MemoryCategory::communication);
    const autograd::NoGrad no_grad;
    bucket.ready = 0;
    const auto nodes = nodes_of_round(round);
    const ShardBucket& layout = bucket.layout;
    const auto& mine = nodes[static_cast<size_t>(group.rank())];
    std::vector<std::vector<CanonicalSum::Part>> parts;  // [tensor of the bucket][node]
    for (const size_t p : layout.tensors()) {
      parts.push_back(sums[p]->parts());
      sums[p].reset();
    }
    const int64_t count = layout.count(group.rank());
    if (const auto whole = joined(nodes, total)) {
      const Tensor flat = Tensor::empty({layout.elements()}, bucket.sum_dtype);
      for (size_t i = 0; i < parts.size(); ++i) {
        const Tensor& gradient = parts[i].front().tensor;
        flat.narrow(0, layout.start(i), gradient.numel()).copy_(gradient.reshape({-1}));
      }
      parts.clear();
      const Tensor output = Tensor::empty({count}, bucket.sum_dtype);
      bucket.transfers.push_back(
          {group.reduce_scatter_async(flat, output, Reduction::sum, layout.counts()), output, {*whole}});
      return;
    }
    // In general every rank gets every node of its range, and adds them up itself.
    std::vector<int64_t> send, receive;
    std::vector<MicroBatchRange> coming;
    for (int rank = 0; rank < group.size(); ++rank) {
      const auto& theirs = nodes[static_cast<size_t>(rank)];
      send.push_back(layout.count(rank) * static_cast<int64_t>(mine.size()));
      receive.push_back(count * static_cast<int64_t>(theirs.size()));
      coming.insert(coming.end(), theirs.begin(), theirs.end());
    }
    const Tensor flat = Tensor::empty({layout.elements() * static_cast<int64_t>(mine.size())}, bucket.sum_dtype);
    int64_t at = 0;
    for (int rank = 0; rank < group.size(); ++rank) {
      for (size_t node = 0; node < mine.size(); ++node) {
        for (size_t i = 0; i < parts.size(); ++i) {
          const int64_t begin = std::max(layout.cut(rank), layout.start(i)),
                        end = std::min(layout.cut(rank + 1), layout.start(i + 1));
          if (begin >= end) continue;
          flat.narrow(0, at, end - begin)
              .copy_(parts[i][node].tensor.reshape({-1}).narrow(0, begin - layout.start(i), end - begin));
          at += end - begin;
        }
      }
    }
    parts.clear();
    const Tensor output = Tensor::empty({count * static_cast<int64_t>(coming.size())}, bucket.sum_dtype);
    bucket.transfers.push_back({group.all_to_all_async(flat, output, send, receive), output, coming});
  }

  /// Waits for a bucket's transfers; this rank's range of the sum over the step.
  Tensor finish(Bucket& bucket) {
    const MemoryScope scope(MemoryCategory::gradients);
    const int64_t count = bucket.layout.count(group.rank());
    for (Bucket::Transfer& transfer : bucket.transfers) {
      transfer.work.wait();
      if (!bucket.sum) bucket.sum.emplace(total);
      for (size_t i = 0; i < transfer.nodes.size(); ++i) {
        // Parts of one output are added up where they lie.
        bucket.sum->add(transfer.nodes[i], transfer.output.narrow(0, static_cast<int64_t>(i) * count, count));
      }
    }
    bucket.transfers.clear();
    const Tensor sum = bucket.sum->take();
    bucket.sum.reset();
    return sum.to(bucket.dtype);
  }
};

DataParallel::DataParallel(Group& group, Parameters parameters, const DataParallelOptions& options)
    : state_(std::make_shared<State>(group, std::move(parameters), options)) {
  State& s = *state_;
  const autograd::NoGrad no_grad;
  std::vector<int64_t> sizes, widths;
  for (const Parameter& parameter : s.model) {
    const Tensor& t = parameter.tensor;
    if (!t.defined() || !t.is_leaf() || !t.requires_grad() || !t.is_contiguous())
      fail(ErrorKind::kValue, kWhere, "parameter ", quoted(parameter.name),
           " must be a contiguous leaf that requires a gradient");
    sizes.push_back(t.numel());
    widths.push_back(size_of(t.dtype()));
    group.broadcast_(t.detach(), 0);
  }
  s.bucket_of.resize(sizes.size());
  s.pieces.resize(sizes.size());
  for (size_t p = 0; p < sizes.size(); ++p) s.pieces[p] = {p, 0, 0};
  for (std::vector<size_t>& tensors : transfer_buckets(sizes, widths, options.bucket_bytes)) {
    State::Bucket bucket(ShardBucket(std::move(tensors), sizes, group.size(), kAlign));
    bucket.dtype = s.model[bucket.layout.tensors().front()].tensor.dtype();
    for (const size_t p : bucket.layout.tensors()) s.bucket_of[p] = s.buckets.size();
    for (const ShardPiece& piece : bucket.layout.pieces(group.rank())) s.pieces[piece.tensor] = piece;
    s.buckets.push_back(std::move(bucket));
  }
  for (size_t p = 0; p < sizes.size(); ++p) {
    Parameter own = s.model[p];
    if (options.zero != Zero::kNone) {
      own.tensor = own.tensor.detach().reshape({-1}).narrow(0, s.pieces[p].begin, s.pieces[p].count());
      own.tensor.requires_grad_();
    } else {
      s.pieces[p] = {p, 0, sizes[p]};
    }
    s.own.push_back(std::move(own));
    s.model[p].tensor.register_grad_ready_hook([state = std::weak_ptr<State>(state_), p](const Tensor&) {
      if (const auto alive = state.lock()) alive->take(p);
    });
  }
}

DataParallel::~DataParallel() = default;

Zero DataParallel::zero() const { return state_->options.zero; }
const Parameters& DataParallel::parameters() const { return state_->own; }
const std::vector<ShardPiece>& DataParallel::pieces() const { return state_->pieces; }

std::shared_ptr<optim::NormReducer> DataParallel::norms() const {
  if (state_->options.zero == Zero::kNone) return std::make_shared<optim::LocalNorms>();
  return std::make_shared<ShardedNorms>(state_->group);
}

void DataParallel::begin_step(std::span<const int64_t> micro_batches) {
  State& s = *state_;
  if (micro_batches.size() != static_cast<size_t>(s.group.size()))
    fail(ErrorKind::kValue, kWhere, "there are ", s.group.size(), " ranks, but micro-batches of ",
         micro_batches.size());
  for (size_t rank = 0; rank < micro_batches.size(); ++rank) {
    if (micro_batches[rank] < 1)
      fail(ErrorKind::kValue, kWhere, "rank ", rank, " must have at least one micro-batch, got ", micro_batches[rank]);
    if (s.every_micro_batch() && micro_batches[rank] != micro_batches[0]) {
      fail(ErrorKind::kValue, kWhere, "where gradients are sharded all ranks must have as many micro-batches, got ",
           micro_batches[0], " on rank 0 and ", micro_batches[rank], " on rank ", rank);
    }
  }
  s.counts.assign(micro_batches.begin(), micro_batches.end());
  s.total = 0;
  for (const int64_t count : s.counts) s.total += count;
  s.seen.assign(s.model.size(), 0);
  s.sums.assign(s.model.size(), std::nullopt);
  for (State::Bucket& bucket : s.buckets) {
    bucket.ready = 0, bucket.transfers.clear(), bucket.sum.reset();
    // 16-bit gradients are added up in f32 and rounded once. Groups do so themselves where one reduction is the whole
    // sum.
    const bool narrow = size_of(bucket.dtype) == 2, one_reduction = s.total == s.group.size();
    bucket.sum_dtype = narrow && !one_reduction ? DType::f32 : bucket.dtype;
  }
  for (const Parameter& parameter : s.model) parameter.tensor.clear_grad();
}

int64_t DataParallel::micro_batch(int64_t i) const {
  const State& s = *state_;
  if (s.counts.empty()) fail(ErrorKind::kState, kWhere, "no step has begun");
  const int64_t count = s.counts[static_cast<size_t>(s.group.rank())];
  if (i < 0 || i >= count)
    fail(ErrorKind::kIndex, kWhere, "this rank has ", count, " micro-batches in the step, and ", i,
         " is not one of them");
  return s.number(s.group.rank(), i);
}

void DataParallel::reduce() {
  State& s = *state_;
  if (s.counts.empty()) fail(ErrorKind::kState, kWhere, "no step has begun");
  const int64_t wanted = s.counts[static_cast<size_t>(s.group.rank())];
  for (size_t p = 0; p < s.model.size(); ++p) {
    if (s.seen[p] == wanted) continue;
    fail(ErrorKind::kState, kWhere, "parameter ", quoted(s.model[p].name), " got ", s.seen[p], " gradients from ",
         wanted, " micro-batches. Hint: every parameter must be used by every loss");
  }
  const autograd::NoGrad no_grad;
  if (s.group.size() == 1) {
    for (size_t p = 0; p < s.own.size(); ++p) {
      const Tensor& t = s.own[p].tensor;
      t.set_grad(s.sums[p]->take().to(t.dtype()).reshape(t.shape()));
    }
    s.counts.clear();
    return;
  }
  const bool whole = s.options.zero == Zero::kNone;
  std::vector<Tensor> flat;
  std::vector<Work> gathers;
  for (State::Bucket& bucket : s.buckets) {
    Tensor sum = s.finish(bucket);
    if (whole) {
      const MemoryScope scope(MemoryCategory::gradients);
      Tensor all = Tensor::empty({bucket.layout.elements()}, bucket.dtype);
      gathers.push_back(s.group.all_gather_async(sum, all, bucket.layout.counts()));
      sum = all;
    }
    flat.push_back(sum);
  }
  for (const Work& work : gathers) work.wait();
  for (size_t b = 0; b < s.buckets.size(); ++b) {
    const ShardBucket& layout = s.buckets[b].layout;
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
  s.counts.clear();
}

void DataParallel::gather() {
  State& s = *state_;
  if (s.options.zero == Zero::kNone || s.group.size() == 1) return;
  const autograd::NoGrad no_grad;
  const MemoryScope scope(MemoryCategory::communication);
  const auto range = [&](const ShardPiece& piece) {
    return s.model[piece.tensor].tensor.detach().reshape({-1}).narrow(0, piece.begin, piece.count());
  };
  std::vector<Tensor> flat;
  std::vector<Work> works;
  for (const State::Bucket& bucket : s.buckets) {
    flat.push_back(Tensor::empty({bucket.layout.elements()}, bucket.dtype));
    int64_t at = bucket.layout.cut(s.group.rank());
    for (const ShardPiece& piece : bucket.layout.pieces(s.group.rank())) {
      flat.back().narrow(0, at, piece.count()).copy_(range(piece));
      at += piece.count();
    }
    works.push_back(s.group.all_gather_async_(flat.back(), bucket.layout.counts()));
  }
  for (size_t b = 0; b < s.buckets.size(); ++b) {
    works[b].wait();
    const ShardBucket& layout = s.buckets[b].layout;
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

NamedTensors DataParallel::whole_state(const NamedTensors& own) const {
  const State& s = *state_;
  if (s.options.zero == Zero::kNone) return own;
  const autograd::NoGrad no_grad;
  NamedTensors whole;
  for (const auto& [name, tensor] : own) {
    const std::optional<size_t> p = s.parameter_of(name);
    if (!p) {
      whole.emplace_back(name, tensor);
      continue;
    }
    Counts counts;
    for (int rank = 0; rank < s.group.size(); ++rank) {
      counts.push_back(0);
      for (const ShardPiece& piece : s.buckets[s.bucket_of[*p]].layout.pieces(rank)) {
        if (piece.tensor == *p) counts.back() = piece.count();
      }
    }
    whole.emplace_back(name, s.group.all_gather(tensor, counts).reshape(s.model[*p].tensor.shape()));
  }
  return whole;
}

NamedTensors DataParallel::own_state(const NamedTensors& whole) const {
  const State& s = *state_;
  if (s.options.zero == Zero::kNone) return whole;
  const autograd::NoGrad no_grad;
  NamedTensors own;
  for (const auto& [name, tensor] : whole) {
    const std::optional<size_t> p = s.parameter_of(name);
    if (p && tensor.numel() != s.model[*p].tensor.numel()) {
      fail(ErrorKind::kData, kWhere, "stored state ", quoted(name), " is ", tensor.describe(), "; its parameter is ",
           s.model[*p].tensor.describe());
    }
    own.emplace_back(name, p ? tensor.reshape({-1}).narrow(0, s.pieces[*p].begin, s.pieces[*p].count()) : tensor);
  }
  return own;
}

}  // namespace weft::dist
