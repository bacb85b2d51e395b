#include "models/text/bpe.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <queue>
#include <tuple>

#include "core/error.h"
#include "core/thread_pool.h"
#include "models/text/bpe_model.h"
#include "models/text/pretokenize.h"

namespace weft::text {
namespace {

/// Bytes a task encodes: large enough that its cold cache costs little, small enough to share out.
constexpr size_t kChunk = size_t{1} << 20;

/// Pieces up to this many bytes are merged by scanning all pairs for each merge (n^2 / 2 steps in one cache line or
/// two); longer ones with a heap.
constexpr size_t kScanned = 48;

/// merge_piece for short pieces.
void merge_by_scanning(const std::array<int32_t, 256>& byte_ids, const PairTable& pairs, std::string_view piece,
                       std::vector<int32_t>& ids) {
  std::array<int32_t, kScanned> token;
  std::array<PairTable::Merge, kScanned> merge;  // of token[i] and token[i + 1]
  size_t n = piece.size();
  for (size_t i = 0; i < n; ++i) token[i] = byte_ids[static_cast<unsigned char>(piece[i])];
  for (size_t i = 0; i + 1 < n; ++i) merge[i] = pairs.find(token[i], token[i + 1]);
  for (;;) {
    size_t best = 0;
    int32_t rank = PairTable::kNone;
    for (size_t i = 0; i + 1 < n; ++i) {
      if (merge[i].rank < rank) rank = merge[i].rank, best = i;
    }
    if (rank == PairTable::kNone) break;
    token[best] = merge[best].result;
    --n;
    for (size_t i = best + 1; i < n; ++i) token[i] = token[i + 1];
    for (size_t i = best + 1; i + 1 < n; ++i) merge[i] = merge[i + 1];
    if (best > 0) merge[best - 1] = pairs.find(token[best - 1], token[best]);
    if (best + 1 < n) merge[best] = pairs.find(token[best], token[best + 1]);
  }
  ids.insert(ids.end(), token.begin(), token.begin() + static_cast<ptrdiff_t>(n));
}

/// merge_piece in O(n log n): a heap of pairs over a linked list of tokens; entries that a merge has made stale are
/// recognised by the rank that stands at their place now.
void merge_with_heap(const std::array<int32_t, 256>& byte_ids, const PairTable& pairs, std::string_view piece,
                     std::vector<int32_t>& ids) {
  struct Node {
    int32_t token;
    PairTable::Merge merge;  ///< with the next node; rank kNone if there is none, or if this node is gone
    size_t previous, next;
  };
  struct Entry {
    int32_t rank;
    size_t at;
    bool operator>(const Entry& other) const { return std::tie(rank, at) > std::tie(other.rank, other.at); }
  };
  const size_t n = piece.size();
  constexpr size_t kEnd = std::numeric_limits<size_t>::max();
  std::vector<Node> nodes(n);
  std::vector<Entry> entries;
  for (size_t i = 0; i < n; ++i) {
    nodes[i].token = byte_ids[static_cast<unsigned char>(piece[i])];
    nodes[i].previous = i == 0 ? kEnd : i - 1;
    nodes[i].next = i + 1 == n ? kEnd : i + 1;
  }
  const auto pair_at = [&](size_t i) {
    const Node& node = nodes[i];
    return node.next == kEnd ? PairTable::Merge{PairTable::kNone, -1} : pairs.find(node.token, nodes[node.next].token);
  };
  for (size_t i = 0; i < n; ++i) {
    nodes[i].merge = pair_at(i);
    if (nodes[i].merge.rank != PairTable::kNone) entries.push_back({nodes[i].merge.rank, i});
  }
  std::priority_queue<Entry, std::vector<Entry>, std::greater<>> heap(std::greater<>(), std::move(entries));
  const auto renew = [&](size_t i) {
    nodes[i].merge = pair_at(i);
    if (nodes[i].merge.rank != PairTable::kNone) heap.push({nodes[i].merge.rank, i});
  };
  while (!heap.empty()) {
    const Entry entry = heap.top();
    heap.pop();
    Node& node = nodes[entry.at];
    if (node.merge.rank != entry.rank) continue;
    const size_t gone = node.next;
    node.token = node.merge.result;
    node.next = nodes[gone].next;
    if (node.next != kEnd) nodes[node.next].previous = entry.at;
    nodes[gone].merge.rank = PairTable::kNone;
    renew(entry.at);
    if (node.previous != kEnd) renew(node.previous);
  }
  for (size_t i = 0; i != kEnd && i < n; i = nodes[i].next) ids.push_back(nodes[i].token);
}

/// Encodes plain text piece by piece. Words repeat: a direct-mapped table keeps the ids of short pieces, one cache line
/// each; a newcomer replaces what stands in its slot, so that memory is bounded.
class PieceEncoder {
 public:
  PieceEncoder(const BpeModel& model, size_t text_size)
      : model_(model), slots_(std::bit_ceil(std::clamp<size_t>(text_size / 32, 16, kSlots))) {}

  void encode(std::string_view text, std::vector<int32_t>& ids) {
    for (size_t at = 0; at < text.size();) {
      const size_t end = piece_end(text, at);
      encode_piece(text.substr(at, end - at), ids);
      at = end;
    }
  }

 private:
  static constexpr size_t kSlots = size_t{1} << 15;
  static constexpr size_t kLongest = 16;
  struct alignas(64) Slot {
    uint64_t low = 0, high = 0;  ///< the piece, padded with zeros
    uint16_t length = 0;         ///< of the piece in bytes; 0: empty
    uint16_t count = 0;
    std::array<int32_t, 11> ids;
  };

  void encode_piece(std::string_view piece, std::vector<int32_t>& ids) {
    const size_t length = piece.size();
    if (length == 1) return ids.push_back(model_.byte_ids[static_cast<unsigned char>(piece[0])]);
    if (length > kLongest) return merge_piece(model_.byte_ids, model_.pairs, piece, ids);
    uint64_t low = 0, high = 0;
    std::memcpy(&low, piece.data(), std::min<size_t>(length, 8));
    if (length > 8) std::memcpy(&high, piece.data() + 8, length - 8);
    Slot& slot = slots_[mix(low ^ (high * 0x9e3779b97f4a7c15ULL)) & (slots_.size() - 1)];
    if (slot.low != low || slot.high != high || slot.length != length) {
      const size_t before = ids.size();
      merge_piece(model_.byte_ids, model_.pairs, piece, ids);
      const size_t count = ids.size() - before;
      if (count > slot.ids.size()) return;
      slot.low = low, slot.high = high;
      slot.length = static_cast<uint16_t>(length), slot.count = static_cast<uint16_t>(count);
      std::copy(ids.end() - static_cast<ptrdiff_t>(count), ids.end(), slot.ids.begin());
      return;
    }
    ids.insert(ids.end(), slot.ids.begin(), slot.ids.begin() + slot.count);
  }

  const BpeModel& model_;
  std::vector<Slot> slots_;
};

}  // namespace

void merge_piece(const std::array<int32_t, 256>& byte_ids, const PairTable& pairs, std::string_view piece,
                 std::vector<int32_t>& ids) {
  (piece.size() <= kScanned ? merge_by_scanning : merge_with_heap)(byte_ids, pairs, piece, ids);
}

void BpeModel::finish(const char* where, const std::string& name) {
  const auto spelled = [&](int32_t id) { return weft::quoted(tokens[static_cast<size_t>(id)], 40); };
  size_t next_special = 0;
  for (size_t i = 0; i < tokens.size(); ++i) {
    const auto id = static_cast<int32_t>(i);
    if (tokens[i].empty())
      fail(ErrorKind::kData, where, name, ": token ", id, " is empty; every token stands for bytes");
    const bool special = next_special < special_ids.size() && special_ids[next_special] == id;
    next_special += special;
    const auto [other, is_new] = (special ? specials : plain).emplace(tokens[i], id);
    if (!is_new)
      fail(ErrorKind::kData, where, name, ": tokens ", other->second, " and ", id, " are both ", spelled(id));
  }
  for (const int32_t id : special_ids) {
    if (const auto found = plain.find(tokens[static_cast<size_t>(id)]); found != plain.end()) {
      fail(ErrorKind::kData, where, name, ": the special token ", id, " and the token ", found->second, " are both ",
           spelled(id));
    }
  }
  for (int byte = 0; byte < 256; ++byte) {
    const char text = static_cast<char>(byte);
    const auto found = plain.find(std::string_view(&text, 1));
    if (found == plain.end()) {
      fail(ErrorKind::kData, where, name, ": no token for the byte ", weft::quoted(std::string_view(&text, 1)), " (",
           byte, "); a byte-level vocabulary has all 256, so that any text can be encoded");
    }
    byte_ids[static_cast<size_t>(byte)] = found->second;
  }
  pairs = PairTable(merges.size());
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    const auto [left, right] = merges[rank];
    const auto made = plain.find(tokens[static_cast<size_t>(left)] + tokens[static_cast<size_t>(right)]);
    if (made == plain.end()) {
      fail(ErrorKind::kData, where, name, ": merge ", rank, " of ", spelled(left), " and ", spelled(right),
           " makes no token of the vocabulary (special tokens not counted)");
    }
    if (!pairs.insert(left, right, {static_cast<int32_t>(rank), made->second})) {
      fail(ErrorKind::kData, where, name, ": merge ", rank, " of ", spelled(left), " and ", spelled(right),
           " is there twice");
    }
  }
}

Tokenizer Tokenizer::bytes() {
  auto model = std::make_shared<BpeModel>();
  for (int byte = 0; byte < 256; ++byte) model->tokens.emplace_back(1, static_cast<char>(byte));
  model->finish("Tokenizer::bytes", "bytes");
  return Tokenizer(std::move(model));
}

std::vector<int32_t> Tokenizer::encode(std::string_view text, SpecialTokens specials) const {
  std::vector<int32_t> ids;
  encode_append(text, ids, specials);
  return ids;
}

void Tokenizer::encode_append(std::string_view text, std::vector<int32_t>& ids, SpecialTokens specials) const {
  const BpeModel& model = *model_;
  const bool parse = specials == SpecialTokens::kParse && !model.specials.empty();
  if (text.size() < 2 * kChunk) {
    PieceEncoder encoder(model, text.size());
    ids.reserve(ids.size() + text.size() / 4);
    if (!parse) return encoder.encode(text, ids);
    split_at_specials(
        model.specials, text, [&](std::string_view plain) { encoder.encode(plain, ids); },
        [&](int32_t id) { ids.push_back(id); });
    return;
  }
  struct Span {
    std::string_view plain;  ///< to encode, or
    int32_t special = -1;    ///< a special token
  };
  // A task takes consecutive spans of about a chunk together: documents between special tokens may be short.
  std::vector<std::vector<Span>> tasks;
  size_t room = 0;
  const auto add = [&](Span span) {
    if (room == 0 || tasks.empty()) tasks.emplace_back(), room = kChunk;
    room -= std::min(room, std::max<size_t>(span.plain.size(), 1));
    tasks.back().push_back(span);
  };
  const auto add_plain = [&](std::string_view plain) {
    for (const std::string_view chunk : split_at_boundaries(plain, kChunk)) add({chunk, -1});
  };
  if (parse) {
    split_at_specials(model.specials, text, add_plain, [&](int32_t id) { add({{}, id}); });
  } else {
    add_plain(text);
  }
  std::vector<std::vector<int32_t>> parts(tasks.size());
  parallel_tasks(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    std::vector<int32_t>& part = parts[static_cast<size_t>(i)];
    part.reserve(kChunk / 4);
    PieceEncoder encoder(model, kChunk);
    for (const Span& span : tasks[static_cast<size_t>(i)]) {
      span.special >= 0 ? part.push_back(span.special) : encoder.encode(span.plain, part);
    }
  });
  size_t total = ids.size();
  for (const auto& part : parts) total += part.size();
  ids.reserve(total);
  for (auto& part : parts) {
    ids.insert(ids.end(), part.begin(), part.end());
    std::vector<int32_t>().swap(part);
  }
}

std::string Tokenizer::decode(std::span<const int32_t> ids) const {
  const auto& tokens = model_->tokens;
  size_t size = 0;
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || static_cast<size_t>(ids[i]) >= tokens.size()) {
      fail(ErrorKind::kIndex, "Tokenizer::decode", "id ", ids[i], " at position ", i, " is not in the vocabulary of ",
           tokens.size(), " tokens");
    }
    size += tokens[static_cast<size_t>(ids[i])].size();
  }
  std::string text;
  text.reserve(size);
  for (const int32_t id : ids) text += tokens[static_cast<size_t>(id)];
  return text;
}

int64_t Tokenizer::vocab_size() const { return static_cast<int64_t>(model_->tokens.size()); }

std::string_view Tokenizer::token(int32_t id) const {
  if (id < 0 || id >= vocab_size()) {
    fail(ErrorKind::kIndex, "Tokenizer::token", "id ", id, " is not in the vocabulary of ", vocab_size(), " tokens");
  }
  return model_->tokens[static_cast<size_t>(id)];
}

std::optional<int32_t> Tokenizer::find(std::string_view bytes) const {
  const auto found = model_->plain.find(bytes);
  return found == model_->plain.end() ? std::nullopt : std::optional(found->second);
}

int32_t Tokenizer::special(std::string_view text) const {
  const auto found = model_->specials.find(text);
  if (found != model_->specials.end()) return found->second;
  std::string known;
  for (const int32_t id : model_->special_ids) known += (known.empty() ? "" : ", ") + weft::quoted(token(id));
  fail(ErrorKind::kValue, "Tokenizer::special", weft::quoted(text), " is no special token of this tokenizer; it has ",
       known.empty() ? "none" : known);
}

bool Tokenizer::is_special(int32_t id) const {
  return std::binary_search(model_->special_ids.begin(), model_->special_ids.end(), id);
}

std::vector<int32_t> Tokenizer::special_ids() const { return model_->special_ids; }

}  // namespace weft::text
