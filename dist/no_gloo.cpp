// What the library is without Gloo: the symbols of gloo_group.cpp.
#include "core/error.h"
#include "dist/processes.h"

namespace weft::dist {

const char* why_no_gloo() { return "this build has no Gloo"; }

Group gloo_group(const ProcessOptions&, Store&) {
  fail(ErrorKind::kUsage, "gloo", why_no_gloo(), ". Hint: install libgloo-dev and build again");
}

}  // namespace weft::dist
