// What the library is without CUDA: the symbols of cuda/, with no device behind them.
#include "core/backend.h"

namespace weft {

std::unique_ptr<Backend> make_cuda_backend(int) { return nullptr; }
const char* why_no_cuda() { return "this build has no CUDA backend"; }

}  // namespace weft
