// What the library is without NCCL: the symbols of nccl_group.cpp.
#include "core/error.h"
#include "dist/processes.h"

namespace weft::dist {

const char* why_no_nccl() { return "this build has no NCCL"; }

std::string describe_nccl() { return concat("none: ", why_no_nccl()); }

Group nccl_group(const ProcessOptions&, Store&, int) {
  fail(ErrorKind::kUsage, "nccl", why_no_nccl(), ". Hint: build with CUDA where nccl.h and libnccl are installed");
}

}  // namespace weft::dist
