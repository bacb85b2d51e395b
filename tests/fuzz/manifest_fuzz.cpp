// Fuzz target for the manifest of a checkpoint.
#include "core/file.h"
#include "models/checkpoint/manifest.h"
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
  manifest.files = {{"model.safetensors", 10, std::string(32, 'a')},
                    {"optimizer.safetensors", 10, std::string(32, 'b')}};
  CheckpointManifest pieces;
  pieces.version = 2;
  const Shape shape = {4, 6};
  CheckpointTensor tensor{"w", DType::f32, shape, {}};
  for (int i = 0; i < 2; ++i) {
    const std::string name = checkpoint::file_name("model", i + 1, 2);
    pieces.files.push_back({name, 10, std::string(32, 'c')});
    const TensorPart columns = TensorPart::along(shape, 1, {{i, 1 + i}, {2 + 2 * i, 4 + 2 * i}});
    tensor.pieces.push_back({name, columns});
  }
  pieces.model = {tensor, {"s", DType::i64, {}, {{"model-00001-of-00002.safetensors", TensorPart::all({})}}}};
  pieces.files.push_back({"optimizer-00001-of-00001.safetensors", 10, std::string(32, 'd')});
  CheckpointTensor rows{"w.mean", DType::f64, shape, {}};
  rows.pieces.push_back({"optimizer-00001-of-00001.safetensors", TensorPart::all(shape)});
  pieces.optimizer = {rows};
  return {checkpoint::manifest_text(manifest), checkpoint::manifest_text(pieces)};
}

std::vector<std::string> words() {
  return {"{",
          "}",
          "[",
          "]",
          ",",
          ":",
          "\"",
          "0",
          "-1",
          "1e99",
          "18446744073709551616",
          "null",
          "../",
          "\\u0000",
          "\xff",
          "[0,4]",
          "[]",
          "9223372036854775807",
          "4611686018427387904",
          "\"dim\":1"};
}

std::string repaired(std::string mutated, const std::string&) {
  constexpr size_t kDigits = 32, kEnd = 4;
  if (mutated.size() < kDigits + kEnd) return mutated;
  const size_t digits = mutated.size() - kEnd - kDigits;
  return mutated.replace(digits, kDigits, hash_bytes(as_bytes(mutated.substr(0, digits))));
}

}  // namespace weft::fuzz
