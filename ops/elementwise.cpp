#include "ops/elementwise.h"

#include "core/autograd.h"
#include "ops/elementwise_checks.h"
#include "ops/elementwise_kernels.h"
#include "ops/launch.h"

namespace weft {
namespace {

using autograd::BackwardContext;
using autograd::Rule;
using detail::broadcast;
using detail::check_device;
using detail::check_float;
using scalar_math::Saved;

// ---- of one element ----

/// A tensor, or a number, with the functions that the functors of scalar_math.inc call: evaluating a derivative with it
/// puts that derivative on the tape.
class Traced {
 public:
  explicit Traced(double number) : number_(number) {}
  explicit Traced(Tensor tensor) : tensor_(std::move(tensor)) {}
  /// dy times this.
  Tensor times(const Tensor& dy) const { return tensor_.defined() ? mul(dy, tensor_) : mul(dy, number_); }

#define WEFT_TRACED_BINARY(op, function)                                                                  \
  friend Traced operator op(const Traced& a, const Traced& b) {                                           \
    if (!a.tensor_.defined() && !b.tensor_.defined()) return Traced(a.number_ op b.number_);              \
    if (!a.tensor_.defined()) return Traced(a.number_ op b.tensor_);                                      \
    return Traced(b.tensor_.defined() ? function(a.tensor_, b.tensor_) : function(a.tensor_, b.number_)); \
  }
  WEFT_TRACED_BINARY(+, add)
  WEFT_TRACED_BINARY(-, sub)
  WEFT_TRACED_BINARY(*, mul)
  WEFT_TRACED_BINARY(/, div)
#undef WEFT_TRACED_BINARY
  friend Traced operator-(const Traced& x) { return x.tensor_.defined() ? Traced(neg(x.tensor_)) : Traced(-x.number_); }
  friend Traced exp(const Traced& x) { return Traced(weft::exp(x.tensor_)); }
  friend Traced sin(const Traced& x) { return Traced(weft::sin(x.tensor_)); }
  friend Traced cos(const Traced& x) { return Traced(weft::cos(x.tensor_)); }
  friend Traced where_positive(const Traced& x, const Traced& a, const Traced& b) {
    return choose(gt(x.tensor_, 0), a, b, x.tensor_.dtype());
  }
  friend Traced where_negative(const Traced& x, const Traced& a, const Traced& b) {
    return choose(lt(x.tensor_, 0), a, b, x.tensor_.dtype());
  }

 private:
  static Traced choose(const Tensor& condition, const Traced& a, const Traced& b, DType dtype) {
    if (a.tensor_.defined() && b.tensor_.defined()) return Traced(where(condition, a.tensor_, b.tensor_));
    if (a.tensor_.defined()) return Traced(where(condition, a.tensor_, b.number_));
    if (b.tensor_.defined()) return Traced(where(condition, a.number_, b.tensor_));
    return Traced(where(condition, a.number_, Tensor::full({}, b.number_, dtype, condition.device())));
  }

  Tensor tensor_;
  double number_ = 0;
};

template <class Op>
void unary_rule(BackwardContext& context) {
  const Tensor& dy = context.grad();
  constexpr bool kSaves = Op::saved != Saved::kNothing;
  const Tensor saved = kSaves ? context.saved(0) : Tensor();
  if (autograd::grad_mode()) {
    context.set(0, Op::derivative(Traced(saved)).times(dy));
    return;
  }
  Tensor dx = Tensor::empty(dy.shape(), dy.dtype(), dy.device());
  const Operand operand = kSaves ? Operand(saved.view()) : Operand(0.0);
  launch(dx.device(), Op::name, [&](auto device) { unary_backward<Op>(device, dx.view(), dy.view(), operand); });
  context.set(0, dx);
}

template <class Op>
Tensor apply(const Tensor& x) {
  check_float(Op::name, x);
  Tensor y = Tensor::empty(x.shape(), x.dtype(), x.device());
  launch(x.device(), Op::name, [&](auto device) { unary<Op>(device, y.view(), x.view()); });
  std::vector<Tensor> saved;
  if (Op::saved != Saved::kNothing) saved.push_back(Op::saved == Saved::kInput ? x : y);
  autograd::record(Op::name, {x}, {y}, saved, unary_rule<Op>, Rule::kDifferentiable);
  return y;
}

// ---- of two elements ----

/// Both operands in the dtype of the result.
struct Pair {
  Tensor a, b;
};

Pair promoted(const char* op, const Tensor& a, const Tensor& b) {
  check_device(op, a, b);
  const DType dtype = promote(a.dtype(), b.dtype());
  return {a.to(dtype), b.to(dtype)};
}

template <class Op>
Tensor apply(const Tensor& a, const Tensor& b) {
  Tensor y = Tensor::empty(broadcast_shapes(a.shape(), b.shape(), Op::name), a.dtype(), a.device());
  launch(y.device(), Op::name, [&](auto device) {
    binary<Op>(device, y.view(), broadcast(Op::name, a, y.shape()), broadcast(Op::name, b, y.shape()));
  });
  return y;
}

template <class Op>
Tensor apply(const Tensor& a, double b) {
  check_float(Op::name, a);
  Tensor y = Tensor::empty(a.shape(), a.dtype(), a.device());
  launch(y.device(), Op::name, [&](auto device) { binary<Op>(device, y.view(), a.view(), b); });
  return y;
}

template <class Op>
Tensor apply(double a, const Tensor& b) {
  check_float(Op::name, b);
  Tensor y = Tensor::empty(b.shape(), b.dtype(), b.device());
  launch(y.device(), Op::name, [&](auto device) { binary<Op>(device, y.view(), a, b.view()); });
  return y;
}

/// Promotes, checks, computes and records; `rule` sets the gradients of a and b.
template <class Op>
Tensor two(const Tensor& a_, const Tensor& b_, bool saves_a, bool saves_b, bool saves_y, autograd::BackwardRule rule) {
  const auto [a, b] = promoted(Op::name, a_, b_);
  check_float(Op::name, a);
  Tensor y = apply<Op>(a, b);
  std::vector<Tensor> saved;
  if (saves_a) saved.push_back(a);
  if (saves_b) saved.push_back(b);
  if (saves_y) saved.push_back(y);
  autograd::record(Op::name, {a, b}, {y}, saved, std::move(rule), Rule::kDifferentiable);
  return y;
}

template <class Op>
Tensor with_number(const Tensor& a, double b, autograd::BackwardRule rule, bool saves_a = false) {
  Tensor y = apply<Op>(a, b);
  autograd::record(Op::name, {a}, {y}, saves_a ? std::vector<Tensor>{a} : std::vector<Tensor>{}, std::move(rule),
                   Rule::kDifferentiable);
  return y;
}

/// The gradient goes to a where `first` holds, else to b.
template <class Op>
Tensor extreme(const Tensor& a, const Tensor& b, Tensor (*first)(const Tensor&, const Tensor&)) {
  return two<Op>(a, b, true, true, false, [first](BackwardContext& context) {
    const Tensor from_a = first(context.saved(0), context.saved(1));
    if (context.needs(0)) context.set(0, where(from_a, context.grad(), 0));
    if (context.needs(1)) context.set(1, where(from_a, 0, context.grad()));
  });
}

template <class Op>
Tensor extreme(const Tensor& a, double b, Tensor (*first)(const Tensor&, double)) {
  return with_number<Op>(
      a, b,
      [b, first](BackwardContext& context) { context.set(0, where(first(context.saved(0), b), context.grad(), 0)); },
      true);
}

void pass(BackwardContext& context) { context.set(0, context.grad()); }

}  // namespace

#define WEFT_UNARY(Op, function) \
  Tensor function(const Tensor& x) { return apply<scalar_math::Op>(x); }
#include "ops/op_list.def"

Tensor add(const Tensor& a, const Tensor& b) {
  return two<scalar_math::Add>(a, b, false, false, false, [](BackwardContext& context) {
    if (context.needs(0)) context.set(0, context.grad());
    if (context.needs(1)) context.set(1, context.grad());
  });
}
Tensor add(const Tensor& a, double b) { return with_number<scalar_math::Add>(a, b, pass); }

Tensor sub(const Tensor& a, const Tensor& b) {
  return two<scalar_math::Sub>(a, b, false, false, false, [](BackwardContext& context) {
    if (context.needs(0)) context.set(0, context.grad());
    if (context.needs(1)) context.set(1, neg(context.grad()));
  });
}
Tensor sub(const Tensor& a, double b) { return with_number<scalar_math::Sub>(a, b, pass); }
Tensor sub(double a, const Tensor& b) {
  Tensor y = apply<scalar_math::Sub>(a, b);
  autograd::record(
      "sub", {b}, {y}, {}, [](BackwardContext& context) { context.set(0, neg(context.grad())); },
      Rule::kDifferentiable);
  return y;
}

Tensor mul(const Tensor& a, const Tensor& b) {
  return two<scalar_math::Mul>(a, b, true, true, false, [](BackwardContext& context) {
    if (context.needs(0)) context.set(0, mul(context.grad(), context.saved(1)));
    if (context.needs(1)) context.set(1, mul(context.grad(), context.saved(0)));
  });
}
Tensor mul(const Tensor& a, double b) {
  return with_number<scalar_math::Mul>(a, b, [b](BackwardContext& context) { context.set(0, mul(context.grad(), b)); });
}

Tensor div(const Tensor& a, const Tensor& b) {
  return two<scalar_math::Div>(a, b, false, true, true, [](BackwardContext& context) {
    const Tensor da = div(context.grad(), context.saved(0));
    if (context.needs(0)) context.set(0, da);
    if (context.needs(1)) context.set(1, neg(mul(da, context.saved(1))));
  });
}
Tensor div(const Tensor& a, double b) {
  return with_number<scalar_math::Div>(a, b, [b](BackwardContext& context) { context.set(0, div(context.grad(), b)); });
}
Tensor div(double a, const Tensor& b) {
  Tensor y = apply<scalar_math::Div>(a, b);
  autograd::record(
      "div", {b}, {y}, {b, y},
      [](BackwardContext& context) {
        context.set(0, neg(mul(div(context.grad(), context.saved(0)), context.saved(1))));
      },
      Rule::kDifferentiable);
  return y;
}

Tensor maximum(const Tensor& a, const Tensor& b) { return extreme<scalar_math::Maximum>(a, b, ge); }
Tensor maximum(const Tensor& a, double b) { return extreme<scalar_math::Maximum>(a, b, ge); }
Tensor minimum(const Tensor& a, const Tensor& b) { return extreme<scalar_math::Minimum>(a, b, le); }
Tensor minimum(const Tensor& a, double b) { return extreme<scalar_math::Minimum>(a, b, le); }

Tensor clamp(const Tensor& x, double low, double high) {
  if (!(low <= high)) fail(ErrorKind::kValue, "clamp", "low must not be above high, got ", low, " and ", high);
  return minimum(maximum(x, low), high);
}

// ---- in place ----

namespace {

/// y in x's dtype, after the checks that all changes in place have in common.
Tensor source_of_change(const char* op, const Tensor& x, const Tensor& y) {
  check_float(op, x);
  check_device(op, x, y);
  if (!(x.shape() == y.shape())) {
    fail(ErrorKind::kShape, op, "shapes must be equal in place: the target is ", x.describe(), ", the other tensor ",
         y.describe(), ". Hint: expand() it");
  }
  if (autograd::grad_mode() && y.requires_grad()) {
    fail(ErrorKind::kState, op, "no gradient is recorded in place, and the other tensor (", y.describe(),
         ") requires one. Hint: do it under NoGrad, or detach() that tensor");
  }
  return y.to(x.dtype());
}

/// A tensor that reads `y` after x has been written must not share memory with x in another order.
bool same_elements(const Tensor& x, const Tensor& y) { return x.raw() == y.raw() && x.strides() == y.strides(); }

Tensor apart(const Tensor& x, const Tensor& y) {
  return x.storage() == y.storage() && !same_elements(x, y) ? y.clone() : y;
}

}  // namespace

const Tensor& add_(const Tensor& x, const Tensor& y, double alpha) {
  const Tensor source = apart(x, source_of_change("add_", x, y));
  x.begin_change("add_");
  launch(x.device(), "add_", [&](auto device) { add_scaled(device, x.view(), x.view(), source.view(), alpha); });
  return x;
}

const Tensor& add_(const Tensor& x, double value) {
  check_float("add_", x);
  x.begin_change("add_");
  launch(x.device(), "add_", [&](auto device) { binary<scalar_math::Add>(device, x.view(), x.view(), value); });
  return x;
}

const Tensor& mul_(const Tensor& x, const Tensor& y) {
  const Tensor source = apart(x, source_of_change("mul_", x, y));
  x.begin_change("mul_");
  launch(x.device(), "mul_", [&](auto device) { binary<scalar_math::Mul>(device, x.view(), x.view(), source.view()); });
  return x;
}

const Tensor& mul_(const Tensor& x, double value) {
  check_float("mul_", x);
  x.begin_change("mul_");
  launch(x.device(), "mul_", [&](auto device) { binary<scalar_math::Mul>(device, x.view(), x.view(), value); });
  return x;
}

}  // namespace weft
