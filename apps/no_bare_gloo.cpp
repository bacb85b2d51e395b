// In place of bare_gloo.cpp where the build has no Gloo.
#include "apps/bare_gloo.h"
#include "core/error.h"

namespace weft::apps {

struct BareGloo::State {};

BareGloo::BareGloo(int, int, const std::filesystem::path&) {
  fail(ErrorKind::kUsage, "bench", "this build has no Gloo. Hint: install libgloo-dev and configure again");
}
BareGloo::~BareGloo() = default;
void BareGloo::all_reduce(float*, int64_t) {}
void BareGloo::reduce_scatter(float*, int64_t) {}
void BareGloo::all_gather(float*, float*, int64_t) {}

}  // namespace weft::apps
