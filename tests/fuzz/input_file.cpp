#include <sys/mman.h>

#include <stdexcept>

#include "tests/fuzz/fuzz.h"

namespace weft::fuzz {

InputFile::InputFile(const uint8_t* data, size_t size) : descriptor_(::memfd_create("fuzz", 0)) {
  if (descriptor_ < 0) throw std::runtime_error("memfd_create failed");
  for (size_t done = 0; done < size;) {
    const ssize_t wrote = ::write(descriptor_, data + done, size - done);
    if (wrote <= 0) throw std::runtime_error("a memory file could not be written");
    done += static_cast<size_t>(wrote);
  }
}

}  // namespace weft::fuzz
