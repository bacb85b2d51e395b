#pragma once
#include <memory>
#include <span>

#include "dist/group.h"
#include "dist/shard_layout.h"
#include "optim/norm.h"

namespace weft::dist {

/// What the ranks of a data-parallel group share out among them instead of each keeping all of it (Rajbhandari et al.
/// 2020). With P parameters and n ranks each keeps
enum class Zero : uint8_t {
  kNone,       ///< everything
  kOptimizer,  ///< P / n of the optimizer's state (ZeRO-1)
  kGradients,  ///< P / n of the gradients too (ZeRO-2)
};

/// The second use of a parameter that serves in two places: a token embedding that is the head's matrix too. Gradients
/// of the two uses are added up apart, each in the canonical order over the micro-batches, and then to each other;
/// those of bf16 and f16 are rounded after that alone. So they have the same bits wherever the two uses are:
struct SecondUse {
  std::string parameter;  ///< its name
  /// Both on this rank: another leaf on the parameter's memory, which the second use goes through
  /// (models::Gpt::head()).
  Tensor leaf = {};
  /// One each on the two ranks of this group (the first and the last stage of a pipeline), which both have the
  /// parameter in the same groups of data-parallel ranks, with the same Zero. It must outlive the DataParallel. The
  /// ranks' sums are added up over it, and at the start it takes the value of its first rank.
  Group* pair = nullptr;
};

struct DataParallelOptions {
  Zero zero = Zero::kNone;
  int64_t bucket_bytes = int64_t{25} << 20;  ///< gradients travel in buckets of this size as they become ready
  std::vector<SecondUse> second_uses = {};   ///< at most one for a parameter
};

/// Micro-batches of each rank where a step of `total` is shared out among `ranks`: as evenly as can be, the first ranks
/// have one more. @throws Error kValue for more ranks than micro-batches.
std::vector<int64_t> micro_batch_shares(int64_t total, int ranks);

/// Trains copies of one model on the ranks of a group, each on its own micro-batches. A step:
///
///   parallel.begin_step(micro_batches of each rank);
///   for (i of own micro-batches) { loss(micro-batch number parallel.micro_batch(i)).backward(); }
///   parallel.reduce();                        // parameters().grad is now that of the whole step
///   optimizer.step(lr);                       // an optimizer over parameters(), with norms() as its NormReducer
///   parallel.gather();                        // what other ranks have updated
///   optimizer.zero_grad();
///
/// Gradients of micro-batches are added up in the canonical order (dist/canonical_sum.h), so that the result has the
/// bits that one rank alone gets, whatever the number of ranks and `zero` are. Reductions begin during the backward
/// pass of the last micro-batch (with kGradients, of each).
///
/// Bytes that a rank sends in a step, of P bytes of gradients, n ranks and a micro-batches a rank: kNone and kOptimizer
/// 2 P (n-1)/n; kGradients (a + 1) P (n-1)/n. Where the ranks' micro-batches are not the same power of two, kNone and
/// kOptimizer send P (n-1)/n for each node that a rank's micro-batches make, instead of once. Gradients of bf16 and f16
/// are added up in f32 and rounded once; they travel as f32 unless every rank has one micro-batch.
class DataParallel {
 public:
  /// `parameters` must be equal on all ranks; the first rank's values are taken by all. The group must outlive this.
  /// @throws Error kValue unless all are contiguous leaves on the group's device; for a second use of no parameter, or
  /// that is not one leaf on the parameter's memory, or one group of two ranks.
  DataParallel(Group& group, Parameters parameters, const DataParallelOptions& options = {});
  ~DataParallel();

  Zero zero() const;
  /// What this rank's optimizer updates: the parameters, or with any Zero the ranges of them that this rank has, under
  /// their parameters' names and in their order: flat views, some of 0 elements.
  const Parameters& parameters() const;
  /// The range of each of parameters() in its flattened parameter.
  const std::vector<ShardPiece>& pieces() const;
  /// Sums of squares over whole tensors, for an optimizer over parameters().
  std::shared_ptr<optim::NormReducer> norms() const;

  /// Begins a step of micro_batches[r] micro-batches on rank r, at least one, the same on all ranks with kGradients.
  void begin_step(std::span<const int64_t> micro_batches);
  /// The number in the whole step of this rank's i-th micro-batch.
  int64_t micro_batch(int64_t i) const;
  /// Ends the step's backward passes. @throws Error kState, naming the parameter, if one got no gradient from some
  /// micro-batch, or if there were fewer or more backward passes than micro-batches.
  void reduce();
  /// After the update: every rank gets every parameter's new values.
  void gather();

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace weft::dist
