#include <algorithm>
#include <cstdint>
#include <limits>
#include <queue>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "core/error.h"
#include "core/thread_pool.h"
#include "models/text/bpe.h"
#include "models/text/bpe_model.h"
#include "models/text/pretokenize.h"

namespace weft::text {
namespace {

/// Bytes in which a task counts words.
constexpr size_t kChunk = size_t{4} << 20;

/// Distinct pieces with their number, in the order in which they first occur.
class WordCounts {
 public:
  void add(std::string_view word, int64_t count) {
    const auto [found, is_new] = index_.emplace(word, words_.size());
    if (is_new) {
      words_.emplace_back(word, count);
    } else {
      words_[found->second].second += count;
    }
  }
  const std::vector<std::pair<std::string_view, int64_t>>& words() const { return words_; }

 private:
  std::unordered_map<std::string_view, size_t> index_;
  std::vector<std::pair<std::string_view, int64_t>> words_;
};

WordCounts count_words(const std::vector<std::string_view>& texts) {
  std::vector<std::string_view> chunks;
  for (const std::string_view text : texts) {
    for (const std::string_view chunk : split_at_boundaries(text, kChunk)) chunks.push_back(chunk);
  }
  std::vector<WordCounts> parts(chunks.size());
  parallel_tasks(static_cast<int64_t>(chunks.size()), [&](int64_t i) {
    const std::string_view text = chunks[static_cast<size_t>(i)];
    for (size_t at = 0; at < text.size();) {
      const size_t end = piece_end(text, at);
      parts[static_cast<size_t>(i)].add(text.substr(at, end - at), 1);
      at = end;
    }
  });
  if (parts.empty()) return {};
  WordCounts total = std::move(parts[0]);
  for (size_t i = 1; i < parts.size(); ++i) {
    for (const auto& [word, count] : parts[i].words()) total.add(word, count);
  }
  return total;
}

/// All distinct words as one linked list of tokens, and for every pair of neighbours its number and the places where it
/// stands. A merge visits its own places only and every visit removes a token, so that the work over all merges is
/// linear in the letters of the distinct words, however long a word is.
class PairCounter {
 public:
  explicit PairCounter(const WordCounts& counts) {
    size_t letters = 1;
    for (const auto& [word, count] : counts.words()) letters += word.size() + 1;
    if (letters > std::numeric_limits<uint32_t>::max()) {
      fail(ErrorKind::kValue, "Tokenizer::train", "the distinct words of the text have ",
           grouped(static_cast<int64_t>(letters)),
           " bytes; at most 4,294,967,295 can be trained on. Hint: train on a part");
    }
    tokens_.reserve(letters), word_.reserve(letters), previous_.reserve(letters), next_.reserve(letters);
    append(kBoundary, 0);
    for (const auto& [word, count] : counts.words()) {
      const auto index = static_cast<uint32_t>(word_counts_.size());
      word_counts_.push_back(count);
      for (const char letter : word) append(static_cast<unsigned char>(letter), index);
      append(kBoundary, 0);
    }
    for (uint32_t at = 0; at + 1 < tokens_.size(); ++at) {
      if (tokens_[at] != kBoundary && tokens_[at + 1] != kBoundary) {
        add(tokens_[at], tokens_[at + 1], at, word_counts_[word_[at]]);
      }
    }
    offer_new(0);
  }

  /// The most frequent pair, the smallest among equals; false if no pair is left.
  bool best(std::pair<int32_t, int32_t>& pair) {
    while (!heap_.empty()) {
      const Candidate top = heap_.top();
      heap_.pop();
      const int64_t count = pairs_[top.pair].count;
      if (count == top.count) {
        pair = {static_cast<int32_t>(top.key >> 32), static_cast<int32_t>(top.key & 0xffffffff)};
        return true;
      }
      // Once offered, a count only falls (pairs grow in the merge that makes one of their tokens, and are offered after
      // it), so that a stale candidate can stand no lower than its true place.
      if (count > 0) heap_.push({count, top.key, top.pair});
    }
    return false;
  }

  /// Replaces the pair by `made` wherever it stands, from left to right.
  void merge(std::pair<int32_t, int32_t> pair, int32_t made) {
    const auto [left, right] = pair;
    const size_t known = pairs_.size();
    Pair& merged = pairs_[index_.at(pair_key(left, right))];
    const std::vector<uint32_t> places = std::move(merged.places);
    merged = {};
    for (const uint32_t at : places) {
      const uint32_t gone = next_[at];
      if (tokens_[at] != left || tokens_[gone] != right) continue;  // an earlier merge was here
      const uint32_t before = previous_[at], after = next_[gone];
      const int64_t count = word_counts_[word_[at]];
      if (tokens_[before] != kBoundary) {
        remove(tokens_[before], left, count);
        add(tokens_[before], made, before, count);
      }
      if (tokens_[after] != kBoundary) {
        remove(right, tokens_[after], count);
        add(made, tokens_[after], at, count);
      }
      tokens_[at] = made;
      tokens_[gone] = kGone;
      next_[at] = after;
      previous_[after] = at;
    }
    pairs_[index_.at(pair_key(left, right))] = {};  // what a pair of equal tokens has left over ("aaa") is stale
    offer_new(known);
  }

 private:
  static constexpr int32_t kBoundary = -1;  ///< between words
  static constexpr int32_t kGone = -2;      ///< merged into the token before it
  struct Pair {
    int64_t count = 0;
    std::vector<uint32_t> places;  ///< of the left token; some may be stale
  };
  struct Candidate {
    int64_t count;
    uint64_t key;
    size_t pair;
    bool operator<(const Candidate& other) const {
      return count != other.count ? count < other.count : key > other.key;
    }
  };

  void append(int32_t token, uint32_t word) {
    const auto at = static_cast<uint32_t>(tokens_.size());
    tokens_.push_back(token);
    word_.push_back(word);
    previous_.push_back(at == 0 ? 0 : at - 1);
    next_.push_back(at + 1);
  }
  void add(int32_t left, int32_t right, uint32_t at, int64_t count) {
    const auto [found, is_new] = index_.emplace(pair_key(left, right), pairs_.size());
    if (is_new) pairs_.emplace_back(), keys_.push_back(found->first);
    Pair& pair = pairs_[found->second];
    pair.count += count;
    pair.places.push_back(at);
  }
  void remove(int32_t left, int32_t right, int64_t count) { pairs_[index_.at(pair_key(left, right))].count -= count; }
  void offer_new(size_t first) {
    for (size_t i = first; i < pairs_.size(); ++i) {
      if (pairs_[i].count > 0) heap_.push({pairs_[i].count, keys_[i], i});
    }
  }

  std::vector<int32_t> tokens_;
  std::vector<uint32_t> word_, previous_, next_;
  std::vector<int64_t> word_counts_;
  std::vector<Pair> pairs_;
  std::vector<uint64_t> keys_;  ///< of pairs_
  std::unordered_map<uint64_t, size_t> index_;
  std::priority_queue<Candidate> heap_;
};

/// Appends up to `count` tokens and their merges to a model that has the 256 bytes.
void learn_merges(const std::vector<std::string_view>& texts, int64_t count, BpeModel& model) {
  PairCounter counter(count_words(texts));
  std::unordered_set<std::string> made;
  for (std::pair<int32_t, int32_t> pair; count > 0 && counter.best(pair);) {
    std::string token = model.tokens[static_cast<size_t>(pair.first)] + model.tokens[static_cast<size_t>(pair.second)];
    // Were two pairs to make the same bytes, the first would be the token; the second is not merged.
    if (!made.insert(token).second) continue;
    counter.merge(pair, static_cast<int32_t>(model.tokens.size()));
    model.tokens.push_back(std::move(token));
    model.merges.push_back(pair);
    --count;
  }
}

}  // namespace

Tokenizer Tokenizer::train(std::string_view text, int64_t vocab_size, const std::vector<std::string>& special_tokens) {
  constexpr const char* kWhere = "Tokenizer::train";
  const auto specials = static_cast<int64_t>(special_tokens.size());
  if (vocab_size < 256 + specials || vocab_size > std::numeric_limits<int32_t>::max()) {
    fail(ErrorKind::kValue, kWhere, "vocab_size must be at least ", 256 + specials, " (256 bytes and ", specials,
         " special tokens) and below 2^31, got ", vocab_size);
  }
  std::unordered_map<std::string_view, int32_t> special_ids;
  for (const std::string& special : special_tokens) {
    if (special.size() < 2) {
      fail(ErrorKind::kValue, kWhere, "the special token ", weft::quoted(special),
           " is too short: it must be told from bytes");
    }
    if (!special_ids.emplace(special, static_cast<int32_t>(special_ids.size())).second) {
      fail(ErrorKind::kValue, kWhere, "the special token ", weft::quoted(special), " is given twice");
    }
  }
  std::vector<std::string_view> texts;
  split_at_specials(special_ids, text, [&](std::string_view plain) { texts.push_back(plain); }, [](int32_t) {});

  auto model = std::make_shared<BpeModel>();
  for (int byte = 0; byte < 256; ++byte) model->tokens.emplace_back(1, static_cast<char>(byte));
  learn_merges(texts, vocab_size - 256 - specials, *model);
  if (const auto learnt = static_cast<int64_t>(model->tokens.size()) + specials; learnt < vocab_size) {
    fail(ErrorKind::kValue, kWhere, "vocab_size ", vocab_size, " is more than the ", learnt,
         " tokens that the text of ", grouped(static_cast<int64_t>(text.size())),
         " bytes yields. Hint: more text or a smaller vocabulary");
  }
  for (const std::string& special : special_tokens) {
    model->special_ids.push_back(static_cast<int32_t>(model->tokens.size()));
    model->tokens.push_back(special);
  }
  model->finish(kWhere, "the trained vocabulary");
  return Tokenizer(std::move(model));
}

}  // namespace weft::text
