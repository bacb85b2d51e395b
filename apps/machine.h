#pragma once
#include <cstdint>

namespace weft::apps {

/// Bytes of memory that this process can ever have: the machine's, or the control group's limit if that is lower; 0 if
/// neither can be told.
int64_t memory_limit();

/// Bytes of the machine's memory that are free now; 0 if that cannot be told.
int64_t memory_available();

/// Processors that the control group's CPU quota amounts to; 0 if there is no limit.
double processor_quota();

}  // namespace weft::apps
