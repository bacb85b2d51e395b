#include "core/error.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "tests/error_of.h"

namespace weft {
namespace {

TEST(Error, MessageBeginsWithTheFunctionAndJoinsItsParts) {
  EXPECT_EQ(testing::error_of(ErrorKind::kShape,
                              [] { fail(ErrorKind::kShape, "matmul", "got ", 3, " and ", 2.5, ", not ", true); }),
            "[matmul] got 3 and 2.5, not 1");
}

TEST(Error, EveryKindHasANameOfItsOwn) {
  const std::vector<std::string> names = {"shape", "dtype",  "device", "value", "index",
                                          "state", "memory", "usage",  "data",  "io"};
  for (size_t i = 0; i < names.size(); ++i) EXPECT_EQ(to_string(static_cast<ErrorKind>(i)), names[i]);
  EXPECT_STREQ(to_string(static_cast<ErrorKind>(names.size())), "unknown");
}

TEST(Error, IsARuntimeErrorForCallersThatKnowNoMore) {
  EXPECT_THROW(fail(ErrorKind::kIo, "read", "no"), std::runtime_error);
}

TEST(Grouped, SetsACommaBeforeEveryThirdDigit) {
  EXPECT_EQ(grouped(0), "0");
  EXPECT_EQ(grouped(999), "999");
  EXPECT_EQ(grouped(1000), "1,000");
  EXPECT_EQ(grouped(1234567), "1,234,567");
  EXPECT_EQ(grouped(-999), "-999");
  EXPECT_EQ(grouped(-100000), "-100,000");
  EXPECT_EQ(grouped(std::numeric_limits<int64_t>::max()), "9,223,372,036,854,775,807");
  EXPECT_EQ(grouped(std::numeric_limits<int64_t>::min()), "-9,223,372,036,854,775,808");
}

TEST(Quoted, KeepsPlainTextAndValidUtf8) {
  EXPECT_EQ(quoted(""), "\"\"");
  EXPECT_EQ(quoted("abc def"), "\"abc def\"");
  EXPECT_EQ(quoted("\xc3\xa9 \xe2\x82\xac \xf0\x9f\x98\x80"), "\"\xc3\xa9 \xe2\x82\xac \xf0\x9f\x98\x80\"");
  EXPECT_EQ(quoted("\xed\x9f\xbf\xee\x80\x80\xf4\x8f\xbf\xbf"), "\"\xed\x9f\xbf\xee\x80\x80\xf4\x8f\xbf\xbf\"")
      << "the edges of the valid ranges";
}

TEST(Quoted, EscapesQuotesBackslashesAndControlCharacters) {
  EXPECT_EQ(quoted("a\"b\\c"), R"("a\"b\\c")");
  EXPECT_EQ(quoted(std::string_view("\0\n\x1b[31m\x7f", 8)), R"("\x00\x0a\x1b[31m\x7f")");
  EXPECT_EQ(quoted("\xc2\x9b"
                   "31m"),
            R"("\xc2\x9b31m")")
      << "U+009B begins a terminal command like ESC [ does";
}

TEST(Quoted, EscapesEveryInvalidByteOfUtf8) {
  EXPECT_EQ(quoted("\xff\xfe"), R"("\xff\xfe")");
  EXPECT_EQ(quoted("a\x80"), R"("a\x80")") << "a continuation byte alone";
  EXPECT_EQ(quoted("\xc3"), R"("\xc3")") << "cut off";
  EXPECT_EQ(quoted("\xe2\x82"), R"("\xe2\x82")") << "cut off";
  EXPECT_EQ(quoted("\xc0\xaf"), R"("\xc0\xaf")") << "overlong";
  EXPECT_EQ(quoted("\xe0\x80\xaf"), R"("\xe0\x80\xaf")") << "overlong";
  EXPECT_EQ(quoted("\xf0\x80\x80\xaf"), R"("\xf0\x80\x80\xaf")") << "overlong";
  EXPECT_EQ(quoted("\xed\xa0\x80"), R"("\xed\xa0\x80")") << "a surrogate";
  EXPECT_EQ(quoted("\xf4\x90\x80\x80"), R"("\xf4\x90\x80\x80")") << "beyond U+10FFFF";
}

TEST(Quoted, CutsLongTextWithoutSplittingACharacter) {
  EXPECT_EQ(quoted("abcdef", 3), "\"abc\"...");
  EXPECT_EQ(quoted("abc", 3), "\"abc\"");
  EXPECT_EQ(quoted("ab\xe2\x82\xac"
                   "c",
                   3),
            "\"ab\xe2\x82\xac\"...");
  EXPECT_EQ(quoted("abc", 0), "\"\"...");
  EXPECT_EQ(weft::quoted(std::string(100, 'x')), "\"" + std::string(80, 'x') + "\"...");
}

TEST(EditDistance, CountsInsertionsDeletionsSubstitutionsAndSwaps) {
  EXPECT_EQ(edit_distance("", ""), 0);
  EXPECT_EQ(edit_distance("", "abc"), 3);
  EXPECT_EQ(edit_distance("abc", ""), 3);
  EXPECT_EQ(edit_distance("kitten", "sitting"), 3);
  EXPECT_EQ(edit_distance("layers", "lyaers"), 1);
  EXPECT_EQ(edit_distance("ab", "ba"), 1);
  EXPECT_EQ(edit_distance("ca", "abc"), 3) << "optimal string alignment: no edit inside a swapped pair";
  EXPECT_EQ(edit_distance("abcdef", "abcdef"), 0);
}

TEST(EditDistance, IsSymmetric) {
  const std::vector<std::string> words = {"", "a", "lr", "warmup", "wramup", "weight_decay", "decay_weight"};
  for (const auto& a : words) {
    for (const auto& b : words) EXPECT_EQ(edit_distance(a, b), edit_distance(b, a)) << a << ' ' << b;
  }
}

TEST(DidYouMean, NamesTheClosestCandidateOrNone) {
  const std::vector<std::string> options = {"layers", "heads", "width"};
  EXPECT_EQ(did_you_mean("layer", options), "; did you mean \"layers\"?");
  EXPECT_EQ(did_you_mean("haeds", options), "; did you mean \"heads\"?");
  EXPECT_EQ(did_you_mean("temperature", options), "");
  EXPECT_EQ(did_you_mean("x", std::vector<std::string>{}), "");
}

}  // namespace
}  // namespace weft
