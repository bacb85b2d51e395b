#pragma once
#include <array>
#include <bit>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

// The inside of text::Tokenizer, for the files that train, encode, read and write it.

namespace weft::text {

/// Two token ids in one word: the key of tables of pairs.
inline uint64_t pair_key(int32_t left, int32_t right) {
  return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
}

/// MurmurHash3's finalizer: every input bit reaches every output bit.
inline uint64_t mix(uint64_t x) {
  x = (x ^ x >> 33) * 0xff51afd7ed558ccdULL;
  x = (x ^ x >> 33) * 0xc4ceb9fe1a85ec53ULL;
  return x ^ x >> 33;
}

/// Pairs to merges: an open-addressing table, as encoding does little else than look up pairs that are mostly not
/// there.
class PairTable {
 public:
  struct Merge {
    int32_t rank;    ///< smaller is merged first; kNone if the pair is not merged
    int32_t result;  ///< token that the pair becomes
  };
  static constexpr int32_t kNone = INT32_MAX;

  /// Room for `pairs` merges.
  explicit PairTable(size_t pairs = 0) : slots_(std::bit_ceil(2 * pairs + 1), Slot{kEmpty, {kNone, -1}}) {}

  Merge find(int32_t left, int32_t right) const {
    const uint64_t key = pair_key(left, right);
    for (size_t at = mix(key);; ++at) {
      const Slot& slot = slots_[at & (slots_.size() - 1)];
      if (slot.key == key || slot.key == kEmpty) return slot.merge;
    }
  }

  /// False if the pair is there already. At most the number of pairs given to the constructor.
  bool insert(int32_t left, int32_t right, Merge merge) {
    const uint64_t key = pair_key(left, right);
    for (size_t at = mix(key);; ++at) {
      Slot& slot = slots_[at & (slots_.size() - 1)];
      if (slot.key == key) return false;
      if (slot.key != kEmpty) continue;
      slot = {key, merge};
      return true;
    }
  }

 private:
  static constexpr uint64_t kEmpty = ~uint64_t{0};  // ids are not negative: no pair has this key
  struct Slot {
    uint64_t key;
    Merge merge;
  };
  std::vector<Slot> slots_;  // size is a power of two
};

struct BpeModel {
  std::vector<std::string> tokens;                  ///< bytes of every token, special ones included
  std::vector<std::pair<int32_t, int32_t>> merges;  ///< in order of rank
  std::vector<int32_t> special_ids;                 ///< ascending

  std::array<int32_t, 256> byte_ids{};
  PairTable pairs;
  std::unordered_map<std::string_view, int32_t> plain;     ///< bytes to id, special tokens not among them
  std::unordered_map<std::string_view, int32_t> specials;  ///< text to id

  BpeModel() = default;
  BpeModel(const BpeModel&) = delete;  // the maps point into `tokens`
  BpeModel& operator=(const BpeModel&) = delete;

  /// Fills what follows from tokens, merges and special_ids, and checks it all: bytes and tokens each there once,
  /// merges that name tokens and make tokens, nothing that makes a special token of plain text.
  /// @param where, name  of the caller and the file, for messages.  @throws Error  kData.
  void finish(const char* where, const std::string& name);
};

/// Appends the tokens of one piece: the pair of least rank (leftmost among equals) is merged until none is left.
void merge_piece(const std::array<int32_t, 256>& byte_ids, const PairTable& pairs, std::string_view piece,
                 std::vector<int32_t>& ids);

/// Cuts `text` at the special tokens in it (leftmost, then longest). Calls plain(text) and special(id) in order.
template <class Plain, class Special>
void split_at_specials(const std::unordered_map<std::string_view, int32_t>& specials, std::string_view text,
                       Plain plain, Special special) {
  struct Next {
    std::string_view token;
    int32_t id;
    size_t at;  ///< its first place at or after the position, npos if there is none
  };
  std::vector<Next> next;
  for (const auto& [token, id] : specials) next.push_back({token, id, text.find(token)});
  for (size_t position = 0;;) {
    const Next* best = nullptr;
    for (Next& candidate : next) {
      if (candidate.at != std::string_view::npos && candidate.at < position) {
        candidate.at = text.find(candidate.token, position);
      }
      if (candidate.at == std::string_view::npos) continue;
      if (best == nullptr || candidate.at < best->at ||
          (candidate.at == best->at && candidate.token.size() > best->token.size())) {
        best = &candidate;
      }
    }
    if (best == nullptr) {
      if (position < text.size()) plain(text.substr(position));
      return;
    }
    if (best->at > position) plain(text.substr(position, best->at - position));
    special(best->id);
    position = best->at + best->token.size();
  }
}

}  // namespace weft::text
