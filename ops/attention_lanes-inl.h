// What the attention kernels are made of: rows in and out of scratch memory, 2^x, products of tiles. Included once per
// instruction set.
#if defined(WEFT_OPS_ATTENTION_LANES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef WEFT_OPS_ATTENTION_LANES_INL_H_
#undef WEFT_OPS_ATTENTION_LANES_INL_H_
#else
#define WEFT_OPS_ATTENTION_LANES_INL_H_
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/dtype.h"
#include "hwy/contrib/math/math-inl.h"
#include "ops/attention_kernels.h"
#include "ops/gemm_pack-inl.h"

HWY_BEFORE_NAMESPACE();
namespace weft::detail {
namespace HWY_NAMESPACE {
namespace {

inline constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.69314718055994531;

// ---- rows of storage type S as values of type T ----

/// As many elements as a vector of T has.
template <class T, class S>
HWY_INLINE hn::Vec<Tag<T>> widen(Tag<T> d, const S* from) {
  if constexpr (std::is_same_v<S, T>) {
    return hn::LoadU(d, from);
  } else if constexpr (std::is_same_v<S, BFloat16>) {
    return hn::PromoteTo(
        d, hn::LoadU(hn::Rebind<hwy::bfloat16_t, Tag<T>>(), reinterpret_cast<const hwy::bfloat16_t*>(from)));
  } else {
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX2  // F16C
    return hn::PromoteTo(
        d, hn::LoadU(hn::Rebind<hwy::float16_t, Tag<T>>(), reinterpret_cast<const hwy::float16_t*>(from)));
#else
    HWY_ALIGN T wide[kLanes<T>];
    for (int i = 0; i < kLanes<T>; ++i) wide[i] = static_cast<T>(from[i]);
    return hn::Load(d, wide);
#endif
  }
}

/// The bits of v as bfloat16 in the lower halves of the lanes, rounded to nearest even.
template <class D>
HWY_INLINE hn::Vec<hn::RebindToUnsigned<D>> bfloat16_lanes(D, hn::Vec<D> v) {
  const hn::RebindToUnsigned<D> du;
  const auto bits = hn::BitCast(du, v);
  const auto high = hn::ShiftRight<16>(bits);
  const auto up = hn::Add(hn::And(high, hn::Set(du, 1)), hn::Set(du, 0x7fff));
  const auto rounded = hn::ShiftRight<16>(hn::Add(bits, up));
  return hn::IfThenElse(hn::RebindMask(du, hn::IsNaN(v)), hn::Or(high, hn::Set(du, 0x40)), rounded);
}

/// Rounds once, to nearest even.
template <class T, class S>
HWY_INLINE void narrow(Tag<T> d, hn::Vec<Tag<T>> v, S* to) {
  if constexpr (std::is_same_v<S, T>) {
    hn::StoreU(v, d, to);
  } else if constexpr (std::is_same_v<S, BFloat16>) {
    const hn::Rebind<int32_t, Tag<T>> di;
    const hn::Rebind<uint16_t, Tag<T>> d16;
    hn::StoreU(hn::DemoteTo(d16, hn::BitCast(di, bfloat16_lanes(d, v))), d16, reinterpret_cast<uint16_t*>(to));
  } else {
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX2
    const hn::Rebind<hwy::float16_t, Tag<T>> d16;
    hn::StoreU(hn::DemoteTo(d16, v), d16, reinterpret_cast<hwy::float16_t*>(to));
#else
    HWY_ALIGN T wide[kLanes<T>];
    hn::Store(v, d, wide);
    for (int i = 0; i < kLanes<T>; ++i) to[i] = S(wide[i]);
#endif
  }
}

/// to[i] = from[i], and zeros up to `padded`, a multiple of the vector length.
template <class T, class S>
void load_row(const S* from, int64_t count, int64_t padded, T* to) {
  const Tag<T> d;
  constexpr int64_t n = kLanes<T>;
  int64_t i = 0;
  for (; i + n <= count; i += n) hn::Store(widen<T>(d, from + i), d, to + i);
  if (i < count) {
    S part[n] = {};
    std::memcpy(static_cast<void*>(part), from + i, static_cast<size_t>(count - i) * sizeof(S));
    hn::Store(widen<T>(d, part), d, to + i);
    i += n;
  }
  for (; i < padded; i += n) hn::Store(hn::Zero(d), d, to + i);
}

/// to[i] = factor * from[i], rounded once.
template <class T, class S>
void store_row(const T* from, T factor, int64_t count, S* to) {
  const Tag<T> d;
  constexpr int64_t n = kLanes<T>;
  const auto scale = hn::Set(d, factor);
  int64_t i = 0;
  for (; i + n <= count; i += n) narrow<T>(d, hn::Mul(scale, hn::LoadU(d, from + i)), to + i);
  if (i < count) {
    S part[n];
    narrow<T>(d, hn::Mul(scale, hn::LoadU(d, from + i)), part);
    std::memcpy(static_cast<void*>(to + i), part, static_cast<size_t>(count - i) * sizeof(S));
  }
}

/// to[i] += from[i].
template <class T>
void add_row(const T* from, int64_t count, T* to) {
  const Tag<T> d;
  constexpr int64_t n = kLanes<T>;
  int64_t i = 0;
  for (; i + n <= count; i += n) hn::StoreU(hn::Add(hn::LoadU(d, to + i), hn::LoadU(d, from + i)), d, to + i);
  for (; i < count; ++i) to[i] += from[i];
}

/// Row `token` of a gradient: added to `sum` if that has data, else rounded and written to `out`.
template <class T, class S>
void put_gradient(const T* row, int64_t head_size, const HeadView<S>& out, const HeadView<T>& sum, int64_t b,
                  int64_t head, int64_t token) {
  if (sum.data != nullptr) {
    add_row(row, head_size, sum.at(b, head, token));
  } else {
    store_row<T>(row, T(1), head_size, out.at(b, head, token));
  }
}

/// Rows of operands of the products: row i is at data + i * stride. Of T, a row has a whole number of vectors.
template <class P>
struct Rows {
  const P* data;
  int64_t stride;
};

/// Rows as the products read them: in place where type and width allow it, else a copy in `scratch`, padded with zeros.
template <class T, class S>
Rows<T> load_rows(const S* from, int64_t stride, int64_t rows, int64_t head_size, T* scratch) {
  const int64_t padded = padded_head_size(head_size);
  if constexpr (std::is_same_v<S, T>) {
    if (head_size == padded) return {from, stride};
  }
  for (int64_t i = 0; i < rows; ++i) load_row<T>(from + i * stride, head_size, padded, scratch + i * padded);
  return {scratch, padded};
}

// The products of a kernel take operands of type P: T, into which S is widened, or pairs of bfloat16, which are read
// where they lie or copied.

inline const uint16_t* bits_of(const BFloat16* from) { return reinterpret_cast<const uint16_t*>(from); }

/// Rows as the first operand of a product that sums over the head's columns.
template <class P, class S>
Rows<P> rows_along(const S* from, int64_t stride, int64_t rows, int64_t head_size, P* scratch) {
  if constexpr (std::is_same_v<P, Bf16Pair>) {
    if (head_size % 2 == 0 && stride % 2 == 0 && reinterpret_cast<uintptr_t>(from) % 4 == 0) {
      return {reinterpret_cast<const P*>(from), stride / 2};
    }
    pack_a_along_k<P, uint16_t>(bits_of(from), stride, rows, head_size, scratch);
    return {scratch, packed_row<P>(depth_of<P>(head_size))};
  } else {
    return load_rows<P>(from, stride, rows, head_size, scratch);
  }
}

/// Rows as the second operand of a product that sums over them.
template <class P, class S>
Rows<P> rows_across(const S* from, int64_t stride, int64_t rows, int64_t head_size, P* scratch) {
  if constexpr (std::is_same_v<P, Bf16Pair>) {
    const Tag<float> d;
    constexpr int64_t n = kLanes<float>;
    const int64_t padded = padded_head_size(head_size);
    for (int64_t i = 0; i < rows; i += 2) {
      const uint16_t* row = bits_of(from + i * stride);
      float* to = reinterpret_cast<float*>(scratch + i / 2 * padded);
      int64_t c = 0;
      for (; c + n <= head_size; c += n) {
        hn::Store(Source<P, uint16_t>::across(d, row + c, stride, rows - i), d, to + c);
      }
      if (c == head_size) continue;
      const size_t left = static_cast<size_t>(head_size - c);
      hn::Store(Source<P, uint16_t>::across_n(d, row + c, stride, rows - i, left), d, to + c);
    }
    return {scratch, padded};
  } else {
    return load_rows<P>(from, stride, rows, head_size, scratch);
  }
}

/// Rows of a block of queries as the second operand of a product that sums over the head's columns: rows of
/// kAttentionQueries lanes, out[c][i] = rows[i][c].
template <class P, class S>
void transpose(const S* from, int64_t stride, int64_t rows, int64_t head_size, P* scratch, P* out) {
  constexpr int64_t n = kLanes<SumOf<P>>;
  const auto pack = [&]<class E>(const E* data, int64_t ld) {
    for (int64_t i = 0; i < rows; i += n) {
      pack_transposed<P, E>(data + i * ld, ld, head_size, std::min(n, rows - i), kAttentionQueries, out + i);
    }
  };
  if constexpr (std::is_same_v<P, Bf16Pair>) {
    pack(bits_of(from), stride);
  } else {
    const Rows<P> loaded = load_rows<P>(from, stride, rows, head_size, scratch);
    pack(loaded.data, loaded.stride);
  }
}

/// Stores weights of two keys for the same queries as pairs: those of `first` and `second`.
HWY_INLINE void store_pairs(hn::Vec<Tag<float>> first, hn::Vec<Tag<float>> second, Bf16Pair* to) {
  const Tag<float> d;
  const auto upper = hn::ShiftLeft<16>(bfloat16_lanes(d, second));
  hn::Store(hn::BitCast(d, hn::Or(bfloat16_lanes(d, first), upper)), d, reinterpret_cast<float*>(to));
}

/// rows[i] *= factors[i].
template <class T>
void scale_rows(T* rows, int64_t count, int64_t columns, const T* factors) {
  const Tag<T> d;
  for (int64_t i = 0; i < count; ++i) {
    if (factors[i] == T(1)) continue;
    const auto factor = hn::Set(d, factors[i]);
    for (int64_t c = 0; c < columns; c += kLanes<T>) {
      T* at = rows + i * columns + c;
      hn::Store(hn::Mul(factor, hn::Load(d, at)), d, at);
    }
  }
}

// ---- the exponential ----

/// 2^x; 0 for x < -100, where softmax has no use for it and denormal numbers would be slow. NaN gives NaN.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V exp2(D d, V x) {
  using T = hn::TFromD<D>;
  const auto tiny = hn::Lt(x, hn::Set(d, T(-100)));
  if constexpr (std::is_same_v<T, float>) {
    // x = n + f with |f| <= 1/2; 2^f is a polynomial fitted to a relative error of 4e-9, 9e-8 with rounding.
    const hn::RebindToSigned<D> di;
    const auto n = hn::NearestInt(x);
    const V f = hn::Sub(x, hn::ConvertTo(d, n));
    V p = hn::Set(d, 0x1.46b3acp-13f);
    p = hn::MulAdd(p, f, hn::Set(d, 0x1.5f5d6p-10f));
    p = hn::MulAdd(p, f, hn::Set(d, 0x1.3b271ep-7f));
    p = hn::MulAdd(p, f, hn::Set(d, 0x1.c6aeaap-5f));
    p = hn::MulAdd(p, f, hn::Set(d, 0x1.ebfbe4p-3f));
    p = hn::MulAdd(p, f, hn::Set(d, 0x1.62e43p-1f));
    p = hn::MulAdd(p, f, hn::Set(d, 1.0f));
    // A product, not an addition to the exponent: that could turn a NaN into a number.
    const V power = hn::BitCast(d, hn::ShiftLeft<23>(hn::Add(n, hn::Set(di, 127))));
    return hn::IfThenZeroElse(tiny, hn::Mul(p, power));
  } else {
    const V y = hn::Exp(d, hn::Mul(x, hn::Set(d, T(kLn2))));
    return hn::IfThenElse(hn::IsNaN(x), x, hn::IfThenZeroElse(tiny, y));
  }
}

// ---- products of tiles ----

/// What is computed of some rows of a product: columns from `column` on (a whole number of vectors), sums over [begin,
/// end).
struct Part {
  int64_t column, begin, end;
};

/// C = alpha * A B + beta * C by register tiles; part_of(first row, rows) says what of their rows is computed. The rest
/// of C is left as it is. a: element (i, p) is a[i * a_stride + p] if kAlongK, else a[p * a_stride + i]. `columns` is a
/// whole number of vectors. Of pairs, those are summed that hold an element of the part.
template <bool kAlongK, class P, class T, class PartOf>
HWY_INLINE void product(int64_t rows, int64_t columns, const P* a, int64_t a_stride, const P* b, int64_t b_stride,
                        T alpha, T beta, T* c, int64_t ldc, PartOf part_of) {
  constexpr int64_t n = kLanes<T>;
  const RowPanels panels(rows);
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    const int64_t first = panels.first(panel), height = panels.rows(panel);
    const Part part = part_of(first, height);
    if (part.begin >= part.end) continue;
    const int64_t begin = part.begin / kPerElement<P>, depth = depth_of<P>(part.end) - begin;
    const P* from = kAlongK ? a + first * a_stride + begin : a + begin * a_stride + first;
    for (int64_t j = part.column; j < columns; j += kTileVecs * n) {
      const int64_t wide = std::min(kTileVecs * n, columns - j);
      const TileOut<T> out = {c + first * ldc + j, ldc, alpha, beta, nullptr, static_cast<int>(wide)};
      TileKernels<P>::all[kAlongK][wide / n - 1][static_cast<size_t>(height - 1)](
          from, a_stride, b + begin * b_stride + j, b_stride, depth, out);
    }
  }
}

/// Which part of a tile of keys by queries exists: query i sees keys [0, reach + i) of the tile's `keys`.
struct TileMask {
  int64_t keys, queries, reach;

  /// Scores of keys from `first` on, sums over `depth`: the vectors of queries of which one at least sees the first
  /// key.
  Part scores(int64_t first, int64_t depth, int64_t lanes) const {
    return {queries_of(first).begin / lanes * lanes, 0, depth};
  }
  /// Sums over the keys that queries [first, first + rows) see, the last one the most.
  Part keys_of(int64_t first, int64_t rows) const {
    return {0, 0, std::clamp<int64_t>(reach + first + rows - 1, 0, keys)};
  }
  /// Sums over the queries that see key `first`; later keys are seen by fewer.
  Part queries_of(int64_t first) const { return {0, std::max<int64_t>(0, first - reach + 1), queries}; }

  /// For queries [lane, lane + lanes): keys below `full` are seen by all of them, keys from `none` on by none.
  int64_t full(int64_t lane) const { return std::clamp<int64_t>(reach + lane, 0, keys); }
  int64_t none(int64_t lane, int64_t lanes) const { return std::clamp<int64_t>(reach + lane + lanes - 1, 0, keys); }
  /// Lanes of the queries from `lane` on that see `key`.
  template <class D>
  HWY_INLINE hn::Mask<D> lanes(D d, int64_t lane, int64_t key) const {
    return hn::Not(hn::FirstN(d, static_cast<size_t>(std::max<int64_t>(0, key - reach - lane + 1))));
  }
};

/// Goes over the keys of a tile, as many at a time as make an element of P, for the vector of queries from `lane` on:
/// visible(key) where all of these queries see all of these keys, masked(key) where some may, zero(key) where none
/// does.
template <class P, class Visible, class Masked, class Zero>
HWY_INLINE void for_keys(const TileMask& mask, int64_t lane, const Visible& visible, const Masked& masked,
                         const Zero& zero) {
  constexpr int64_t step = kPerElement<P>;
  const int64_t full = mask.full(lane), none = mask.none(lane, kLanes<SumOf<P>>);
  int64_t key = 0;
  for (; key + step <= full; key += step) visible(key);
  for (; key < none; key += step) masked(key);
  for (; key < mask.keys; key += step) zero(key);
}

/// Stores weight(key) for the queries from `lane` on, or the weights of two keys as pairs, in a tile's rows of P, which
/// begin where those of T do.
template <class P, class Weight, class T>
HWY_INLINE void store_weights(int64_t key, const Weight& weight, T* tile, int64_t lane) {
  constexpr int64_t row = kAttentionQueries;
  if constexpr (std::is_same_v<P, Bf16Pair>) {
    const auto first = weight(key);
    store_pairs(first, weight(key + 1), reinterpret_cast<P*>(tile) + key / 2 * row + lane);
  } else {
    hn::Store(weight(key), Tag<T>(), tile + key * row + lane);
  }
}

/// Number of keys that the first query of a block sees; the next one sees one more, up to all of them.
inline int64_t keys_seen(const AttentionShape& s, int64_t query) {
  return s.causal ? std::min(s.query_offset, s.keys) + query + 1 : s.keys;
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace weft::detail
HWY_AFTER_NAMESPACE();
#endif
