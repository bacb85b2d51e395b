// Fuzz target for token files: our own layout, llm.c's and bare tokens.
#include <cstring>

#include "core/file.h"
#include "models/text/shard.h"
#include "tests/fuzz/fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using weft::text::Shard;
  const weft::fuzz::InputFile file(data, size);
  // What was accepted has no id outside its vocabulary.
  const auto check = [](const Shard& shard) {
    for (const int32_t id : shard.tokens()) {
      if (id < 0 || id >= shard.vocab_size()) __builtin_trap();
    }
  };
  weft::fuzz::accepts_or_refuses(weft::ErrorKind::kData, [&] { check(Shard::open(file.path())); });
  weft::fuzz::accepts_or_refuses(weft::ErrorKind::kData, [&] { check(Shard::open_llmc(file.path(), 300)); });
  return weft::fuzz::accepts_or_refuses(weft::ErrorKind::kData,
                                        [&] { check(Shard::open_raw(file.path(), weft::text::TokenType::kU16, 300)); });
}

namespace weft::fuzz {
namespace {
template <class T>
std::string little(T value) {
  std::string bytes(sizeof value, '\0');
  std::memcpy(bytes.data(), &value, sizeof value);
  return bytes;
}
constexpr size_t kHashPlace = 40, kHashBytes = 16;
}  // namespace

std::vector<std::string> seeds() {
  const auto shard = [](uint32_t width, const std::string& payload, uint64_t count, uint64_t vocab, uint64_t largest) {
    const std::string file = std::string("WEFTTOK") + '\0' + little<uint32_t>(1) + little(width) + little(count) +
                             little(vocab) + little(largest) + std::string(kHashBytes + 8, '\0') + payload;
    return repaired(file, file);
  };
  std::string llmc = little<uint32_t>(20240520) + little<uint32_t>(1) + little<uint32_t>(3);
  llmc.resize(1024, '\0');
  return {shard(2, little<uint16_t>(7) + little<uint16_t>(299) + little<uint16_t>(0), 3, 300, 299),
          shard(4, little<uint32_t>(70000) + little<uint32_t>(1), 2, 70001, 70000), shard(2, "", 0, 1, 0),
          llmc + little<uint16_t>(1) + little<uint16_t>(2) + little<uint16_t>(3)};
}

std::vector<std::string> words() {
  return {little<uint16_t>(299),     little<uint16_t>(300),
          little<uint32_t>(2),       little<uint32_t>(4),
          little<uint64_t>(0),       little(~uint64_t{0}),
          little(uint64_t{1} << 62), little(uint64_t{1} << 63),
          std::string(64, '\0'),     "WEFTTOK"};
}

std::string repaired(std::string mutated, const std::string&) {
  if (mutated.size() < static_cast<size_t>(text::Shard::kHeaderSize)) return mutated;
  const auto digest = Hasher().update(as_bytes(mutated).subspan(text::Shard::kHeaderSize)).digest();
  std::memcpy(mutated.data() + kHashPlace, digest.data(), kHashBytes);
  return mutated;
}

}  // namespace weft::fuzz
