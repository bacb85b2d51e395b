// Ranges of each thread, kept while a test wants to see them.
#include <nvtx3/nvToolsExt.h>

#include "emulation.h"

namespace weft_emulation {
namespace {

thread_local bool kept = false;
thread_local int depth = 0;
thread_local std::vector<std::string> seen;

}  // namespace

void keep_ranges() {
  kept = true;
  seen.clear();
}

std::vector<std::string> take_ranges() {
  kept = false;
  return std::move(seen);
}

}  // namespace weft_emulation

int nvtxRangePushA(const char* message) {
  using namespace weft_emulation;
  if (kept) seen.push_back(std::string(static_cast<size_t>(depth), ' ') + message);
  return depth++;
}

int nvtxRangePop() { return --weft_emulation::depth; }
