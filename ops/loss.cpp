#include "ops/loss.h"

#include "core/autograd.h"
#include "ops/launch.h"
#include "ops/loss_kernels.h"
#include "ops/loss_targets.h"

namespace weft {
namespace {

using autograd::BackwardContext;
constexpr const char* kOp = "cross_entropy";

DType wide(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

LossTargets rows_of(const Tensor& logits, const Tensor& targets, int64_t ignored) {
  return {targets.data<int64_t>(), targets.numel(), logits.shape().back(), ignored};
}

}  // namespace

Tensor cross_entropy(const Tensor& logits_, const Tensor& targets_, const CrossEntropyOptions& options) {
  dispatch_float(logits_.dtype(), kOp, []<class T>() {});
  const int64_t ignored = options.ignore_index;
  Tensor targets, lse, losses, denominator;
  Tensor out = Tensor::empty({}, wide(logits_.dtype()), logits_.device());
  {
    const autograd::NoGrad no_grad;
    targets = checked_targets(kOp, logits_, targets_, options);
    if (logits_.shape().back() == 0)
      fail(ErrorKind::kShape, kOp, "needs at least one class, got logits ", logits_.describe());
    const Tensor logits = logits_.contiguous();
    lse = Tensor::empty(targets.shape(), wide(logits.dtype()), logits.device());
    denominator = Tensor::empty({}, DType::f64, logits.device());
    {
      const MemoryScope scope(MemoryCategory::workspace);
      losses = Tensor::empty(targets.shape(), DType::f64, logits.device());
    }
    launch(logits.device(), kOp, [&](auto device) {
      const LossTargets rows = rows_of(logits, targets, ignored);
      loss_denominator(device, kOp, rows, known_denominator(options), denominator.data<double>());
      dispatch_float(logits.dtype(), kOp, [&]<class T>() {
        using A = Accumulate<T>;
        loss_forward(device, rows, logits.data<T>(), lse.data<A>(), losses.data<double>());
        reduce_losses(device, losses.data<double>(), rows.rows, denominator.data<double>(), out.data<A>());
      });
    });
  }
  autograd::record(kOp, {logits_, targets_}, {out}, {logits_, targets, lse, denominator},
                   [ignored](BackwardContext& context) {
                     const Tensor logits = context.saved(0).contiguous(), targets = context.saved(1),
                                  lse = context.saved(2), denominator = context.saved(3);
                     const Tensor gradient = context.grad();
                     const Tensor dlogits = Tensor::empty_like(logits);
                     launch(logits.device(), kOp, [&](auto device) {
                       const LossTargets rows = rows_of(logits, targets, ignored);
                       dispatch_float(logits.dtype(), kOp, [&]<class T>() {
                         using A = Accumulate<T>;
                         loss_backward(device, rows, logits.data<T>(), lse.data<A>(),
                                       LossScale<A>{denominator.data<double>(), gradient.data<A>()}, dlogits.data<T>());
                       });
                     });
                     context.set(0, dlogits);
                   });
  return out;
}

}  // namespace weft
