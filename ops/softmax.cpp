#include "ops/softmax.h"

#include "core/autograd.h"
#include "ops/elementwise.h"
#include "ops/launch.h"
#include "ops/reduce.h"
#include "ops/softmax_kernels.h"

namespace weft {
namespace {

using autograd::BackwardContext;
using autograd::Rule;

int checked_dim(const char* op, const Tensor& x, int64_t dim) {
  dispatch_float(x.dtype(), op, []<class T>() {});
  return normalize_dim(dim, x.rank(), op);
}

}  // namespace

Tensor softmax(const Tensor& x, int64_t dim_) {
  const int dim = checked_dim("softmax", x, dim_);
  Tensor y = Tensor::empty_like(x);
  launch(x.device(), "softmax", [&](auto device) { softmax(device, y.view(), x.view(), dim); });
  autograd::record(
      "softmax", {x}, {y}, {y},
      [dim](BackwardContext& context) {
        const Tensor y = context.saved(0), dy = context.grad();
        if (autograd::grad_mode()) return context.set(0, y * (dy - sum(dy * y, {dim}, true)));
        Tensor dx = Tensor::empty_like(y);
        launch(y.device(), "softmax",
               [&](auto device) { softmax_backward(device, dx.view(), dy.view(), y.view(), dim); });
        context.set(0, dx);
      },
      Rule::kDifferentiable);
  return y;
}

Tensor log_softmax(const Tensor& x, int64_t dim_) {
  const int dim = checked_dim("log_softmax", x, dim_);
  Tensor y = Tensor::empty_like(x);
  launch(x.device(), "log_softmax", [&](auto device) { log_softmax(device, y.view(), x.view(), dim); });
  autograd::record(
      "log_softmax", {x}, {y}, {y},
      [dim](BackwardContext& context) {
        const Tensor y = context.saved(0), dy = context.grad();
        if (autograd::grad_mode()) return context.set(0, dy - exp(y) * sum(dy, {dim}, true));
        Tensor dx = Tensor::empty_like(y);
        launch(y.device(), "log_softmax",
               [&](auto device) { log_softmax_backward(device, dx.view(), dy.view(), y.view(), dim); });
        context.set(0, dx);
      },
      Rule::kDifferentiable);
  return y;
}

}  // namespace weft
