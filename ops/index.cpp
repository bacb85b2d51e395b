#include "ops/index.h"

#include <string>

#include "core/autograd.h"
#include "ops/index_kernels.h"
#include "ops/launch.h"

namespace weft {
namespace {

using autograd::BackwardContext;

/// Indices as the kernels take them: i64, row-major.
Tensor checked_indices(const char* op, const char* what, const Tensor& indices) {
  if (indices.dtype() != DType::i64 && indices.dtype() != DType::i32) {
    fail(ErrorKind::kDType, op, what, " must be i64 or i32, got ", indices.describe());
  }
  return indices.to(DType::i64).contiguous();
}

void check_device(const char* op, const Tensor& a, const Tensor& b) {
  if (a.device() != b.device()) {
    fail(ErrorKind::kDevice, op, "tensors must be on one device, got ", a.describe(), " on ", a.device(), " and ",
         b.describe(), " on ", b.device());
  }
}

/// "[2, 7]": where element number `flat` of a tensor is.
std::string place(int64_t flat, const Shape& shape) {
  Dims at = shape;
  for (int d = shape.rank() - 1; d >= 0; --d) at[d] = flat % shape[d], flat /= shape[d];
  return concat(at);
}

void check_range(const char* op, const char* what, Cpu device, const Tensor& indices, int64_t limit,
                 const std::string& owner) {
  const int64_t* values = indices.data<int64_t>();
  const int64_t found = first_outside(device, values, indices.numel(), limit);
  if (found < 0) return;
  fail(ErrorKind::kIndex, op, what, place(found, indices.shape()), " is ", values[found], " but must be from 0 to ",
       limit - 1, ": ", owner);
}

void check_range(const char*, const char* what, Cuda device, const Tensor& indices, int64_t limit, const std::string&) {
  report_outside(device, what, indices.data<int64_t>(), indices.numel(), limit);
}

}  // namespace

Tensor embedding(const Tensor& ids, const Tensor& table) {
  return embedding(ids, table, 0, table.rank() == 2 ? table.size(0) : 0);
}

Tensor embedding(const Tensor& ids_, const Tensor& table_, int64_t first, int64_t all) {
  constexpr const char* kOp = "embedding";
  dispatch_float(table_.dtype(), kOp, []<class T>() {});
  if (table_.rank() != 2) fail(ErrorKind::kShape, kOp, "the table must be [V, C], got ", table_.describe());
  check_device(kOp, ids_, table_);
  const int64_t vocabulary = table_.size(0), columns = table_.size(1);
  if (first < 0 || first > all - vocabulary) {
    fail(ErrorKind::kShape, kOp, "the part ", table_.describe(), " from row ", first, " on is not within a table of ",
         all, " rows");
  }
  Shape shape = ids_.shape();
  shape.push_back(columns);
  Tensor out = Tensor::empty(shape, table_.dtype(), table_.device());
  Tensor ids;
  {
    const autograd::NoGrad no_grad;
    ids = checked_indices(kOp, "ids", ids_);
    const Tensor table = table_.contiguous();
    launch(table.device(), kOp, [&](auto device) {
      check_range(kOp, "ids", device, ids, all,
                  vocabulary == all
                      ? concat("the table is ", table.describe())
                      : concat("the table has ", all, " rows, of which ", table.describe(), " is a part"));
      if (vocabulary < all) {
        const Tensor local = Tensor::empty(ids.shape(), DType::i64, ids.device());
        local_ids(device, ids.data<int64_t>(), ids.numel(), first, vocabulary, local.data<int64_t>());
        ids = local;
      }
      embedding_forward(device, ids.data<int64_t>(), ids.numel(), table.raw(), vocabulary,
                        columns * size_of(table.dtype()), out.raw());
    });
  }
  const DType dtype = table_.dtype();
  autograd::record(kOp, {ids_, table_}, {out}, {ids}, [vocabulary, columns, dtype](BackwardContext& context) {
    if (!context.needs(1)) return;
    const Tensor ids = context.saved(0), gradient = context.grad().contiguous();
    const auto sink = context.sink(1);
    const Tensor out = sink ? sink->tensor : Tensor::empty({vocabulary, columns}, dtype, gradient.device());
    Tensor workspace;
    {
      const MemoryScope scope(MemoryCategory::workspace);
      workspace = dispatch_float(dtype, kOp, [&]<class T>() {
        const int64_t elements = ask(gradient.device(), [&](auto device) {
          return embedding_workspace<T>(device, ids.numel(), vocabulary, columns);
        });
        return Tensor::empty({elements}, DType::i64, gradient.device());
      });
    }
    launch(gradient.device(), kOp, [&](auto device) {
      dispatch_float(dtype, kOp, [&]<class T>() {
        embedding_backward(device, EmbeddingBackward<T>{.dy = gradient.data<T>(),
                                                        .ids = ids.data<int64_t>(),
                                                        .dtable = out.data<T>(),
                                                        .workspace = workspace.data<int64_t>(),
                                                        .count = ids.numel(),
                                                        .vocabulary = vocabulary,
                                                        .columns = columns,
                                                        .accumulate = sink && sink->accumulate});
      });
    });
    if (!sink) context.set(1, out);
  });
  return out;
}

namespace {

GatherLines gather_lines(const Shape& shape, int dim, const Tensor& index) {
  const Shape& count = index.shape();
  const Strides strides = contiguous_strides(shape);
  GatherLines lines{.index = index.data<int64_t>(),
                    .outer = 1,
                    .count = count[dim],
                    .inner = 1,
                    .length = shape[dim],
                    .stride = strides[dim],
                    .rank = count.rank(),
                    .dim = dim,
                    .sizes = {},
                    .strides = {}};
  for (int d = 0; d < count.rank(); ++d) {
    if (d != dim) (d < dim ? lines.outer : lines.inner) *= count[d];
    lines.sizes[d] = count[d];
    lines.strides[d] = strides[d];
  }
  return lines;
}

}  // namespace

Tensor gather(const Tensor& x_, int64_t dim_, const Tensor& index_) {
  constexpr const char* kOp = "gather";
  const int dim = normalize_dim(dim_, x_.rank(), kOp);
  check_device(kOp, x_, index_);
  bool fits = x_.rank() == index_.rank();
  for (int d = 0; fits && d < x_.rank(); ++d) fits = d == dim || index_.shape()[d] <= x_.shape()[d];
  if (!fits) {
    fail(ErrorKind::kShape, kOp, "index must have the rank of x, and at most its sizes except along dimension ", dim,
         "; x is ", x_.describe(), ", index is ", index_.describe());
  }
  Tensor out = Tensor::empty(index_.shape(), x_.dtype(), x_.device());
  Tensor index;
  {
    const autograd::NoGrad no_grad;
    index = checked_indices(kOp, "index", index_);
    const Tensor x = x_.contiguous();
    launch(x.device(), kOp, [&](auto device) {
      check_range(kOp, "index", device, index, x.size(dim),
                  concat("dimension ", dim, " of x, which is ", x.describe()));
      gather_forward(device, gather_lines(x.shape(), dim, index), x.raw(), static_cast<int>(size_of(x.dtype())),
                     out.raw());
    });
  }
  if (!is_float(x_.dtype())) return out;
  autograd::record(kOp, {x_}, {out}, {index}, [shape = x_.shape(), dim](BackwardContext& context) {
    const Tensor index = context.saved(0), gradient = context.grad().contiguous();
    const DType dtype = gradient.dtype();
    const Tensor dx = Tensor::zeros(shape, dtype == DType::f64 ? DType::f64 : DType::f32, gradient.device());
    launch(dx.device(), kOp, [&](auto device) {
      const GatherLines lines = gather_lines(shape, dim, index);
      dispatch_float(dtype, kOp,
                     [&]<class T>() { gather_backward(device, lines, gradient.data<T>(), dx.data<Accumulate<T>>()); });
    });
    context.set(0, dx.to(dtype));
  });
  return out;
}

}  // namespace weft
