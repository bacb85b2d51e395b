#include "ops/attention.h"

#include <cmath>

#include "core/autograd.h"
#include "ops/attention_kernels.h"
#include "ops/launch.h"

namespace weft {
namespace {

using autograd::BackwardContext;

void check_float(const char* op, const Tensor& x) {
  dispatch_float(x.dtype(), op, []<class T>() {});
}

/// The tensor with unit stride in its last dimension; a copy only if it has another.
Tensor with_unit_stride(const Tensor& x) { return x.strides().back() == 1 || x.size(-1) == 1 ? x : x.contiguous(); }

/// A tensor [B, T, H, D], or such columns of a packed one from `column` on, as the kernels take it.
template <class T>
HeadView<T> heads_of(const Tensor& x, int64_t column = 0, int64_t head_size = 0) {
  T* data = static_cast<T*>(x.raw()) + column;
  const int64_t head = x.rank() == 4 ? x.strides()[2] : head_size;
  return {data, x.strides()[0], head, x.strides()[1]};
}

DType sum_dtype(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

Tensor empty_lse(const AttentionShape& s, const Tensor& like) {
  return Tensor::empty({s.batch, s.heads, s.queries}, sum_dtype(like.dtype()), like.device());
}

/// Memory for sums that are added up afterwards; undefined if the kernel needs none.
Tensor empty_workspace(const AttentionShape& s, const Tensor& like) {
  const int64_t count = ask(like.device(), [&](auto device) { return attention_workspace(device, s); });
  const MemoryScope scope(MemoryCategory::workspace);
  return count == 0 ? Tensor() : Tensor::empty({count}, sum_dtype(like.dtype()), like.device());
}

template <class T>
Accumulate<T>* data_or_null(const Tensor& x) {
  return x.defined() ? x.data<Accumulate<T>>() : nullptr;
}

/// @throws Error unless [B, T, heads * D] or [B, heads, T, D] with sizes that can be attended to.
void check_heads(const char* name, const Tensor& x, int64_t heads) {
  if (x.rank() == 4 ? x.size(1) == heads && x.size(3) > 0 : x.rank() == 3 && x.size(2) > 0 && x.size(2) % heads == 0)
    return;
  fail(ErrorKind::kShape, "attention", name, " must be [B, T, heads * D] or [B, heads, T, D] with ", heads,
       " heads and D > 0, got ", x.describe());
}

/// [B, T, heads * D] or [B, heads, T, D] as [B, T, heads, D].
Tensor by_tokens(const Tensor& x, int64_t heads) {
  if (x.rank() == 4) return with_unit_stride(x.transpose(1, 2));
  return with_unit_stride(x).reshape({x.size(0), x.size(1), heads, x.size(2) / heads});
}

void check_options(const AttentionOptions& o, int64_t kv_heads) {
  constexpr const char* kOp = "attention";
  if (o.heads < 1 || kv_heads < 1) {
    fail(ErrorKind::kValue, kOp, "heads and kv_heads must be at least 1, got ", o.heads, " and ", o.kv_heads);
  }
  if (o.heads % kv_heads != 0) {
    fail(ErrorKind::kValue, kOp, "kv_heads must divide heads, got kv_heads = ", kv_heads, " and heads = ", o.heads);
  }
  if (o.query_offset < 0) fail(ErrorKind::kValue, kOp, "query_offset must not be negative, got ", o.query_offset);
  if (o.scale && !std::isfinite(*o.scale)) fail(ErrorKind::kValue, kOp, "scale must be finite, got ", *o.scale);
}

/// Checks everything about a call of attention() and says what the kernels need to know.
AttentionShape check_attention(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& o) {
  constexpr const char* kOp = "attention";
  const int64_t kv_heads = o.kv_heads == 0 ? o.heads : o.kv_heads;
  check_options(o, kv_heads);
  check_same(kOp, {&q, &k, &v});
  check_float(kOp, q);
  check_heads("q", q, o.heads);
  check_heads("k", k, kv_heads);
  const bool packed = q.rank() == 3;
  const int64_t head_size = packed ? q.size(2) / o.heads : q.size(3), queries = q.size(packed ? 1 : 2);
  const int64_t keys = k.size(k.rank() - 2);
  const int64_t k_head_size = k.rank() == 3 ? k.size(2) / kv_heads : k.size(3);
  if (k.rank() != q.rank() || k.size(0) != q.size(0) || k_head_size != head_size) {
    fail(ErrorKind::kShape, kOp, "q and k must have the same number of dimensions, batch and head size: q is ",
         q.describe(), " with ", o.heads, " heads of ", head_size, ", k is ", k.describe(), " with ", kv_heads,
         " heads of ", k_head_size);
  }
  if (!(v.shape() == k.shape())) {
    fail(ErrorKind::kShape, kOp, "k and v must have the same shape: k is ", k.describe(), ", v is ", v.describe());
  }
  if (keys == 0 && queries > 0)
    fail(ErrorKind::kShape, kOp, "there must be a key to attend to: q is ", q.describe(), ", k is ", k.describe());
  return {.batch = q.size(0),
          .heads = o.heads,
          .kv_heads = kv_heads,
          .queries = queries,
          .keys = keys,
          .head_size = head_size,
          .causal = o.causal,
          .query_offset = o.query_offset,
          .scale = o.scale.value_or(1 / std::sqrt(static_cast<double>(head_size)))};
}

}  // namespace

Tensor causal_attention(const Tensor& qkv, int64_t heads, autograd::Keep keep) {
  constexpr const char* kOp = "causal_attention";
  check_float(kOp, qkv);
  if (heads < 1) fail(ErrorKind::kValue, kOp, "heads must be at least 1, got ", heads);
  if (qkv.rank() != 3 || qkv.size(2) == 0 || qkv.size(2) % 3 != 0) {
    fail(ErrorKind::kShape, kOp, "qkv must be [B, T, 3 C], got ", qkv.describe());
  }
  const int64_t channels = qkv.size(2) / 3;
  if (channels % heads != 0) {
    fail(ErrorKind::kShape, kOp, "heads must divide C: qkv is ", qkv.describe(), ", so C = ", channels,
         "; heads = ", heads);
  }
  const int64_t head_size = channels / heads;
  const AttentionShape shape = {.batch = qkv.size(0),
                                .heads = heads,
                                .kv_heads = heads,
                                .queries = qkv.size(1),
                                .keys = qkv.size(1),
                                .head_size = head_size,
                                .scale = 1 / std::sqrt(static_cast<double>(head_size))};
  const Tensor packed = with_unit_stride(qkv);
  Tensor out = Tensor::empty({shape.batch, shape.queries, channels}, qkv.dtype(), qkv.device());
  const Tensor lse = empty_lse(shape, qkv);
  launch(qkv.device(), kOp, [&](auto device) {
    dispatch_float(qkv.dtype(), kOp, [&]<class T>() {
      attention_forward<T>(device, {.shape = shape,
                                    .q = heads_of<const T>(packed, 0, head_size),
                                    .k = heads_of<const T>(packed, channels, head_size),
                                    .v = heads_of<const T>(packed, 2 * channels, head_size),
                                    .out = heads_of<T>(out, 0, head_size),
                                    .lse = lse.data<Accumulate<T>>()});
    });
  });
  if (keep == autograd::Keep::kRecipe) {
    const auto again = [heads](const std::vector<Tensor>& in) { return causal_attention(in[0], heads); };
    autograd::remade(kOp, out, again, {packed});
  }
  autograd::record(kOp, {packed}, {out}, {packed, out, lse}, [shape](BackwardContext& context) {
    const Tensor qkv = context.saved(0), out = context.saved(1), lse = context.saved(2);
    const Tensor dout = with_unit_stride(context.grad());
    const Tensor dqkv = Tensor::empty(qkv.shape(), qkv.dtype(), qkv.device()), workspace = empty_workspace(shape, qkv);
    const int64_t channels = qkv.size(2) / 3, head_size = shape.head_size;
    launch(qkv.device(), kOp, [&](auto device) {
      dispatch_float(qkv.dtype(), kOp, [&]<class T>() {
        attention_backward<T>(device, {.shape = shape,
                                       .q = heads_of<const T>(qkv, 0, head_size),
                                       .k = heads_of<const T>(qkv, channels, head_size),
                                       .v = heads_of<const T>(qkv, 2 * channels, head_size),
                                       .out = heads_of<const T>(out, 0, head_size),
                                       .dout = heads_of<const T>(dout, 0, head_size),
                                       .lse = lse.data<Accumulate<T>>(),
                                       .dq = heads_of<T>(dqkv, 0, head_size),
                                       .dk = heads_of<T>(dqkv, channels, head_size),
                                       .dv = heads_of<T>(dqkv, 2 * channels, head_size),
                                       .workspace = data_or_null<T>(workspace)});
      });
    });
    context.set(0, dqkv);
  });
  return out;
}

Tensor attention(const Tensor& q_, const Tensor& k_, const Tensor& v_, const AttentionOptions& options) {
  constexpr const char* kOp = "attention";
  const AttentionShape shape = check_attention(q_, k_, v_, options);
  const Tensor q = by_tokens(q_, shape.heads), k = by_tokens(k_, shape.kv_heads), v = by_tokens(v_, shape.kv_heads);
  const Tensor out = Tensor::empty({shape.batch, shape.queries, shape.heads, shape.head_size}, q.dtype(), q.device());
  const Tensor lse = empty_lse(shape, q);
  launch(q.device(), kOp, [&](auto device) {
    dispatch_float(q.dtype(), kOp, [&]<class T>() {
      attention_forward<T>(device, {.shape = shape,
                                    .q = heads_of<const T>(q),
                                    .k = heads_of<const T>(k),
                                    .v = heads_of<const T>(v),
                                    .out = heads_of<T>(out),
                                    .lse = lse.data<Accumulate<T>>()});
    });
  });
  autograd::record(kOp, {q, k, v}, {out}, {q, k, v, out, lse}, [shape](BackwardContext& context) {
    const Tensor q = context.saved(0), k = context.saved(1), v = context.saved(2), out = context.saved(3),
                 lse = context.saved(4);
    const Tensor dout = with_unit_stride(context.grad());
    const auto gradient_of = [](const Tensor& x) { return Tensor::empty(x.shape(), x.dtype(), x.device()); };
    const Tensor dq = gradient_of(q), dk = gradient_of(k), dv = gradient_of(v), workspace = empty_workspace(shape, q);
    launch(q.device(), kOp, [&](auto device) {
      dispatch_float(q.dtype(), kOp, [&]<class T>() {
        attention_backward<T>(device, {.shape = shape,
                                       .q = heads_of<const T>(q),
                                       .k = heads_of<const T>(k),
                                       .v = heads_of<const T>(v),
                                       .out = heads_of<const T>(out),
                                       .dout = heads_of<const T>(dout),
                                       .lse = lse.data<Accumulate<T>>(),
                                       .dq = heads_of<T>(dq),
                                       .dk = heads_of<T>(dk),
                                       .dv = heads_of<T>(dv),
                                       .workspace = data_or_null<T>(workspace)});
      });
    });
    for (int i = 0; i < 3; ++i) {
      if (context.needs(i)) context.set(i, i == 0 ? dq : i == 1 ? dk : dv);
    }
  });
  return q_.rank() == 4 ? out.transpose(1, 2)
                        : out.reshape({shape.batch, shape.queries, shape.heads * shape.head_size});
}

namespace {

/// What the kernels need to know of a part; checks the tensors that both directions have.
AttentionShape check_part(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const AttentionPart& part,
                          const Tensor& lse) {
  check_same(op, {&q, &k, &v});
  check_float(op, q);
  const bool fits = q.rank() == 4 && k.rank() == 4 && v.shape() == k.shape() && k.size(0) == q.size(0) &&
                    k.size(3) == q.size(3) && q.size(2) > 0 && k.size(2) > 0 && q.size(2) % k.size(2) == 0;
  if (!fits) {
    fail(ErrorKind::kShape, op,
         "q must be [B, Tq, H, D], k and v [B, Tk, kv_heads, D] with kv_heads dividing H, got q ", q.describe(), ", k ",
         k.describe(), ", v ", v.describe());
  }
  if (part.query_offset < 0) fail(ErrorKind::kValue, op, "query_offset must not be negative, got ", part.query_offset);
  if (!(lse.shape() == Shape{q.size(0), q.size(2), q.size(1)}) || lse.dtype() != sum_dtype(q.dtype()) ||
      !lse.is_contiguous() || lse.device() != q.device()) {
    fail(ErrorKind::kShape, op, "lse must be row-major ", sum_dtype(q.dtype()), " [B, H, Tq], got ", lse.describe(),
         " for q ", q.describe());
  }
  for (const Tensor* x : {&q, &k, &v}) {
    if (x->strides().back() != 1 && x->size(-1) != 1)
      fail(ErrorKind::kShape, op, "the last dimension must have unit stride, got ", x->describe());
  }
  return {.batch = q.size(0),
          .heads = q.size(2),
          .kv_heads = k.size(2),
          .queries = q.size(1),
          .keys = k.size(1),
          .head_size = q.size(3),
          .causal = part.causal,
          .query_offset = part.query_offset,
          .scale = part.scale};
}

/// @throws Error unless `x` is like `like` in shape and place, of `dtype`, with unit stride in its last dimension.
void check_like(const char* op, const char* name, const Tensor& x, const Tensor& like, DType dtype) {
  if (x.shape() == like.shape() && x.dtype() == dtype && x.device() == like.device() &&
      (x.strides().back() == 1 || x.size(-1) == 1)) {
    return;
  }
  fail(ErrorKind::kShape, op, name, " must be ", dtype, " ", like.shape(), " on ", like.device(),
       " with unit stride in its last dimension, got ", x.describe(), " on ", x.device());
}

}  // namespace

void attention_part(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionPart& part, const Tensor& out,
                    const Tensor& lse) {
  constexpr const char* kOp = "attention_part";
  const AttentionShape shape = check_part(kOp, q, k, v, part, lse);
  check_like(kOp, "out", out, q, sum_dtype(q.dtype()));
  if (shape.keys == 0 && shape.queries > 0 && !part.resume)
    fail(ErrorKind::kShape, kOp, "the first part must have a key to attend to: k is ", k.describe());
  if (shape.keys == 0) return;
  Tensor before;
  if (part.resume) {
    const MemoryScope scope(MemoryCategory::workspace);
    before = lse.clone();
  }
  for (const Tensor* written : {&out, &lse}) written->begin_change(kOp);
  launch(q.device(), kOp, [&](auto device) {
    dispatch_float(q.dtype(), kOp, [&]<class T>() {
      attention_forward<T>(device, {.shape = shape,
                                    .q = heads_of<const T>(q),
                                    .k = heads_of<const T>(k),
                                    .v = heads_of<const T>(v),
                                    .out = {},
                                    .lse = lse.data<Accumulate<T>>(),
                                    .so_far = heads_of<Accumulate<T>>(out),
                                    .lse_before = data_or_null<T>(before)});
    });
  });
}

void attention_part_backward(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionPart& part,
                             const Tensor& out, const Tensor& lse, const Tensor& dout, const Tensor& dq,
                             const Tensor& dk, const Tensor& dv) {
  constexpr const char* kOp = "attention_part_backward";
  const AttentionShape shape = check_part(kOp, q, k, v, part, lse);
  check_like(kOp, "out", out, q, q.dtype());
  check_like(kOp, "dout", dout, q, q.dtype());
  const DType wide = sum_dtype(q.dtype());
  check_like(kOp, "dq", dq, q, wide);
  check_like(kOp, "dk", dk, k, wide);
  check_like(kOp, "dv", dv, v, wide);
  if (shape.keys == 0 || shape.queries == 0) return;
  for (const Tensor* sum : {&dq, &dk, &dv}) sum->begin_change(kOp);
  const Tensor workspace = empty_workspace(shape, q);
  launch(q.device(), kOp, [&](auto device) {
    dispatch_float(q.dtype(), kOp, [&]<class T>() {
      attention_backward<T>(device, {.shape = shape,
                                     .q = heads_of<const T>(q),
                                     .k = heads_of<const T>(k),
                                     .v = heads_of<const T>(v),
                                     .out = heads_of<const T>(out),
                                     .dout = heads_of<const T>(dout),
                                     .lse = lse.data<Accumulate<T>>(),
                                     .dq = {},
                                     .dk = {},
                                     .dv = {},
                                     .workspace = data_or_null<T>(workspace),
                                     .dq_sum = heads_of<Accumulate<T>>(dq),
                                     .dk_sum = heads_of<Accumulate<T>>(dk),
                                     .dv_sum = heads_of<Accumulate<T>>(dv)});
    });
  });
}

}  // namespace weft
