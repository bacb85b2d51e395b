#include "ops/reduce.h"

#include "core/autograd.h"
#include "ops/elementwise.h"
#include "ops/launch.h"
#include "ops/reduce_kernels.h"

namespace weft {
namespace {

using autograd::BackwardContext;
using autograd::Rule;

/// Which dimensions of a tensor are reduced, and what that makes of its shape.
struct Plan {
  Plan(const char* op, const Tensor& x, const Dims& dims) {
    dispatch_float(x.dtype(), op, []<class T>() {});
    reduced = Dims::filled(x.rank(), 0);
    for (const int64_t dim : dims) {
      int64_t& mark = reduced[normalize_dim(dim, x.rank(), op)];
      if (mark != 0) fail(ErrorKind::kShape, op, "dimensions ", dims, " of ", x.describe(), " name one of them twice");
      mark = 1;
    }
    for (int d = 0; d < x.rank(); ++d) {
      if (reduced[d])
        terms *= x.shape()[d];
      else
        outputs *= x.shape()[d], without.push_back(x.shape()[d]);
      with.push_back(reduced[d] ? 1 : x.shape()[d]);
    }
  }
  Dims reduced;         ///< 1 where a dimension is reduced
  Shape with, without;  ///< the result's shape with the reduced dimensions as 1, and without them
  int64_t terms = 1, outputs = 1;
};

Dims all_dims(const Tensor& x) {
  Dims dims;
  for (int d = 0; d < x.rank(); ++d) dims.push_back(d);
  return dims;
}

Tensor summed(const char* op, const Tensor& x, const Dims& dims, bool keepdim, bool divide) {
  const Plan plan(op, x, dims);
  const double divisor = divide ? static_cast<double>(plan.terms) : 1;
  Tensor y = Tensor::empty(plan.with, x.dtype(), x.device());
  launch(x.device(), op, [&](auto device) {
    StridedView to = y.view();
    to.shape = x.shape();
    for (int d = 0; d < x.rank(); ++d) to.strides[d] *= plan.reduced[d] == 0;
    sum_over(device, to, x.view(), divisor);
  });
  if (!keepdim) y = Tensor::make_view(y, plan.without, contiguous_strides(plan.without), 0);
  autograd::record(
      op, {x}, {y}, {},
      [with = plan.with, full = x.shape(), divisor](BackwardContext& context) {
        Tensor dy = context.grad().reshape(with);
        if (divisor != 1) dy = dy / divisor;
        context.set(0, dy.expand(full));
      },
      Rule::kDifferentiable);
  return y;
}

/// x as rows of what is reduced to one element each: [outputs, terms], kept dimensions first. Differentiable.
Tensor as_rows(const char* op, const Tensor& x, const Plan& plan) {
  if (plan.terms == 0) {
    fail(ErrorKind::kShape, op, "there is no element to choose along a reduced dimension of size 0: x is ",
         x.describe());
  }
  Dims order;
  for (const int64_t reduced : {0, 1}) {
    for (int d = 0; d < x.rank(); ++d) {
      if (plan.reduced[d] == reduced) order.push_back(d);
    }
  }
  return x.permute(order).reshape({plan.outputs, plan.terms});
}

Tensor index_of_extreme(const char* op, const Tensor& rows, bool largest) {
  Tensor index = Tensor::empty({rows.size(0)}, DType::i64, rows.device());
  launch(rows.device(), op, [&](auto device) { extreme_index(device, rows.view(), largest, index.data<int64_t>()); });
  return index;
}

Tensor extreme(const char* op, const Tensor& x, const Dims& dims, bool keepdim, bool largest) {
  const Plan plan(op, x, dims);
  const Tensor rows = as_rows(op, x, plan);
  const Tensor index = index_of_extreme(op, rows, largest);
  Tensor y = Tensor::empty({plan.outputs}, x.dtype(), x.device());
  launch(x.device(), op, [&](auto device) { pick(device, y.view(), rows.view(), index.data<int64_t>()); });
  autograd::record(
      op, {rows}, {y}, {index},
      [n = plan.terms](BackwardContext& context) {
        const Tensor index = context.saved(0), dy = context.grad();
        const Tensor mask = Tensor::empty({index.numel(), n}, DType::boolean, index.device());
        launch(index.device(), context.op(),
               [&](auto device) { mark(device, index.data<int64_t>(), mask.data<bool>(), index.numel(), n); });
        context.set(0, where(mask, dy.unsqueeze(1), 0));
      },
      Rule::kDifferentiable);
  return y.reshape(keepdim ? plan.with : plan.without);
}

}  // namespace

Tensor sum(const Tensor& x) { return sum(x, all_dims(x)); }
Tensor sum(const Tensor& x, const Dims& dims, bool keepdim) { return summed("sum", x, dims, keepdim, false); }
Tensor mean(const Tensor& x) { return mean(x, all_dims(x)); }
Tensor mean(const Tensor& x, const Dims& dims, bool keepdim) { return summed("mean", x, dims, keepdim, true); }
Tensor max(const Tensor& x) { return max(x, all_dims(x)); }
Tensor max(const Tensor& x, const Dims& dims, bool keepdim) { return extreme("max", x, dims, keepdim, true); }
Tensor min(const Tensor& x) { return min(x, all_dims(x)); }
Tensor min(const Tensor& x, const Dims& dims, bool keepdim) { return extreme("min", x, dims, keepdim, false); }

Tensor argmax(const Tensor& x, int64_t dim, bool keepdim) {
  const autograd::NoGrad no_grad;
  const Plan plan("argmax", x, {normalize_dim(dim, x.rank(), "argmax")});
  return index_of_extreme("argmax", as_rows("argmax", x, plan), true).reshape(keepdim ? plan.with : plan.without);
}

}  // namespace weft
