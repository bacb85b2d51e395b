// Rows of any float type as vectors of f32 (f64 for f64), tails included. Included once per instruction set.
#if defined(WEFT_OPS_NORM_LANES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef WEFT_OPS_NORM_LANES_INL_H_
#undef WEFT_OPS_NORM_LANES_INL_H_
#else
#define WEFT_OPS_NORM_LANES_INL_H_
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/dtype.h"
#include "hwy/cache_control.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace weft::detail {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

template <class T>
using Tag = hn::ScalableTag<Accumulate<T>>;
template <class T>
using Vector = hn::Vec<Tag<T>>;

/// How much of a vector exists: all of it, or its first `count` lanes at the end of a row. Loads give 0 in the others.
struct Full {};
struct Part {
  int64_t count;
};

template <class T>
HWY_INLINE Vector<T> load(Tag<T> d, const T* from, Full) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const hn::Rebind<uint16_t, Tag<T>> d16;
    const hn::Rebind<uint32_t, Tag<T>> d32;
    const auto bits = hn::PromoteTo(d32, hn::LoadU(d16, reinterpret_cast<const uint16_t*>(from)));
    return hn::BitCast(d, hn::ShiftLeft<16>(bits));
  } else if constexpr (std::is_same_v<T, Half>) {
    HWY_ALIGN float wide[hn::MaxLanes(Tag<T>())];
    for (size_t i = 0; i < hn::Lanes(d); ++i) wide[i] = static_cast<float>(from[i]);
    return hn::Load(d, wide);
  } else {
    return hn::LoadU(d, from);
  }
}

template <class T>
HWY_INLINE Vector<T> load(Tag<T> d, const T* from, Part part) {
  T padded[hn::MaxLanes(Tag<T>())] = {};
  std::memcpy(padded, from, static_cast<size_t>(part.count) * sizeof(T));
  return load<T>(d, padded, Full());
}

/// The bits of v as bfloat16, rounded to nearest even.
template <class D>
HWY_INLINE auto bfloat16_bits(D, hn::Vec<D> v) {
  const hn::Rebind<uint32_t, D> du;
  const hn::Rebind<int32_t, D> di;
  const auto bits = hn::BitCast(du, v);
  const auto high = hn::ShiftRight<16>(bits);
  const auto odd = hn::And(high, hn::Set(du, 1));
  const auto rounded = hn::ShiftRight<16>(hn::Add(bits, hn::Add(odd, hn::Set(du, 0x7fff))));
  const auto nan = hn::RebindMask(du, hn::IsNaN(v));
  const auto result = hn::IfThenElse(nan, hn::Or(high, hn::Set(du, 0x40)), rounded);
  return hn::DemoteTo(hn::Rebind<uint16_t, D>(), hn::BitCast(di, result));
}

/// Rounds once, to nearest even.
template <class T>
HWY_INLINE void store(Tag<T> d, Vector<T> v, T* to, Full) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    hn::StoreU(bfloat16_bits(d, v), hn::Rebind<uint16_t, Tag<T>>(), reinterpret_cast<uint16_t*>(to));
  } else if constexpr (std::is_same_v<T, Half>) {
    HWY_ALIGN float wide[hn::MaxLanes(Tag<T>())];
    hn::Store(v, d, wide);
    for (size_t i = 0; i < hn::Lanes(d); ++i) to[i] = Half(wide[i]);
  } else {
    hn::StoreU(v, d, to);
  }
}

/// store() past the caches where the type allows it; `to` is aligned to the vector. FlushStream() must follow.
template <class T>
HWY_INLINE void stream(Tag<T> d, Vector<T> v, T* to) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    hn::Stream(bfloat16_bits(d, v), hn::Rebind<uint16_t, Tag<T>>(), reinterpret_cast<uint16_t*>(to));
  } else if constexpr (std::is_same_v<T, Half>) {
    store<T>(d, v, to, Full());
  } else {
    hn::Stream(v, d, to);
  }
}

template <class T>
HWY_INLINE void store(Tag<T> d, Vector<T> v, T* to, Part part) {
  T padded[hn::MaxLanes(Tag<T>())];
  store<T>(d, v, padded, Full());
  std::memcpy(to, padded, static_cast<size_t>(part.count) * sizeof(T));
}

/// v with 0 (or `other`) in the lanes that do not exist.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V existing(D, V v, Full, V = V()) {
  return v;
}
template <class D, class V = hn::Vec<D>>
HWY_INLINE V existing(D d, V v, Part part) {
  return hn::IfThenElseZero(hn::FirstN(d, static_cast<size_t>(part.count)), v);
}
template <class D, class V = hn::Vec<D>>
HWY_INLINE V existing(D d, V v, Part part, V other) {
  return hn::IfThenElse(hn::FirstN(d, static_cast<size_t>(part.count)), v, other);
}

/// Calls body(k, i, which) for each vector of a row of n elements, i its first element. k cycles through 0 to 3 as a
/// constant: four sums that do not wait for each other.
template <class D, class Body>
HWY_INLINE void for_lanes(D d, int64_t n, Body&& body) {
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    body(std::integral_constant<int, 0>(), i, Full());
    body(std::integral_constant<int, 1>(), i + lanes, Full());
    body(std::integral_constant<int, 2>(), i + 2 * lanes, Full());
    body(std::integral_constant<int, 3>(), i + 3 * lanes, Full());
  }
  for (; i + lanes <= n; i += lanes) body(std::integral_constant<int, 0>(), i, Full());
  if (i < n) body(std::integral_constant<int, 1>(), i, Part{n - i});
}

/// Four partial sums and their total.
template <class D>
struct Sums {
  hn::Vec<D> part[4];
  HWY_INLINE explicit Sums(D d) : part{hn::Zero(d), hn::Zero(d), hn::Zero(d), hn::Zero(d)} {}
  HWY_INLINE hn::TFromD<D> total(D d) const {
    return hn::GetLane(hn::SumOfLanes(d, hn::Add(hn::Add(part[0], part[1]), hn::Add(part[2], part[3]))));
  }
};

/// Where results go: past the caches if they are larger than these, so that they are not read in to be overwritten.
/// `rows` of `columns` elements of T at `to`, which must be aligned to 64 bytes with every row.
template <class T>
bool worth_streaming(const T* to, int64_t rows, int64_t columns) {
  constexpr int64_t kCache = int64_t{32} << 20;
  const int64_t row_bytes = columns * static_cast<int64_t>(sizeof(T));
  return rows * row_bytes > kCache && row_bytes % 64 == 0 && reinterpret_cast<uintptr_t>(to) % 64 == 0;
}

/// store() or, for a kStream kernel, stream().
template <class T, bool kStream, class Which>
HWY_INLINE void put(Tag<T> d, Vector<T> v, T* to, Which which) {
  if constexpr (kStream && std::is_same_v<Which, Full>) {
    stream<T>(d, v, to);
  } else {
    store<T>(d, v, to, which);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace weft::detail
HWY_AFTER_NAMESPACE();

#endif
