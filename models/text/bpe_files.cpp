#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <unordered_set>

#include "core/error.h"
#include "core/file.h"
#include "models/text/bpe.h"
#include "models/text/bpe_model.h"

namespace weft::text {
namespace {

using Json = nlohmann::json;

/// GPT-2's byte alphabet: every byte as a printable character, so that tokens can be written in JSON. Printable Latin-1
/// stands for itself, the other 68 bytes for U+0100, U+0101, ... in order. All are below U+0800: one or two UTF-8
/// bytes.
class ByteAlphabet {
 public:
  ByteAlphabet() {
    bytes_.fill(-1);
    int next = 256;
    for (int byte = 0; byte < 256; ++byte) {
      const bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
      const int c = printable ? byte : next++;
      bytes_[static_cast<size_t>(c)] = static_cast<int16_t>(byte);
      std::string& text = text_[static_cast<size_t>(byte)];
      if (c >= 0x80) text += static_cast<char>(0xc0 | c >> 6);
      text += static_cast<char>(c >= 0x80 ? 0x80 | (c & 63) : c);
    }
  }

  std::string spell(std::string_view bytes) const {
    std::string text;
    for (const char byte : bytes) text += text_[static_cast<unsigned char>(byte)];
    return text;
  }

  /// False if `text` has a character that stands for no byte.
  bool read(std::string_view text, std::string& bytes) const {
    bytes.clear();
    for (size_t at = 0; at < text.size(); ++at) {
      auto c = static_cast<unsigned>(static_cast<unsigned char>(text[at]));
      if (c >= 0xe0) return false;
      if (c >= 0x80) {
        if (at + 1 == text.size()) return false;
        c = (c & 31) << 6 | (static_cast<unsigned char>(text[++at]) & 63);
      }
      if (c >= bytes_.size() || bytes_[c] < 0) return false;
      bytes += static_cast<char>(bytes_[c]);
    }
    return true;
  }

 private:
  std::array<std::string, 256> text_;
  std::array<int16_t, 256 + 68> bytes_;
};

const ByteAlphabet& alphabet() {
  static const ByteAlphabet instance;
  return instance;
}

/// What a file says of a vocabulary, in the file's own spelling.
struct Listing {
  std::vector<std::pair<std::string, int64_t>> tokens;
  std::vector<std::pair<std::string, std::string>> merges;
  std::vector<std::pair<std::string, int64_t>> specials;
};

/// A value for a message. Not dump() for what nests: it recurses as deep as a file says.
std::string brief(const Json& value) {
  if (!value.is_structured()) return weft::quoted(value.dump(-1, ' ', false, Json::error_handler_t::replace), 60);
  if (value.is_object()) {
    if (const auto type = value.find("type"); type != value.end() && type->is_string()) {
      return "of type " + weft::quoted(type->get_ref<const std::string&>());
    }
  }
  return value.is_object() ? "(an object)" : "(an array)";
}

Listing read_vocab(const Json& vocab, const char* where, const std::string& name) {
  if (!vocab.is_object()) fail(ErrorKind::kData, where, name, ": the vocabulary must be an object of tokens and ids");
  Listing listing;
  for (const auto& [token, id] : vocab.items()) {
    if (!id.is_number_integer()) {
      fail(ErrorKind::kData, where, name, ": the id of ", weft::quoted(token), " must be a whole number, is ",
           brief(id));
    }
    listing.tokens.emplace_back(token, id.get<int64_t>());
  }
  return listing;
}

/// "left right" -> the two; each merge has exactly one space, as the byte alphabet has none.
std::pair<std::string, std::string> read_merge(std::string_view line, size_t index, const char* where,
                                               const std::string& name) {
  const size_t space = line.find(' ');
  if (space == std::string_view::npos || space == 0 || space + 1 == line.size() ||
      line.find(' ', space + 1) != std::string_view::npos) {
    fail(ErrorKind::kData, where, name, ": merge ", index, " must be two tokens with a space between, is ",
         weft::quoted(line));
  }
  return {std::string(line.substr(0, space)), std::string(line.substr(space + 1))};
}

std::shared_ptr<const BpeModel> build(const Listing& listing, const char* where, const std::string& name) {
  // Special tokens may stand in the vocabulary as well: then under the same id.
  std::unordered_map<std::string_view, int64_t> special_ids;
  for (const auto& [text, id] : listing.specials) {
    if (!special_ids.emplace(text, id).second) {
      fail(ErrorKind::kData, where, name, ": the special token ", weft::quoted(text), " is there twice");
    }
  }
  std::vector<std::pair<std::string_view, int64_t>> all(listing.specials.begin(), listing.specials.end());
  for (const auto& [text, id] : listing.tokens) {
    const auto special = special_ids.find(text);
    if (special == special_ids.end()) {
      all.emplace_back(text, id);
    } else if (special->second != id) {
      fail(ErrorKind::kData, where, name, ": the special token ", weft::quoted(text), " has the id ", special->second,
           " among the added tokens and ", id, " in the vocabulary");
    }
  }

  const auto count = static_cast<int64_t>(all.size());
  auto model = std::make_shared<BpeModel>();
  model->tokens.resize(all.size());
  std::vector<const std::string_view*> owner(all.size(), nullptr);
  std::unordered_map<std::string_view, int32_t> ids;
  for (const auto& [text, id] : all) {
    if (id < 0 || id >= count) {
      fail(ErrorKind::kData, where, name, ": token ", weft::quoted(text), " has the id ", id, "; the ids of ", count,
           " tokens must be 0 to ", count - 1, ", each once");
    }
    const auto at = static_cast<size_t>(id);
    if (owner[at] != nullptr) {
      fail(ErrorKind::kData, where, name, ": tokens ", weft::quoted(*owner[at]), " and ", weft::quoted(text),
           " both have the id ", id);
    }
    owner[at] = &text;
    if (special_ids.contains(text)) {
      model->tokens[at] = text;
      model->special_ids.push_back(static_cast<int32_t>(id));
    } else if (!alphabet().read(text, model->tokens[at])) {
      fail(
          ErrorKind::kData, where, name, ": token ", id, " (", weft::quoted(text),
          ") has a character outside GPT-2's byte alphabet. Hint: only byte-level vocabularies can be read, and tokens "
          "such as <|endoftext|> must be listed as special");
    } else {
      ids.emplace(text, static_cast<int32_t>(id));
    }
  }
  std::sort(model->special_ids.begin(), model->special_ids.end());
  for (const auto& [left, right] : listing.merges) {
    const auto a = ids.find(left), b = ids.find(right);
    if (a == ids.end() || b == ids.end()) {
      fail(ErrorKind::kData, where, name, ": merge ", model->merges.size(), " of ", weft::quoted(left), " and ",
           weft::quoted(right), ": ", weft::quoted(a == ids.end() ? left : right), " is not in the vocabulary");
    }
    model->merges.emplace_back(a->second, b->second);
  }
  model->finish(where, name);
  return model;
}

Json parse(std::string_view text, const char* where, const std::string& name) {
  try {
    return Json::parse(text);
  } catch (const Json::exception& error) {
    fail(ErrorKind::kData, where, name, ": is no valid JSON: ", error.what());
  }
}

/// object[key], or null if it is not there.
const Json& member(const Json& object, const char* key) {
  static const Json kNull;
  const auto found = object.find(key);
  return found == object.end() ? kNull : *found;
}

/// Refuses `object[key]` unless it is absent, null or `expected`.
void expect_default(const Json& object, const char* key, const Json& expected, const char* where,
                    const std::string& name) {
  const Json& value = member(object, key);
  if (value.is_null() || value == expected) return;
  fail(ErrorKind::kData, where, name, ": ", key, " ", brief(value), " is not supported: it would change the ids; only ",
       expected.dump(), " is");
}

std::string base64(std::string_view text, size_t line, const char* where, const std::string& name) {
  std::string bytes;
  uint32_t bits = 0;
  int held = 0;
  size_t digits = text.size();
  while (digits > 0 && text.size() - digits < 2 && text[digits - 1] == '=') --digits;
  bool valid = !text.empty() && text.size() % 4 == 0;
  for (size_t i = 0; valid && i < digits; ++i) {
    const char c = text[i];
    const int value = c >= 'A' && c <= 'Z'   ? c - 'A'
                      : c >= 'a' && c <= 'z' ? c - 'a' + 26
                      : c >= '0' && c <= '9' ? c - '0' + 52
                      : c == '+'             ? 62
                      : c == '/'             ? 63
                                             : -1;
    valid = value >= 0;
    bits = bits << 6 | static_cast<uint32_t>(value & 63);
    held += 6;
    if (held >= 8) bytes += static_cast<char>(bits >> (held -= 8) & 255);
  }
  if (!valid) fail(ErrorKind::kData, where, name, ": line ", line, ": ", weft::quoted(text), " is no base64");
  return bytes;
}

}  // namespace

Tokenizer Tokenizer::from_json(std::string_view text, const std::string& name) {
  constexpr const char* kWhere = "Tokenizer::from_json";
  const Json json = parse(text, kWhere, name);
  if (!json.is_object()) fail(ErrorKind::kData, kWhere, name, ": must hold an object");
  expect_default(json, "normalizer", nullptr, kWhere, name);

  const Json& cut = member(json, "pre_tokenizer");
  if (!cut.is_object() || member(cut, "type") != "ByteLevel") {
    fail(ErrorKind::kData, kWhere, name, ": pre_tokenizer ", brief(cut),
         " is not supported; only {\"type\":\"ByteLevel\"}, GPT-2's, is");
  }
  // Absent, add_prefix_space would be an error and use_regex true there.
  if (member(cut, "add_prefix_space") != false) {
    fail(ErrorKind::kData, kWhere, name,
         ": pre_tokenizer must say add_prefix_space false; a space before the text is not ", "supported");
  }
  expect_default(cut, "use_regex", true, kWhere, name);
  const Json& post = member(json, "post_processor");
  if (!post.is_null() && (!post.is_object() || member(post, "type") != "ByteLevel")) {
    fail(ErrorKind::kData, kWhere, name, ": post_processor ", brief(post),
         " is not supported; only ByteLevel or none is");
  }

  const Json& model = member(json, "model");
  if (!model.is_object()) fail(ErrorKind::kData, kWhere, name, ": has no model");
  expect_default(model, "type", "BPE", kWhere, name);
  expect_default(model, "byte_fallback", false, kWhere, name);
  expect_default(model, "ignore_merges", false, kWhere, name);
  expect_default(model, "continuing_subword_prefix", "", kWhere, name);
  expect_default(model, "end_of_word_suffix", "", kWhere, name);
  if (const Json& dropout = member(model, "dropout"); !dropout.is_null() && dropout != 0.0) {
    fail(ErrorKind::kData, kWhere, name, ": dropout of merges is not supported");
  }

  Listing listing = read_vocab(member(model, "vocab"), kWhere, name);
  const Json& merges = member(model, "merges");
  if (!merges.is_array()) fail(ErrorKind::kData, kWhere, name, ": model.merges must be an array");
  for (const Json& merge : merges) {
    const size_t index = listing.merges.size();
    if (merge.is_string()) {
      listing.merges.push_back(read_merge(merge.get_ref<const std::string&>(), index, kWhere, name));
    } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
      listing.merges.emplace_back(merge[0].get<std::string>(), merge[1].get<std::string>());
    } else {
      fail(ErrorKind::kData, kWhere, name, ": merge ", index, " must be two tokens, is ", brief(merge));
    }
  }
  const Json& added = member(json, "added_tokens");
  if (!added.is_null() && !added.is_array()) fail(ErrorKind::kData, kWhere, name, ": added_tokens must be an array");
  for (const Json& token : added) {
    const Json& content = token.is_object() ? member(token, "content") : token;
    const Json& id = token.is_object() ? member(token, "id") : token;
    if (!content.is_string() || !id.is_number_integer()) {
      fail(ErrorKind::kData, kWhere, name, ": an added token must have content and id, is ", brief(token));
    }
    for (const char* flag : {"single_word", "lstrip", "rstrip"}) expect_default(token, flag, false, kWhere, name);
    expect_default(token, "special", true, kWhere, name);
    listing.specials.emplace_back(content.get<std::string>(), id.get<int64_t>());
  }
  return Tokenizer(build(listing, kWhere, name));
}

Tokenizer Tokenizer::from_vocab_and_merges(std::string_view vocab_json, std::string_view merges,
                                           const std::string& name) {
  constexpr const char* kWhere = "Tokenizer::from_vocab_and_merges";
  Listing listing = read_vocab(parse(vocab_json, kWhere, name), kWhere, name);
  std::unordered_set<std::string> made;
  for (size_t begin = 0, line = 0; begin < merges.size(); ++line) {
    const size_t end = std::min(merges.find('\n', begin), merges.size());
    std::string_view text = merges.substr(begin, end - begin);
    begin = end + 1;
    if (!text.empty() && text.back() == '\r') text.remove_suffix(1);
    if (text.empty() || (line == 0 && text.starts_with("#version"))) continue;
    listing.merges.push_back(read_merge(text, listing.merges.size(), kWhere, name));
    made.insert(listing.merges.back().first + listing.merges.back().second);
  }
  std::string bytes;
  std::erase_if(listing.tokens, [&](const auto& token) {
    const bool plain = made.contains(token.first) || (alphabet().read(token.first, bytes) && bytes.size() == 1);
    if (!plain) listing.specials.push_back(token);
    return !plain;
  });
  return Tokenizer(build(listing, kWhere, name));
}

Tokenizer Tokenizer::from_tiktoken(std::string_view content, const std::vector<std::string>& special_tokens,
                                   const std::string& name) {
  constexpr const char* kWhere = "Tokenizer::from_tiktoken";
  auto model = std::make_shared<BpeModel>();
  std::vector<std::pair<std::string, int64_t>> listed;
  for (size_t begin = 0, line = 1; begin < content.size(); ++line) {
    const size_t end = std::min(content.find('\n', begin), content.size());
    std::string_view text = content.substr(begin, end - begin);
    begin = end + 1;
    if (!text.empty() && text.back() == '\r') text.remove_suffix(1);
    if (text.empty()) continue;
    const size_t space = std::min(text.find(' '), text.size());
    const std::string_view digits = text.substr(std::min(space + 1, text.size()));
    if (digits.empty() || digits.size() > 9 || digits.find_first_not_of("0123456789") != std::string_view::npos) {
      fail(ErrorKind::kData, kWhere, name, ": line ", line, " must be a token in base64, a space and its rank, is ",
           weft::quoted(text));
    }
    listed.emplace_back(base64(text.substr(0, space), line, kWhere, name), std::stoll(std::string(digits)));
  }
  model->tokens.resize(listed.size());
  std::vector<bool> seen(listed.size());
  for (auto& [token, rank] : listed) {
    const auto at = static_cast<size_t>(rank);
    if (at >= listed.size() || seen[at]) {
      fail(ErrorKind::kData, kWhere, name, ": rank ", rank, seen.size() > at ? " is there twice" : " is too large",
           "; the ranks of ", listed.size(), " tokens must be 0 to ", listed.size() - 1, ", each once");
    }
    seen[at] = true;
    model->tokens[at] = std::move(token);
  }
  for (const std::string& special : special_tokens) {
    model->special_ids.push_back(static_cast<int32_t>(model->tokens.size()));
    model->tokens.push_back(special);
  }
  model->finish(kWhere, name);  // tokens and bytes; there are no merges yet

  PairTable pairs(listed.size());
  std::vector<int32_t> parts;
  for (size_t rank = 0; rank < listed.size(); ++rank) {
    const std::string& token = model->tokens[rank];
    if (token.size() == 1) continue;
    parts.clear();
    merge_piece(model->byte_ids, pairs, token, parts);
    if (parts.size() != 2) {
      fail(ErrorKind::kData, kWhere, name, ": token ", rank, " (", weft::quoted(token), ") consists of ", parts.size(),
           " tokens of lower rank; it must be two that merge");
    }
    pairs.insert(parts[0], parts[1], {static_cast<int32_t>(rank), static_cast<int32_t>(rank)});
    model->merges.emplace_back(parts[0], parts[1]);
  }
  // The ranks in `pairs` are ids, not indices of merges: the same order, and what encoding compares.
  model->pairs = std::move(pairs);
  return Tokenizer(std::move(model));
}

Tokenizer Tokenizer::load(const std::string& path) {
  namespace fs = std::filesystem;
  std::error_code ignored;
  if (fs::is_directory(path, ignored)) {
    for (const char* file : {"tokenizer.json", "vocab.json"}) {
      if (const fs::path inside = fs::path(path) / file; fs::exists(inside, ignored)) return load(inside.string());
    }
    fail(ErrorKind::kIo, "Tokenizer::load", path, ": the directory has neither tokenizer.json nor vocab.json");
  }
  const std::string content = read_file(path);
  if (path.ends_with(".tiktoken")) return from_tiktoken(content, {"<|endoftext|>"}, path);
  if (path.ends_with("vocab.json")) {
    return from_vocab_and_merges(content, read_file(path.substr(0, path.size() - 10) + "merges.txt"), path);
  }
  return from_json(content, path);
}

std::string Tokenizer::to_json() const {
  using Ordered = nlohmann::ordered_json;
  const BpeModel& model = *model_;
  Ordered vocab = Ordered::object(), merges = Ordered::array(), added = Ordered::array();
  std::unordered_set<std::string> names;
  std::vector<Ordered::object_t::value_type> entries;
  for (int32_t id = 0; id < vocab_size(); ++id) {
    const std::string& token = model.tokens[static_cast<size_t>(id)];
    const std::string name = is_special(id) ? token : alphabet().spell(token);
    if (!names.insert(name).second) {
      fail(ErrorKind::kValue, "Tokenizer::to_json", "the special token ", weft::quoted(name), " is spelled like token ",
           id, " in the file's byte alphabet; it needs another name");
    }
    entries.emplace_back(name, id);
    if (!is_special(id)) continue;
    added.push_back({{"id", id},
                     {"content", token},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", true}});
  }
  // Not one by one through operator[]: an ordered object searches linearly.
  auto& object = vocab.get_ref<Ordered::object_t&>();
  object.reserve(entries.size());
  for (auto& entry : entries) object.push_back(std::move(entry));
  for (const auto& [left, right] : model.merges) {
    merges.push_back(alphabet().spell(token(left)) + ' ' + alphabet().spell(token(right)));
  }
  const Ordered byte_level = {
      {"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", true}};
  const Ordered json = {{"version", "1.0"},
                        {"truncation", nullptr},
                        {"padding", nullptr},
                        {"added_tokens", std::move(added)},
                        {"normalizer", nullptr},
                        {"pre_tokenizer", byte_level},
                        {"post_processor", nullptr},
                        {"decoder", byte_level},
                        {"model",
                         {{"type", "BPE"},
                          {"dropout", nullptr},
                          {"unk_token", nullptr},
                          {"continuing_subword_prefix", nullptr},
                          {"end_of_word_suffix", nullptr},
                          {"fuse_unk", false},
                          {"byte_fallback", false},
                          {"ignore_merges", false},
                          {"vocab", std::move(vocab)},
                          {"merges", std::move(merges)}}}};
  try {
    return json.dump(1) + '\n';
  } catch (const Ordered::exception& error) {
    fail(ErrorKind::kValue, "Tokenizer::to_json", "a special token is no valid UTF-8: ", error.what());
  }
}

void Tokenizer::save(const std::string& path) const { write_file_atomic(path, to_json()); }

}  // namespace weft::text
