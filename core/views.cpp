// Views and copies of tensors, with their backward rules.
#include <algorithm>
#include <numeric>

#include "core/autograd.h"
#include "core/tensor.h"

namespace weft {
namespace {

using autograd::BackwardContext;
using autograd::Rule;

Tensor recorded_view(const char* op, const Tensor& base, Tensor view, autograd::BackwardRule rule) {
  autograd::record(op, {base}, {view}, {}, std::move(rule), Rule::kDifferentiable);
  return view;
}

/// Zeros of `shape` whose slice is `part`: what takes a gradient back through slice(), and slice() takes one back
/// through it.
Tensor unslice(const Tensor& part, const Shape& shape, int dim, int64_t start, int64_t stop, int64_t step) {
  Tensor full = Tensor::zeros(shape, part.dtype(), part.device());
  {
    const autograd::NoGrad no_grad;
    full.slice(dim, start, stop, step).copy_(part);
  }
  autograd::record(
      "unslice", {part}, {full}, {},
      [=](BackwardContext& context) { context.set(0, context.grad().slice(dim, start, stop, step)); },
      Rule::kDifferentiable);
  return full;
}

/// Strides with which a tensor reads as `shape` without copying, if there are any: dimensions are matched in groups of
/// equal products, and inside a group the old strides must be mergeable.
std::optional<Strides> view_strides(const Tensor& tensor, const Shape& shape) {
  if (tensor.numel() == 0 || tensor.is_contiguous()) return contiguous_strides(shape);
  Shape sizes;
  Strides strides;
  for (int d = 0; d < tensor.rank(); ++d) {
    if (tensor.shape()[d] == 1) continue;
    const int last = sizes.rank() - 1;
    if (last >= 0 && strides[last] == tensor.strides()[d] * tensor.shape()[d]) {
      sizes[last] *= tensor.shape()[d];
      strides[last] = tensor.strides()[d];
    } else {
      sizes.push_back(tensor.shape()[d]);
      strides.push_back(tensor.strides()[d]);
    }
  }
  Strides out = Dims::filled(shape.rank(), 1);
  int group = sizes.rank() - 1;
  int64_t left = group >= 0 ? sizes[group] : 1, step = group >= 0 ? strides[group] : 1;
  for (int d = shape.rank() - 1; d >= 0; --d) {
    if (shape[d] == 1) continue;
    if (left == 1) {
      --group;
      left = sizes[group];
      step = strides[group];
    }
    if (left % shape[d] != 0) return std::nullopt;
    out[d] = step;
    step *= shape[d];
    left /= shape[d];
  }
  return out;
}

}  // namespace

Tensor Tensor::reshape(const Shape& wanted) const {
  Shape target = wanted;
  int unknown = -1;
  int64_t known = 1;
  for (int d = 0; d < wanted.rank(); ++d) {
    if (wanted[d] == -1) {
      if (unknown >= 0) fail(ErrorKind::kShape, "reshape", "at most one size may be -1, got ", wanted);
      unknown = d;
    } else if (wanted[d] < 0 || __builtin_mul_overflow(known, wanted[d], &known)) {
      fail(ErrorKind::kShape, "reshape", "sizes must not be negative (but for one -1) nor overflow, got ", wanted);
    }
  }
  if (unknown >= 0) {
    if (known == 0 || numel() % known != 0) {
      fail(ErrorKind::kShape, "reshape", describe(), " has ", numel(), " elements, which ", wanted,
           " cannot hold for any -1");
    }
    target[unknown] = numel() / known;
  }
  if (weft::numel(target, "reshape") != numel()) {
    fail(ErrorKind::kShape, "reshape", describe(), " has ", numel(), " elements, ", target, " has ",
         weft::numel(target));
  }
  const std::optional<Strides> strides = view_strides(*this, target);
  if (!strides) return contiguous().reshape(target);
  return recorded_view("reshape", *this, make_view(*this, target, *strides, offset()),
                       [from = shape()](BackwardContext& context) { context.set(0, context.grad().reshape(from)); });
}

Tensor Tensor::permute(const Dims& order) const {
  if (order.rank() != rank())
    fail(ErrorKind::kShape, "permute", "order ", order, " must name each of the ", rank(), " dimensions once");
  Shape sizes;
  Strides steps;
  Dims inverse = Dims::filled(rank(), -1);
  for (int i = 0; i < rank(); ++i) {
    const int d = normalize_dim(order[i], rank(), "permute");
    if (inverse[d] >= 0) fail(ErrorKind::kShape, "permute", "order ", order, " names dimension ", d, " twice");
    inverse[d] = i;
    sizes.push_back(shape()[d]);
    steps.push_back(strides()[d]);
  }
  return recorded_view("permute", *this, make_view(*this, sizes, steps, offset()),
                       [inverse](BackwardContext& context) { context.set(0, context.grad().permute(inverse)); });
}

Tensor Tensor::transpose(int64_t dim0, int64_t dim1) const {
  Dims order;
  for (int d = 0; d < rank(); ++d) order.push_back(d);
  std::swap(order[normalize_dim(dim0, rank(), "transpose")], order[normalize_dim(dim1, rank(), "transpose")]);
  return permute(order);
}

Tensor Tensor::slice(int64_t dim_, int64_t start, int64_t stop, int64_t step) const {
  const int dim = normalize_dim(dim_, rank(), "slice");
  const int64_t size = shape()[dim];
  const int64_t first = start < 0 ? start + size : start, last = stop < 0 ? stop + size : stop;
  if (first < 0 || last > size || first > last || step < 1) {
    fail(ErrorKind::kIndex, "slice", "elements ", start, " to ", stop, " in steps of ", step, " of dimension ", dim,
         " of ", describe(), "; expected 0 <= start <= stop <= ", size, " and a step of at least 1");
  }
  Shape sizes = shape();
  Strides steps = strides();
  sizes[dim] = (last - first) / step + ((last - first) % step != 0);
  if (sizes[dim] > 1) steps[dim] *= step;  // a step as long as the dimension or longer need not fit in a stride
  const int64_t at = sizes[dim] > 0 ? offset() + first * strides()[dim] : offset();
  return recorded_view("slice", *this, make_view(*this, sizes, steps, at),
                       [=, full = shape()](BackwardContext& context) {
                         context.set(0, unslice(context.grad(), full, dim, first, last, step));
                       });
}

Tensor Tensor::narrow(int64_t dim, int64_t start, int64_t length) const {
  const int64_t size = shape()[normalize_dim(dim, rank(), "narrow")];
  if (start < 0 || length < 0 || start > size - length) {
    fail(ErrorKind::kIndex, "narrow", length, " elements from ", start, " of dimension ", dim, " of ", describe(),
         ", which has ", size);
  }
  return slice(dim, start, start + length);
}

Tensor Tensor::select(int64_t dim, int64_t index) const {
  const int64_t size = shape()[normalize_dim(dim, rank(), "select")];
  if (index < -size || index >= size)
    fail(ErrorKind::kIndex, "select", "element ", index, " of dimension ", dim, " of ", describe());
  return narrow(dim, index < 0 ? index + size : index, 1).squeeze(dim);
}

Tensor Tensor::expand(const Shape& to) const {
  weft::numel(to, "expand");
  const Strides steps = broadcast_strides(shape(), strides(), to, "expand");
  return recorded_view("expand", *this, make_view(*this, to, steps, offset()),
                       [](BackwardContext& context) { context.set(0, context.grad()); });
}

Tensor Tensor::squeeze(int64_t dim_) const {
  const int dim = normalize_dim(dim_, rank(), "squeeze");
  if (shape()[dim] != 1)
    fail(ErrorKind::kShape, "squeeze", "dimension ", dim, " of ", describe(), " has size ", shape()[dim], ", not 1");
  Shape sizes = shape();
  Strides steps = strides();
  sizes.erase(dim);
  steps.erase(dim);
  return recorded_view("squeeze", *this, make_view(*this, sizes, steps, offset()),
                       [dim](BackwardContext& context) { context.set(0, context.grad().unsqueeze(dim)); });
}

Tensor Tensor::unsqueeze(int64_t dim_) const {
  const int dim = normalize_dim(dim_, rank() + 1, "unsqueeze");
  Shape sizes = shape();
  Strides steps = strides();
  sizes.insert(dim, 1);
  steps.insert(dim, 1);
  return recorded_view("unsqueeze", *this, make_view(*this, sizes, steps, offset()),
                       [dim](BackwardContext& context) { context.set(0, context.grad().squeeze(dim)); });
}

std::vector<Tensor> Tensor::split(int64_t size, int64_t dim_) const {
  const int dim = normalize_dim(dim_, rank(), "split");
  if (size < 1) fail(ErrorKind::kValue, "split", "pieces need at least one element, got a size of ", size);
  std::vector<Tensor> pieces;
  for (int64_t start = 0; start < shape()[dim]; start += size) {
    Shape sizes = shape();
    sizes[dim] = std::min(size, shape()[dim] - start);
    pieces.push_back(make_view(*this, sizes, strides(), offset() + start * strides()[dim]));
  }
  autograd::record(
      "split", {*this}, pieces, {},
      [dim, size, full = shape(), dtype = dtype(), device = device()](BackwardContext& context) {
        std::vector<Tensor> gradients;
        for (int64_t start = 0, i = 0; start < full[dim]; start += size, ++i) {
          Shape sizes = full;
          sizes[dim] = std::min(size, full[dim] - start);
          const Tensor& gradient = context.grad(static_cast<int>(i));
          gradients.push_back(gradient.defined() ? gradient : Tensor::zeros(sizes, dtype, device));
        }
        context.set(0, cat(gradients, dim));
      },
      Rule::kDifferentiable);
  return pieces;
}

Tensor cat(const std::vector<Tensor>& tensors, int64_t dim_) {
  if (tensors.empty()) fail(ErrorKind::kValue, "cat", "needs at least one tensor");
  const Tensor& first = tensors[0];
  const int dim = normalize_dim(dim_, first.rank(), "cat");
  Shape sizes = first.shape();
  sizes[dim] = 0;
  for (const Tensor& tensor : tensors) {
    Shape other = tensor.shape();
    if (other.rank() == sizes.rank()) other[dim] = first.shape()[dim];
    const auto refuse = [&](ErrorKind kind, const char* rule) {
      fail(kind, "cat", "cannot join ", first.describe(), " on ", first.device(), " and ", tensor.describe(), " on ",
           tensor.device(), " along dimension ", dim, ": ", rule);
    };
    if (!(other == first.shape())) refuse(ErrorKind::kShape, "all other sizes must be equal");
    if (tensor.dtype() != first.dtype()) refuse(ErrorKind::kDType, "dtypes must be equal. Hint: cast with .to()");
    if (tensor.device() != first.device()) refuse(ErrorKind::kDevice, "devices must be equal");
    if (__builtin_add_overflow(sizes[dim], tensor.shape()[dim], &sizes[dim]))
      refuse(ErrorKind::kShape, "the size overflows 64 bits");
  }
  Tensor out = Tensor::empty(sizes, first.dtype(), first.device());
  std::vector<int64_t> starts;
  int64_t start = 0;
  for (const Tensor& tensor : tensors) {
    starts.push_back(start);
    Tensor part = Tensor::make_view(out, tensor.shape(), out.strides(), start * out.strides()[dim]);
    if (!DryRun::active()) backend(out.device()).copy(part.view(), tensor.view());
    start += tensor.shape()[dim];
  }
  starts.push_back(start);
  autograd::record(
      "cat", tensors, {out}, {},
      [dim, starts](BackwardContext& context) {
        for (size_t i = 0; i + 1 < starts.size(); ++i) {
          if (context.needs(static_cast<int>(i))) {
            context.set(static_cast<int>(i), context.grad().narrow(dim, starts[i], starts[i + 1] - starts[i]));
          }
        }
      },
      Rule::kDifferentiable);
  return out;
}

Tensor Tensor::clone() const {
  Tensor out = empty(shape(), dtype(), device());
  if (!DryRun::active()) backend(device()).copy(out.view(), view());
  autograd::record(
      "clone", {*this}, {out}, {}, [](BackwardContext& context) { context.set(0, context.grad()); },
      Rule::kDifferentiable);
  return out;
}

Tensor Tensor::contiguous() const { return is_contiguous() ? *this : clone(); }

Tensor Tensor::to(DType target) const {
  if (target == dtype()) return *this;
  Tensor out = empty(shape(), target, device());
  if (!DryRun::active()) backend(device()).copy(out.view(), view());
  if (!is_float(target)) return out;
  autograd::record(
      "to", {*this}, {out}, {}, [from = dtype()](BackwardContext& context) { context.set(0, context.grad().to(from)); },
      Rule::kDifferentiable);
  return out;
}

Tensor Tensor::to(Device target) const {
  if (target == device()) return *this;
  Tensor out = empty(shape(), dtype(), target);
  {
    const autograd::NoGrad no_grad;
    out.copy_(*this);
  }
  autograd::record(
      "to", {*this}, {out}, {},
      [from = device()](BackwardContext& context) { context.set(0, context.grad().to(from)); }, Rule::kDifferentiable);
  return out;
}

}  // namespace weft
