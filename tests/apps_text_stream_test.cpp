#include "apps/text_stream.h"

#include <gtest/gtest.h>
#include <random>
#include <string>

#include "apps/option_value.h"

namespace {

using weft::apps::TextStream;
using weft::apps::valid_utf8;

std::string in_pieces(const std::string& bytes, size_t size, const std::string& stop = "") {
  TextStream stream(stop);
  std::string out;
  for (size_t at = 0; at < bytes.size(); at += size) {
    const std::string piece = stream.push(bytes.substr(at, size));
    EXPECT_TRUE(valid_utf8(piece)) << "a piece that cannot be shown by itself";
    out += piece;
  }
  return out + stream.finish();
}

TEST(TextStream, HoldsBackWhatIsNotAWholeCharacter) {
  TextStream stream;
  EXPECT_EQ(stream.push("caf\xc3"), "caf");
  EXPECT_EQ(stream.push("\xa9 \xe2\x82"), "\xc3\xa9 ");
  EXPECT_EQ(stream.push("\xac"), "\xe2\x82\xac");
  EXPECT_EQ(stream.push("\xf0\x9f"), "");
  EXPECT_EQ(stream.push("\x98\x80!"), "\xf0\x9f\x98\x80!");
  EXPECT_EQ(stream.finish(), "");
}

TEST(TextStream, GivesValidTextBackWhateverThePieces) {
  const std::string text = "a\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80z\n\xed\x9f\xbf\xee\x80\x80\xf4\x8f\xbf\xbf";
  ASSERT_TRUE(valid_utf8(text));
  for (size_t size = 1; size <= text.size(); ++size) EXPECT_EQ(in_pieces(text, size), text) << size;
}

TEST(TextStream, ReplacesBytesThatAreNoCharacter) {
  EXPECT_EQ(in_pieces("a\xff"
                      "b",
                      1),
            "a\xef\xbf\xbd"
            "b");
  EXPECT_EQ(in_pieces("\x80", 1), "\xef\xbf\xbd");
  EXPECT_EQ(in_pieces("\xc3(", 1), "\xef\xbf\xbd(");
  EXPECT_EQ(in_pieces("end\xe2\x82", 1), "end\xef\xbf\xbd\xef\xbf\xbd") << "nothing came to complete it";
  // Surrogates, overlong forms and numbers beyond Unicode are not waited for: nothing can complete them.
  for (const char* start : {"\xed\xa0", "\xe0\x80", "\xf4\x90", "\xf0\x80"}) {
    TextStream stream;
    EXPECT_EQ(stream.push(start), "\xef\xbf\xbd\xef\xbf\xbd");
  }
}

TEST(TextStream, EndsAtTheStopTextHoweverItIsCut) {
  const std::string text = "one two aaab three";
  for (size_t size = 1; size <= text.size(); ++size) {
    EXPECT_EQ(in_pieces(text, size, "aab"), "one two a") << size;
    EXPECT_EQ(in_pieces(text, size, "three"), "one two aaab ") << size;
    EXPECT_EQ(in_pieces(text, size, "threes"), text) << size;
    EXPECT_EQ(in_pieces(text, size, "one"), "") << size;
  }
  TextStream stream("stop");
  EXPECT_EQ(stream.push("a st"), "a ");
  EXPECT_EQ(stream.push("ay st"), "stay ");
  EXPECT_FALSE(stream.stopped());
  EXPECT_EQ(stream.push("op and more"), "");
  EXPECT_TRUE(stream.stopped());
  EXPECT_EQ(stream.push("more"), "");
  EXPECT_EQ(stream.finish(), "");
}

TEST(TextStream, AnyBytesGiveValidTextThatDoesNotDependOnThePieces) {
  std::mt19937 random(5);
  const std::string alphabet = "a\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80\xed\xa0\xff\xf4\x90\xe0";
  for (int trial = 0; trial < 2000; ++trial) {
    std::string bytes;
    for (uint32_t n = random() % 12; n > 0; --n) bytes += alphabet[random() % alphabet.size()];
    const std::string whole = in_pieces(bytes, 100);
    EXPECT_TRUE(valid_utf8(whole));
    EXPECT_TRUE(!valid_utf8(bytes) || whole == bytes);
    for (size_t size = 1; size < 4; ++size) EXPECT_EQ(in_pieces(bytes, size), whole);
  }
}

}  // namespace
