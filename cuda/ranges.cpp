// Ranges for a profiler. The header finds the tool at run time; without one a range is two calls through a null check.
#include <nvtx3/nvToolsExt.h>

#include "core/backend.h"

namespace weft {

Range::Range(const char* name) { nvtxRangePushA(name); }
Range::~Range() { nvtxRangePop(); }

}  // namespace weft
