// Drives a fuzz target from its seeds: every cut, every flipped bit, and rounds of random edits (the same ones in every
// run). What must not happen is a crash, a hang, or an exception that is not the parser's refusal.
#include <gtest/gtest.h>

#include <random>

#include "tests/fuzz/fuzz.h"

namespace weft::fuzz {
namespace {

constexpr int kRounds = 20'000;

void run(const std::string& input) {
  LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(input.data()), input.size());
}

TEST(Fuzz, EverySeedCutAnywhereIsAcceptedOrRefused) {
  for (const std::string& seed : seeds()) {
    for (size_t size = 0; size <= seed.size(); ++size) run(seed.substr(0, size));
  }
}

TEST(Fuzz, EverySeedWithAnyBitFlippedIsAcceptedOrRefused) {
  for (const std::string& seed : seeds()) {
    for (size_t bit = 0; bit < seed.size() * 8; ++bit) {
      std::string flipped = seed;
      flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ (1 << (bit % 8)));
      run(flipped);
      run(repaired(flipped, seed));
    }
  }
}

TEST(Fuzz, SeedsMutatedAtRandomAreAcceptedOrRefused) {
  std::mt19937 random(7);
  const auto below = [&](size_t n) { return static_cast<size_t>(random() % n); };
  const std::vector<std::string> all_words = words();
  for (const std::string& seed : seeds()) {
    for (int round = 0; round < kRounds; ++round) {
      std::string mutated = seed;
      for (size_t changes = 1 + below(4); changes > 0; --changes) {
        const size_t place = below(mutated.size());
        const std::string& word = all_words[below(all_words.size())];
        switch (below(4)) {
          case 0:
            mutated[place] = static_cast<char>(random());
            break;
          case 1:
            mutated.insert(place, word);
            break;
          case 2:
            mutated.replace(place, std::min(word.size(), mutated.size() - place), word);
            break;
          default:
            mutated.erase(place, below(8));
            break;
        }
        if (mutated.empty()) mutated = seed;
      }
      run(round % 2 == 0 ? repaired(mutated, seed) : mutated);
    }
  }
}

}  // namespace
}  // namespace weft::fuzz
