#pragma once
#include <cstdint>

namespace weft::dist {

/// Direction in which a model is run.
enum class Pass : uint8_t { kForward, kBackward };

}  // namespace weft::dist
