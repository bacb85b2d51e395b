// Fuzz target for the manifest of a checkpoint.
#include "models/checkpoint_manifest.h"
#include "tests/fuzz/fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  return weft::fuzz::accepts_or_refuses(weft::ErrorKind::kData, [&] {
    // What was accepted is written and read back.
    const auto manifest = weft::checkpoint::parse_manifest(weft::fuzz::text_of(data, size), "fuzz");
    weft::checkpoint::parse_manifest(weft::checkpoint::manifest_text(manifest), "fuzz");
  });
}

namespace weft::fuzz {

std::vector<std::string> seeds() {
  CheckpointManifest manifest;
  manifest.files = {{"model.safetensors", 10, std::string(32, 'a')}};
  return {checkpoint::manifest_text(manifest)};
}

std::vector<std::string> words() {
  return {"{",    "}",   "[",       "]",   ",", ":", "\"", "0", "-1", "1e99", "18446744073709551616",
          "null", "../", "\\u0000", "\xff"};
}

std::string repaired(std::string mutated, const std::string&) { return mutated; }

}  // namespace weft::fuzz
