#include "apps/option_value.h"

#include <gtest/gtest.h>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>

namespace {

using namespace weft::apps;

TEST(OptionValue, ReadsIntegersExactlyOrNotAtAll) {
  const auto read = [](const std::string& text) { return read_integer(Raw{text}); };
  EXPECT_EQ(read("1_000"), 1000);
  EXPECT_EQ(read("1e6"), 1'000'000);
  EXPECT_EQ(read("2.5e3"), 2500);
  EXPECT_EQ(read("1.50e+1"), 15);
  EXPECT_EQ(read("1500e-2"), 15);
  EXPECT_EQ(read("64Ki"), 65536);
  EXPECT_EQ(read("1.5Ki"), 1536);
  EXPECT_EQ(read("300M"), 300'000'000);
  EXPECT_EQ(read("-7k"), -7000);
  EXPECT_EQ(read("+5"), 5);
  EXPECT_EQ(read("000"), 0);
  EXPECT_EQ(read("0e999999"), 0);
  EXPECT_EQ(read("1.000000000000000000000000"), 1);
  EXPECT_EQ(read("9223372036854775807"), INT64_MAX);
  EXPECT_EQ(read("-9223372036854775808"), INT64_MIN);
  EXPECT_EQ(read("9007199254740993"), 9007199254740993) << "2^53 + 1 has no double";
  for (const char* text : {"",
                           "-",
                           "+",
                           "x",
                           "1x",
                           "1.5",
                           "1e-1",
                           "1..0",
                           ".5",
                           "5.",
                           "1e",
                           "1e+",
                           "1e+-5",
                           "1e++5",
                           "e5",
                           "--5",
                           "+-5",
                           " 5",
                           "5 ",
                           "0x10",
                           "1__0",
                           "_1",
                           "1_",
                           "1_e3",
                           "1,000",
                           "5K",
                           "k",
                           "Ki",
                           "5kk",
                           "nan",
                           "inf",
                           "true",
                           "9223372036854775808",
                           "-9223372036854775809",
                           "1e19",
                           "1e99999999999",
                           "1e2147483647",
                           "1e-2147483647",
                           "99999999999999999999",
                           "9223373T"}) {
    EXPECT_THROW(read(text), Refused) << '"' << text << '"';
  }
  EXPECT_EQ(read_integer(1e6), 1'000'000);
  EXPECT_THROW(read_integer(1.5), Refused);
  EXPECT_THROW(read_integer(std::ldexp(1.0, 54)), Refused);
  EXPECT_THROW(read_integer(std::numeric_limits<double>::quiet_NaN()), Refused);
  EXPECT_THROW(read_integer(std::string("6")), Refused) << "a string is no integer in a file";
  EXPECT_THROW(read_integer(true), Refused);
}

TEST(OptionValue, ReadsNumbersStrictly) {
  const auto read = [](const std::string& text) { return read_number(Raw{text}); };
  EXPECT_EQ(read("1e-3"), 1e-3);
  EXPECT_EQ(read("+.5"), .5);
  EXPECT_EQ(read("1_000.5"), 1000.5);
  EXPECT_EQ(read("-0"), 0.0);
  EXPECT_TRUE(std::signbit(read("-0")));
  for (const char* text :
       {"", "+", "-", "1e", "0x1p3", "1.5x", " 1", "1 ", "inf", "-inf", "nan", "NaN", "1e999", "+-1", "1_", "1,5"}) {
    EXPECT_THROW(read(text), Refused) << '"' << text << '"';
  }
  EXPECT_EQ(read_number(int64_t{3}), 3.0);
  EXPECT_THROW(read_number((int64_t{1} << 53) + 1), Refused) << "it would be rounded";
  EXPECT_THROW(read_number(std::string("0.1")), Refused);
}

TEST(OptionValue, PrintsNumbersAsOneWouldTypeThem) {
  EXPECT_EQ(shortest(3e-4), "3e-4");
  EXPECT_EQ(shortest(1e-10), "1e-10");
  EXPECT_EQ(shortest(0.001), "0.001");
  EXPECT_EQ(toml_literal(3.0), "3.0");
  EXPECT_EQ(toml_literal(1e22), "1e+22");
}

TEST(OptionValue, KnowsWellFormedUtf8) {
  for (const char* good :
       {"", "a", "\xc3\xa9", "\xe2\x82\xac", "\xf0\x9f\x98\x80", "\xf4\x8f\xbf\xbf", "\xed\x9f\xbf"}) {
    EXPECT_TRUE(valid_utf8(good)) << good;
  }
  for (const char* bad : {"\x80", "\xc3", "\xc0\x80", "\xc1\xbf", "\xe0\x9f\xbf", "\xed\xa0\x80", "\xf0\x8f\xbf\xbf",
                          "\xf4\x90\x80\x80", "\xf5\x80\x80\x80", "\xff", "\xe2\x82", "\xe2\x28\xa1"}) {
    EXPECT_FALSE(valid_utf8(bad)) << bad;
  }
}

}  // namespace
