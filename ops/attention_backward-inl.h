// The backward kernel of attention (Dao 2023, algorithm 2): the weights are computed again from q, k and the saved
// logarithm of their sum. Included once per instruction set.
#if defined(WEFT_OPS_ATTENTION_BACKWARD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef WEFT_OPS_ATTENTION_BACKWARD_INL_H_
#undef WEFT_OPS_ATTENTION_BACKWARD_INL_H_
#else
#define WEFT_OPS_ATTENTION_BACKWARD_INL_H_
#endif

#include <limits>

#include "ops/attention_lanes-inl.h"

HWY_BEFORE_NAMESPACE();
namespace weft::detail {
namespace HWY_NAMESPACE {
namespace {

/// s becomes p = 2^(s - lse) and dp becomes ds = p (dp - delta), both keys by queries, zero where a key is hidden. For
/// pairs, the rows of both become bfloat16 (pairs of queries, at the beginning of the row), and `ds_pairs` has pairs of
/// keys.
template <class P, class T>
void softmax_gradient_tile(const TileMask& mask, const T* lse, const T* delta, T* s, T* dp,
                           [[maybe_unused]] P* ds_pairs) {
  const Tag<T> d;
  constexpr int64_t n = kLanes<T>, row = kAttentionQueries;
  constexpr bool kPairs = std::is_same_v<P, Bf16Pair>;
  for (int64_t lane = 0; lane < mask.queries; lane += n) {
    const int64_t none = mask.none(lane, n);
    const auto log = hn::Load(d, lse + lane), sum = hn::Load(d, delta + lane);
    const auto put = [&](int64_t key, hn::Vec<Tag<T>> p, hn::Vec<Tag<T>> ds) HWY_ATTR {
      if constexpr (kPairs) {  // what is written lies where this and earlier vectors were read
        narrow<T>(d, p, reinterpret_cast<BFloat16*>(s + key * row) + lane);
        narrow<T>(d, ds, reinterpret_cast<BFloat16*>(dp + key * row) + lane);
      } else {
        hn::Store(p, d, s + key * row + lane);
        hn::Store(ds, d, dp + key * row + lane);
      }
      return ds;
    };
    const auto visible = [&](int64_t key) HWY_ATTR {
      const auto p = exp2(d, hn::Sub(hn::Load(d, s + key * row + lane), log));
      return put(key, p, hn::Mul(p, hn::Sub(hn::Load(d, dp + key * row + lane), sum)));
    };
    const auto masked = [&](int64_t key) HWY_ATTR {
      const auto zero = hn::Zero(d);
      if (key >= none) return put(key, zero, zero);
      const auto seen = mask.lanes(d, lane, key);
      const auto p = hn::IfThenElseZero(seen, exp2(d, hn::Sub(hn::Load(d, s + key * row + lane), log)));
      const auto ds = hn::Mul(p, hn::Sub(hn::Load(d, dp + key * row + lane), sum));
      return put(key, p, hn::IfThenElseZero(seen, ds));
    };
    const auto element = [&](int64_t key, const auto& gradient) HWY_ATTR {
      if constexpr (kPairs) {
        store_weights<P>(key, gradient, reinterpret_cast<T*>(ds_pairs), lane);
      } else {
        gradient(key);
      }
    };
    for_keys<P>(
        mask, lane, [&](int64_t key) HWY_ATTR { element(key, visible); },
        [&](int64_t key) HWY_ATTR { element(key, masked); }, [&](int64_t key) HWY_ATTR { element(key, masked); });
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
template <class P, class S>
void backward_chunk(const AttentionBackward<S>& a, const AttentionUnits& units, int64_t b, int64_t kv_head,
                    int64_t chunk, SumOf<P>* partial) {
  using T = SumOf<P>;
  constexpr bool kPairs = std::is_same_v<P, Bf16Pair>;
  const AttentionShape& shape = a.shape;
  const int64_t head_size = shape.head_size, padded = padded_head_size(head_size), sums = shape.keys * padded;
  constexpr int64_t kQ = kAttentionQueries, kK = kAttentionKeys;
  const int64_t pairs = kPairs ? kK * padded + kK * kQ / 2 : 0;
  AttentionScratch<T> scratch(
      (5 * kQ + 2 * kK) * padded + 2 * kK * kQ + 2 * kQ + pairs + (partial == nullptr ? 2 * sums : 0), 14);
  const auto take = [&](int64_t count) { return reinterpret_cast<P*>(scratch.take(count)); };
  P* const q_rows = take(kQ * padded);
  P* const dout_rows = take(kQ * padded);
  P* const k_rows = take(kK * padded);
  P* const v_rows = take(kK * padded);
  P* const qt = take(padded * kQ);
  P* const doutt = take(padded * kQ);
  P* const k_pairs = take(kPairs ? kK * padded : 0);
  P* const ds_pairs = take(kPairs ? kK * kQ / 2 : 0);
  T* const dq = scratch.take(kQ * padded);
  T* const s = scratch.take(kK * kQ);
  T* const dp = scratch.take(kK * kQ);
  T* const lse = scratch.take(kQ);
  T* const delta = scratch.take(kQ);
  T* const dk = partial == nullptr ? scratch.take(2 * sums) : partial;
  T* const dv = dk + sums;
  std::fill_n(dk, 2 * sums, T(0));
  // Of lanes beyond the queries: so that pairs which end in one have a weight of 0 there.
  std::fill_n(lse, kQ, kPairs ? std::numeric_limits<T>::infinity() : T(0));
  std::fill_n(delta, kQ, T(0));
  const T scale = static_cast<T>(shape.scale);
  for (int64_t unit = chunk; unit < units.count(); unit += units.chunks) {
    const int64_t head = units.head(kv_head, unit), first = units.block(unit) * kQ;
    const int64_t queries = std::min(kQ, shape.queries - first),
                  columns = (queries + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
    const int64_t seen = keys_seen(shape, first), keys = std::min(shape.keys, seen + queries - 1);
    const S *q_at = a.q.at(b, head, first), *dout_at = a.dout.at(b, head, first);
    const T* saved_lse = a.lse + (b * shape.heads + head) * shape.queries + first;
    for (int64_t i = 0; i < queries; ++i) {
      lse[i] = saved_lse[i] * static_cast<T>(kLog2E);
      const Rows<T> left = load_rows<T>(a.dout.at(b, head, first + i), 0, 1, head_size, dq);
      const Rows<T> right = load_rows<T>(a.out.at(b, head, first + i), 0, 1, head_size, dq + padded);
      delta[i] = dot(left.data, right.data, padded);
    }
    transpose(q_at, a.q.token, queries, head_size, q_rows, qt);
    transpose(dout_at, a.dout.token, queries, head_size, dout_rows, doutt);
    const Rows<P> q = rows_across(q_at, a.q.token, queries, head_size, q_rows);
    const Rows<P> dout = rows_across(dout_at, a.dout.token, queries, head_size, dout_rows);
    for (int64_t key = 0; key < keys; key += kK) {
      const TileMask mask = {std::min(kK, keys - key), queries, seen - key};
      const Rows<P> k = rows_along(a.k.at(b, kv_head, key), a.k.token, mask.keys, head_size, k_rows);
      const Rows<P> v = rows_along(a.v.at(b, kv_head, key), a.v.token, mask.keys, head_size, v_rows);
      const auto scores = [&](int64_t row, int64_t) { return mask.scores(row, head_size, kLanes<T>); };
      const auto keys_of = [&](int64_t row, int64_t rows) { return mask.keys_of(row, rows); };
      const auto queries_of = [&](int64_t row, int64_t) { return mask.queries_of(row); };
      product<true>(mask.keys, columns, k.data, k.stride, qt, kQ, static_cast<T>(shape.scale * kLog2E), T(0), s, kQ,
                    scores);
      product<true>(mask.keys, columns, v.data, v.stride, doutt, kQ, T(1), T(0), dp, kQ, scores);
      softmax_gradient_tile(mask, lse, delta, s, dp, ds_pairs);
      const P *weights = reinterpret_cast<const P*>(s), *ds = reinterpret_cast<const P*>(dp);
      product<true>(mask.keys, padded, weights, kQ, dout.data, dout.stride, T(1), T(1), dv + key * padded, padded,
                    queries_of);
      product<true>(mask.keys, padded, ds, kQ, q.data, q.stride, scale, T(1), dk + key * padded, padded, queries_of);
      Rows<P> k_across = k;
      if constexpr (kPairs) {
        ds = ds_pairs;
        k_across = rows_across(a.k.at(b, kv_head, key), a.k.token, mask.keys, head_size, k_pairs);
      }
      product<false>(queries, padded, ds, kQ, k_across.data, k_across.stride, scale, key > 0 ? T(1) : T(0), dq, padded,
                     keys_of);
    }
    for (int64_t i = 0; i < queries; ++i) put_gradient(dq + i * padded, head_size, a.dq, a.dq_sum, b, head, first + i);
  }
  if (partial != nullptr) return;
  for (int64_t key = 0; key < shape.keys; ++key) {
    put_gradient(dk + key * padded, head_size, a.dk, a.dk_sum, b, kv_head, key);
    put_gradient(dv + key * padded, head_size, a.dv, a.dv_sum, b, kv_head, key);
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
      put_gradient(total + key * padded, head_size, is_v ? a.dv : a.dk, is_v ? a.dv_sum : a.dk_sum, b, kv_head, key);
    }
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace weft::detail
HWY_AFTER_NAMESPACE();
#endif
