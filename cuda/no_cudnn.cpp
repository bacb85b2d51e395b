// What cuda/ is without cuDNN's headers or those of its frontend: attention is our own.
#include "core/error.h"
#include "core/shared_library.h"
#include "cuda/cudnn_sdpa.h"

namespace weft::cuda {
namespace {

constexpr const char* kWhy =
    "this build has no attention of cuDNN: the headers of cuDNN and of its frontend were not both found";

[[noreturn]] void absent() { fail(ErrorKind::kDevice, "cudnn", kWhy); }

}  // namespace

std::string why_no_cudnn() { return kWhy; }
std::string cudnn_version() { absent(); }
std::string describe_cudnn() {
  const auto ask = SharedLibrary("cuDNN", {"libcudnn.so.9"}).find<size_t()>("cudnnGetVersion");
  const size_t version = ask == nullptr ? 0 : ask();
  const std::string found =
      version == 0 ? "not found" : concat(version / 10000, '.', version / 100 % 100, '.', version % 100);
  return concat(found, ", the build saw " WEFT_CUDNN_VERSION " without its frontend: attention is our own");
}
std::unique_ptr<SdpaPlan> make_sdpa_plan(Context&, const Sdpa&) { absent(); }
std::vector<std::string> sdpa_proposals(const Sdpa&, const std::string&, int) { absent(); }

}  // namespace weft::cuda
