// Fuzz target for the safetensors reader.
#include <cstring>

#include "core/file.h"
#include "core/safetensors.h"
#include "tests/fuzz/fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  return weft::fuzz::accepts_or_refuses(weft::ErrorKind::kData, [&] {
    const weft::SafetensorsFile file(std::as_bytes(std::span(data, size)), "fuzz");
    int64_t bytes = 0;
    for (const auto& [name, tensor] : file.load_all()) bytes += tensor.numel() * weft::size_of(tensor.dtype());
    // Whatever was accepted is tiled by its tensors: this finds a check that was lost.
    if (bytes > static_cast<int64_t>(size)) __builtin_trap();
  });
}

namespace weft::fuzz {
namespace {
constexpr size_t kDataBytes = 24;  // of the seed's tensors
}

std::vector<std::string> seeds() {
  const std::string header =
      R"({"__metadata__":{"k":"v"},"x":{"dtype":"I32","shape":[5],"data_offsets":[0,20]},"m":{"dtype":"BOOL","shape":[2,2],"data_offsets":[20,24]}})";
  const uint64_t length = header.size();
  std::string file(8, '\0');
  std::memcpy(file.data(), &length, 8);
  return {file + header + std::string(kDataBytes, '\0')};
}

std::vector<std::string> words() {
  return {"{",       "}",
          "[",       "]",
          ",",       ":",
          "\"",      "0",
          "-1",      "9223372036854775807",
          "1e9",     "BOOL",
          "F64",     "__metadata__",
          "\\u0000", std::string(1, '\0'),
          "\xff",    " ",
          "null",    "[[[["};
}

/// Most inserts shift the end of the header.
std::string repaired(std::string mutated, const std::string&) {
  if (mutated.size() < 8 + kDataBytes) return mutated;
  const uint64_t length = mutated.size() - 8 - kDataBytes;
  std::memcpy(mutated.data(), &length, 8);
  return mutated;
}

}  // namespace weft::fuzz
