#include "core/dtype.h"

#include <array>
#include <ostream>

namespace weft {
namespace {

constexpr std::array<const char*, kDTypeCount> kNames = {"f32", "f64",  "f16", "bf16",   "i32",   "i64",
                                                         "u8",  "bool", "i8",  "f8e4m3", "f8e5m2"};

using enum DType;
// Row and column in the order of the enumeration. The 8-bit floats promote with nothing: only their diagonal is valid.
constexpr DType kPromotion[9][9] = {
    /*            f32  f64  f16  bf16 i32  i64  u8   bool     i8 */
    /* f32  */ {f32, f64, f32, f32, f32, f32, f32, f32, f32},
    /* f64  */ {f64, f64, f64, f64, f64, f64, f64, f64, f64},
    /* f16  */ {f32, f64, f16, f32, f16, f16, f16, f16, f16},
    /* bf16 */ {f32, f64, f32, bf16, bf16, bf16, bf16, bf16, bf16},
    /* i32  */ {f32, f64, f16, bf16, i32, i64, i32, i32, i32},
    /* i64  */ {f32, f64, f16, bf16, i64, i64, i64, i64, i64},
    /* u8   */ {f32, f64, f16, bf16, i32, i64, u8, u8, i32},
    /* bool */ {f32, f64, f16, bf16, i32, i64, u8, boolean, i8},
    /* i8   */ {f32, f64, f16, bf16, i32, i64, i32, i8, i8},
};

}  // namespace

const char* name(DType dtype) { return kNames.at(static_cast<size_t>(dtype)); }

std::ostream& operator<<(std::ostream& out, DType dtype) { return out << name(dtype); }

DType parse_dtype(std::string_view text) {
  for (int i = 0; i < kDTypeCount; ++i) {
    if (text == kNames[i]) return static_cast<DType>(i);
  }
  std::string choices;
  for (const char* choice : kNames) choices += std::string(choices.empty() ? "" : ", ") + choice;
  fail(ErrorKind::kDType, "dtype", quoted(text), " is not an element type; the types are ", choices);
}

int64_t size_of(DType dtype) {
  return dispatch_all(dtype, []<class T>() -> int64_t { return sizeof(T); });
}

bool is_float(DType dtype) {
  return dtype == f32 || dtype == f64 || dtype == f16 || dtype == bf16 || dtype == f8e4m3 || dtype == f8e5m2;
}

DType promote(DType a, DType b) {
  const auto i = static_cast<size_t>(a), j = static_cast<size_t>(b);
  if (i < 9 && j < 9) return kPromotion[i][j];
  if (a == b) return a;
  fail(ErrorKind::kDType, "promote", "no operation mixes ", a, " and ", b,
       ". Hint: f8 types are for storage; cast them first");
}

}  // namespace weft
