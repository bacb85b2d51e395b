#pragma once
#include <cublasLt.h>

namespace weft::cuda {

/// The functions of cuBLASLt that are used, each by its name without "cublasLt".
#define WEFT_CUBLASLT_FUNCTIONS(DO) \
  DO(Create);                       \
  DO(Destroy);                      \
  DO(GetVersion);                   \
  DO(GetStatusName);                \
  DO(GetStatusString);              \
  DO(MatmulDescCreate);             \
  DO(MatmulDescDestroy);            \
  DO(MatmulDescSetAttribute);       \
  DO(MatrixLayoutCreate);           \
  DO(MatrixLayoutDestroy);          \
  DO(MatrixLayoutSetAttribute);     \
  DO(MatmulPreferenceCreate);       \
  DO(MatmulPreferenceDestroy);      \
  DO(MatmulPreferenceSetAttribute); \
  DO(MatmulAlgoGetHeuristic);       \
  DO(MatmulAlgoCheck);              \
  DO(MatmulAlgoConfigGetAttribute); \
  DO(Matmul)

struct CublasLt {
#define WEFT_FUNCTION(name) decltype(&cublasLt##name) name = nullptr
  WEFT_CUBLASLT_FUNCTIONS(WEFT_FUNCTION);
#undef WEFT_FUNCTION
};

/// cuBLASLt, which the first call loads: its 540 MB take longer to load than a program without a device may take to
/// start. @throws Error kDevice naming what was looked for if the library is not there or lacks a function.
const CublasLt& cublaslt();

}  // namespace weft::cuda
