// What follows the sums: GELU and its derivative, and the rounding to bfloat16. Included once per instruction set.
#if defined(WEFT_OPS_GEMM_EPILOGUE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef WEFT_OPS_GEMM_EPILOGUE_INL_H_
#undef WEFT_OPS_GEMM_EPILOGUE_INL_H_
#else
#define WEFT_OPS_GEMM_EPILOGUE_INL_H_
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

#include "hwy/contrib/math/math-inl.h"
#include "ops/gemm_pack-inl.h"

HWY_BEFORE_NAMESPACE();
namespace weft::detail {
namespace HWY_NAMESPACE {

/// exp(x) for the logistic function: x is first cut to where the result is a normal number.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V exp_cut(D d, V x) {
  using T = hn::TFromD<D>;
  if constexpr (sizeof(T) == 8) {
    return hn::Exp(d, hn::Max(hn::Min(x, hn::Set(d, T(708))), hn::Set(d, T(-708))));
  } else {
    // Cody-Waite: x = q ln 2 + r, |r| <= ln(2) / 2; a polynomial of degree 6 in r (Cephes expf), error 2 ulp.
    x = hn::Max(hn::Min(x, hn::Set(d, 87.0f)), hn::Set(d, -87.0f));
    const V q = hn::Round(hn::Mul(x, hn::Set(d, 1.44269504f)));
    V r = hn::NegMulAdd(q, hn::Set(d, 0.693359375f), x);
    r = hn::NegMulAdd(q, hn::Set(d, -2.12194440e-4f), r);
    V y = hn::Set(d, 1.9875691500e-4f);
    y = hn::MulAdd(y, r, hn::Set(d, 1.3981999507e-3f));
    y = hn::MulAdd(y, r, hn::Set(d, 8.3334519073e-3f));
    y = hn::MulAdd(y, r, hn::Set(d, 4.1665795894e-2f));
    y = hn::MulAdd(y, r, hn::Set(d, 1.6666665459e-1f));
    y = hn::MulAdd(y, r, hn::Set(d, 5.0000001201e-1f));
    y = hn::Add(hn::MulAdd(y, hn::Mul(r, r), r), hn::Set(d, 1.0f));
    const hn::RebindToSigned<D> di;
    const auto power = hn::ShiftLeft<23>(hn::Add(hn::ConvertTo(di, q), hn::Set(di, 127)));
    return hn::Mul(y, hn::BitCast(d, power));
  }
}

/// With u = sqrt(2/pi) (x + 0.044715 x^3), 0.5 (1 + tanh u) is the logistic function of 2u. Returns exp(-2u).
template <class D, class V = hn::Vec<D>>
HWY_INLINE V gelu_exp(D d, V x, V x2) {
  using T = hn::TFromD<D>;
  constexpr double kTwoU = -2 * 0.79788456080286535588;
  return exp_cut(d, hn::Mul(x, hn::MulAdd(x2, hn::Set(d, T(kTwoU * 0.044715)), hn::Set(d, T(kTwoU)))));
}

template <class D, class V = hn::Vec<D>>
HWY_INLINE V gelu(D d, V x) {
  using T = hn::TFromD<D>;
  const V y = hn::Div(x, hn::Add(hn::Set(d, T(1)), gelu_exp(d, x, hn::Mul(x, x))));
  // The cut exponent leaves x * 1e-38 there, which is not small for every x.
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(d, T(-30))), y);
}

/// gelu'(x) = s + x s (1 - s) 2u'(x), s the logistic function of 2u.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V gelu_grad(D d, V x) {
  using T = hn::TFromD<D>;
  constexpr double kTwoU = 2 * 0.79788456080286535588;
  // Where s is 0 or 1 in floating point, x^3 may be infinite and 0 * inf would be NaN: beyond 30, gelu' is 0 or 1.
  // (A comparison, because Min and Max would swallow a NaN.)
  const V limit = hn::Set(d, T(30));
  x = hn::IfThenElse(hn::Gt(hn::Abs(x), limit), hn::CopySign(limit, x), x);
  const V x2 = hn::Mul(x, x);
  const V one = hn::Set(d, T(1));
  const V s = hn::Div(one, hn::Add(one, gelu_exp(d, x, x2)));
  const V slope = hn::MulAdd(x2, hn::Set(d, T(kTwoU * 3 * 0.044715)), hn::Set(d, T(kTwoU)));
  return hn::MulAdd(hn::Mul(hn::Mul(x, s), hn::Sub(one, s)), slope, s);
}

/// Stores of sums in the type of C.
template <class S>
struct Target {
  static_assert(std::is_same_v<S, uint16_t>);  // bfloat16 from float, to nearest even; NaN stays NaN
  template <class D>
  using Half = hn::Rebind<uint16_t, D>;

  template <class D>
  HWY_INLINE static hn::Vec<Half<D>> round(hn::Vec<D> value, [[maybe_unused]] D d) {
    const hn::RebindToUnsigned<D> du;
    const hn::RebindToSigned<D> di;
    const auto bits = hn::BitCast(du, value);
    const auto even = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1));
    const auto rounded = hn::Add(bits, hn::Add(even, hn::Set(du, 0x7fff)));
    const auto quiet = hn::Or(bits, hn::Set(du, 0x400000));
    const auto kept = hn::IfThenElse(hn::RebindMask(du, hn::IsNaN(value)), quiet, rounded);
    return hn::DemoteTo(Half<D>(), hn::BitCast(di, hn::ShiftRight<16>(kept)));
  }
  template <class D>
  HWY_INLINE static void store(hn::Vec<D> value, D d, S* at) {
    hn::StoreU(round(value, d), Half<D>(), at);
  }
  template <class D>
  HWY_INLINE static void store_n(hn::Vec<D> value, D d, S* at, size_t count) {
    HWY_ALIGN S lanes[hn::MaxLanes(d)];
    hn::Store(round(value, d), Half<D>(), lanes);
    std::memcpy(at, lanes, count * sizeof(S));
  }
};

template <class T>
  requires(!std::is_same_v<T, uint16_t>)
struct Target<T> {
  template <class D>
  HWY_INLINE static void store(hn::Vec<D> value, D d, T* at) {
    hn::StoreU(value, d, at);
  }
  template <class D>
  HWY_INLINE static void store_n(hn::Vec<D> value, D d, T* at, size_t count) {
    hn::BlendedStore(value, hn::FirstN(d, count), d, at);
  }
};

/// The activation of rows x cols elements of `pre`, which may be c itself. For a bfloat16 C this is also the rounding.
template <class T, class TC>
void finish(GemmActivation activation, const T* pre, int64_t ldpre, int64_t rows, int64_t cols, TC* c, int64_t ldc,
            TC* d, int64_t ldd, const TC* aux, int64_t ldaux) {
  const Tag<T> tag;
  constexpr int64_t n = kLanes<T>;
  if (activation == GemmActivation::kNone && cols == kTileVecs * n) {  // a whole tile
    for (int64_t i = 0; i < rows; ++i) {
      unroll<kTileVecs>([&](auto v) WEFT_UNROLLED {
        Target<TC>::store(hn::LoadU(tag, pre + i * ldpre + v * n), tag, c + i * ldc + v * n);
      });
    }
    return;
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; j += n) {
      const size_t left = static_cast<size_t>(cols - j < n ? cols - j : n);
      const bool whole = left == size_t(n);
      const auto put = [&](hn::Vec<Tag<T>> value, TC* at) HWY_ATTR {
        whole ? Target<TC>::store(value, tag, at) : Target<TC>::store_n(value, tag, at, left);
      };
      const T* from = pre + i * ldpre + j;
      const auto x = whole ? hn::LoadU(tag, from) : Source<T, T>::load_n(tag, from, left);
      switch (activation) {
        case GemmActivation::kNone:
          put(x, c + i * ldc + j);
          break;
        case GemmActivation::kGelu:
          if (static_cast<const void*>(c) != pre) put(x, c + i * ldc + j);
          put(gelu(tag, x), d + i * ldd + j);
          break;
        case GemmActivation::kGeluGrad: {
          const TC* at = aux + i * ldaux + j;
          const auto a = whole ? Source<T, TC>::load(tag, at) : Source<T, TC>::load_n(tag, at, left);
          put(hn::Mul(x, gelu_grad(tag, a)), c + i * ldc + j);
          break;
        }
      }
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace weft::detail
HWY_AFTER_NAMESPACE();
#endif
