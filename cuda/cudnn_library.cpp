// cuDNN as it is found when the program runs.
#include "cuda/cudnn_library.h"

#include <string>

#include "core/error.h"
#include "core/shared_library.h"

namespace weft::cuda {

const Cudnn& cudnn() {
  static const Cudnn functions = [] {
    // WEFT_CUDNN is the path of the one that stood beside the headers of the build.
    const SharedLibrary library("cuDNN", {concat("libcudnn.so.", CUDNN_MAJOR), WEFT_CUDNN});
    Cudnn found;
#define WEFT_FUNCTION(name) library.require(found.name, "cudnn" #name)
    WEFT_CUDNN_FUNCTIONS(WEFT_FUNCTION);
#undef WEFT_FUNCTION
    const size_t version = found.GetVersion(), major = version / 10000, minor = version / 100 % 100;
    if (major != CUDNN_MAJOR || minor < CUDNN_MINOR) {
      fail(ErrorKind::kDevice, "cuDNN", "the library is ", major, '.', minor, ", but this program was built with ",
           CUDNN_MAJOR, '.', CUDNN_MINOR, " and needs one that is as new. Hint: name its directory in LD_LIBRARY_PATH");
    }
    return found;
  }();
  return functions;
}

}  // namespace weft::cuda
