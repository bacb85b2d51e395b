#pragma once
#include <iosfwd>
#include <string_view>
#include <type_traits>

#include "core/error.h"
#include "core/float_types.h"

namespace weft {

/// Element types. f8e4m3, f8e5m2 and i8 are storage types: they cast and copy, no arithmetic is defined on them.
enum class DType : uint8_t { f32, f64, f16, bf16, i32, i64, u8, boolean, i8, f8e4m3, f8e5m2 };
inline constexpr int kDTypeCount = 11;

/// "f32", "bf16", "bool", ...
const char* name(DType dtype);
std::ostream& operator<<(std::ostream& out, DType dtype);

/// The dtype of that name. @throws Error kDType naming the choices.
DType parse_dtype(std::string_view name);

/// Bytes of one element.
int64_t size_of(DType dtype);

bool is_float(DType dtype);

/// The dtype in which an operation on `a` and `b` computes and answers; the one promotion table of the library:
///   bool < u8, i8 < i32 < i64 < f16, bf16 < f32 < f64; u8 with i8 gives i32; f16 with bf16 gives f32.
/// @throws Error kDType for f8e4m3 and f8e5m2 with anything but themselves: cast them first.
DType promote(DType a, DType b);

template <class T>
struct DTypeOf;
#define WEFT_FOR_EACH_DTYPE(X) \
  X(f32, float)                \
  X(f64, double)               \
  X(f16, Half)                 \
  X(bf16, BFloat16)            \
  X(i32, int32_t)              \
  X(i64, int64_t)              \
  X(u8, uint8_t)               \
  X(boolean, bool)             \
  X(i8, int8_t)                \
  X(f8e4m3, Float8E4M3)        \
  X(f8e5m2, Float8E5M2)
#define WEFT_DTYPE_OF(value, T) \
  template <>                   \
  struct DTypeOf<T> : std::integral_constant<DType, DType::value> {};
WEFT_FOR_EACH_DTYPE(WEFT_DTYPE_OF)
#undef WEFT_DTYPE_OF

/// Calls f.operator()<T>() with the C++ type of `dtype`.
template <class F>
decltype(auto) dispatch_all(DType dtype, F&& f) {
  switch (dtype) {
#define WEFT_CASE(value, T) \
  case DType::value:        \
    return f.template operator()<T>();
    WEFT_FOR_EACH_DTYPE(WEFT_CASE)
#undef WEFT_CASE
  }
  fail(ErrorKind::kDType, "dtype", "not an element type: ", static_cast<int>(dtype));
}

/// The same over the float types that operators compute on: f32, f64, f16, bf16. @throws Error kDType naming `op`.
template <class F>
decltype(auto) dispatch_float(DType dtype, const char* op, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f.template operator()<float>();
    case DType::f64:
      return f.template operator()<double>();
    case DType::f16:
      return f.template operator()<Half>();
    case DType::bf16:
      return f.template operator()<BFloat16>();
    default:
      fail(ErrorKind::kDType, op, "takes f32, f64, f16 or bf16, got ", dtype, ". Hint: cast with .to(DType::f32)");
  }
}

/// Calls f.operator()<Word>() with the unsigned integer of `size` bytes (1, 2, 4 or 8): for what moves elements without
/// looking at them.
template <class F>
decltype(auto) dispatch_bytes(int64_t size, F&& f) {
  switch (size) {
    case 1:
      return f.template operator()<uint8_t>();
    case 2:
      return f.template operator()<uint16_t>();
    case 4:
      return f.template operator()<uint32_t>();
    default:
      return f.template operator()<uint64_t>();
  }
}

/// The type in which values of T are added up: f64 for f64, else f32.
template <class T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

}  // namespace weft
