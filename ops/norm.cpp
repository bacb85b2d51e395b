#include "ops/norm.h"

#include <cmath>
#include <optional>

#include "core/autograd.h"
#include "ops/column_sum.h"
#include "ops/launch.h"
#include "ops/norm_kernels.h"

namespace weft {
namespace {

using autograd::BackwardContext;

DType accumulate_dtype(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

/// The last dimension's size. Weight and bias (undefined: none) must be [C], eps positive.
int64_t check_norm(const char* op, const Tensor& x, const Tensor& weight, const Tensor& bias, double eps) {
  check_same(op, {&x, &weight, &bias});
  dispatch_float(x.dtype(), op, []<class T>() {});
  if (x.rank() < 1 || x.shape().back() == 0) {
    fail(ErrorKind::kShape, op, "normalises over the last dimension, which must have an element; x is ", x.describe());
  }
  const int64_t columns = x.shape().back();
  const auto fits = [&](const char* what, const Tensor& parameter) {
    if (!(parameter.shape() == Shape{columns})) {
      fail(ErrorKind::kShape, op, what, " must match the last dimension of x: x is ", x.describe(), ", ", what, " is ",
           parameter.describe(), "; expected ", what, " [", columns, "]");
    }
  };
  fits("weight", weight);
  if (bias.defined()) fits("bias", bias);
  if (!(eps > 0) || !std::isfinite(eps)) fail(ErrorKind::kValue, op, "eps must be positive and finite, got ", eps);
  return columns;
}

/// Writes the sum of the partial sums of weight (which = 0) or bias (1) as the gradient of input i.
void set_parameter_gradient(BackwardContext& context, int i, const Tensor& partials, int which, const Tensor& like) {
  if (!context.needs(i)) return;
  const int64_t blocks = partials.size(0), columns = partials.size(2);
  const bool narrow = partials.dtype() != like.dtype();  // many rows add up to one number: rounded once at the end
  const auto sink = narrow ? std::nullopt : context.sink(i);
  const Tensor out = sink ? sink->tensor : Tensor::empty({columns}, partials.dtype(), partials.device());
  launch(out.device(), context.op(), [&](auto device) {
    const auto sum = [&]<class A>() {
      column_sum(device, partials.data<A>() + which * columns, blocks, columns, 2 * columns, out.data<A>(),
                 sink && sink->accumulate);
    };
    out.dtype() == DType::f64 ? sum.template operator()<double>() : sum.template operator()<float>();
  });
  if (!sink) context.set(i, out.to(like.dtype()));
}

struct Gradients {
  Tensor dx;        ///< undefined if not wanted
  Tensor partials;  ///< [blocks, 2, C]
};

/// Gradient of a norm; `added` (may be undefined) is added to dx, `mean` is undefined for RMS norm.
Gradients norm_gradients(const char* op, const Tensor& dy, const Tensor& x_, const Tensor& weight_, const Tensor& mean,
                         const Tensor& rstd, const Tensor& added_, bool needs_dx) {
  const Tensor gradient = dy.contiguous(), x = x_.contiguous(), weight = weight_.contiguous();
  const Tensor added = added_.defined() ? added_.contiguous() : added_;
  const int64_t columns = weight.numel(), rows = rstd.numel();
  Gradients out;
  if (needs_dx) out.dx = Tensor::empty(x.shape(), x.dtype(), x.device());
  {
    const MemoryScope scope(MemoryCategory::workspace);
    const int64_t blocks = ask(x.device(), [&](auto device) { return norm_blocks(device, rows); });
    out.partials = Tensor::empty({blocks, 2, columns}, accumulate_dtype(x.dtype()), x.device());
  }
  launch(x.device(), op, [&](auto device) {
    dispatch_float(x.dtype(), op, [&]<class T>() {
      using A = Accumulate<T>;
      norm_backward(device, NormBackward<T>{.dy = gradient.data<T>(),
                                            .x = x.data<T>(),
                                            .weight = weight.data<T>(),
                                            .mean = mean.defined() ? mean.data<A>() : nullptr,
                                            .rstd = rstd.data<A>(),
                                            .added = added.defined() ? added.data<T>() : nullptr,
                                            .dx = needs_dx ? out.dx.data<T>() : nullptr,
                                            .partials = out.partials.data<A>(),
                                            .rows = rows,
                                            .columns = columns});
    });
  });
  return out;
}

struct Outputs {
  Tensor sum, y, mean, rstd;
};

/// All three forward passes; without residual there is no sum, and RMS norm has no mean.
Outputs norm_outputs(const char* op, const Tensor& x_, const Tensor& residual_, const Tensor& weight_,
                     const Tensor& bias_, double eps, bool centered = true) {
  const autograd::NoGrad no_grad;
  const auto row_major = [](const Tensor& tensor) { return tensor.defined() ? tensor.contiguous() : tensor; };
  const Tensor x = row_major(x_), residual = row_major(residual_), weight = row_major(weight_), bias = row_major(bias_);
  const int64_t columns = weight.numel(), rows = x.numel() / columns;
  const DType wide = accumulate_dtype(x.dtype());
  Outputs out;
  if (residual.defined()) out.sum = Tensor::empty(x.shape(), x.dtype(), x.device());
  out.y = Tensor::empty(x.shape(), x.dtype(), x.device());
  if (centered) out.mean = Tensor::empty({rows}, wide, x.device());
  out.rstd = Tensor::empty({rows}, wide, x.device());
  launch(x.device(), op, [&](auto device) {
    dispatch_float(x.dtype(), op, [&]<class T>() {
      using A = Accumulate<T>;
      norm_forward(device, NormForward<T>{.x = x.data<T>(),
                                          .residual = residual.defined() ? residual.data<T>() : nullptr,
                                          .weight = weight.data<T>(),
                                          .bias = bias.defined() ? bias.data<T>() : nullptr,
                                          .sum = residual.defined() ? out.sum.data<T>() : nullptr,
                                          .y = out.y.data<T>(),
                                          .mean = centered ? out.mean.data<A>() : nullptr,
                                          .rstd = out.rstd.data<A>(),
                                          .rows = rows,
                                          .columns = columns,
                                          .eps = eps});
    });
  });
  return out;
}

}  // namespace

Tensor layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps) {
  check_norm("layer_norm", x, weight, bias, eps);
  const Outputs out = norm_outputs("layer_norm", x, {}, weight, bias, eps);
  autograd::record(
      "layer_norm", {x, weight, bias}, {out.y}, {x, weight, out.mean, out.rstd}, [](BackwardContext& context) {
        const Tensor weight = context.saved(1);
        const Gradients gradients = norm_gradients("layer_norm", context.grad(), context.saved(0), weight,
                                                   context.saved(2), context.saved(3), {}, context.needs(0));
        if (context.needs(0)) context.set(0, gradients.dx);
        set_parameter_gradient(context, 1, gradients.partials, 0, weight);
        set_parameter_gradient(context, 2, gradients.partials, 1, weight);
      });
  return out.y;
}

ResidualNorm residual_layer_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& bias,
                                 double eps) {
  constexpr const char* kOp = "residual_layer_norm";
  check_norm(kOp, x, weight, bias, eps);
  check_same(kOp, {&x, &residual});
  if (!(x.shape() == residual.shape())) {
    fail(ErrorKind::kShape, kOp, "x is ", x.describe(), ", residual is ", residual.describe(),
         "; their shapes must be equal");
  }
  const Outputs out = norm_outputs(kOp, x, residual, weight, bias, eps);
  autograd::record(kOp, {x, residual, weight, bias}, {out.sum, out.y}, {out.sum, weight, out.mean, out.rstd},
                   [](BackwardContext& context) {
                     const Tensor& dsum = context.grad(0);
                     const Tensor& dnormed = context.grad(1);
                     const bool needs_dx = context.needs(0) || context.needs(1);
                     Tensor dx = dsum;
                     if (dnormed.defined()) {
                       const Tensor weight = context.saved(1);
                       const Gradients gradients = norm_gradients(kOp, dnormed, context.saved(0), weight,
                                                                  context.saved(2), context.saved(3), dsum, needs_dx);
                       dx = gradients.dx;
                       set_parameter_gradient(context, 2, gradients.partials, 0, weight);
                       set_parameter_gradient(context, 3, gradients.partials, 1, weight);
                     }
                     if (context.needs(0)) context.set(0, dx);
                     if (context.needs(1)) context.set(1, dx);
                   });
  return {out.sum, out.y};
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  check_norm("rms_norm", x, weight, {}, eps);
  const Outputs out = norm_outputs("rms_norm", x, {}, weight, {}, eps, false);
  autograd::record("rms_norm", {x, weight}, {out.y}, {x, weight, out.rstd}, [](BackwardContext& context) {
    const Tensor weight = context.saved(1);
    const Gradients gradients = norm_gradients("rms_norm", context.grad(), context.saved(0), weight, {},
                                               context.saved(2), {}, context.needs(0));
    if (context.needs(0)) context.set(0, gradients.dx);
    set_parameter_gradient(context, 1, gradients.partials, 0, weight);
  });
  return out.y;
}

}  // namespace weft
