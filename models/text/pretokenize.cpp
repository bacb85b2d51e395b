#define PCRE2_CODE_UNIT_WIDTH 8
#include "models/text/pretokenize.h"

#include <pcre2.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <string>

#include "core/error.h"

namespace weft::text {
namespace {

/// What the expression distinguishes.
enum Class : uint8_t { kOther, kLetter, kNumber, kSpace, kInvalid, kEnd };

constexpr char32_t kCodePoints = 0x110000;

bool is_surrogate(char32_t c) { return c >= 0xd800 && c < 0xe000; }

void append_utf8(std::string& text, char32_t c) {
  const auto put = [&](char32_t byte) { text += static_cast<char>(byte); };
  if (c < 0x80) {
    put(c);
  } else if (c < 0x800) {
    put(0xc0 | c >> 6), put(0x80 | (c & 63));
  } else if (c < 0x10000) {
    put(0xe0 | c >> 12), put(0x80 | (c >> 6 & 63)), put(0x80 | (c & 63));
  } else {
    put(0xf0 | c >> 18), put(0x80 | (c >> 12 & 63)), put(0x80 | (c >> 6 & 63)), put(0x80 | (c & 63));
  }
}

/// Sets classes[c] for every code point c that `pattern` (one or more of a class) matches. `text` holds all code points
/// in order, `first[c]` is where c begins in it: one pass over 4.4 MB asks PCRE2 about all of Unicode.
void mark(const char* pattern, const std::string& text, const std::vector<uint32_t>& first, Class value,
          std::vector<uint8_t>& classes) {
  int error = 0;
  PCRE2_SIZE where = 0;
  const std::unique_ptr<pcre2_code, decltype(&pcre2_code_free)> code(
      pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern), PCRE2_ZERO_TERMINATED, PCRE2_UTF, &error, &where, nullptr),
      pcre2_code_free);
  if (code == nullptr) {
    fail(ErrorKind::kState, "pretokenize", "the linked PCRE2 cannot compile ", pattern, " (error ", error,
         "); it must be 10.40 or newer and know Unicode");
  }
  pcre2_jit_compile(code.get(), PCRE2_JIT_COMPLETE);  // where there is no JIT, the interpreter matches the same
  const std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)> match(
      pcre2_match_data_create_from_pattern(code.get(), nullptr), pcre2_match_data_free);
  const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  for (size_t at = 0; at < text.size();) {
    if (pcre2_match(code.get(), subject, text.size(), at, PCRE2_NO_UTF_CHECK, match.get(), nullptr) < 0) break;
    const PCRE2_SIZE* range = pcre2_get_ovector_pointer(match.get());
    const auto begin = std::lower_bound(first.begin(), first.end(), range[0]) - first.begin();
    const auto end = std::lower_bound(first.begin(), first.end(), range[1]) - first.begin();
    for (auto c = begin; c < end; ++c) {
      if (!is_surrogate(static_cast<char32_t>(c))) classes[static_cast<size_t>(c)] = value;
    }
    at = range[1];
  }
}

/// The class of every code point, from PCRE2's Unicode tables; made on the first use (about 20 ms, 1.1 MB).
const std::vector<uint8_t>& unicode_classes() {
  static const std::vector<uint8_t> classes = [] {
    std::string text;
    std::vector<uint32_t> first;
    text.reserve(size_t{4} * kCodePoints);
    first.reserve(kCodePoints);
    for (char32_t c = 0; c < kCodePoints; ++c) {
      first.push_back(static_cast<uint32_t>(text.size()));
      if (!is_surrogate(c)) append_utf8(text, c);  // surrogates have no UTF-8 form; they share their successor's place
    }
    std::vector<uint8_t> result(kCodePoints, kOther);
    mark("\\p{L}+", text, first, kLetter, result);
    mark("\\p{N}+", text, first, kNumber, result);
    mark("\\p{White_Space}+", text, first, kSpace, result);
    return result;
  }();
  return classes;
}

constexpr std::array<uint8_t, 128> kAsciiClasses = [] {
  std::array<uint8_t, 128> classes{};
  for (int c = 0; c < 128; ++c) {
    const bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
    const bool space = c == ' ' || (c >= '\t' && c <= '\r');
    classes[static_cast<size_t>(c)] = letter ? kLetter : space ? kSpace : c >= '0' && c <= '9' ? kNumber : kOther;
  }
  return classes;
}();

struct Character {
  uint8_t kind;
  uint8_t length;
};

/// The character at `at`; one byte of class kInvalid if no valid UTF-8 sequence begins there.
Character non_ascii(std::string_view text, size_t at) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[at + i]); };
  const unsigned char lead = byte(0);
  const uint8_t length = lead < 0xc2 ? 0 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : lead < 0xf5 ? 4 : 0;
  if (length == 0 || length > text.size() - at) return {kInvalid, 1};
  char32_t c = lead & (0x7f >> length);
  for (uint8_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xc0) != 0x80) return {kInvalid, 1};
    c = c << 6 | (byte(i) & 63);
  }
  // What is left to refuse: forms longer than needed, surrogates, and numbers beyond Unicode.
  if ((length == 3 && c < 0x800) || (length == 4 && c < 0x10000) || c >= kCodePoints || is_surrogate(c)) {
    return {kInvalid, 1};
  }
  return {unicode_classes()[c], length};
}

Character character(std::string_view text, size_t at) {
  if (at >= text.size()) return {kEnd, 0};
  const auto byte = static_cast<unsigned char>(text[at]);
  return byte < 128 ? Character{kAsciiClasses[byte], 1} : non_ascii(text, at);
}

/// End of the run of characters of class `kind` from `at`.
size_t run_end(std::string_view text, size_t at, uint8_t kind) {
  for (;;) {
    const Character next = character(text, at);
    if (next.kind != kind) return at;
    at += next.length;
  }
}

/// Length of the contraction at `at`, which holds an apostrophe; 0 if there is none.
size_t contraction(std::string_view text, size_t at) {
  const char a = at + 1 < text.size() ? text[at + 1] : '\0';
  if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
  const char b = at + 2 < text.size() ? text[at + 2] : '\0';
  return (a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l') ? 3 : 0;
}

bool is_ascii_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

}  // namespace

size_t piece_end(std::string_view text, size_t begin) {
  if (text[begin] == '\'') {
    if (const size_t length = contraction(text, begin)) return begin + length;
  }
  const Character first = character(text, begin);
  const size_t after = begin + first.length;
  if (text[begin] == ' ') {
    const Character second = character(text, after);
    if (second.kind < kSpace) return run_end(text, after + second.length, second.kind);
  }
  if (first.kind != kSpace) return run_end(text, after, first.kind);

  // White space: all of it at the end of the text, else all but the last character, which belongs to what follows (or,
  // if it cannot be taken there, is the next piece); a single one stands alone.
  size_t last = begin, end = after;
  for (Character next; (next = character(text, end)).kind == kSpace; end += next.length) last = end;
  const bool text_ends = end == text.size() || character(text, end).kind == kInvalid;
  return text_ends || last == begin ? end : last;
}

std::vector<std::string_view> pretokenize(std::string_view text) {
  std::vector<std::string_view> pieces;
  for (size_t at = 0; at < text.size();) {
    const size_t end = piece_end(text, at);
    pieces.push_back(text.substr(at, end - at));
    at = end;
  }
  return pieces;
}

std::vector<std::string_view> split_at_boundaries(std::string_view text, size_t size) {
  std::vector<std::string_view> chunks;
  size_t begin = 0;
  for (size_t at = std::max<size_t>(size, 1); at < text.size(); ++at) {
    const char before = text[at - 1];
    if (is_ascii_space(text[at]) && static_cast<unsigned char>(before) < 128 && !is_ascii_space(before)) {
      chunks.push_back(text.substr(begin, at - begin));
      begin = at;
      at += std::max<size_t>(size, 1) - 1;
    }
  }
  if (begin < text.size()) chunks.push_back(text.substr(begin));
  return chunks;
}

}  // namespace weft::text
