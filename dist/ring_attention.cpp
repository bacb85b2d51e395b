#include "dist/ring_attention.h"

#include <cmath>
#include <deque>
#include <optional>
#include <utility>

#include "core/memory.h"
#include "ops/elementwise.h"

namespace weft::dist {
namespace {

using autograd::BackwardContext;
constexpr const char* kOp = "ring_attention";

/// A call of ring_attention() on one rank: sizes, and what each trip around the ring does.
struct Ring {
  Group* group;
  SequenceLayout layout;
  int64_t batch, heads, kv_heads, head_size;
  double scale;
  DType dtype;
  Device device;

  int ranks() const { return group->size(); }
  int rank() const { return group->rank(); }
  int after() const { return (rank() + 1) % ranks(); }
  int before() const { return (rank() + ranks() - 1) % ranks(); }
  /// Whose keys and values a rank has at a step of the trip.
  int owner(int step) const { return (rank() - step + ranks()) % ranks(); }
  int64_t tokens() const { return layout.count(rank()); }
  int64_t width() const { return kv_heads * head_size; }
  DType sum_dtype() const { return dtype == DType::f64 ? DType::f64 : DType::f32; }

  /// Keys and values of a rank's tokens beside each other, or their gradients: [B, T_r, 2 W].
  Tensor empty_block(int of, DType type) const {
    const MemoryScope scope(MemoryCategory::communication);
    return Tensor::empty({batch, layout.count(of), 2 * width()}, type, device);
  }
  /// Tokens [first, first + count) of [B, T, H * D] as [B, count, H, D], from column `column` on.
  Tensor heads_of(const Tensor& x, int64_t first, int64_t count, int64_t column, int64_t number) const {
    return x.narrow(1, first, count).narrow(2, column, number * head_size).reshape({batch, count, number, head_size});
  }
  Tensor queries_of(const Tensor& x, const IndexRange& own) const {
    return heads_of(x, own.begin, own.count(), 0, heads);
  }
  Tensor keys_of(const Tensor& block, int64_t count) const { return heads_of(block, 0, count, 0, kv_heads); }
  Tensor values_of(const Tensor& block, int64_t count) const { return heads_of(block, 0, count, width(), kv_heads); }
  /// The logarithms of one range's sums, [B, H, count], in the memory of those of all of this rank's queries.
  Tensor lse_of(const Tensor& lse, const IndexRange& own) const {
    const int64_t rows = batch * heads;
    return lse.narrow(0, rows * own.begin, rows * own.count()).reshape({batch, heads, own.count()});
  }

  /// Calls part(own queries, keys of the owner that they see, how) for those of this rank's two ranges of queries that
  /// see keys of `step`'s owner. Ranges are counted in tokens of this rank.
  template <class Part>
  void parts(int step, const Part& part) const {
    int64_t begin = 0;
    const auto ranges = layout.ranges(rank());
    for (int i = 0; i < 2; ++i) {
      const IndexRange own = {begin, begin + ranges[static_cast<size_t>(i)].count()};
      const int64_t keys = layout.keys_seen(rank(), i, owner(step));
      // The own tokens before the range come before it in the sequence, too: plain causal attention.
      const AttentionPart how = {
          .scale = scale, .causal = step == 0, .query_offset = step == 0 ? begin : 0, .resume = step > 0};
      if (own.count() > 0 && keys > 0) part(own, keys, how);
      begin = own.end;
    }
  }

  /// Sends `block` of this step's owner on, and starts to receive that of the next step.
  struct Passage {
    Tensor next;
    std::optional<Work> sent, received;
    void wait() const {
      if (received) received->wait();
      if (sent) sent->wait();
    }
  };
  Passage pass_on(int step, const Tensor& block) const {
    if (step + 1 == ranks()) return {};
    const Tensor next = empty_block(owner(step + 1), dtype);
    return {next, group->send_async(block, after()), group->recv_async_(next, before())};
  }

  /// Calls visit(step, block) with every rank's keys and values, beginning with its own; the next ones are under way
  /// while it runs. early(step) is called before.
  template <class Early, class Visit>
  void go_around(Tensor block, const Early& early, const Visit& visit) const {
    for (int step = 0; step < ranks(); ++step) {
      early(step);
      const Passage passage = pass_on(step, block);
      visit(step, block);
      passage.wait();
      block = passage.next;
    }
  }

  /// {y [B, T_r, H * D], logarithms of sums}.
  std::pair<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v) const {
    const Tensor y = Tensor::empty({batch, tokens(), heads * head_size}, sum_dtype(), device);
    const Tensor lse = Tensor::empty({batch * heads * tokens()}, sum_dtype(), device);
    const auto nothing = [](int) {};
    go_around(join(k, v), nothing, [&](int step, const Tensor& block) {
      parts(step, [&](const IndexRange& own, int64_t keys, const AttentionPart& how) {
        attention_part(queries_of(q, own), keys_of(block, keys), values_of(block, keys), how, queries_of(y, own),
                       lse_of(lse, own));
      });
    });
    return {y.to(dtype), lse};
  }

  struct Gradients {
    Tensor dq, dkv;  ///< sums: [B, T_r, H * D] and [B, T_r, 2 W]
  };
  Gradients backward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& y, const Tensor& lse,
                     const Tensor& dy) const {
    const Gradients own = {Tensor::zeros({batch, tokens(), heads * head_size}, sum_dtype(), device),
                           empty_block(rank(), sum_dtype()).zero_()};
    Tensor arriving;  // what the ranks before have added up for this step's keys
    std::optional<Work> received;
    std::deque<Work> sent;
    // Asked for before the next keys: a pair's messages come in the order in which they were sent.
    const auto early = [&](int step) {
      if (step < 2) return;
      arriving = empty_block(owner(step), sum_dtype());
      received = group->recv_async_(arriving, before());
    };
    go_around(join(k, v), early, [&](int step, const Tensor& block) {
      const Tensor sum = step == 0 ? own.dkv : empty_block(owner(step), sum_dtype()).zero_();
      parts(step, [&](const IndexRange& mine, int64_t keys, const AttentionPart& how) {
        attention_part_backward(queries_of(q, mine), keys_of(block, keys), values_of(block, keys), how,
                                queries_of(y, mine), lse_of(lse, mine), queries_of(dy, mine), queries_of(own.dq, mine),
                                keys_of(sum, keys), values_of(sum, keys));
      });
      if (step == 0) return;
      if (received) {
        received->wait();
        add_(sum, arriving);
      }
      sent.push_back(group->send_async(sum, after()));
      if (sent.size() < 2) return;
      sent.front().wait();  // and its memory is free
      sent.pop_front();
    });
    const Tensor home = empty_block(rank(), sum_dtype());
    group->recv_(home, before());
    add_(own.dkv, home);
    for (const Work& work : sent) work.wait();
    return own;
  }

  Tensor join(const Tensor& k, const Tensor& v) const {
    const MemoryScope scope(MemoryCategory::communication);
    return cat({k, v}, 2);
  }
};

/// @throws Error unless everything about the call fits; what it is made of.
Ring check_ring(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& o, Group& group,
                const SequenceLayout& layout) {
  if (layout.ranks() != group.size()) {
    fail(ErrorKind::kValue, kOp, "the layout is for ", layout.ranks(), " ranks, the group has ", group.size());
  }
  if (!o.causal || o.query_offset != 0) {
    fail(ErrorKind::kValue, kOp, "attends causally from position 0 on, got ", o.causal ? "" : "causal = false, ",
         "query_offset = ", o.query_offset);
  }
  const int64_t kv_heads = o.kv_heads == 0 ? o.heads : o.kv_heads, tokens = layout.count(group.rank());
  if (o.heads < 1 || kv_heads < 1 || o.heads % kv_heads != 0) {
    fail(ErrorKind::kValue, kOp, "kv_heads must divide heads, got kv_heads = ", kv_heads, " and heads = ", o.heads);
  }
  if (o.scale && !std::isfinite(*o.scale)) fail(ErrorKind::kValue, kOp, "scale must be finite, got ", *o.scale);
  for (const Tensor* x : {&k, &v}) {
    if (x->dtype() != q.dtype())
      fail(ErrorKind::kDType, kOp, "q, k and v must have one dtype: q is ", q.describe(), ", got ", x->describe());
    if (x->device() != q.device())
      fail(ErrorKind::kDevice, kOp, "q, k and v must be on one device: q is on ", q.device(), ", got ", x->device());
  }
  if (q.rank() != 3 || q.size(1) != tokens || q.size(2) == 0 || q.size(2) % o.heads != 0) {
    fail(ErrorKind::kShape, kOp, "q must be [B, T, heads * D] with the ", tokens, " tokens of rank ", group.rank(),
         " of a sequence of ", layout.tokens(), " and heads = ", o.heads, ", got ", q.describe());
  }
  const int64_t head_size = q.size(2) / o.heads;
  const Shape wanted = {q.size(0), tokens, kv_heads * head_size};
  if (!(k.shape() == wanted) || !(v.shape() == wanted)) {
    fail(ErrorKind::kShape, kOp, "k and v must be ", wanted, " for q ", q.describe(), " with ", o.heads, " heads and ",
         kv_heads, " of keys, got ", k.describe(), " and ", v.describe());
  }
  return {.group = &group,
          .layout = layout,
          .batch = q.size(0),
          .heads = o.heads,
          .kv_heads = kv_heads,
          .head_size = head_size,
          .scale = o.scale.value_or(1 / std::sqrt(static_cast<double>(head_size))),
          .dtype = q.dtype(),
          .device = q.device()};
}

/// The values alone, as the kernels read them where they lie; a copy only if columns are not beside each other.
Tensor plain(const Tensor& x) { return x.strides().back() == 1 || x.size(-1) == 1 ? x.detach() : x.contiguous(); }

}  // namespace

Tensor ring_attention(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options, Group& group,
                      const SequenceLayout& layout, autograd::Keep keep) {
  const Ring ring = check_ring(q, k, v, options, group, layout);
  if (group.size() == 1) return attention(q, k, v, options);
  Tensor y, lse;
  {
    const autograd::NoGrad no_grad;
    std::tie(y, lse) = ring.forward(plain(q), plain(k), plain(v));
  }
  if (keep == autograd::Keep::kRecipe) {
    const auto again = [ring](const std::vector<Tensor>& in) {
      return ring.forward(plain(in[0]), plain(in[1]), plain(in[2])).first;
    };
    autograd::remade(kOp, y, again, {q, k, v});
  }
  autograd::record(kOp, {q, k, v}, {y}, {q, k, v, y, lse}, [ring](BackwardContext& context) {
    const autograd::NoGrad no_grad;
    // Also for inputs that want no gradient: all ranks take part.
    const auto [dq, dkv] = ring.backward(plain(context.saved(0)), plain(context.saved(1)), plain(context.saved(2)),
                                         context.saved(3), context.saved(4), plain(context.grad()));
    if (context.needs(0)) context.set(0, dq.to(ring.dtype));
    if (context.needs(1)) context.set(1, dkv.narrow(2, 0, ring.width()).to(ring.dtype));
    if (context.needs(2)) context.set(2, dkv.narrow(2, ring.width(), ring.width()).to(ring.dtype));
  });
  return y;
}

}  // namespace weft::dist
