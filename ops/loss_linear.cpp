#include <algorithm>
#include <type_traits>

#include "core/autograd.h"
#include "ops/gemm.h"
#include "ops/gemm_types.h"
#include "ops/launch.h"
#include "ops/loss.h"
#include "ops/loss_kernels.h"
#include "ops/loss_targets.h"
#include "ops/matmul.h"

namespace weft {
namespace {

using autograd::BackwardContext;
constexpr const char* kOp = "linear_cross_entropy";

/// One chunk of the head on plain memory: x [rows, channels], weight [classes, channels], logits [rows, classes], which
/// loss_in_place() turns into their gradient.
template <class T, class OnDevice>
struct Head {
  using A = Accumulate<T>;
  using G = GemmType<T>;
  /// Elements of T from one row of the logits' gradient to the next: it lies where the wider logits were.
  static constexpr int64_t kWiden = sizeof(A) / sizeof(T);

  OnDevice device;
  const T* weight;
  int64_t channels, classes;

  static const G* bits(const T* p) { return reinterpret_cast<const G*>(p); }
  static G* bits(T* p) { return reinterpret_cast<G*>(p); }
  const G* gradient(const A* logits) const { return reinterpret_cast<const G*>(logits); }

  /// logits = x W^T
  void forward(const T* x, int64_t rows, A* logits) const {
    auto product = make_gemm<G, G, A>(false, true, rows, classes, channels, bits(x), channels, bits(weight), channels,
                                      logits, classes);
    product.tf32 = AllowTf32::active();
    gemm(device, product);
  }
  /// dx = scale * gradient W, as A or rounded to G. `scale` is where the device keeps it; null: 1.
  template <class Out>
  void input_gradient(const A* logits, int64_t rows, const A* scale, Out* dx) const {
    auto product = make_gemm<G, G, Out>(false, false, rows, channels, classes, gradient(logits), kWiden * classes,
                                        bits(weight), channels, dx, channels);
    product.scale = scale;
    product.tf32 = AllowTf32::active();
    gemm(device, product);
  }
  /// dW = scale * gradient^T x (+ dW), as A or rounded to G.
  template <class Out>
  void weight_gradient(const A* logits, const T* x, int64_t rows, const A* scale, Out* dw, bool accumulate) const {
    auto product = make_gemm<G, G, Out>(true, false, classes, channels, rows, gradient(logits), kWiden * classes,
                                        bits(x), channels, dw, channels, 1, accumulate ? 1 : 0);
    product.scale = scale;
    product.tf32 = AllowTf32::active();
    gemm(device, product);
  }
};

/// @throws Error unless the weight's classes are a slice as it is said.
void check_slice(const ClassSlice& slice, const Tensor& weight) {
  if (slice.first < 0 || slice.first > slice.all - weight.size(0) || slice.most < weight.size(0) || !slice.gather) {
    fail(ErrorKind::kValue, kOp,
         "a slice needs a function that gathers, must lie within all classes and have no more than the largest; the "
         "weight is ",
         weight.describe(), " from class ", slice.first, " on, of ", slice.all, ", and the largest has ", slice.most);
  }
}

/// The losses of a chunk `held` whose classes are a slice, and if `scale` is given the gradient of its logits in their
/// place.
template <class T, class OnDevice>
void slice_losses(OnDevice device, const ClassSlice& slice, const LossTargets& targets, const Tensor& held,
                  const LossScale<Accumulate<T>>* scale, double* losses) {
  using A = Accumulate<T>;
  const MemoryScope scope(MemoryCategory::workspace);
  A* const logits = held.data<A>();
  const Tensor own = Tensor::empty({targets.rows, 2}, DType::f64, held.device()),
               lse = Tensor::empty({targets.rows}, held.dtype(), held.device());
  loss_parts(device, targets, slice.first, logits, own.data<double>());
  const Tensor parts = slice.gather(own);
  const int64_t slices = parts.numel() / own.numel();
  join_loss_parts(device, targets, slices, parts.data<double>(), lse.data<A>(), losses);
  if (scale != nullptr) loss_slice_in_place<T>(device, targets, slice.first, lse.data<A>(), losses, logits, *scale);
}

/// The gradient of the logits was kept: both products go straight to where they belong.
void backward_of_one_chunk(BackwardContext& context) {
  const Tensor x = context.saved(0).contiguous(), weight = context.saved(1).contiguous(), dlogits = context.saved(2);
  const Tensor gradient = context.grad();
  const int64_t classes = weight.size(0), channels = weight.size(1), rows = dlogits.size(0);
  Tensor dx, dw;
  bool accumulate = false;
  if (context.needs(0)) context.set(0, dx = Tensor::empty(x.shape(), x.dtype(), x.device()));
  if (context.needs(1)) {
    const auto sink = context.sink(1);
    accumulate = sink && sink->accumulate;
    dw = sink ? sink->tensor : Tensor::empty({classes, channels}, weight.dtype(), weight.device());
    if (!sink) context.set(1, dw);
  }
  launch(x.device(), kOp, [&](auto device) {
    dispatch_gemm(device, x.dtype(), [&]<class T>() {
      using A = Accumulate<T>;
      const Head<T, decltype(device)> head{device, weight.data<T>(), channels, classes};
      const A* scale = gradient.data<A>();
      if (dx.defined()) head.input_gradient(dlogits.data<A>(), rows, scale, head.bits(dx.data<T>()));
      if (dw.defined()) {
        head.weight_gradient(dlogits.data<A>(), x.data<T>(), rows, scale, head.bits(dw.data<T>()), accumulate);
      }
    });
  });
}

/// The forward pass has formed dx and dW already: they are scaled on their way to where they belong.
void backward_of_chunks(BackwardContext& context, DType dtype) {
  const Tensor gradient = context.grad();
  for (const int i : {0, 1}) {
    if (!context.needs(i)) continue;
    const Tensor made = context.saved(i);
    const auto sink = context.sink(i);
    const Tensor out = sink ? sink->tensor : Tensor::empty(made.shape(), dtype, made.device());
    launch(made.device(), kOp, [&](auto device) {
      dispatch_gemm(device, dtype, [&]<class T>() {
        using A = Accumulate<T>;
        scale_to(device, made.data<A>(), made.numel(), gradient.data<A>(), out.data<T>(), sink && sink->accumulate);
      });
    });
    if (!sink) context.set(i, out);
  }
}

}  // namespace

int64_t linear_cross_entropy_rows(int64_t rows, int64_t channels, int64_t classes) {
  constexpr int64_t kLogits = (int64_t{16} << 20) / 4, kFewest = 256;
  const int64_t chunk = std::max(kFewest, kLogits / std::max<int64_t>(1, classes));
  return rows - chunk <= channels ? rows : chunk;
}

Tensor linear_cross_entropy(const Tensor& x_, const Tensor& weight_, const Tensor& targets_,
                            const LinearCrossEntropyOptions& options) {
  check_same(kOp, {&x_, &weight_});
  dispatch_float(x_.dtype(), kOp, []<class T>() {});
  if (x_.rank() < 1 || weight_.rank() != 2 || weight_.size(1) != x_.size(-1) || weight_.size(0) == 0) {
    fail(ErrorKind::kShape, kOp, "needs x [..., C] and weight [V, C] with V >= 1, got x ", x_.describe(),
         " and weight ", weight_.describe());
  }
  if (options.chunk_rows < 0) fail(ErrorKind::kValue, kOp, "chunk_rows must not be negative, got ", options.chunk_rows);
  if (options.slice) check_slice(*options.slice, weight_);
  if (gemm_widens(x_.dtype(), x_.device().kind)) {
    return linear_cross_entropy(x_.to(DType::f32), weight_.to(DType::f32), targets_, options);
  }
  const int64_t classes = weight_.size(0), channels = weight_.size(1);
  const bool needs_dx = autograd::needed({&x_}), needs_dw = autograd::needed({&weight_}),
             training = needs_dx || needs_dw;
  const DType wide = x_.dtype() == DType::f64 ? DType::f64 : DType::f32;
  const Device device = x_.device();
  Tensor targets, losses, denominator, logits, dx, dw;
  Tensor out = Tensor::empty({}, wide, device);
  bool one_chunk = false;
  {
    const autograd::NoGrad no_grad;
    targets = checked_targets(kOp, x_, targets_, options);
    const Tensor x = x_.contiguous(), weight = weight_.contiguous();
    const int64_t rows = targets.numel(), most = options.slice ? options.slice->most : classes;
    const int64_t chunk =
        std::min(rows, options.chunk_rows > 0 ? options.chunk_rows : linear_cross_entropy_rows(rows, channels, most));
    one_chunk = chunk == rows;
    const bool form_gradients = training && !one_chunk;
    if (form_gradients && needs_dx) dx = Tensor::empty(x.shape(), wide, device);
    if (form_gradients && needs_dw) dw = Tensor::empty(weight.shape(), wide, device);
    {
      const MemoryScope scope(training && one_chunk ? MemoryScope::current() : MemoryCategory::workspace);
      logits = Tensor::empty({chunk, classes}, wide, device);
    }
    {
      const MemoryScope scope(MemoryCategory::workspace);
      losses = Tensor::empty({rows}, DType::f64, device);
      denominator = Tensor::empty({}, DType::f64, device);
    }
    launch(device, kOp, [&](auto on) {
      const LossTargets all{targets.data<int64_t>(), rows, options.slice ? options.slice->all : classes,
                            options.ignore_index};
      loss_denominator(on, kOp, all, known_denominator(options), denominator.data<double>());
      dispatch_gemm(on, x.dtype(), [&]<class T>() {
        using A = Accumulate<T>;
        const Head<T, decltype(on)> head{on, weight.data<T>(), channels, classes};
        A* const held = logits.data<A>();
        for (int64_t begin = 0; begin < rows; begin += chunk) {
          const int64_t count = std::min(chunk, rows - begin);
          const T* part = x.data<T>() + begin * channels;
          const LossTargets some{all.targets + begin, count, classes, all.ignored};
          double* some_losses = losses.data<double>() + begin;
          head.forward(part, count, held);
          const LossScale<A> scale{denominator.data<double>()};
          if (options.slice) {
            slice_losses<T>(on, *options.slice, some, logits, training ? &scale : nullptr, some_losses);
          } else if (!training) {
            loss_forward(on, some, held, static_cast<A*>(nullptr), some_losses);
          } else {
            loss_in_place<T>(on, some, held, scale, some_losses);
          }
          if (dx.defined()) head.input_gradient(held, count, nullptr, dx.data<A>() + begin * channels);
          if (dw.defined()) head.weight_gradient(held, part, count, nullptr, dw.data<A>(), begin > 0);
        }
        reduce_losses(on, losses.data<double>(), rows, denominator.data<double>(), out.data<A>());
      });
    });
  }
  if (one_chunk) {
    autograd::record(kOp, {x_, weight_, targets_}, {out}, {x_, weight_, logits}, backward_of_one_chunk);
  } else {
    autograd::record(kOp, {x_, weight_, targets_}, {out}, {dx, dw},
                     [dtype = x_.dtype()](BackwardContext& context) { backward_of_chunks(context, dtype); });
  }
  return out;
}

}  // namespace weft
