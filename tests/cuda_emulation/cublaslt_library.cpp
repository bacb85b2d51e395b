// Where cuda/cublaslt_library.cpp loads a library, the emulation's own is linked.
#include "cuda/cublaslt_library.h"

namespace weft::cuda {

const CublasLt& cublaslt() {
  static constexpr CublasLt kFunctions = [] {
    CublasLt functions;
#define WEFT_FUNCTION(name) functions.name = &cublasLt##name
    WEFT_CUBLASLT_FUNCTIONS(WEFT_FUNCTION);
#undef WEFT_FUNCTION
    return functions;
  }();
  return kFunctions;
}

}  // namespace weft::cuda
