// cuBLASLt as it is found when the program runs. For tests that emulate the device another file has this function.
#include "cuda/cublaslt_library.h"

#include <string>

#include "core/error.h"
#include "core/shared_library.h"

namespace weft::cuda {

const CublasLt& cublaslt() {
  static const CublasLt functions = [] {
    // WEFT_CUBLASLT is the path of the one that the program was built with.
    const SharedLibrary library("cuBLASLt", {concat("libcublasLt.so.", CUBLAS_VER_MAJOR), WEFT_CUBLASLT});
    CublasLt found;
#define WEFT_FUNCTION(name) library.require(found.name, "cublasLt" #name)
    WEFT_CUBLASLT_FUNCTIONS(WEFT_FUNCTION);
#undef WEFT_FUNCTION
    return found;
  }();
  return functions;
}

}  // namespace weft::cuda
