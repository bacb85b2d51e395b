// The backward kernel of attention (Dao 2023, algorithm 2): the weights are computed again from q, k and the saved
// logarithm of their sum. Included once per instruction set.
#if defined(WEFT_OPS_ATTENTION_BACKWARD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef WEFT_OPS_ATTENTION_BACKWARD_INL_H_
#undef WEFT_OPS_ATTENTION_BACKWARD_INL_H_
#else
#define WEFT_OPS_ATTENTION_BACKWARD_INL_H_
#endif

#include "ops/attention_lanes-inl.h"

HWY_BEFORE_NAMESPACE();
namespace weft::detail {
namespace HWY_NAMESPACE {
namespace {

/// s becomes p = 2^(s - lse) and dp becomes ds = p (dp - delta), both keys by queries, zero where a key is hidden.
template <class T>
void softmax_gradient_tile(const TileMask& mask, const T* lse, const T* delta, T* s, T* dp) {
  const Tag<T> d;
  constexpr int64_t n = kLanes<T>, row = kAttentionQueries;
  for (int64_t lane = 0; lane < mask.queries; lane += n) {
    const int64_t full = mask.full(lane), none = mask.none(lane, n);
    const auto log = hn::Load(d, lse + lane), sum = hn::Load(d, delta + lane);
    T* p_at = s + lane;
    T* ds_at = dp + lane;
    for (int64_t key = 0; key < full; ++key, p_at += row, ds_at += row) {
      const auto p = exp2(d, hn::Sub(hn::Load(d, p_at), log));
      hn::Store(p, d, p_at);
      hn::Store(hn::Mul(p, hn::Sub(hn::Load(d, ds_at), sum)), d, ds_at);
    }
    for (int64_t key = full; key < none; ++key, p_at += row, ds_at += row) {
      const auto visible = mask.lanes(d, lane, key);
      const auto p = hn::IfThenElseZero(visible, exp2(d, hn::Sub(hn::Load(d, p_at), log)));
      hn::Store(p, d, p_at);
      hn::Store(hn::IfThenElseZero(visible, hn::Mul(p, hn::Sub(hn::Load(d, ds_at), sum))), d, ds_at);
    }
    for (int64_t key = none; key < mask.keys; ++key, p_at += row, ds_at += row) {
      hn::Store(hn::Zero(d), d, p_at);
      hn::Store(hn::Zero(d), d, ds_at);
    }
  }
}

/// a . b, both of a whole number of vectors.
template <class T>
T dot(const T* a, const T* b, int64_t columns) {
  const Tag<T> d;
  auto sum = hn::Zero(d);
  for (int64_t c = 0; c < columns; c += kLanes<T>) sum = hn::MulAdd(hn::LoadU(d, a + c), hn::LoadU(d, b + c), sum);
  return hn::GetLane(hn::SumOfLanes(d, sum));
}

/// One task: every chunks-th unit of a (batch, key head). dq is written; dk and dv are summed in `partial` or, where
/// one task has the whole head (partial is null), in scratch memory and written.
template <class T, class S>
void backward_chunk(const AttentionBackward<S>& a, const AttentionUnits& units, int64_t b, int64_t kv_head,
                    int64_t chunk, T* partial) {
  const AttentionShape& shape = a.shape;
  const int64_t head_size = shape.head_size, padded = padded_head_size(head_size), sums = shape.keys * padded;
  constexpr int64_t kQ = kAttentionQueries, kK = kAttentionKeys;
  AttentionScratch<T> scratch((5 * kQ + 2 * kK) * padded + 2 * kK * kQ + 2 * kQ + (partial == nullptr ? 2 * sums : 0),
                              12);
  T* const q_rows = scratch.take(kQ * padded);
  T* const dout_rows = scratch.take(kQ * padded);
  T* const k_rows = scratch.take(kK * padded);
  T* const v_rows = scratch.take(kK * padded);
  T* const qt = scratch.take(padded * kQ);
  T* const doutt = scratch.take(padded * kQ);
  T* const dq = scratch.take(kQ * padded);
  T* const s = scratch.take(kK * kQ);
  T* const dp = scratch.take(kK * kQ);
  T* const lse = scratch.take(kQ);
  T* const delta = scratch.take(kQ);
  T* const dk = partial == nullptr ? scratch.take(2 * sums) : partial;
  T* const dv = dk + sums;
  std::fill_n(dk, 2 * sums, T(0));
  std::fill_n(lse, kQ, T(0));
  std::fill_n(delta, kQ, T(0));
  const T scale = static_cast<T>(shape.scale);
  for (int64_t unit = chunk; unit < units.count(); unit += units.chunks) {
    const int64_t head = units.head(kv_head, unit), first = units.block(unit) * kQ;
    const int64_t queries = std::min(kQ, shape.queries - first),
                  columns = (queries + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
    const int64_t seen = keys_seen(shape, first), keys = std::min(shape.keys, seen + queries - 1);
    const Rows<T> q = load_rows<T>(a.q.at(b, head, first), a.q.token, queries, head_size, q_rows);
    const Rows<T> dout = load_rows<T>(a.dout.at(b, head, first), a.dout.token, queries, head_size, dout_rows);
    const Rows<T> out = load_rows<T>(a.out.at(b, head, first), a.out.token, queries, head_size, dq);
    const T* saved_lse = a.lse + (b * shape.heads + head) * shape.queries + first;
    for (int64_t i = 0; i < queries; ++i) {
      lse[i] = saved_lse[i] * static_cast<T>(kLog2E);
      delta[i] = dot(dout.data + i * dout.stride, out.data + i * out.stride, padded);
    }
    transpose(q, queries, head_size, qt);
    transpose(dout, queries, head_size, doutt);
    for (int64_t key = 0; key < keys; key += kK) {
      const TileMask mask = {std::min(kK, keys - key), queries, seen - key};
      const Rows<T> k = load_rows<T>(a.k.at(b, kv_head, key), a.k.token, mask.keys, head_size, k_rows);
      const Rows<T> v = load_rows<T>(a.v.at(b, kv_head, key), a.v.token, mask.keys, head_size, v_rows);
      const auto scores = [&](int64_t row, int64_t) { return mask.scores(row, head_size, kLanes<T>); };
      const auto keys_of = [&](int64_t row, int64_t rows) { return mask.keys_of(row, rows); };
      const auto queries_of = [&](int64_t row, int64_t) { return mask.queries_of(row); };
      product<true>(mask.keys, columns, k.data, k.stride, qt, kQ, static_cast<T>(shape.scale * kLog2E), T(0), s, kQ,
                    scores);
      product<true>(mask.keys, columns, v.data, v.stride, doutt, kQ, T(1), T(0), dp, kQ, scores);
      softmax_gradient_tile(mask, lse, delta, s, dp);
      product<true>(mask.keys, padded, s, kQ, dout.data, dout.stride, T(1), T(1), dv + key * padded, padded,
                    queries_of);
      product<true>(mask.keys, padded, dp, kQ, q.data, q.stride, scale, T(1), dk + key * padded, padded, queries_of);
      product<false>(queries, padded, dp, kQ, k.data, k.stride, scale, key > 0 ? T(1) : T(0), dq, padded, keys_of);
    }
    for (int64_t i = 0; i < queries; ++i) store_row<T>(dq + i * padded, T(1), head_size, a.dq.at(b, head, first + i));
  }
  if (partial != nullptr) return;
  for (int64_t key = 0; key < shape.keys; ++key) {
    store_row<T>(dk + key * padded, T(1), head_size, a.dk.at(b, kv_head, key));
    store_row<T>(dv + key * padded, T(1), head_size, a.dv.at(b, kv_head, key));
  }
}

/// Adds up what the tasks of a (batch, key head) have for keys [begin, end), in the order of the tasks, and writes it.
template <class T, class S>
void add_partials(const AttentionBackward<S>& a, int64_t chunks, int64_t b, int64_t kv_head, int64_t begin,
                  int64_t end) {
  const Tag<T> d;
  const int64_t head_size = a.shape.head_size, padded = padded_head_size(head_size), sums = a.shape.keys * padded;
  T* const mine = a.workspace + (b * a.shape.kv_heads + kv_head) * chunks * 2 * sums;
  for (const bool is_v : {false, true}) {
    T* const total = mine + (is_v ? sums : 0);
    for (int64_t i = begin * padded; i < end * padded; i += kLanes<T>) {
      auto sum = hn::LoadU(d, total + i);
      for (int64_t chunk = 1; chunk < chunks; ++chunk) sum = hn::Add(sum, hn::LoadU(d, total + chunk * 2 * sums + i));
      hn::StoreU(sum, d, total + i);
    }
    for (int64_t key = begin; key < end; ++key) {
      store_row<T>(total + key * padded, T(1), head_size, (is_v ? a.dv : a.dk).at(b, kv_head, key));
    }
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace weft::detail
HWY_AFTER_NAMESPACE();
#endif
