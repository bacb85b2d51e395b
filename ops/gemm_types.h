#pragma once
#include <type_traits>

#include "core/dtype.h"
#include "ops/kernel_device.h"

namespace weft {

/// The element type under which gemm() knows T: bfloat16 goes by its bits.
template <class T>
using GemmType = std::conditional_t<std::is_same_v<T, BFloat16>, uint16_t, T>;

/// The dtype of an element type of gemm().
template <class G>
inline constexpr DType kGemmDType = DTypeOf<std::conditional_t<std::is_same_v<G, uint16_t>, BFloat16, G>>::value;

/// Calls f<T>() for the types that gemm() multiplies on a device: f32, f64, bf16, and on CUDA f16.
template <class OnDevice, class F>
void dispatch_gemm(OnDevice, DType dtype, F&& f) {
  switch (dtype) {
    case DType::f64:
      return f.template operator()<double>();
    case DType::bf16:
      return f.template operator()<BFloat16>();
    case DType::f16:
      if constexpr (std::is_same_v<OnDevice, Cuda>) return f.template operator()<Half>();
      [[fallthrough]];
    default:
      return f.template operator()<float>();
  }
}

/// Whether tensors of this dtype must go through f32 on their way to gemm(): the CPU's products have no f16.
inline bool gemm_widens(DType dtype, DeviceKind device) { return dtype == DType::f16 && device == DeviceKind::cpu; }

}  // namespace weft
