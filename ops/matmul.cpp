#include "ops/matmul.h"

#include <memory>
#include <utility>

#include "core/autograd.h"
#include "ops/column_sum.h"
#include "ops/elementwise.h"
#include "ops/gemm.h"
#include "ops/gemm_sums.h"
#include "ops/gemm_types.h"
#include "ops/launch.h"
#include "ops/reduce.h"

namespace weft {
namespace {

using autograd::BackwardContext;
using autograd::Rule;

void check_float(const char* op, const Tensor& x) {
  dispatch_float(x.dtype(), op, []<class T>() {});
}

/// Product of all sizes but the last: the rows of a tensor read as a matrix.
int64_t row_count(const Shape& shape) {
  int64_t rows = 1;
  for (int d = 0; d + 1 < shape.rank(); ++d) rows *= shape[d];
  return rows;
}

/// The last two dimensions of `x` as gemm() takes them; a copy first if neither has unit stride.
Tensor with_unit_stride(const Tensor& x) {
  const int64_t rows = x.size(-2), columns = x.size(-1), row = x.strides()[x.rank() - 2], column = x.strides().back();
  const bool fits = (column == 1 || columns <= 1) || (row == 1 || rows <= 1);
  return fits && row >= 0 && column >= 0 ? x : x.contiguous();
}

template <class T>
MatrixRef<T> matrix(const Tensor& x) {
  int64_t row = x.strides()[x.rank() - 2], column = x.strides().back();
  // A single row or column may have any stride in its dimension of size 1: name the unit stride.
  if (column != 1 && row != 1) (x.size(-1) <= 1 ? column : row) = 1;
  return {static_cast<const T*>(x.raw()), row, column};
}

/// What a product does beside multiplying.
struct Extras {
  bool accumulate = false;  ///< adds to what C holds
  Tensor bias = {};         ///< is added to each row, if defined
  Tensor gelu_input = {};   ///< if defined, C contiguous: the product is multiplied by gelu' of it
  Tensor a_sums = {};       ///< if defined: takes the sums of A's rows, on CUDA and in 16 bits
};

/// c[b] = a[b] * b[b] over matrices [batch, ., .]; c contiguous; f32, f64, bf16, on CUDA f16.
void product(const Tensor& a_, const Tensor& b_, const Tensor& c, const Extras& extras = {}) {
  const autograd::NoGrad no_grad;
  const Tensor a = with_unit_stride(a_), b = with_unit_stride(b_);
  launch(c.device(), "matmul", [&]<class On>(On device) {
    dispatch_gemm(device, c.dtype(), [&]<class Element>() {
      using T = GemmType<Element>;
      Gemm<T> g;
      g.m = c.size(-2), g.n = c.size(-1), g.k = a.size(-1);
      g.a = matrix<T>(a), g.b = matrix<T>(b);
      g.c = static_cast<T*>(c.raw()), g.ldc = c.size(-1);
      g.beta = extras.accumulate ? 1 : 0;
      g.tf32 = AllowTf32::active();
      const Tensor& bias = extras.bias;
      if (bias.defined() && size_of(bias.dtype()) == 2) {
        g.bias_of_c = static_cast<const T*>(bias.raw());
      } else if (bias.defined()) {
        g.bias = bias.data<typename Gemm<T>::Sum>();
      }
      if (extras.gelu_input.defined()) {
        g.activation = GemmActivation::kGeluGrad;
        g.aux = static_cast<const T*>(extras.gelu_input.raw()), g.ldaux = g.n;
      }
      if constexpr (std::is_same_v<On, Cuda> && sizeof(T) == 2) {
        if (extras.a_sums.defined()) return gemm_with_sums(device, g, static_cast<T*>(extras.a_sums.raw()));
      }
      if (c.rank() == 2) return gemm(device, g);
      gemm_batched(device, g, {.count = c.size(0), .a = a.strides()[0], .b = b.strides()[0], .c = g.m * g.n});
    });
  });
}

/// A tensor as a matrix of its last dimension: a view if it is contiguous.
Tensor rows_of(const Tensor& x) {
  const autograd::NoGrad no_grad;
  return x.reshape({row_count(x.shape()), x.size(-1)});
}

void check_affine(const char* op, const Tensor& x, const Tensor& weight, const Tensor& bias) {
  check_same(op, {&x, &weight, &bias});
  check_float(op, x);
  if (weight.rank() != 2 || x.rank() < 1 || x.size(-1) != weight.size(1)) {
    fail(ErrorKind::kShape, op, "the last dimension of x must be the weight's second: x is ", x.describe(),
         ", weight is ", weight.describe());
  }
  if (bias.defined() && !(bias.shape() == Shape{weight.size(0)})) {
    fail(ErrorKind::kShape, op, "weight is ", weight.describe(), ", bias is ", bias.describe(), "; expected bias [",
         weight.size(0), "]");
  }
}

/// x W^T + b, not recorded.
Tensor affine(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const autograd::NoGrad no_grad;
  Shape shape = x.shape();
  shape[x.rank() - 1] = weight.size(0);
  const Tensor out = Tensor::empty(shape, x.dtype(), x.device());
  const Tensor sum_bias = !bias.defined()                                                  ? bias
                          : x.dtype() == DType::bf16 && x.device().kind == DeviceKind::cpu ? bias.to(DType::f32)
                                                                                           : bias.contiguous();
  product(rows_of(x), weight.transpose(0, 1), rows_of(out), {.bias = sum_bias});
  return out;
}

/// The gradients of weight and bias, inputs 1 and 2 of a rule, of x W^T + b; `gradient` is that of its rows. On CUDA,
/// in 16 bits, both come from one product, which adds up the rows that it reads.
void parameter_gradients(BackwardContext& context, const Tensor& x, const Tensor& gradient) {
  const int64_t rows = gradient.size(0), out_features = gradient.size(1);
  const bool on_cuda = x.device().kind == DeviceKind::cuda, narrow = size_of(x.dtype()) == 2;
  const auto sums = std::make_shared<Tensor>();
  const bool beside = on_cuda && narrow && context.needs(1) && context.needs(2);
  if (context.needs(1)) {
    context.compute(1, [=](const std::optional<BackwardContext::Sink>& sink) {
      const Tensor dw = sink ? sink->tensor : Tensor::empty({out_features, x.size(-1)}, x.dtype(), x.device());
      if (beside) *sums = Tensor::empty({out_features}, x.dtype(), x.device());
      product(gradient.transpose(0, 1), rows_of(x), dw, {.accumulate = sink && sink->accumulate, .a_sums = *sums});
      return dw;
    });
  }
  if (!context.needs(2)) return;
  if (on_cuda && narrow) {
    context.compute(2, [=](const std::optional<BackwardContext::Sink>& sink) {
      // Not there if the weight's gradient is put off and this one is not.
      const Tensor db = sums->defined() ? std::exchange(*sums, {}) : weft::sum(gradient, {0});
      if (!sink) return db;
      Tensor to = sink->tensor;
      return sink->accumulate ? add_(to, db) : to.copy_(db);
    });
    return;
  }
  if (narrow) {  // many rows add up to one number: sum in f32 and round once
    Tensor sum = Tensor::empty({out_features}, DType::f32, x.device());
    launch(x.device(), context.op(), [&](auto) {
      column_sum(Cpu(), gradient.data<BFloat16>(), rows, out_features, out_features, sum.data<float>(), false);
    });
    return context.set(2, sum.to(x.dtype()));
  }
  const auto sink = context.sink(2);
  Tensor db = sink ? sink->tensor : Tensor::empty({out_features}, x.dtype(), x.device());
  launch(x.device(), context.op(), [&](auto device) {
    const auto sum = [&]<class T>() {
      column_sum(device, gradient.data<T>(), rows, out_features, out_features, db.data<T>(), sink && sink->accumulate);
    };
    x.dtype() == DType::f64 ? sum.template operator()<double>() : sum.template operator()<float>();
  });
  if (!sink) context.set(2, db);
}

thread_local bool tf32_allowed = false;

}  // namespace

AllowTf32::AllowTf32() : previous_(std::exchange(tf32_allowed, true)) {}
AllowTf32::~AllowTf32() { tf32_allowed = previous_; }
bool AllowTf32::active() { return tf32_allowed; }

Tensor matmul(const Tensor& a, const Tensor& b) {
  check_same("matmul", {&a, &b});
  check_float("matmul", a);
  if (a.rank() < 2 || b.rank() < 2 || a.size(-1) != b.size(-2)) {
    fail(ErrorKind::kShape, "matmul", "needs [..., M, K] and [..., K, N], got ", a.describe(), " and ", b.describe());
  }
  if (gemm_widens(a.dtype(), a.device().kind)) return matmul(a.to(DType::f32), b.to(DType::f32)).to(DType::f16);
  if (b.rank() == 2 && a.rank() > 2) {  // one large product instead of many small ones
    Shape shape = a.shape();
    shape[a.rank() - 1] = b.size(1);
    return matmul(a.reshape({row_count(a.shape()), a.size(-1)}), b).reshape(shape);
  }
  Shape batch_a = a.shape(), batch_b = b.shape();
  for (Shape* shape : {&batch_a, &batch_b}) shape->erase(shape->rank() - 1), shape->erase(shape->rank() - 1);
  const Shape batch = broadcast_shapes(batch_a, batch_b, "matmul");
  const int64_t count = numel(batch);
  Shape shape = batch;
  shape.push_back(a.size(-2));
  shape.push_back(b.size(-1));
  Tensor out = Tensor::empty(shape, a.dtype(), a.device());
  const auto flat = [&](const Tensor& x) {
    const autograd::NoGrad no_grad;
    if (batch.empty()) return x;
    Shape full = batch;
    full.push_back(x.size(-2));
    full.push_back(x.size(-1));
    return x.expand(full).reshape({count, x.size(-2), x.size(-1)});
  };
  product(flat(a), flat(b), batch.empty() ? out : out.detach().reshape({count, a.size(-2), b.size(-1)}));
  autograd::record(
      "matmul", {a, b}, {out}, {a, b},
      [](BackwardContext& context) {
        if (context.needs(0)) context.set(0, matmul(context.grad(), context.saved(1).transpose(-1, -2)));
        if (context.needs(1)) context.set(1, matmul(context.saved(0).transpose(-1, -2), context.grad()));
      },
      Rule::kDifferentiable);
  return out;
}

Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  check_affine("linear", x, weight, bias);
  if (gemm_widens(x.dtype(), x.device().kind)) {
    return linear(x.to(DType::f32), weight.to(DType::f32), bias.defined() ? bias.to(DType::f32) : bias).to(DType::f16);
  }
  const Tensor out = affine(x, weight, bias);
  autograd::record("linear", {x, weight, bias}, {out}, {x, weight}, [](BackwardContext& context) {
    const Tensor x = context.saved(0), weight = context.saved(1), gradient = rows_of(context.grad().contiguous());
    if (context.needs(0)) {
      Tensor dx = Tensor::empty(x.shape(), x.dtype(), x.device());
      product(gradient, weight, rows_of(dx));
      context.set(0, dx);
    }
    parameter_gradients(context, x, gradient);
  });
  return out;
}

Tensor gelu_linear(const Tensor& x, const Tensor& weight, const Tensor& bias, autograd::Keep keep) {
  constexpr const char* kOp = "gelu_linear";
  check_affine(kOp, x, weight, bias);
  // The CPU's products have this epilogue too, but a step with it is no faster than one with a pass of its own.
  const bool fused = x.device().kind == DeviceKind::cuda;
  const Tensor activated = gelu(fused ? x.detach() : x);
  if (keep == autograd::Keep::kRecipe)
    autograd::remade("gelu", activated, [](const std::vector<Tensor>& in) { return gelu(in[0]); }, {x});
  if (!fused) return linear(activated, weight, bias);
  const Tensor out = affine(activated, weight, bias);
  autograd::record(kOp, {x, weight, bias}, {out}, {activated, weight, x}, [](BackwardContext& context) {
    const Tensor activated = context.saved(0), weight = context.saved(1), x = context.saved(2);
    const Tensor gradient = rows_of(context.grad().contiguous());
    if (context.needs(0)) {
      Tensor dx = Tensor::empty(x.shape(), x.dtype(), x.device());
      product(gradient, weight, rows_of(dx), {.gelu_input = rows_of(x.contiguous())});
      context.set(0, dx);
    }
    parameter_gradients(context, activated, gradient);
  });
  return out;
}

}  // namespace weft
