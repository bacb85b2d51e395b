// Fuzz target for the safetensors reader: any bytes either load or are refused with Error kData. Build with
// -fsanitize=fuzzer,address,undefined; tests/core_safetensors_test.cpp calls it with mutations of a small file.
#include <cstddef>
#include <cstdint>

#include "core/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    const weft::SafetensorsFile file(std::as_bytes(std::span(data, size)), "fuzz");
    int64_t bytes = 0;
    for (const auto& [name, tensor] : file.load_all()) bytes += tensor.numel() * weft::size_of(tensor.dtype());
    // Whatever was accepted is tiled by its tensors: this finds a check that was lost.
    if (bytes > static_cast<int64_t>(size)) __builtin_trap();
  } catch (const weft::Error& error) {
    if (error.kind() != weft::ErrorKind::kData) throw;
  }
  return 0;
}
