#pragma once
#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <string_view>

#include "core/dtype.h"

/// Names of element types in safetensors files. Private to core/safetensors*.cpp and models/checkpoint*.cpp.
namespace weft {

inline constexpr std::array<std::pair<std::string_view, DType>, kDTypeCount> kSafetensorsDTypes = {{
    {"F64", DType::f64},
    {"F32", DType::f32},
    {"F16", DType::f16},
    {"BF16", DType::bf16},
    {"I64", DType::i64},
    {"I32", DType::i32},
    {"I8", DType::i8},
    {"U8", DType::u8},
    {"BOOL", DType::boolean},
    {"F8_E4M3", DType::f8e4m3},
    {"F8_E5M2", DType::f8e5m2},
}};

inline std::optional<DType> safetensors_dtype(std::string_view name) {
  for (const auto& [known, dtype] : kSafetensorsDTypes) {
    if (known == name) return dtype;
  }
  return std::nullopt;
}

inline std::string_view safetensors_name(DType dtype) {
  for (const auto& [name, known] : kSafetensorsDTypes) {
    if (known == dtype) return name;
  }
  fail(ErrorKind::kDType, "safetensors", "not an element type: ", static_cast<int>(dtype));
}

/// Whether the format has this type although Weft does not.
inline bool is_foreign_safetensors_dtype(std::string_view name) {
  static constexpr std::string_view kForeign[] = {"I16", "U16",     "U32",     "U64",     "C64",         "C128",
                                                  "F4",  "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"};
  return std::find(std::begin(kForeign), std::end(kForeign), name) != std::end(kForeign);
}

/// "F64, F32, ...", for messages.
inline std::string safetensors_dtypes() {
  std::string list;
  for (const auto& [name, dtype] : kSafetensorsDTypes) list += (list.empty() ? "" : ", ") + std::string(name);
  return list;
}

}  // namespace weft
