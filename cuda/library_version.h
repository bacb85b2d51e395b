#pragma once
#include <string>

#include "core/error.h"
#include "cuda/cublaslt_library.h"

namespace weft::cuda {

/// Of the library that is loaded: "13.0.2".
inline std::string cublaslt_version() {
  const size_t version = cublaslt().GetVersion();
  return concat(version / 10000, '.', version / 100 % 100, '.', version % 100);
}

}  // namespace weft::cuda
