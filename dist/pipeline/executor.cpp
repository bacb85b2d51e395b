#include "dist/pipeline/executor.h"

#include <algorithm>
#include <utility>

#include "core/memory.h"

namespace weft::dist {
namespace {

using Op = PipelineOp;
constexpr const char* kWhere = "pipeline";

}  // namespace

PipelineExecutor::PipelineExecutor(Group& group, PipelineSchedule schedule, std::vector<PipelineStage> stages,
                                   std::vector<BoundaryTensor> boundary, Device device)
    : group_(group),
      schedule_(std::move(schedule)),
      stages_(std::move(stages)),
      boundary_(std::move(boundary)),
      device_(device) {
  check_pipeline_schedule(schedule_);
  if (schedule_.shape.ranks != group.size())
    fail(ErrorKind::kValue, kWhere, "the schedule is for ", schedule_.shape.ranks, " ranks, the group has ",
         group.size());
  if (stages_.size() != static_cast<size_t>(schedule_.shape.chunks)) {
    fail(ErrorKind::kValue, kWhere, "the schedule has ", schedule_.shape.chunks, " stages a rank, got ",
         stages_.size());
  }
}

std::vector<Tensor> PipelineExecutor::run(double loss_scale) {
  const std::vector<PipelineAction>& actions = schedule_.actions[static_cast<size_t>(group_.rank())];
  posted_ = 0;
  progress_.clear();
  for (size_t i = 0; i < actions.size(); ++i) {
    const PipelineAction& action = actions[i];
    if (is_send(action.op)) {
      send(action);
    } else if (is_compute(action.op)) {
      post_receives(i + 1);
      const Pass pass = action.op == Op::kForward ? Pass::kForward : Pass::kBackward;
      Progress& progress = progress_[{action.stage, pass}];
      if (!std::exchange(progress.begun, true) && hooks_.begin) hooks_.begin(action.stage, pass);
      compute(action, loss_scale);
      if (action.op != Op::kBackwardInput && ++progress.done == schedule_.shape.micro_batches && hooks_.end)
        hooks_.end(action.stage, pass);
    }
  }
  for (const Work& work : sending_) work.wait();
  sending_.clear();
  return std::exchange(losses_, {});
}

void PipelineExecutor::compute(const PipelineAction& action, double loss_scale) {
  const Key key{action.stage, action.micro_batch};
  if (action.op == Op::kForward) {
    forward(action);
  } else if (action.op == Op::kBackward) {
    backward(action, loss_scale);
  } else if (action.op == Op::kBackwardInput) {
    const autograd::DeferredGradients::Scope scope(weight_gradients_[key]);
    backward(action, loss_scale);
  } else {
    weight_gradients_.at(key).run();
    weight_gradients_.erase(key);
  }
}

/// Posts what is received before action `from` and between it and the computation after it.
void PipelineExecutor::post_receives(size_t from) {
  const std::vector<PipelineAction>& actions = schedule_.actions[static_cast<size_t>(group_.rank())];
  size_t end = from;
  while (end < actions.size() && !is_compute(actions[end].op)) ++end;
  const MemoryScope scope(MemoryCategory::communication);
  for (; posted_ < end; ++posted_) {
    const PipelineAction& action = actions[posted_];
    const bool gradient = action.op == Op::kReceiveGradient;
    if (!gradient && action.op != Op::kReceiveActivation) continue;
    Arriving& arriving = (gradient ? gradients_ : activations_)[{action.stage, action.micro_batch}];
    const int peer = schedule_.rank_of(action.stage + (gradient ? 1 : schedule_.shape.ranks - 1));
    for (const BoundaryTensor& tensor : boundary_) {
      arriving.tensors.push_back(Tensor::empty(tensor.shape, tensor.dtype, device_));
      arriving.works.push_back(group_.recv_async_(arriving.tensors.back(), peer));
    }
  }
}

std::vector<Tensor> PipelineExecutor::arrived(std::map<Key, Arriving>& from, Key key) {
  auto node = from.extract(key);
  for (const Work& work : node.mapped().works) work.wait();
  return std::move(node.mapped().tensors);
}

void PipelineExecutor::forward(const PipelineAction& action) {
  const Key key{action.stage, action.micro_batch};
  Kept kept;
  if (action.stage > 0) {
    const Key before{action.stage - 1, action.micro_batch};
    if (schedule_.rank_of(action.stage - 1) == group_.rank()) {
      for (const Tensor& output : kept_.at(before).outputs) kept.inputs.push_back(output.detach());
    } else {
      kept.inputs = arrived(activations_, key);
    }
    for (Tensor& input : kept.inputs) input.requires_grad_();
  }
  kept.outputs = stage(action.stage)(action.micro_batch, kept.inputs);
  const bool last = action.stage == schedule_.stages() - 1;
  const size_t wanted = last ? 1 : boundary_.size();
  if (kept.outputs.size() != wanted) {
    fail(ErrorKind::kValue, kWhere, "stage ", action.stage, " must give ", wanted, last ? " loss" : " tensors",
         ", got ", kept.outputs.size());
  }
  for (size_t i = 0; !last && i < wanted; ++i) {
    const Tensor& output = kept.outputs[i];
    if (output.shape() == boundary_[i].shape && output.dtype() == boundary_[i].dtype) continue;
    fail(ErrorKind::kShape, kWhere, "output ", i, " of stage ", action.stage, " must be ", boundary_[i].dtype, ' ',
         boundary_[i].shape, ", got ", output.describe());
  }
  if (last) losses_.push_back(kept.outputs.front().detach());
  kept_.emplace(key, std::move(kept));
}

void PipelineExecutor::backward(const PipelineAction& action, double loss_scale) {
  const Key key{action.stage, action.micro_batch};
  const Kept kept = std::move(kept_.extract(key).mapped());
  std::vector<Tensor> gradients;
  if (action.stage == schedule_.stages() - 1) {
    const Tensor& loss = kept.outputs.front();
    gradients.push_back(Tensor::full(loss.shape(), loss_scale, loss.dtype(), device_));
  } else if (const Key after{action.stage + 1, action.micro_batch};
             schedule_.rank_of(action.stage + 1) == group_.rank()) {
    gradients = std::move(input_gradients_.extract(after).mapped());
  } else {
    gradients = arrived(gradients_, key);
  }
  // The first stage may pass on data that nothing in it has learned to change.
  std::vector<Tensor> outputs, theirs;
  for (size_t i = 0; i < kept.outputs.size(); ++i) {
    if (!kept.outputs[i].requires_grad()) continue;
    outputs.push_back(kept.outputs[i]);
    theirs.push_back(gradients[i]);
  }
  autograd::backward(outputs, theirs);
  if (action.stage == 0) return;
  std::vector<Tensor>& out = input_gradients_[key];
  for (const Tensor& input : kept.inputs) {
    Tensor gradient = input.grad();
    // What the stage does not use has no gradient, but the stage before waits for one.
    out.push_back(gradient.defined() ? gradient.contiguous() : Tensor::zeros_like(input.detach()));
  }
}

void PipelineExecutor::send(const PipelineAction& action) {
  std::erase_if(sending_, [](const Work& work) { return work.done(); });
  const Key key{action.stage, action.micro_batch};
  const bool gradient = action.op == Op::kSendGradient;
  const int peer = schedule_.rank_of(action.stage + (gradient ? schedule_.shape.ranks - 1 : 1));
  const std::vector<Tensor> tensors =
      gradient ? std::move(input_gradients_.extract(key).mapped()) : kept_.at(key).outputs;
  const autograd::NoGrad no_grad;
  for (const Tensor& tensor : tensors) sending_.push_back(group_.send_async(tensor.detach().contiguous(), peer));
}

}  // namespace weft::dist
