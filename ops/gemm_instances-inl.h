// The table of kernels of a translation unit, written once all instruction sets are compiled.
// WEFT_GEMM_TYPES(X) lists X(TA, TB, TC).
#include <type_traits>

#include "ops/gemm_engine.h"

#if HWY_ONCE
namespace weft::detail {

template <class TA, class TB, class TC>
const GemmKernels<TA, TB, TC>* gemm_kernels(GemmIsa isa) {
  switch (isa) {
#if HWY_TARGETS & HWY_AVX3
    case GemmIsa::kAvx512Bf16:
      if constexpr (std::is_same_v<TA, uint16_t> && std::is_same_v<TB, uint16_t>) {
        return &N_AVX3::kKernels<TA, TB, TC, Bf16Pair>;
      }
      [[fallthrough]];
    case GemmIsa::kAvx512:
      return &N_AVX3::kKernels<TA, TB, TC>;
#endif
#if HWY_TARGETS & HWY_AVX2
    case GemmIsa::kAvx2:
      return &N_AVX2::kKernels<TA, TB, TC>;
#endif
    case GemmIsa::kPortable:
      return &HWY_NAMESPACE::kKernels<TA, TB, TC>;
    default:
      return nullptr;
  }
}

#define WEFT_GEMM_INSTANCE(TA, TB, TC) template const GemmKernels<TA, TB, TC>* gemm_kernels<TA, TB, TC>(GemmIsa);
WEFT_GEMM_TYPES(WEFT_GEMM_INSTANCE)
#undef WEFT_GEMM_INSTANCE

}  // namespace weft::detail
#endif
