#pragma once
#include <functional>
#include <map>
#include <vector>

#include "core/autograd.h"
#include "dist/group.h"
#include "dist/pass.h"
#include "dist/pipeline/schedule.h"

namespace weft::dist {

/// Shape and dtype of a tensor that goes from one stage to the next; its gradient comes back in the same.
struct BoundaryTensor {
  Shape shape;
  DType dtype = DType::f32;
};

/// A stage of a model: its outputs from its inputs. The first stage has no inputs and knows the micro-batch's data; the
/// outputs of the last are one tensor, the loss of the micro-batch, with one element.
using PipelineStage = std::function<std::vector<Tensor>(int micro_batch, const std::vector<Tensor>& inputs)>;

/// Told when a stage's passes of a step in one direction begin and have ended, over all micro-batches: what holds a
/// stage's weights only while it runs (DataParallel::begin_unit) is made of this. Either may be empty.
struct PipelineHooks {
  std::function<void(int stage, Pass pass)> begin, end;
};

/// Follows a schedule on the ranks of a group: one rank's part of it. Gradients of a stage's weights are added to their
/// grad() as its backward passes run, in the order of the micro-batches in every schedule; where those are split, what
/// linear layers give BackwardContext::compute() comes with the second half. The next input is on its way while a rank
/// computes.
class PipelineExecutor {
 public:
  /// @param stages    this rank's, in order: chunk c is stage c * ranks + rank
  /// @param boundary  what goes between any two stages
  /// @throws Error kValue for a schedule that check_pipeline_schedule() refuses, or of another number of ranks than the
  ///         group has; for a number of stages that is not the schedule's chunks.
  PipelineExecutor(Group& group, PipelineSchedule schedule, std::vector<PipelineStage> stages,
                   std::vector<BoundaryTensor> boundary, Device device = Device::cpu());

  /// One step: every action of this rank. Each loss is multiplied by `loss_scale` before its backward pass.
  /// @return on the last stage's rank the micro-batches' losses, outside any graph; elsewhere nothing.
  std::vector<Tensor> run(double loss_scale = 1);

  /// From now on these are told.
  void set_hooks(PipelineHooks hooks) { hooks_ = std::move(hooks); }

  const PipelineSchedule& schedule() const { return schedule_; }

 private:
  /// What a rank keeps of a micro-batch in a stage from its forward to its backward.
  struct Kept {
    std::vector<Tensor> inputs, outputs;
  };
  struct Arriving {
    std::vector<Tensor> tensors;
    std::vector<Work> works;
  };
  using Key = std::pair<int, int>;  // stage, micro-batch

  /// How far a stage has come in one direction.
  struct Progress {
    bool begun = false;
    int done = 0;
  };

  void compute(const PipelineAction& action, double loss_scale);
  void post_receives(size_t from);
  std::vector<Tensor> arrived(std::map<Key, Arriving>& from, Key key);
  void forward(const PipelineAction& action);
  void backward(const PipelineAction& action, double loss_scale);
  void send(const PipelineAction& action);
  const PipelineStage& stage(int number) const { return stages_[static_cast<size_t>(number / schedule_.shape.ranks)]; }

  Group& group_;
  PipelineSchedule schedule_;
  std::vector<PipelineStage> stages_;
  std::vector<BoundaryTensor> boundary_;
  Device device_;
  PipelineHooks hooks_;
  // of the step under way
  std::map<std::pair<int, Pass>, Progress> progress_;
  size_t posted_ = 0;  ///< actions whose receives have been posted
  std::map<Key, Kept> kept_;
  std::map<Key, Arriving> activations_, gradients_;
  std::map<Key, std::vector<Tensor>> input_gradients_;  ///< until they are sent
  std::map<Key, autograd::DeferredGradients> weight_gradients_;
  std::vector<Tensor> losses_;
  std::vector<Work> sending_;
};

}  // namespace weft::dist
