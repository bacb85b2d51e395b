#pragma once
#include <deque>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "dist/canonical_sum.h"
#include "dist/group.h"
#include "dist/shard_layout.h"

namespace weft::dist {

/// Gradients of leaves on their way to the ranks that keep their sums over a step: in buckets, which are cut into one
/// range for each rank, each in the canonical order over all micro-batches of the step. A step:
///
///   sums.begin(micro_batches of each rank);
///   ... sums.take(leaf), when a backward pass has put the leaf's gradient of a micro-batch into its grad()
///   sums.check_complete();
///   for (each bucket) range = sums.finish(bucket);
///   sums.end();
///
/// Transfers begin when the last gradient of a bucket is there, and go on while backward passes do.
class GradientSums {
 public:
  struct Leaf {
    std::string name;
    Tensor tensor;
  };
  /// Gradients that travel together; `layout` has the numbers of their leaves, which have one dtype.
  struct Bucket {
    ShardBucket layout;
    /// Sums of 16-bit gradients come from finish() as f32, unrounded: more is to be added to them.
    bool unrounded = false;
    /// Every rank wants the sums of all ranges: they come so from finish() where one reduction makes them.
    bool everywhere = false;
  };

  /// @param replicas           those who have this rank's place in other groups that train the same model (null: there
  ///                           are none): finish() adds up their ranges too. The groups must outlive this.
  /// @param every_micro_batch  transfers are made after each of them, so that no rank keeps whole sums; otherwise once,
  ///                           over all that a rank has
  GradientSums(Group& group, Group* replicas, bool every_micro_batch, std::vector<Leaf> leaves,
               std::vector<Bucket> buckets);

  const ShardBucket& layout(size_t bucket) const { return buckets_[bucket].layout; }

  /// Begins a step of micro_batches[r] on rank r; with replicas, of those of the first one's ranks, then of the
  /// second's, ... @throws Error kValue unless each has one at least, and all the same
  /// number where every micro-batch is transferred.
  void begin(std::span<const int64_t> micro_batches);
  bool in_step() const { return !counts_.empty(); }
  /// Micro-batches of this rank in the step.
  int64_t count() const { return counts_[static_cast<size_t>(group_.rank())]; }
  /// The number in the whole step of a rank's i-th micro-batch.
  int64_t number(int rank, int64_t i) const;

  /// Takes the gradient of this rank's next micro-batch from its leaf. @throws Error kState if it is one too many.
  void take(size_t leaf);
  /// Buckets whose transfers have begun in this step.
  size_t started() const { return started_.size(); }
  /// Waits for the first `count` of those, so that what they sent takes no memory any more.
  void settle(size_t count);
  /// @throws Error kState, naming the leaf, if a gradient is missing.
  void check_complete() const;
  /// Waits for a bucket's transfers; this rank's range of the sum over the step, or all ranges where came_whole(): of
  /// the leaves' dtype, or f32 if it is unrounded. Once a step.
  Tensor finish(size_t bucket);
  bool came_whole(size_t bucket) const { return group_.size() == 1 || buckets_[bucket].whole; }
  void end() { counts_.clear(); }

 private:
  /// A transfer under way, and the nodes that it brings, in order.
  struct Transfer {
    Work work;
    Tensor output;
    std::vector<MicroBatchRange> nodes;
  };
  struct State {
    ShardBucket layout;
    bool unrounded, everywhere;
    DType dtype;                           ///< of the leaves and their gradients
    DType sum_dtype;                       ///< in which the gradients of this step are added up
    int64_t rounds = 0;                    ///< transfers that were begun
    bool whole = false;                    ///< the step's transfer brings the sums of all ranges
    std::optional<CanonicalSum> sum = {};  ///< of this rank's range
    std::vector<Transfer> transfers = {};
  };

  /// Whether this rank has all micro-batches of the step.
  bool alone() const { return group_.size() == 1 && replicas_ == nullptr; }
  std::vector<std::vector<MicroBatchRange>> nodes_of_round(int64_t i) const;
  bool ready(const State& bucket) const;
  void start(size_t number);
  void collect(State& bucket);
  Tensor sum_of_replicas(const State& bucket);
  Tensor joined_sums(const State& bucket);

  Group& group_;
  Group* replicas_;
  bool every_micro_batch_;
  std::vector<Leaf> leaves_;
  std::vector<State> buckets_;
  std::vector<size_t> bucket_of_;  ///< [leaf]
  // of the present step
  std::vector<int64_t> counts_;                    ///< micro-batches of each rank; empty between steps
  std::vector<int64_t> replica_starts_;            ///< micro-batches before those of each replica, and all of them
  int64_t first_ = 0;                              ///< before those of this group
  int64_t total_ = 0;                              ///< of all ranks of all replicas
  std::vector<std::optional<CanonicalSum>> sums_;  ///< [leaf], over this rank's micro-batches
  /// In place of sums_, where every micro-batch is transferred: [leaf], those whose bucket is not ready. They are
  /// several where a pipeline puts off the gradients of some weights.
  std::vector<std::deque<Tensor>> waiting_;
  std::vector<size_t> started_;  ///< buckets, in the order of their transfers
  std::vector<int64_t> seen_;    ///< [leaf], gradients so far
};

}  // namespace weft::dist
