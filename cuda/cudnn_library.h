#pragma once
#include <cudnn.h>

namespace weft::cuda {

/// The functions of cuDNN that are used, each by its name without "cudnn".
#define WEFT_CUDNN_FUNCTIONS(DO) \
  DO(Create);                    \
  DO(Destroy);                   \
  DO(SetStream);                 \
  DO(GetStream);                 \
  DO(GetVersion);                \
  DO(GetErrorString);            \
  DO(GetLastErrorString);        \
  DO(BackendCreateDescriptor);   \
  DO(BackendDestroyDescriptor);  \
  DO(BackendExecute);            \
  DO(BackendFinalize);           \
  DO(BackendGetAttribute);       \
  DO(BackendSetAttribute)

struct Cudnn {
#define WEFT_FUNCTION(name) decltype(&cudnn##name) name = nullptr
  WEFT_CUDNN_FUNCTIONS(WEFT_FUNCTION);
#undef WEFT_FUNCTION
};

/// cuDNN, which the first call loads. @throws Error kDevice naming what was looked for if the library is not there,
/// lacks a function, or is older than the headers of this build.
const Cudnn& cudnn();

}  // namespace weft::cuda
