#pragma once
#include <memory>
#include <span>

#include "dist/group.h"
#include "dist/pass.h"
#include "dist/shard_layout.h"
#include "optim/norm.h"

namespace weft::dist {

/// What the ranks of a data-parallel group share out among them instead of each keeping all of it (Rajbhandari et al.
/// 2020). With P parameters and n ranks each keeps
enum class Zero : uint8_t {
  kNone,        ///< everything
  kOptimizer,   ///< P / n of the optimizer's state (ZeRO-1)
  kGradients,   ///< P / n of the gradients too (ZeRO-2)
  kParameters,  ///< P / n of the parameters too (ZeRO-3)
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
  /// With kParameters: names of the parameters of each unit of the model (models::Gpt::units()), in the order in which
  /// units run forward. A parameter is in one, or in two if its second use is a leaf here.
  std::vector<std::vector<std::string>> units = {};
  /// Hybrid sharding (Zhao et al. 2023): the ranks that have this one's place in other groups, which train the same
  /// model together with this one. States are shared out within each group alone, and every group has all of them, so
  /// that only the ranges of a rank's gradients travel between groups. It must outlive the DataParallel. Null: there
  /// are none.
  Group* replicas = nullptr;
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
///   parallel.gather();                        // what other ranks have updated comes while the next step begins
///   optimizer.zero_grad();
///
/// Gradients of micro-batches are added up in the canonical order (dist/canonical_sum.h), so that the result has the
/// bits that one rank alone gets, whatever the number of ranks and `zero` are. Reductions begin during the backward
/// pass of the last micro-batch (with kGradients, of each).
///
/// With kParameters no rank has a parameter whole but while its unit runs. All micro-batches of a rank go through one
/// unit before they go through the next, forwards and then backwards, so that a unit is gathered once in each direction
/// for all of them:
///
///   parallel.begin_step(...);
///   for (each unit, first to last)
///     begin_unit(u, kForward);  forward passes of all own micro-batches;  end_unit(u, kForward);
///   for (each unit, last to first)
///     begin_unit(u, kBackward);  their backward passes, in order;  end_unit(u, kBackward);
///   parallel.reduce();  optimizer.step(lr);  parallel.gather();  optimizer.zero_grad();
///
/// which is what a PipelineExecutor on a group of one rank does with the schedule kGPipe of `units` chunks and
/// begin_unit() and end_unit() as its hooks. What the units' backward passes need of all micro-batches is kept until
/// then: that is the price. While a unit runs the next one comes, so that two are whole at a time. A pass without a
/// step (evaluation) is the forward half of that. With any other Zero begin_unit() and end_unit() do nothing.
///
/// A parameter that has memory when this is made has it taken away; its values are the first rank's. For a model that
/// was made without (models::GptPart::values), which may be larger than a rank's memory, parameters() get their values
/// afterwards, from Module::draw(parameters(), parts()) or from a checkpoint, before the first step.
///
/// Bytes that a rank sends in a step, of P bytes of gradients, n ranks and a micro-batches a rank: kNone and kOptimizer
/// 2 P (n-1)/n; kGradients (a + 1) P (n-1)/n; kParameters, with P counting a tensor in each of its units and U of the
/// last unit, (3 P - U) (n-1)/n. Where the ranks' micro-batches are not the same power of two, kNone and kOptimizer
/// send P (n-1)/n for each node that a rank's micro-batches make, instead of once; so does kParameters. With m replicas
/// a rank sends 2 P/n (m-1)/m to them besides, or, where their micro-batches are not the same power of two, P/n (m-1)
/// for each node. Gradients of bf16 and f16 are added up in f32 and rounded once; they travel as f32 unless every rank
/// has one micro-batch.
class DataParallel {
 public:
  /// `parameters` must be equal on all ranks; the first rank's values are taken by all. The group must outlive this.
  /// @throws Error kValue unless all are contiguous leaves on the group's device, with kParameters on memory of their
  /// own; for units that do not have every parameter; for a second use of no parameter, or that is not one leaf on the
  /// parameter's memory, or one group of two ranks.
  DataParallel(Group& group, Parameters parameters, const DataParallelOptions& options = {});
  ~DataParallel();

  Zero zero() const;
  /// What this rank's optimizer updates: the parameters, or with any Zero the ranges of them that this rank has, under
  /// their parameters' names and in their order: flat, some of 0 elements.
  const Parameters& parameters() const;
  /// The range of each of parameters() in its flattened parameter.
  const std::vector<ShardPiece>& pieces() const;
  /// The same in indices of the whole tensor: what of it each of parameters() holds, whoever cut it.
  std::vector<TensorPart> parts() const;
  /// Sums of squares over whole tensors, for an optimizer over parameters().
  std::shared_ptr<optim::NormReducer> norms() const;

  /// Begins a step of micro_batches[r] micro-batches on rank r, at least one, the same on all ranks with kGradients.
  /// With replicas, those of the first replica's ranks come first, then those of the second's, and so on.
  void begin_step(std::span<const int64_t> micro_batches);
  /// The number in the whole step of this rank's i-th micro-batch.
  int64_t micro_batch(int64_t i) const;
  /// With kParameters: the unit's parameters are whole from here on, and those of the next one on their way.
  /// @throws Error kIndex for a unit that is none, kState for one that has begun.
  void begin_unit(size_t unit, Pass pass);
  /// The unit has run; its memory is given back, but for the last one's between its forward and its backward passes.
  /// @throws Error kState for one that has not begun.
  void end_unit(size_t unit, Pass pass);

  /// Ends the step's backward passes. @throws Error kState, naming the parameter, if one got no gradient from some
  /// micro-batch, or if there were fewer or more backward passes than micro-batches.
  void reduce();
  /// After the update: every rank gets every parameter's new values, or with kParameters when their units run. They are
  /// sent in the order of `parameters`, that of the forward pass best, and this does not wait for them: whoever reaches
  /// for a parameter's elements does (Storage::defer), and gets the GroupError if they do not come.
  void gather();

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace weft::dist
