#include "cuda_emulation/emulation.h"
#include "tests/lateness.h"

namespace weft::testing {

void for_each_lateness(const std::function<void(const char*)>& test) {
  using weft_emulation::Late;
  struct AsAtTheStart {
    ~AsAtTheStart() { weft_emulation::set_late(Late::kCopies); }
  } const after;
  for (const auto& [late, name] : {std::pair(Late::kKernels, "kernels"), {Late::kCopies, "copies"}}) {
    weft_emulation::set_late(late);
    test(name);
  }
}

}  // namespace weft::testing
