// f32 elementwise kernels for every instruction set of the build.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/elementwise_simd.cpp"
#include "hwy/foreach_target.h"  // must come before highway.h
//
#include <cstring>

#include "hwy/highway.h"
#include "ops/elementwise_simd.h"
#include "ops/lanes-inl.h"
#include "ops/norm_lanes-inl.h"
#include "ops/scalar_math.h"

HWY_BEFORE_NAMESPACE();
namespace weft::detail {
namespace HWY_NAMESPACE {

using F32 = Lanes<float>;

/// The same vector wherever it is loaded from.
struct Repeated {
  F32 value;
  HWY_INLINE F32 at(int64_t) const { return value; }
  HWY_INLINE F32 tail(int64_t, int64_t) const { return value; }
};

struct Consecutive {
  const float* data;
  HWY_INLINE F32 at(int64_t i) const { return F32::load(data + i); }
  HWY_INLINE F32 tail(int64_t i, int64_t count) const { return F32(load<float>(F32::D(), data + i, Part{count})); }
};

/// y[i] = function(a[i], b[i]), b ignored by functions of one element.
template <class Function, class A, class B>
HWY_INLINE void loop(const Function& function, const A& a, const B& b, float* y, int64_t n) {
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(F32::D()));
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) function(a.at(i), b.at(i)).store(y + i);
  if (i < n) store<float>(F32::D(), function(a.tail(i, n - i), b.tail(i, n - i)).v, y + i, Part{n - i});
}

template <class Function>
HWY_INLINE void map2(const Function& function, Run a, Run b, float* y, int64_t n) {
  if (a.repeated && b.repeated) {
    return loop(function, Repeated{F32(*a.data)}, Repeated{F32(*b.data)}, y, n);
  }
  if (a.repeated) return loop(function, Repeated{F32(*a.data)}, Consecutive{b.data}, y, n);
  if (b.repeated) return loop(function, Consecutive{a.data}, Repeated{F32(*b.data)}, y, n);
  loop(function, Consecutive{a.data}, Consecutive{b.data}, y, n);
}

template <class Op>
struct Value {
  HWY_INLINE F32 operator()(F32 x, F32) const { return Op::value(x); }
};
template <class Op>
struct Value2 {
  HWY_INLINE F32 operator()(F32 a, F32 b) const { return Op::value(a, b); }
};
template <class Op>
struct Backward {
  HWY_INLINE F32 operator()(F32 dy, F32 saved) const { return dy * Op::derivative(saved); }
};
struct AddScaled {
  F32 alpha;
  HWY_INLINE F32 operator()(F32 a, F32 b) const { return F32(hn::MulAdd(alpha.v, b.v, a.v)); }
};

#define WEFT_UNARY(Op, function)                                              \
  void map_##Op(Run x, float* y, int64_t n) {                                 \
    const Repeated unused{F32(0.0)};                                          \
    const Value<scalar_math::Op> value;                                       \
    if (x.repeated) return loop(value, Repeated{F32(*x.data)}, unused, y, n); \
    loop(value, Consecutive{x.data}, unused, y, n);                           \
  }                                                                           \
  void map_backward_##Op(Run dy, Run saved, float* dx, int64_t n) {           \
    map2(Backward<scalar_math::Op>(), dy, saved, dx, n);                      \
  }
#define WEFT_BINARY(Op, function) \
  void map2_##Op(Run a, Run b, float* y, int64_t n) { map2(Value2<scalar_math::Op>(), a, b, y, n); }
#include "ops/op_list.def"

void add_scaled(Run a, Run b, float alpha, float* y, int64_t n) { map2(AddScaled{F32(alpha)}, a, b, y, n); }

template <class T>
void widen_row(const T* from, float* to, int64_t n) {
  const hn::ScalableTag<float> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) hn::StoreU(load<T>(d, from + i, Full()), d, to + i);
  if (i < n) store<float>(d, load<T>(d, from + i, Part{n - i}), to + i, Part{n - i});
}

template <class T>
void narrow_row(const float* from, T* to, int64_t n) {
  const hn::ScalableTag<float> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) store<T>(d, hn::LoadU(d, from + i), to + i, Full());
  if (i < n) store<T>(d, load<float>(d, from + i, Part{n - i}), to + i, Part{n - i});
}

void widen_bf16(const BFloat16* from, float* to, int64_t n) { widen_row(from, to, n); }
void narrow_bf16(const float* from, BFloat16* to, int64_t n) { narrow_row(from, to, n); }

#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX2
// These have conversion instructions, which round to nearest even. Highway's substitute elsewhere truncates.
void widen_f16(const Half* from, float* to, int64_t n) {
  const hn::ScalableTag<float> d;
  const hn::Rebind<hwy::float16_t, decltype(d)> half;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    hn::StoreU(hn::PromoteTo(d, hn::LoadU(half, reinterpret_cast<const hwy::float16_t*>(from + i))), d, to + i);
  }
  for (; i < n; ++i) to[i] = static_cast<float>(from[i]);
}

void narrow_f16(const float* from, Half* to, int64_t n) {
  const hn::ScalableTag<float> d;
  const hn::Rebind<hwy::float16_t, decltype(d)> half;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    hn::StoreU(hn::DemoteTo(half, hn::LoadU(d, from + i)), half, reinterpret_cast<hwy::float16_t*>(to + i));
  }
  for (; i < n; ++i) to[i] = Half(from[i]);
}
#else
void widen_f16(const Half* from, float* to, int64_t n) { widen_row(from, to, n); }
void narrow_f16(const float* from, Half* to, int64_t n) { narrow_row(from, to, n); }
#endif

}  // namespace HWY_NAMESPACE
}  // namespace weft::detail
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace weft::detail {

#define WEFT_UNARY(Op, function)                                                    \
  HWY_EXPORT(map_##Op);                                                             \
  HWY_EXPORT(map_backward_##Op);                                                    \
  template <>                                                                       \
  void map_f32<scalar_math::Op>(Run x, float* y, int64_t n) {                       \
    HWY_DYNAMIC_DISPATCH(map_##Op)(x, y, n);                                        \
  }                                                                                 \
  template <>                                                                       \
  void map_backward_f32<scalar_math::Op>(Run dy, Run saved, float* dx, int64_t n) { \
    HWY_DYNAMIC_DISPATCH(map_backward_##Op)(dy, saved, dx, n);                      \
  }
#define WEFT_BINARY(Op, function)                                     \
  HWY_EXPORT(map2_##Op);                                              \
  template <>                                                         \
  void map2_f32<scalar_math::Op>(Run a, Run b, float* y, int64_t n) { \
    HWY_DYNAMIC_DISPATCH(map2_##Op)(a, b, y, n);                      \
  }
#include "ops/op_list.def"

HWY_EXPORT(add_scaled);
HWY_EXPORT(widen_bf16);
HWY_EXPORT(narrow_bf16);
HWY_EXPORT(widen_f16);
HWY_EXPORT(narrow_f16);
void add_scaled_f32(Run a, Run b, float alpha, float* y, int64_t n) {
  HWY_DYNAMIC_DISPATCH(add_scaled)(a, b, alpha, y, n);
}
void widen(const BFloat16* from, float* to, int64_t n) { HWY_DYNAMIC_DISPATCH(widen_bf16)(from, to, n); }
void widen(const Half* from, float* to, int64_t n) { HWY_DYNAMIC_DISPATCH(widen_f16)(from, to, n); }
void narrow(const float* from, BFloat16* to, int64_t n) { HWY_DYNAMIC_DISPATCH(narrow_bf16)(from, to, n); }
void narrow(const float* from, Half* to, int64_t n) { HWY_DYNAMIC_DISPATCH(narrow_f16)(from, to, n); }

}  // namespace weft::detail
#endif
