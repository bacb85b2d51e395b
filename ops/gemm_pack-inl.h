// Copies of pieces of A and B in the order in which the register tiles read them. Included once per instruction set.
#if defined(WEFT_OPS_GEMM_PACK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef WEFT_OPS_GEMM_PACK_INL_H_
#undef WEFT_OPS_GEMM_PACK_INL_H_
#else
#define WEFT_OPS_GEMM_PACK_INL_H_
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "ops/gemm_kernel-inl.h"

HWY_BEFORE_NAMESPACE();
namespace weft::detail {
namespace HWY_NAMESPACE {

/// How many elements along k make one element of an operand of type P.
template <class P>
inline constexpr int64_t kPerElement = std::is_same_v<P, Bf16Pair> ? 2 : 1;

/// Elements of P that `k` elements along k fill.
template <class P>
constexpr int64_t depth_of(int64_t k) {
  return (k + kPerElement<P> - 1) / kPerElement<P>;
}

/// Vectors of an operand's type P, as SumOf<P>, made of elements of S: the same type, bfloat16 bits as float, or pairs.
/// load(): from memory that lies along k. across(): from rows of memory that follow one another along k, as many as
/// make an element of P, `ld` apart; `rows` of them exist. load_n() and across_n(): the first `count` elements of each
/// row; what lies beyond is 0 and is not read.
template <class P, class S>
struct Source {
  static_assert(std::is_same_v<S, uint16_t> && std::is_same_v<P, float>);
  template <class D>
  HWY_INLINE static hn::Vec<D> load(D d, const S* at) {
    const hn::Rebind<hwy::bfloat16_t, D> half;
    return hn::PromoteTo(d, hn::LoadU(half, reinterpret_cast<const hwy::bfloat16_t*>(at)));
  }
  template <class D>
  HWY_INLINE static hn::Vec<D> load_n(D d, const S* at, size_t count) {
    HWY_ALIGN S lanes[hn::MaxLanes(d)] = {};
    std::memcpy(lanes, at, count * sizeof(S));
    return load(d, lanes);
  }
  template <class D>
  HWY_INLINE static hn::Vec<D> across(D d, const S* at, int64_t, int64_t) {
    return load(d, at);
  }
  template <class D>
  HWY_INLINE static hn::Vec<D> across_n(D d, const S* at, int64_t, int64_t, size_t count) {
    return load_n(d, at, count);
  }
  HWY_INLINE static P scalar(S value) {
    const uint32_t bits = uint32_t{value} << 16;
    P out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
  }
};

template <class T>
struct Source<T, T> {
  template <class D>
  HWY_INLINE static hn::Vec<D> load(D d, const T* at) {
    return hn::LoadU(d, at);
  }
  template <class D>
  HWY_INLINE static hn::Vec<D> load_n(D d, const T* at, size_t count) {
    return hn::MaskedLoad(hn::FirstN(d, count), d, at);
  }
  template <class D>
  HWY_INLINE static hn::Vec<D> across(D d, const T* at, int64_t, int64_t) {
    return load(d, at);
  }
  template <class D>
  HWY_INLINE static hn::Vec<D> across_n(D d, const T* at, int64_t, int64_t, size_t count) {
    return load_n(d, at, count);
  }
  HWY_INLINE static T scalar(T value) { return value; }
};

#if HWY_TARGET <= HWY_AVX3
template <>
struct Source<Bf16Pair, uint16_t> {
  using S = uint16_t;
  template <class D>
  HWY_INLINE static hn::Vec<D> load(D d, const S* at) {
    return hn::BitCast(d, hn::LoadU(hn::Repartition<uint16_t, D>(), at));
  }
  template <class D>
  HWY_INLINE static hn::Vec<D> load_n(D d, const S* at, size_t count) {
    HWY_ALIGN S lanes[2 * hn::MaxLanes(d)] = {};
    std::memcpy(lanes, at, count * sizeof(S));
    return load(d, lanes);
  }
  template <class D>
  HWY_INLINE static hn::Vec<D> across(D d, const S* at, int64_t ld, int64_t rows) {
    const hn::Rebind<uint16_t, D> half;
    const hn::Repartition<uint16_t, D> whole;
    HWY_ALIGN static constexpr S kOrder[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                               8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const auto first = hn::ZeroExtendVector(whole, hn::LoadU(half, at));
    const auto second = rows == 1 ? hn::Zero(whole) : hn::ZeroExtendVector(whole, hn::LoadU(half, at + ld));
    const decltype(first) pairs{_mm512_permutex2var_epi16(first.raw, hn::Load(whole, kOrder).raw, second.raw)};
    return hn::BitCast(d, pairs);
  }
  template <class D>
  HWY_INLINE static hn::Vec<D> across_n(D d, const S* at, int64_t ld, int64_t rows, size_t count) {
    HWY_ALIGN S lanes[2][hn::MaxLanes(d)] = {};
    for (int64_t i = 0; i < std::min<int64_t>(rows, 2); ++i) std::memcpy(lanes[i], at + i * ld, count * sizeof(S));
    return across(d, lanes[0], static_cast<int64_t>(hn::MaxLanes(d)), rows);
  }
};
#endif

#if HWY_TARGET != HWY_SCALAR
/// A vector whose 128-bit block i comes from `at` + offsets[i * step]: 4 blocks of 4 floats for AVX-512.
template <class P, class S, class D>
HWY_INLINE hn::Vec<D> load_blocks(D d, const S* at, const int64_t* offsets, int step) {
  if constexpr (hn::MaxLanes(d) * sizeof(P) <= 16) {
    return Source<P, S>::load(d, at + offsets[0]);
  } else {
    const hn::Half<D> half;
    constexpr int blocks = static_cast<int>(hn::MaxLanes(half) * sizeof(P) / 16);
    return hn::Combine(d, load_blocks<P, S>(half, at, offsets + blocks * step, step),
                       load_blocks<P, S>(half, at, offsets, step));
  }
}
#endif

/// `count` lines of memory, each along k and ld apart, turned into a vector's lanes: out[p * step + line]. Lanes beyond
/// `count` repeat the last line; what is computed from them is never stored.
template <class P, class S>
void pack_transposed(const S* from, int64_t ld, int64_t k, int64_t count, int64_t step, P* HWY_RESTRICT out) {
  using T = SumOf<P>;
  [[maybe_unused]] const Tag<T> d;
  constexpr int64_t n = kLanes<T>;
  int64_t offsets[n];
  for (int64_t j = 0; j < n; ++j) offsets[j] = std::min(j, count - 1) * ld;
  int64_t p = 0;
#if HWY_TARGET != HWY_SCALAR
  constexpr int block = 16 / sizeof(T);  // elements of a 128-bit block
  for (; p + block <= k / kPerElement<P>; p += block) {
    // Line j goes to block j / block of vector j % block: then transposing within blocks is enough.
    const S* at = from + p * kPerElement<P>;
    T* to = reinterpret_cast<T*>(out + p * step);
    if constexpr (block == 4) {
      const auto r0 = load_blocks<P, S>(d, at, offsets, 4), r1 = load_blocks<P, S>(d, at, offsets + 1, 4);
      const auto r2 = load_blocks<P, S>(d, at, offsets + 2, 4), r3 = load_blocks<P, S>(d, at, offsets + 3, 4);
      const auto low02 = hn::InterleaveLower(d, r0, r2), low13 = hn::InterleaveLower(d, r1, r3);
      const auto up02 = hn::InterleaveUpper(d, r0, r2), up13 = hn::InterleaveUpper(d, r1, r3);
      hn::StoreU(hn::InterleaveLower(d, low02, low13), d, to);
      hn::StoreU(hn::InterleaveUpper(d, low02, low13), d, to + step);
      hn::StoreU(hn::InterleaveLower(d, up02, up13), d, to + 2 * step);
      hn::StoreU(hn::InterleaveUpper(d, up02, up13), d, to + 3 * step);
    } else {
      const auto r0 = load_blocks<P, S>(d, at, offsets, 2), r1 = load_blocks<P, S>(d, at, offsets + 1, 2);
      hn::StoreU(hn::InterleaveLower(d, r0, r1), d, to);
      hn::StoreU(hn::InterleaveUpper(d, r0, r1), d, to + step);
    }
  }
#endif
  for (; p < depth_of<P>(k); ++p) {
    for (int64_t j = 0; j < n; ++j) {
      if constexpr (kPerElement<P> == 2) {
        const S* at = from + offsets[j] + 2 * p;
        out[p * step + j] = {at[0], 2 * p + 1 < k ? at[1] : S(0)};
      } else {
        out[p * step + j] = Source<P, S>::scalar(from[offsets[j] + p]);
      }
    }
  }
}

/// Elements from one packed panel to the next, `width` by k elements each. The five lines more keep panels, which are
/// written side by side, out of each other's sets in L1: width * k is a multiple of 4 KiB too often.
template <class T>
constexpr int64_t panel_step(int64_t width, int64_t k) {
  return width * k + 5 * 64 / static_cast<int64_t>(sizeof(T));
}

/// A block of B, rows [0, k) and `cols` columns from `b` on, as panels of kTileVecs vectors: out[panel][p][column]. The
/// last panel has only the vectors that it needs, and zeros or repeated columns in the last one.
template <class P, class S>
void pack_b(const S* b, int64_t row_stride, int64_t col_stride, int64_t k, int64_t cols, P* HWY_RESTRICT out) {
  using T = SumOf<P>;
  const Tag<T> d;
  constexpr int64_t n = kLanes<T>, width = kTileVecs * n;
  const int64_t depth = depth_of<P>(k), step = panel_step<P>(width, depth);
  if (col_stride != 1) {
    for (int64_t j = 0; j < cols; j += n) {
      const int64_t panel = j / width, vecs = std::min<int64_t>(kTileVecs, (cols - panel * width + n - 1) / n);
      pack_transposed<P, S>(b + j * col_stride, col_stride, k, std::min(cols - j, n), vecs * n,
                            out + panel * step + j % width);
    }
    return;
  }
  // Whole rows: memory is read in order, panels are written side by side.
  const int64_t whole = cols / width * width, last_vecs = (cols - whole + n - 1) / n;
  for (int64_t p = 0; p < depth; ++p, b += kPerElement<P> * row_stride) {
    const int64_t rows = k - kPerElement<P> * p;
    T* to = reinterpret_cast<T*>(out + p * width);
    for (int64_t j = 0; j < whole; j += width, to += step) {
      unroll<kTileVecs>([&](auto v) WEFT_UNROLLED {
        hn::Store(Source<P, S>::across(d, b + j + v * n, row_stride, rows), d, to + v * n);
      });
    }
    to = reinterpret_cast<T*>(out + whole / width * step + p * last_vecs * n);
    for (int64_t j = whole; j < cols; j += n, to += n) {
      const size_t count = static_cast<size_t>(std::min(cols - j, n));
      hn::Store(Source<P, S>::across_n(d, b + j, row_stride, rows, count), d, to);
    }
  }
}

/// The split of `total` rows into the fewest panels of at most `most` rows, as even as possible: even panels keep
/// enough independent sums in flight, which a short last one would not.
struct RowPanels {
  explicit RowPanels(int64_t total, int64_t most = kTileRows)
      : count((total + most - 1) / most), base(total / count), longer(total % count) {}
  int64_t rows(int64_t panel) const { return base + (panel < longer); }
  int64_t first(int64_t panel) const { return panel * base + std::min(panel, longer); }
  int64_t count, base, longer;
};

/// Elements of one column of a packed panel of A: whole vectors, so that stores are aligned.
template <class P>
inline constexpr int64_t kPanelRows = (kTileRows + kLanes<SumOf<P>> - 1) / kLanes<SumOf<P>> * kLanes<SumOf<P>>;

/// Elements from one row of a packed panel to the next: whole lines of memory, which no vector straddles.
template <class T>
constexpr int64_t packed_row(int64_t k) {
  constexpr int64_t line = 64 / sizeof(T);
  return (k + line - 1) / line * line;
}

/// A panel of an A whose rows lie along k: out[row][p], p < depth_of(k), rows packed_row(depth_of(k)) apart. A vector
/// of every row in turn: all rows come from memory at once.
template <class P, class S>
void pack_a_along_k(const S* a, int64_t row_stride, int64_t rows, int64_t k, P* HWY_RESTRICT out) {
  using T = SumOf<P>;
  const Tag<T> d;
  constexpr int64_t n = kLanes<T>, vector = n * kPerElement<P>;
  const int64_t step = packed_row<P>(depth_of<P>(k));
  int64_t p = 0;
  for (; p + vector <= k; p += vector) {
    const S* from = a + p;
    T* to = reinterpret_cast<T*>(out) + p / kPerElement<P>;
    for (int64_t i = 0; i < rows; ++i, from += row_stride, to += step) hn::Store(Source<P, S>::load(d, from), d, to);
  }
  if (p == k) return;
  const size_t left = static_cast<size_t>(k - p);
  for (int64_t i = 0; i < rows; ++i) {
    T* to = reinterpret_cast<T*>(out) + i * step + p / kPerElement<P>;
    hn::Store(Source<P, S>::load_n(d, a + i * row_stride + p, left), d, to);
  }
}

/// Panels [panel0, panel0 + count) of an A whose columns lie along memory, k of them: out[panel][p][row], panels
/// panel_step(kPanelRows, depth_of(k)) apart. `total` rows of A exist from `a` on.
template <class P, class S>
void pack_a_across_k(const S* a, int64_t col_stride, int64_t total, const RowPanels& panels, int64_t panel0,
                     int64_t count, int64_t k, P* HWY_RESTRICT out) {
  using T = SumOf<P>;
  const Tag<T> d;
  constexpr int64_t n = kLanes<T>;
  const int64_t depth = depth_of<P>(k), step = panel_step<P>(kPanelRows<P>, depth);
  for (int64_t p = 0; p < depth; ++p, a += kPerElement<P> * col_stride) {
    const int64_t columns = k - kPerElement<P> * p;
    const S* from = a;
    T* to = reinterpret_cast<T*>(out + p * kPanelRows<P>);
    int64_t left = total;
    for (int64_t q = 0; q < count; ++q, to += step) {
      const int64_t rows = panels.rows(panel0 + q);
      if (left >= kPanelRows<P>) {
        // More than the panel needs: nobody looks at the lanes beyond its rows.
        for (int64_t i = 0; i < kPanelRows<P>; i += n) {
          hn::Store(Source<P, S>::across(d, from + i, col_stride, columns), d, to + i);
        }
      } else {
        for (int64_t i = 0; i < rows; i += n) {
          const size_t some = static_cast<size_t>(std::min(n, rows - i));
          hn::Store(Source<P, S>::across_n(d, from + i, col_stride, columns, some), d, to + i);
        }
      }
      from += rows;
      left -= rows;
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace weft::detail
HWY_AFTER_NAMESPACE();
#endif
