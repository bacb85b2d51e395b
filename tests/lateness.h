#pragma once
#include <functional>

namespace weft::testing {

/// Calls test(): on a real device once, on the emulated one for each kind of work that it may leave for later
/// (tests/cuda_emulation/emulation.h), so that a wait that is missing shows up as a wrong number.
void for_each_lateness(const std::function<void(const char* late)>& test);

}  // namespace weft::testing
