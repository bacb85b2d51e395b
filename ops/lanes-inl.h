// A vector of floats or doubles with the operators and functions that scalar_math.inc uses, and the functors of that
// file for it. Included once per instruction set, within a file that goes through Highway's foreach_target.h.
#if defined(WEFT_OPS_LANES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef WEFT_OPS_LANES_INL_H_
#undef WEFT_OPS_LANES_INL_H_
#else
#define WEFT_OPS_LANES_INL_H_
#endif

#include <cmath>
#include <cstdint>

#include "core/float_types.h"
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace weft::detail {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

/// e^x, within 2 ulp for f32. 0 where the result is below the smallest normal number, inf where it is too large; NaN
/// stays NaN.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V fast_exp(D d, V x) {
  using T = hn::TFromD<D>;
  if constexpr (sizeof(T) == 8) {
    const V y = hn::Exp(d, hn::Max(hn::Min(x, hn::Set(d, T(700))), hn::Set(d, T(-700))));
    const V clipped = hn::IfThenElse(hn::Le(x, hn::Set(d, T(700))), y, hn::Add(x, hn::Inf(d)));
    return hn::IfThenZeroElse(hn::Lt(x, hn::Set(d, T(-700))), clipped);
  } else {
    // x = q ln 2 + r with |r| <= ln(2) / 2 (Cody and Waite); e^r by a polynomial (Cephes expf). Adding 1.5 * 2^23
    // leaves round(x / ln 2) in the low bits of t.
    const V shift = hn::Set(d, 12582912.0f);
    const V t = hn::MulAdd(x, hn::Set(d, 1.44269504f), shift);
    const V q = hn::Sub(t, shift);
    V r = hn::NegMulAdd(q, hn::Set(d, 0.693359375f), x);
    r = hn::NegMulAdd(q, hn::Set(d, -2.12194440e-4f), r);
    V y = hn::Set(d, 1.9875691500e-4f);
    y = hn::MulAdd(y, r, hn::Set(d, 1.3981999507e-3f));
    y = hn::MulAdd(y, r, hn::Set(d, 8.3334519073e-3f));
    y = hn::MulAdd(y, r, hn::Set(d, 4.1665795894e-2f));
    y = hn::MulAdd(y, r, hn::Set(d, 1.6666665459e-1f));
    y = hn::MulAdd(y, r, hn::Set(d, 5.0000001201e-1f));
    y = hn::Add(hn::MulAdd(y, hn::Mul(r, r), r), hn::Set(d, 1.0f));
    // y * 2^q by adding q to the exponent field: right as long as the result is normal, which the limits see to.
    const hn::RebindToUnsigned<D> du;
    y = hn::BitCast(d, hn::Add(hn::BitCast(du, y), hn::ShiftLeft<23>(hn::BitCast(du, t))));
    y = hn::IfThenElse(hn::Le(x, hn::Set(d, 88.72283f)), y, hn::Add(x, hn::Inf(d)));
    return hn::IfThenZeroElse(hn::Lt(x, hn::Set(d, -87.33654f)), y);
  }
}

/// 2 / (1 + e^-2x) - 1 loses digits near 0, where a polynomial (Cephes tanhf) takes over.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V fast_tanh(D d, V x) {
  const V z = hn::Mul(x, x);
  V p = hn::Set(d, -5.70498872745e-3f);
  p = hn::MulAdd(p, z, hn::Set(d, 2.06390887954e-2f));
  p = hn::MulAdd(p, z, hn::Set(d, -5.37397155531e-2f));
  p = hn::MulAdd(p, z, hn::Set(d, 1.33314422036e-1f));
  p = hn::MulAdd(p, z, hn::Set(d, -3.33332819422e-1f));
  const V small = hn::MulAdd(hn::Mul(p, z), x, x);
  const V one = hn::Set(d, 1.0f), magnitude = hn::Abs(x);
  const V e = fast_exp(d, hn::Add(magnitude, magnitude));
  const V large = hn::Sub(one, hn::Div(hn::Set(d, 2.0f), hn::Add(e, one)));
  return hn::IfThenElse(hn::Lt(magnitude, hn::Set(d, 0.625f)), small, hn::CopySign(large, x));
}

template <class D, class V = hn::Vec<D>>
HWY_INLINE V safe_ln(D d, V x) {
  const V zero = hn::Zero(d), inf = hn::Inf(d);
  V y = hn::Log(d, x);
  y = hn::IfThenElse(hn::Lt(x, inf), y, x);  // inf and NaN are their own logarithms
  y = hn::IfThenElse(hn::Eq(x, zero), hn::Neg(inf), y);
  return hn::IfThenElse(hn::Lt(x, zero), hn::NaN(d), y);
}

/// Highway's sin and cos reduce their argument in a way that is right up to 39,000. Beyond that: one by one.
template <class D, class Vectors, class Scalar, class V = hn::Vec<D>>
HWY_INLINE V in_range_or(D d, V x, Vectors vectors, Scalar scalar) {
  if (HWY_LIKELY(hn::AllTrue(d, hn::Le(hn::Abs(x), hn::Set(d, 39000.0f))))) return vectors(d, x);
  HWY_ALIGN float lanes[hn::MaxLanes(d)];
  hn::Store(x, d, lanes);
  for (size_t i = 0; i < hn::Lanes(d); ++i) lanes[i] = scalar(lanes[i]);
  return hn::Load(d, lanes);
}

template <class F>
struct Lanes {
  using D = hn::ScalableTag<F>;
  using V = hn::Vec<D>;
  V v;
  HWY_INLINE explicit Lanes(V lanes) : v(lanes) {}
  HWY_INLINE explicit Lanes(double x) : v(hn::Set(D(), static_cast<F>(x))) {}
  HWY_INLINE static Lanes load(const F* from) { return Lanes(hn::LoadU(D(), from)); }
  HWY_INLINE void store(F* to) const { hn::StoreU(v, D(), to); }

  friend HWY_INLINE Lanes operator+(Lanes a, Lanes b) { return Lanes(hn::Add(a.v, b.v)); }
  friend HWY_INLINE Lanes operator-(Lanes a, Lanes b) { return Lanes(hn::Sub(a.v, b.v)); }
  friend HWY_INLINE Lanes operator*(Lanes a, Lanes b) { return Lanes(hn::Mul(a.v, b.v)); }
  friend HWY_INLINE Lanes operator/(Lanes a, Lanes b) { return Lanes(hn::Div(a.v, b.v)); }
  friend HWY_INLINE Lanes operator-(Lanes a) { return Lanes(hn::Neg(a.v)); }
  friend HWY_INLINE Lanes abs(Lanes a) { return Lanes(hn::Abs(a.v)); }
  friend HWY_INLINE Lanes sqrt(Lanes a) { return Lanes(hn::Sqrt(a.v)); }
  friend HWY_INLINE Lanes exp(Lanes a) { return Lanes(fast_exp(D(), a.v)); }
  friend HWY_INLINE Lanes ln(Lanes a) { return Lanes(safe_ln(D(), a.v)); }
  friend HWY_INLINE Lanes tanh(Lanes a) { return Lanes(fast_tanh(D(), a.v)); }
  friend HWY_INLINE Lanes sin(Lanes a) {
    return Lanes(
        in_range_or(D(), a.v, [](D d, V x) HWY_ATTR { return hn::Sin(d, x); }, [](F x) { return std::sin(x); }));
  }
  friend HWY_INLINE Lanes cos(Lanes a) {
    return Lanes(
        in_range_or(D(), a.v, [](D d, V x) HWY_ATTR { return hn::Cos(d, x); }, [](F x) { return std::cos(x); }));
  }
  friend HWY_INLINE Lanes larger(Lanes a, Lanes b) {
    return Lanes(hn::IfThenElse(hn::Or(hn::Gt(a.v, b.v), hn::IsNaN(a.v)), a.v, b.v));
  }
  friend HWY_INLINE Lanes smaller(Lanes a, Lanes b) {
    return Lanes(hn::IfThenElse(hn::Or(hn::Lt(a.v, b.v), hn::IsNaN(a.v)), a.v, b.v));
  }
  friend HWY_INLINE Lanes where_positive(Lanes x, Lanes a, Lanes b) {
    return Lanes(hn::IfThenElse(hn::Gt(x.v, hn::Zero(D())), a.v, b.v));
  }
  friend HWY_INLINE Lanes where_negative(Lanes x, Lanes a, Lanes b) {
    return Lanes(hn::IfThenElse(hn::Lt(x.v, hn::Zero(D())), a.v, b.v));
  }
};

namespace scalar_math {
#include "ops/scalar_math.inc"
}  // namespace scalar_math

}  // namespace HWY_NAMESPACE
}  // namespace weft::detail
HWY_AFTER_NAMESPACE();

#endif
