#include "dist/gradient_sums.h"

#include <algorithm>
#include <bit>
#include <map>

#include "core/autograd.h"
#include "core/memory.h"

namespace weft::dist {
namespace {

constexpr const char* kWhere = "data parallel";

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

/// Memory for this rank's range, which stays.
Tensor kept(int64_t count, DType dtype, Device device) {
  const MemoryScope scope(MemoryCategory::gradients);
  return Tensor::empty({count}, dtype, device);
}

}  // namespace

GradientSums::GradientSums(Group& group, Group* replicas, bool every_micro_batch, std::vector<Leaf> leaves,
                           std::vector<Bucket> buckets)
    : group_(group),
      replicas_(replicas),
      every_micro_batch_(every_micro_batch),
      leaves_(std::move(leaves)),
      bucket_of_(leaves_.size()) {
  for (Bucket& bucket : buckets) {
    const DType dtype = leaves_[bucket.layout.tensors().front()].tensor.dtype();
    for (const size_t leaf : bucket.layout.tensors()) bucket_of_[leaf] = buckets_.size();
    buckets_.push_back({std::move(bucket.layout), bucket.unrounded, bucket.everywhere, dtype, dtype});
  }
}

void GradientSums::begin(std::span<const int64_t> micro_batches) {
  const int replicas = replicas_ == nullptr ? 1 : replicas_->size();
  const auto ranks = static_cast<size_t>(group_.size());
  if (micro_batches.size() != ranks * static_cast<size_t>(replicas))
    fail(ErrorKind::kValue, kWhere, "there are ", ranks * static_cast<size_t>(replicas),
         " ranks, but micro-batches of ", micro_batches.size());
  for (size_t rank = 0; rank < micro_batches.size(); ++rank) {
    if (micro_batches[rank] < 1)
      fail(ErrorKind::kValue, kWhere, "rank ", rank, " must have at least one micro-batch, got ", micro_batches[rank]);
    if (every_micro_batch_ && micro_batches[rank] != micro_batches[0]) {
      fail(ErrorKind::kValue, kWhere, "where gradients are sharded all ranks must have as many micro-batches, got ",
           micro_batches[0], " on rank 0 and ", micro_batches[rank], " on rank ", rank);
    }
  }
  const size_t replica = replicas_ == nullptr ? 0 : static_cast<size_t>(replicas_->rank());
  const auto own = micro_batches.subspan(replica * ranks, ranks);
  counts_.assign(own.begin(), own.end());
  replica_starts_.clear();
  total_ = 0;
  for (size_t rank = 0; rank < micro_batches.size(); ++rank) {
    if (rank % ranks == 0) replica_starts_.push_back(total_);
    total_ += micro_batches[rank];
  }
  replica_starts_.push_back(total_);
  first_ = replica_starts_[replica];
  seen_.assign(leaves_.size(), 0);
  sums_.assign(leaves_.size(), std::nullopt);
  waiting_.assign(leaves_.size(), {});
  started_.clear();
  for (State& bucket : buckets_) {
    bucket.rounds = 0, bucket.whole = false, bucket.transfers.clear(), bucket.sum.reset();
    // 16-bit gradients are added up in f32 and rounded once. Groups do so themselves where one reduction is the whole
    // sum.
    const bool narrow = size_of(bucket.dtype) == 2, one_reduction = total_ == group_.size() && !bucket.unrounded;
    bucket.sum_dtype = narrow && !one_reduction ? DType::f32 : bucket.dtype;
  }
  for (const Leaf& leaf : leaves_) leaf.tensor.clear_grad();
}

int64_t GradientSums::number(int rank, int64_t i) const {
  // Reduced once in a step, a rank's micro-batches follow each other, so that it can add up most of them itself;
  // reduced one by one, those of all ranks that are reduced together do.
  if (every_micro_batch_) return first_ + i * group_.size() + rank;
  int64_t before = first_;
  for (int r = 0; r < rank; ++r) before += counts_[static_cast<size_t>(r)];
  return before + i;
}

/// The nodes that each rank brings to the reduction after its micro-batch i.
std::vector<std::vector<MicroBatchRange>> GradientSums::nodes_of_round(int64_t i) const {
  std::vector<std::vector<MicroBatchRange>> nodes;
  for (int rank = 0; rank < group_.size(); ++rank) {
    const int64_t first = number(rank, every_micro_batch_ ? i : 0);
    const int64_t count = every_micro_batch_ ? 1 : counts_[static_cast<size_t>(rank)];
    nodes.push_back(CanonicalSum::nodes({first, first + count}, total_));
  }
  return nodes;
}

void GradientSums::take(size_t leaf) {
  const MemoryScope scope(MemoryCategory::gradients);
  const Tensor gradient = leaves_[leaf].tensor.grad();
  leaves_[leaf].tensor.clear_grad();
  if (seen_[leaf] >= count()) {
    fail(ErrorKind::kState, kWhere, "the gradient of ", quoted(leaves_[leaf].name),
         " is there more often than for the ", count(), " micro-batches of this rank");
  }
  const size_t number_of_bucket = bucket_of_[leaf];
  const State& bucket = buckets_[number_of_bucket];
  const Tensor wide = gradient.contiguous().to(bucket.sum_dtype);
  const int64_t j = number(group_.rank(), seen_[leaf]++);
  if (every_micro_batch_ && !alone()) {
    wide.storage()->recount(MemoryCategory::communication);
    waiting_[leaf].push_back(wide);
  } else {
    if (!sums_[leaf]) sums_[leaf].emplace(total_);
    sums_[leaf]->add({j, j + 1}, wide);
  }
  // One rank alone has all of every sum.
  if (!alone() && ready(bucket)) start(number_of_bucket);
}

/// Whether all leaves of a bucket have what its next transfer takes.
bool GradientSums::ready(const State& bucket) const {
  const int64_t wanted = every_micro_batch_ ? bucket.rounds + 1 : count();
  return std::all_of(bucket.layout.tensors().begin(), bucket.layout.tensors().end(),
                     [&](size_t leaf) { return seen_[leaf] >= wanted; });
}

void GradientSums::check_complete() const {
  for (size_t leaf = 0; leaf < leaves_.size(); ++leaf) {
    if (seen_[leaf] == count()) continue;
    fail(ErrorKind::kState, kWhere, "parameter ", quoted(leaves_[leaf].name), " got ", seen_[leaf], " gradients from ",
         count(), " micro-batches. Hint: every parameter must be used by every loss");
  }
}

/// Sends a bucket's sums to the ranks that keep them.
void GradientSums::start(size_t number_of_bucket) {
  const MemoryScope scope(MemoryCategory::communication);
  const autograd::NoGrad no_grad;
  State& bucket = buckets_[number_of_bucket];
  started_.push_back(number_of_bucket);
  const auto nodes = nodes_of_round(bucket.rounds++);
  const ShardBucket& layout = bucket.layout;
  const auto& mine = nodes[static_cast<size_t>(group_.rank())];
  std::map<size_t, std::vector<CanonicalSum::Part>> parts;  // [leaf][node]
  for (const size_t leaf : layout.tensors()) {
    if (every_micro_batch_) {
      parts[leaf] = {{mine.front(), waiting_[leaf].front()}};
      waiting_[leaf].pop_front();
    } else {
      parts[leaf] = sums_[leaf]->parts();
      sums_[leaf].reset();
    }
  }
  const Device device = leaves_[layout.tensors().front()].tensor.device();
  const int64_t count = layout.count(group_.rank());
  if (const auto whole = joined(nodes, total_)) {
    // What is rounded after the reduction is shorter on its way back to everybody, which then is a transfer of its own.
    bucket.whole = bucket.everywhere && bucket.sum_dtype == bucket.dtype && *whole == MicroBatchRange{0, total_};
    const Tensor flat = Tensor::empty({layout.elements()}, bucket.sum_dtype, device);
    for (size_t i = 0; i < parts.size(); ++i) {
      const Tensor& gradient = parts.at(layout.tensors()[i]).front().tensor;
      flat.narrow(0, layout.start(i), gradient.numel()).copy_(gradient.reshape({-1}));
    }
    parts.clear();
    if (bucket.whole) {
      bucket.transfers.push_back({group_.all_reduce_async_(flat), flat, {*whole}});
      return;
    }
    const Tensor output = kept(count, bucket.sum_dtype, device);
    bucket.transfers.push_back(
        {group_.reduce_scatter_async(flat, output, Reduction::sum, layout.counts()), output, {*whole}});
    return;
  }
  // In general every rank gets every node of its range, and adds them up itself.
  std::vector<int64_t> send, receive;
  std::vector<MicroBatchRange> coming;
  for (int rank = 0; rank < group_.size(); ++rank) {
    const auto& theirs = nodes[static_cast<size_t>(rank)];
    send.push_back(layout.count(rank) * static_cast<int64_t>(mine.size()));
    receive.push_back(count * static_cast<int64_t>(theirs.size()));
    coming.insert(coming.end(), theirs.begin(), theirs.end());
  }
  const Tensor flat = Tensor::empty({layout.elements() * static_cast<int64_t>(mine.size())}, bucket.sum_dtype, device);
  int64_t at = 0;
  for (int rank = 0; rank < group_.size(); ++rank) {
    for (size_t node = 0; node < mine.size(); ++node) {
      layout.for_each_piece(rank, [&](const ShardPiece& piece, int64_t begin) {
        const Tensor& sum = parts.at(piece.tensor)[node].tensor;
        flat.narrow(0, at + begin, piece.count()).copy_(sum.reshape({-1}).narrow(0, piece.begin, piece.count()));
      });
      at += layout.count(rank);
    }
  }
  parts.clear();
  const Tensor output = kept(count * static_cast<int64_t>(coming.size()), bucket.sum_dtype, device);
  bucket.transfers.push_back({group_.all_to_all_async(flat, output, send, receive), output, coming});
}

/// The sums of a bucket's leaves, end to end.
Tensor GradientSums::joined_sums(const State& bucket) {
  const std::vector<size_t>& leaves = bucket.layout.tensors();
  if (leaves.size() == 1) return sums_[leaves.front()]->take().reshape({-1});
  Tensor flat = Tensor::empty({bucket.layout.elements()}, bucket.sum_dtype, leaves_[leaves.front()].tensor.device());
  for (size_t i = 0; i < leaves.size(); ++i) {
    const Tensor sum = sums_[leaves[i]]->take();
    flat.narrow(0, bucket.layout.start(i), sum.numel()).copy_(sum.reshape({-1}));
  }
  return flat;
}

void GradientSums::collect(State& bucket) {
  const MemoryScope scope(MemoryCategory::gradients);
  const int64_t count = bucket.whole ? bucket.layout.elements() : bucket.layout.count(group_.rank());
  for (Transfer& transfer : bucket.transfers) {
    transfer.work.wait();
    transfer.output.storage()->recount(MemoryCategory::gradients);
    if (!bucket.sum) bucket.sum.emplace(total_);
    for (size_t i = 0; i < transfer.nodes.size(); ++i) {
      // Parts of one output are added up where they lie.
      bucket.sum->add(transfer.nodes[i], transfer.output.narrow(0, static_cast<int64_t>(i) * count, count));
    }
  }
  bucket.transfers.clear();
}

void GradientSums::settle(size_t count) {
  for (size_t i = 0; i < count; ++i) collect(buckets_[started_[i]]);
}

/// What this rank and those in its place have, added up.
Tensor GradientSums::sum_of_replicas(const State& bucket) {
  const std::vector<CanonicalSum::Part>& mine = bucket.sum->parts();
  std::vector<std::vector<MicroBatchRange>> nodes;
  for (size_t replica = 0; replica + 1 < replica_starts_.size(); ++replica)
    nodes.push_back(CanonicalSum::nodes({replica_starts_[replica], replica_starts_[replica + 1]}, total_));
  if (joined(nodes, total_)) {
    replicas_->all_reduce_(mine.front().tensor);
    return mine.front().tensor;
  }
  const MemoryScope scope(MemoryCategory::communication);
  const int64_t count = bucket.layout.count(group_.rank());
  const Tensor& first = mine.front().tensor;
  const Tensor own = Tensor::empty({count * static_cast<int64_t>(mine.size())}, first.dtype(), first.device());
  for (size_t i = 0; i < mine.size(); ++i) own.narrow(0, static_cast<int64_t>(i) * count, count).copy_(mine[i].tensor);
  std::vector<int64_t> counts;
  for (const auto& theirs : nodes) counts.push_back(count * static_cast<int64_t>(theirs.size()));
  const Tensor all = replicas_->all_gather(own, counts);
  CanonicalSum sum(total_);
  int64_t at = 0;
  for (const auto& theirs : nodes) {
    for (const MicroBatchRange& node : theirs) {
      sum.add(node, all.narrow(0, at, count));
      at += count;
    }
  }
  return sum.take();
}

Tensor GradientSums::finish(size_t number) {
  State& bucket = buckets_[number];
  const MemoryScope scope(MemoryCategory::gradients);
  const DType dtype = bucket.unrounded ? bucket.sum_dtype : bucket.dtype;
  if (alone()) return joined_sums(bucket).to(dtype);
  collect(bucket);
  Tensor sum = replicas_ == nullptr ? bucket.sum->take() : sum_of_replicas(bucket);
  bucket.sum.reset();
  // One of several nodes that came together: the others' memory is not needed any more.
  if (sum.storage()->bytes() != sum.numel() * size_of(sum.dtype())) sum = sum.clone();
  return sum.to(dtype);
}

}  // namespace weft::dist
