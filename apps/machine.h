#pragma once
#include <cstdint>

namespace weft::apps {

/// Processors that the control group's CPU quota amounts to; 0 if there is no limit.
double processor_quota();

}  // namespace weft::apps
