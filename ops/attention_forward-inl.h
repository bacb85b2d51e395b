// The forward kernel of attention: softmax over tiles of keys as they come (Milakov & Gimelshein 2018; Dao 2023), for
// many queries and for few. Included once per instruction set.
#if defined(WEFT_OPS_ATTENTION_FORWARD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef WEFT_OPS_ATTENTION_FORWARD_INL_H_
#undef WEFT_OPS_ATTENTION_FORWARD_INL_H_
#else
#define WEFT_OPS_ATTENTION_FORWARD_INL_H_
#endif

#include <limits>

#include "ops/attention_lanes-inl.h"

HWY_BEFORE_NAMESPACE();
namespace weft::detail {
namespace HWY_NAMESPACE {
namespace {

/// Takes a tile of scores (in units of log2), keys by queries, into the running softmax of each query: `s` becomes
/// 2^(s - max) with zeros where a key is hidden, in rows of P; max and sum go on; `factors` says by how much earlier
/// sums shrink. (Pairs of keys take half of the rows: they lie behind the scores that are still to be read.)
template <class P, class T>
void softmax_tile(const TileMask& mask, T* s, T* max, T* sum, T* factors) {
  const Tag<T> d;
  constexpr int64_t n = kLanes<T>, row = kAttentionQueries;
  for (int64_t lane = 0; lane < mask.queries; lane += n) {
    const int64_t full = mask.full(lane), none = mask.none(lane, n);
    T* at = s + lane;
    const auto old = hn::Load(d, max + lane);
    auto high = old;
    for (int64_t key = 0; key < full; ++key) high = hn::Max(high, hn::Load(d, at + key * row));
    for (int64_t key = full; key < none; ++key) {
      high = hn::IfThenElse(mask.lanes(d, lane, key), hn::Max(high, hn::Load(d, at + key * row)), high);
    }
    auto total = hn::Zero(d);
    const auto weight = [&](int64_t key) HWY_ATTR {
      const auto p = exp2(d, hn::Sub(hn::Load(d, at + key * row), high));
      total = hn::Add(total, p);
      return p;
    };
    const auto masked = [&](int64_t key) HWY_ATTR {
      if (key >= none) return hn::Zero(d);
      const auto p = hn::IfThenElseZero(mask.lanes(d, lane, key), exp2(d, hn::Sub(hn::Load(d, at + key * row), high)));
      total = hn::Add(total, p);
      return p;
    };
    for_keys<P>(
        mask, lane, [&](int64_t key) HWY_ATTR { store_weights<P>(key, weight, s, lane); },
        [&](int64_t key) HWY_ATTR { store_weights<P>(key, masked, s, lane); },
        [&](int64_t key) HWY_ATTR { store_weights<P>(key, [&](int64_t) HWY_ATTR { return hn::Zero(d); }, s, lane); });
    const auto factor = exp2(d, hn::Sub(old, high));
    hn::Store(factor, d, factors + lane);
    hn::Store(hn::MulAdd(hn::Load(d, sum + lane), factor, total), d, sum + lane);
    hn::Store(high, d, max + lane);
  }
}

/// lse = ln(sum) + max ln 2, and sum becomes 1 / sum. Whole vectors are read and written.
template <class T>
void finish_softmax(int64_t count, const T* max, T* sum, T* lse) {
  const Tag<T> d;
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const auto total = hn::Load(d, sum + i);
    const auto log = hn::IfThenElse(hn::IsNaN(total), total, hn::Log(d, total));
    hn::Store(hn::MulAdd(hn::Load(d, max + i), hn::Set(d, T(kLn2)), log), d, lse + i);
    hn::Store(hn::Div(hn::Set(d, T(1)), total), d, sum + i);
  }
}

/// One query's softmax over the keys of the parts before: as if they were one key with their lse as its score.
template <class T, class S>
void resume_row(const AttentionForward<S>& a, int64_t b, int64_t head, int64_t query, int64_t padded, T& max, T& sum,
                T* out) {
  max = a.lse_before[(b * a.shape.heads + head) * a.shape.queries + query] * static_cast<T>(kLog2E);
  sum = T(1);
  load_row<T>(a.so_far.at(b, head, query), a.shape.head_size, padded, out);
}

/// factor * row, rounded to the result or, where keys come in parts, not.
template <class T, class S>
void put_row(const AttentionForward<S>& a, int64_t b, int64_t head, int64_t query, const T* row, T factor) {
  if (a.so_far.data != nullptr) {
    store_row<T>(row, factor, a.shape.head_size, a.so_far.at(b, head, query));
  } else {
    store_row<T>(row, factor, a.shape.head_size, a.out.at(b, head, query));
  }
}

/// One task: every chunks-th unit of a (batch, key head).
template <class P, class S>
void forward_chunk(const AttentionForward<S>& a, const AttentionUnits& units, int64_t b, int64_t kv_head,
                   int64_t chunk) {
  using T = SumOf<P>;
  const AttentionShape& shape = a.shape;
  const int64_t padded = padded_head_size(shape.head_size);
  constexpr int64_t kQ = kAttentionQueries, kK = kAttentionKeys;
  AttentionScratch<T> scratch(4 * kQ * padded + kK * kQ + 4 * kQ, 9);
  P* const q_rows = reinterpret_cast<P*>(scratch.take(kQ * padded));
  P* const k_rows = q_rows;  // not needed at the same time
  P* const v_rows = reinterpret_cast<P*>(scratch.take(kK * padded));
  P* const qt = reinterpret_cast<P*>(scratch.take(padded * kQ));
  T* const out = scratch.take(kQ * padded);
  T* const s = scratch.take(kK * kQ);
  T* const max = scratch.take(kQ);
  T* const sum = scratch.take(kQ);
  T* const factors = scratch.take(kQ);
  T* const lse = scratch.take(kQ);
  for (int64_t unit = chunk; unit < units.count(); unit += units.chunks) {
    const int64_t head = units.head(kv_head, unit), first = units.block(unit) * kQ;
    const int64_t queries = std::min(kQ, shape.queries - first),
                  columns = (queries + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
    const int64_t seen = keys_seen(shape, first), keys = std::min(shape.keys, seen + queries - 1);
    transpose(a.q.at(b, head, first), a.q.token, queries, shape.head_size, q_rows, qt);
    std::fill_n(max, kQ, -std::numeric_limits<T>::infinity());
    std::fill_n(sum, kQ, T(0));
    for (int64_t i = 0; a.lse_before != nullptr && i < queries; ++i) {
      resume_row(a, b, head, first + i, padded, max[i], sum[i], out + i * padded);
    }
    for (int64_t key = 0; key < keys; key += kK) {
      const bool goes_on = key > 0 || a.lse_before != nullptr;
      const TileMask mask = {std::min(kK, keys - key), queries, seen - key};
      const Rows<P> k = rows_along(a.k.at(b, kv_head, key), a.k.token, mask.keys, shape.head_size, k_rows);
      product<true>(mask.keys, columns, k.data, k.stride, qt, kQ, static_cast<T>(shape.scale * kLog2E), T(0), s, kQ,
                    [&](int64_t row, int64_t) { return mask.scores(row, shape.head_size, kLanes<T>); });
      softmax_tile<P>(mask, s, max, sum, factors);
      if (goes_on) scale_rows(out, queries, padded, factors);
      const Rows<P> v = rows_across(a.v.at(b, kv_head, key), a.v.token, mask.keys, shape.head_size, v_rows);
      product<false>(queries, padded, reinterpret_cast<const P*>(s), kQ, v.data, v.stride, T(1), goes_on ? T(1) : T(0),
                     out, padded, [&](int64_t row, int64_t rows) { return mask.keys_of(row, rows); });
    }
    finish_softmax(queries, max, sum, lse);
    std::copy_n(lse, queries, a.lse + (b * shape.heads + head) * shape.queries + first);
    for (int64_t i = 0; i < queries; ++i) put_row(a, b, head, first + i, out + i * padded, sum[i]);
  }
}

/// s[key] = factor * (q . k[key]) for one query; q has `columns` elements, zeros after the head's.
template <class T>
void few_scores(const T* q, const Rows<T>& k, int64_t keys, int64_t columns, T factor, T* s) {
  const Tag<T> d;
  constexpr int64_t n = kLanes<T>;
  int64_t key = 0;
  for (; key + 4 <= keys; key += 4) {
    const T* row = k.data + key * k.stride;
    auto s0 = hn::Zero(d), s1 = hn::Zero(d), s2 = hn::Zero(d), s3 = hn::Zero(d);
    for (int64_t c = 0; c < columns; c += n) {
      const auto value = hn::Load(d, q + c);
      s0 = hn::MulAdd(value, hn::LoadU(d, row + c), s0);
      s1 = hn::MulAdd(value, hn::LoadU(d, row + k.stride + c), s1);
      s2 = hn::MulAdd(value, hn::LoadU(d, row + 2 * k.stride + c), s2);
      s3 = hn::MulAdd(value, hn::LoadU(d, row + 3 * k.stride + c), s3);
    }
    s[key] = factor * hn::GetLane(hn::SumOfLanes(d, s0));
    s[key + 1] = factor * hn::GetLane(hn::SumOfLanes(d, s1));
    s[key + 2] = factor * hn::GetLane(hn::SumOfLanes(d, s2));
    s[key + 3] = factor * hn::GetLane(hn::SumOfLanes(d, s3));
  }
  for (; key < keys; ++key) {
    auto s0 = hn::Zero(d);
    for (int64_t c = 0; c < columns; c += n)
      s0 = hn::MulAdd(hn::Load(d, q + c), hn::LoadU(d, k.data + key * k.stride + c), s0);
    s[key] = factor * hn::GetLane(hn::SumOfLanes(d, s0));
  }
}

/// softmax_tile for one query: its first `seen` scores of a tile of kAttentionKeys.
template <class T>
void few_softmax(int64_t seen, T* s, T& max, T& sum, T& factor) {
  const Tag<T> d;
  constexpr int64_t n = kLanes<T>;
  std::fill(s + seen, s + kAttentionKeys, -std::numeric_limits<T>::infinity());
  auto lanes = hn::Set(d, max);
  for (int64_t key = 0; key < seen; key += n) lanes = hn::Max(lanes, hn::Load(d, s + key));
  const auto high = hn::MaxOfLanes(d, lanes);
  auto total = hn::Zero(d);
  for (int64_t key = 0; key < kAttentionKeys; key += n) {
    const auto p = exp2(d, hn::Sub(hn::Load(d, s + key), high));
    total = hn::Add(total, p);
    hn::Store(p, d, s + key);
  }
  factor = hn::GetLane(exp2(d, hn::Sub(hn::Set(d, max), high)));
  sum = sum * factor + hn::GetLane(hn::SumOfLanes(d, total));
  max = hn::GetLane(high);
}

/// A (batch, key head) with few queries: generation, where all time goes into reading keys and values once.
template <class T, class S>
void forward_few(const AttentionForward<S>& a, int64_t b, int64_t kv_head) {
  const AttentionShape& shape = a.shape;
  const int64_t padded = padded_head_size(shape.head_size), group = shape.heads / shape.kv_heads,
                rows = group * shape.queries;
  const int64_t whole = (rows + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  constexpr int64_t kK = kAttentionKeys;
  AttentionScratch<T> scratch((2 * rows + kK) * padded + rows * kK + 4 * whole, 8);
  T* const q = scratch.take(rows * padded);
  T* const out = scratch.take(rows * padded);
  T* const kv_rows = scratch.take(kK * padded);
  T* const s = scratch.take(rows * kK);
  T* const max = scratch.take(whole);
  T* const sum = scratch.take(whole);
  T* const factors = scratch.take(whole);
  T* const lse = scratch.take(whole);
  const auto query = [&](int64_t row) { return row % shape.queries; };
  const auto head = [&](int64_t row) { return kv_head * group + row / shape.queries; };
  for (int64_t row = 0; row < rows; ++row) {
    load_row<T>(a.q.at(b, head(row), query(row)), shape.head_size, padded, q + row * padded);
  }
  std::fill_n(out, rows * padded, T(0));
  std::fill_n(max, whole, -std::numeric_limits<T>::infinity());
  std::fill_n(sum, whole, T(0));
  for (int64_t row = 0; a.lse_before != nullptr && row < rows; ++row) {
    resume_row(a, b, head(row), query(row), padded, max[row], sum[row], out + row * padded);
  }
  const int64_t keys = std::min(shape.keys, keys_seen(shape, shape.queries - 1));
  for (int64_t key = 0; key < keys; key += kK) {
    const int64_t count = std::min(kK, keys - key);
    const Rows<T> k = load_rows<T>(a.k.at(b, kv_head, key), a.k.token, count, shape.head_size, kv_rows);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t seen = std::clamp<int64_t>(keys_seen(shape, query(row)) - key, 0, count);
      few_scores(q + row * padded, k, seen, padded, static_cast<T>(shape.scale * kLog2E), s + row * kK);
      few_softmax(seen, s + row * kK, max[row], sum[row], factors[row]);
    }
    scale_rows(out, rows, padded, factors);
    const Rows<T> v = load_rows<T>(a.v.at(b, kv_head, key), a.v.token, count, shape.head_size, kv_rows);
    product<true>(rows, padded, s, kK, v.data, v.stride, T(1), T(1), out, padded,
                  [&](int64_t, int64_t) { return Part{0, 0, count}; });
  }
  finish_softmax(rows, max, sum, lse);
  for (int64_t row = 0; row < rows; ++row) {
    put_row(a, b, head(row), query(row), out + row * padded, sum[row]);
    a.lse[(b * shape.heads + head(row)) * shape.queries + query(row)] = lse[row];
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace weft::detail
HWY_AFTER_NAMESPACE();
#endif
