#include "tests/lateness.h"

namespace weft::testing {

void for_each_lateness(const std::function<void(const char*)>& test) { test("what the device likes"); }

}  // namespace weft::testing
