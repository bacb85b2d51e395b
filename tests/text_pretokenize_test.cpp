#define PCRE2_CODE_UNIT_WIDTH 8
#include "models/text/pretokenize.h"

#include <gtest/gtest.h>
#include <pcre2.h>

#include <random>
#include <string>
#include <vector>

namespace weft::text {
namespace {

using Pieces = std::vector<std::string>;

Pieces pieces_of(std::string_view text) {
  Pieces pieces;
  for (const std::string_view piece : pretokenize(text)) pieces.emplace_back(piece);
  return pieces;
}

/// GPT-2's expression run by PCRE2: what the scanner must equal on valid UTF-8.
Pieces reference(std::string_view text) {
  static pcre2_code* const code = [] {
    const char* pattern =
        "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\p{White_Space}\\p{L}\\p{N}]+"
        "|\\p{White_Space}+(?!\\P{White_Space})|\\p{White_Space}+";
    int error = 0;
    PCRE2_SIZE where = 0;
    return pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern), PCRE2_ZERO_TERMINATED, PCRE2_UTF, &error, &where,
                         nullptr);
  }();
  pcre2_match_data* const match = pcre2_match_data_create_from_pattern(code, nullptr);
  Pieces pieces;
  for (size_t at = 0; at < text.size();) {
    const int rc = pcre2_match(code, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), at,
                               PCRE2_ANCHORED | PCRE2_NO_UTF_CHECK, match, nullptr);
    EXPECT_GT(rc, 0) << "every character of valid UTF-8 is matched, stopped at " << at;
    if (rc <= 0) break;
    const size_t end = pcre2_get_ovector_pointer(match)[1];
    pieces.emplace_back(text.substr(at, end - at));
    at = end;
  }
  pcre2_match_data_free(match);
  return pieces;
}

std::string utf8(uint32_t c) {
  const auto byte = [](uint32_t b) { return std::string(1, static_cast<char>(b)); };
  if (c < 0x80) return byte(c);
  if (c < 0x800) return byte(0xc0 | c >> 6) + byte(0x80 | (c & 63));
  if (c < 0x10000) return byte(0xe0 | c >> 12) + byte(0x80 | (c >> 6 & 63)) + byte(0x80 | (c & 63));
  return byte(0xf0 | c >> 18) + byte(0x80 | (c >> 12 & 63)) + byte(0x80 | (c >> 6 & 63)) + byte(0x80 | (c & 63));
}

TEST(Pretokenize, CutsEnglishAsGpt2Does) {
  EXPECT_EQ(pieces_of("They'll say it's 12345 o'clock,\n\n  don't they?"),
            (Pieces{"They", "'ll", " say", " it", "'s", " 12345", " o", "'", "clock", ",", "\n\n ", " don", "'t",
                    " they", "?"}));
}

TEST(Pretokenize, CutsWhiteSpaceAsGpt2Does) {
  EXPECT_EQ(pieces_of("a  b"), (Pieces{"a", " ", " b"}));
  EXPECT_EQ(pieces_of("a\n b"), (Pieces{"a", "\n", " b"}));
  EXPECT_EQ(pieces_of("a\n\nb"), (Pieces{"a", "\n", "\n", "b"}));
  EXPECT_EQ(pieces_of("a \n"), (Pieces{"a", " \n"}));
  EXPECT_EQ(pieces_of(" "), (Pieces{" "}));
  EXPECT_EQ(pieces_of(""), Pieces{});
}

TEST(Pretokenize, EqualsTheExpressionOnEveryCodePointBetweenOthers) {
  // Every code point of the planes that have letters, after a letter, a digit, a space and a sign, in one text.
  std::string text;
  for (uint32_t c = 0; c < 0x20000; ++c) {
    if (c >= 0xd800 && c < 0xe000) continue;
    static constexpr const char* kBefore[] = {"a", "1", " ", "!", "'", "\n"};
    text += kBefore[c % 6] + utf8(c);
  }
  EXPECT_EQ(pieces_of(text), reference(text));
}

TEST(Pretokenize, EqualsTheExpressionOnRandomText) {
  std::mt19937 random(1);
  const std::vector<std::string> parts = {
      "a",  "B",      "7",      "'",      "'s", "'ll",    "'re",    "'r",     " ",          "  ",
      "\n", "\t",     "\r\n",   ",",      "!?", "\u00a0", "\u3000", "\u00e9", "\u6771",     "\u0661",
      "_",  "\u2028", "\u0301", "\u1680", "z",  "'v",     "'ve",    "\u20ac", "\U0001f600", "\U0001d7d8"};
  for (int round = 0; round < 3000; ++round) {
    std::string text;
    for (unsigned n = random() % 12; n > 0; --n) text += parts[random() % parts.size()];
    ASSERT_EQ(pieces_of(text), reference(text)) << text;
  }
}

TEST(Pretokenize, KeepsInvalidUtf8AsPiecesOfItsOwn) {
  EXPECT_EQ(pieces_of("ab\xff\xfe cd"), (Pieces{"ab", "\xff\xfe", " cd"}));
  EXPECT_EQ(pieces_of("  \x80x"), (Pieces{"  ", "\x80", "x"}));            // as at the end of a text
  EXPECT_EQ(pieces_of("\xe6\x9d"), (Pieces{"\xe6\x9d"}));                  // a character cut short
  EXPECT_EQ(pieces_of("\xc0\xaf"), (Pieces{"\xc0\xaf"}));                  // longer than needed
  EXPECT_EQ(pieces_of("\xed\xa0\x80"), (Pieces{"\xed\xa0\x80"}));          // a surrogate
  EXPECT_EQ(pieces_of("\xf4\x90\x80\x80"), (Pieces{"\xf4\x90\x80\x80"}));  // beyond Unicode
  std::mt19937 random(2);
  for (int round = 0; round < 300; ++round) {
    std::string text, joined;
    for (unsigned n = random() % 60; n > 0; --n) text += static_cast<char>(random());
    for (const std::string& piece : pieces_of(text)) joined += piece;
    ASSERT_EQ(joined, text);
  }
}

TEST(Pretokenize, ChunksHaveThePiecesOfTheWhole) {
  std::mt19937 random(3);
  const std::vector<std::string> parts = {"word", " ", "  ", "\n",   "\u00a0", "\u3000 ", "'s",
                                          "'",    "1", ". ", "\xff", "\xff ",  "\u00e9 "};
  for (int round = 0; round < 500; ++round) {
    std::string text;
    for (unsigned n = random() % 80; n > 0; --n) text += parts[random() % parts.size()];
    const size_t size = 1 + random() % 20;
    Pieces pieces;
    std::string joined;
    for (const std::string_view chunk : split_at_boundaries(text, size)) {
      joined += chunk;
      for (const std::string& piece : pieces_of(chunk)) pieces.push_back(piece);
    }
    ASSERT_EQ(joined, text);
    ASSERT_EQ(pieces, pieces_of(text)) << text;
  }
  EXPECT_EQ(split_at_boundaries("one two three", 3).size(), 3u);
  EXPECT_EQ(split_at_boundaries(std::string(1000, 'x'), 10).size(), 1u);
}

}  // namespace
}  // namespace weft::text
