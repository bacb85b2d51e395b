#pragma once
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/error.h"

// A fuzz target is one file that defines the four functions below. With libFuzzer (-fsanitize=fuzzer,address,undefined)
// it needs the first alone; every run of the tests drives it through mutations_test.cpp.

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace weft::fuzz {

/// Valid inputs, which are cut, flipped and mutated.
std::vector<std::string> seeds();
/// Pieces that mean something to the format.
std::vector<std::string> words();
/// A mutated input with lengths and checksums that fit again, so that it gets past the first check; `seed` is what it
/// was made of.
std::string repaired(std::string mutated, const std::string& seed);

inline std::string_view text_of(const uint8_t* data, size_t size) {
  return {reinterpret_cast<const char*>(data), size};
}

/// An input as a file, for parsers that take a path.
class InputFile {
 public:
  InputFile(const uint8_t* data, size_t size);
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;
  ~InputFile() { ::close(descriptor_); }
  std::string path() const { return "/proc/self/fd/" + std::to_string(descriptor_); }

 private:
  int descriptor_;
};

/// Runs a parser: any input is accepted or refused with an Error of `refusal`; another Error is a finding.
template <class Parse>
int accepts_or_refuses(ErrorKind refusal, Parse&& parse) {
  try {
    parse();
  } catch (const Error& error) {
    if (error.kind() != refusal) throw;
  }
  return 0;
}

}  // namespace weft::fuzz
