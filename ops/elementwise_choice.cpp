// Comparison of elements, and choice between them.
#include "core/autograd.h"
#include "ops/elementwise.h"
#include "ops/elementwise_checks.h"
#include "ops/elementwise_kernels.h"
#include "ops/launch.h"

namespace weft {
namespace {

using autograd::BackwardContext;
using autograd::Rule;
using detail::broadcast;
using detail::check_device;

void check_ordered(const char* op, DType dtype) {
  if (dtype == DType::f8e4m3 || dtype == DType::f8e5m2) {
    fail(ErrorKind::kDType, op, "does not take ", dtype, ", which is for storage. Hint: cast with .to(DType::f32)");
  }
}

Tensor compared(const char* op, Comparison comparison, const Tensor& a_, const Tensor& b_) {
  const autograd::NoGrad no_grad;
  check_device(op, a_, b_);
  const DType dtype = promote(a_.dtype(), b_.dtype());
  check_ordered(op, dtype);
  const Tensor a = a_.to(dtype), b = b_.to(dtype);
  Tensor y = Tensor::empty(broadcast_shapes(a.shape(), b.shape(), op), DType::boolean, a.device());
  launch(y.device(), op, [&](auto device) {
    compare(device, comparison, y.view(), broadcast(op, a, y.shape()), broadcast(op, b, y.shape()));
  });
  return y;
}

Tensor compared(const char* op, Comparison comparison, const Tensor& a, double b) {
  check_ordered(op, a.dtype());
  Tensor y = Tensor::empty(a.shape(), DType::boolean, a.device());
  launch(y.device(), op, [&](auto device) { compare(device, comparison, y.view(), a.view(), b); });
  return y;
}

/// A tensor or a number to choose.
struct Choice {
  Tensor tensor;
  double number = 0;
  Operand operand(const Shape& shape) const {
    return tensor.defined() ? Operand(broadcast("where", tensor, shape)) : Operand(number);
  }
};

Tensor chosen(const Tensor& condition, const Choice& a, const Choice& b) {
  if (condition.dtype() != DType::boolean) {
    fail(ErrorKind::kDType, "where", "the condition must be bool, got ", condition.describe(),
         ". Hint: compare it, as in gt(x, 0)");
  }
  Shape shape = condition.shape();
  for (const Tensor* tensor : {&a.tensor, &b.tensor}) {
    if (!tensor->defined()) continue;
    check_device("where", condition, *tensor);
    shape = broadcast_shapes(shape, tensor->shape(), "where");
  }
  Tensor y = Tensor::empty(shape, (a.tensor.defined() ? a : b).tensor.dtype(), condition.device());
  dispatch_float(y.dtype(), "where", []<class T>() {});
  launch(y.device(), "where", [&](auto device) {
    select(device, y.view(), broadcast("where", condition, shape), a.operand(shape), b.operand(shape));
  });
  autograd::record(
      "where", {a.tensor, b.tensor}, {y}, {condition},
      [](BackwardContext& context) {
        if (context.needs(0)) context.set(0, where(context.saved(0), context.grad(), 0));
        if (context.needs(1)) context.set(1, where(context.saved(0), 0, context.grad()));
      },
      Rule::kDifferentiable);
  return y;
}

}  // namespace

#define WEFT_COMPARISON(function, comparison)                                                                     \
  Tensor function(const Tensor& a, const Tensor& b) { return compared(#function, Comparison::comparison, a, b); } \
  Tensor function(const Tensor& a, double b) { return compared(#function, Comparison::comparison, a, b); }
WEFT_COMPARISON(eq, kEq)
WEFT_COMPARISON(ne, kNe)
WEFT_COMPARISON(lt, kLt)
WEFT_COMPARISON(le, kLe)
WEFT_COMPARISON(gt, kGt)
WEFT_COMPARISON(ge, kGe)
#undef WEFT_COMPARISON

Tensor where(const Tensor& condition, const Tensor& a, const Tensor& b) {
  check_device("where", a, b);
  const DType dtype = promote(a.dtype(), b.dtype());
  return chosen(condition, {.tensor = a.to(dtype)}, {.tensor = b.to(dtype)});
}
Tensor where(const Tensor& condition, const Tensor& a, double b) {
  return chosen(condition, {.tensor = a}, {.tensor = {}, .number = b});
}
Tensor where(const Tensor& condition, double a, const Tensor& b) {
  return chosen(condition, {.tensor = {}, .number = a}, {.tensor = b});
}

Tensor masked_fill(const Tensor& x, const Tensor& mask, double value) {
  if (!broadcastable_to(mask.shape(), x.shape())) {
    fail(ErrorKind::kShape, "masked_fill", "the mask must broadcast to x: x is ", x.describe(), ", the mask ",
         mask.describe());
  }
  return where(mask, value, x);
}

}  // namespace weft
