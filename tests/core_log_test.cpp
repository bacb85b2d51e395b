#include "core/log.h"

#include <gtest/gtest.h>
#include <cctype>
#include <cstdio>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

using namespace weft;

/// Keeps what the logger writes, and the logger as it was found.
class Log : public testing::Test {
 protected:
  void SetUp() override {
    level_ = log::level();
    log::set_level(log::Level::kInfo);
    log::set_writer([this](std::string_view bytes) { bytes_ += bytes; });
  }
  void TearDown() override {
    log::set_status("");
    log::set_sink({});
    log::set_writer({});
    log::set_level(level_);
  }
  std::string bytes_;
  log::Level level_ = log::Level::kInfo;
};

/// `text` with every well-formed time replaced by "T".
std::string untimed(const std::string& text) {
  static const std::string form = "0000-00-00T00:00:00.000Z";
  std::string out;
  for (size_t at = 0; at < text.size();) {
    size_t same = 0;
    while (same < form.size() && at + same < text.size() &&
           (form[same] == '0' ? std::isdigit(static_cast<unsigned char>(text[at + same])) != 0
                              : text[at + same] == form[same])) {
      ++same;
    }
    out += same == form.size() ? 'T' : text[at];
    at += same == form.size() ? same : 1;
  }
  return out;
}

TEST_F(Log, WritesTimeLevelAndMessage) {
  log::info("step ", 3, " of ", 10);
  EXPECT_EQ(untimed(bytes_), "T info  step 3 of 10\n");
}

TEST_F(Log, DropsWhatIsBelowTheLevel) {
  log::set_level(log::Level::kWarn);
  log::debug("a");
  log::info("b");
  EXPECT_EQ(bytes_, "");
  log::warn("c");
  log::error("d");
  EXPECT_EQ(untimed(bytes_), "T warn  c\nT error d\n");
  bytes_.clear();
  log::set_level(log::Level::kOff);
  log::error("e");
  EXPECT_EQ(bytes_, "");
}

TEST_F(Log, ParsesLevelsAndSuggestsTheNearest) {
  for (const auto level :
       {log::Level::kDebug, log::Level::kInfo, log::Level::kWarn, log::Level::kError, log::Level::kOff}) {
    EXPECT_EQ(log::parse_level(log::to_string(level), "test"), level);
  }
  try {
    log::parse_level("wran", "WEFT_LOG_LEVEL");
    FAIL() << "\"wran\" was taken for a level";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::kUsage);
    EXPECT_NE(std::string(error.what()).find("[WEFT_LOG_LEVEL] \"wran\""), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("did you mean \"warn\"?"), std::string::npos) << error.what();
  }
}

TEST_F(Log, IndentsTheLinesOfOneMessageAndDropsItsLastBreak) {
  log::info("first\nsecond\n");
  const std::string indent(31, ' ');  // 24 of time, a space, 6 of level
  EXPECT_EQ(untimed(bytes_), "T info  first\n" + indent + "second\n");
}

TEST_F(Log, EscapesWhatATerminalWouldObey) {
  log::info("name\x1b[2J\x07 \xc2\x9b \xc3\xa9");
  EXPECT_NE(bytes_.find("name\\x1b[2J\\x07 \\xc2\\x9b \xc3\xa9\n"), std::string::npos) << bytes_;
}

TEST_F(Log, ClearsAndRedrawsTheStatusAroundALine) {
  log::set_status("bar");
  EXPECT_EQ(bytes_, "\r\x1b[Kbar");
  bytes_.clear();
  log::info("hello");
  EXPECT_EQ(untimed(bytes_), "\r\x1b[KT info  hello\nbar");
  bytes_.clear();
  log::set_status("");
  EXPECT_EQ(bytes_, "\r\x1b[K");
  bytes_.clear();
  log::set_status("");
  log::info("plain");
  EXPECT_EQ(bytes_.find('\x1b'), std::string::npos) << "control codes although there is no status line";
}

TEST_F(Log, HandsMessagesToTheSinkInsteadOfTheTerminal) {
  std::vector<std::pair<log::Level, std::string>> seen;
  log::set_sink([&](log::Level level, std::string_view message) {
    seen.emplace_back(level, message);
    log::warn("from the sink");  // must neither hang nor come back here
  });
  log::error("one");
  ASSERT_EQ(seen.size(), 1u);
  EXPECT_EQ(seen[0], std::pair(log::Level::kError, std::string("one")));
  EXPECT_NE(bytes_.find("warn  from the sink\n"), std::string::npos);
}

TEST_F(Log, SurvivesASinkThatThrows) {
  log::set_sink([](log::Level, std::string_view) { throw std::runtime_error("full"); });
  EXPECT_THROW(log::error("one"), std::runtime_error);
  int calls = 0;
  log::set_sink([&](log::Level, std::string_view) { ++calls; });
  log::error("two");
  EXPECT_EQ(calls, 1);
}

TEST_F(Log, NeverTearsLinesOfSeveralThreads) {
  constexpr int kThreads = 8, kLines = 200;
  std::vector<std::string> lines;
  log::set_writer([&](std::string_view bytes) { lines.emplace_back(bytes); });
  {
    std::vector<std::jthread> threads;
    for (int t = 0; t < kThreads; ++t) {
      threads.emplace_back([t] {
        for (int i = 0; i < kLines; ++i) {
          log::info("thread ", t, " line ", i);
          if (i % 50 == 0) log::set_status(i % 100 == 0 ? "bar" : "");
        }
      });
    }
  }
  std::vector<int> next(kThreads, 0);
  const std::string clear = "\r\x1b[K";
  for (const std::string& raw : lines) {
    std::string line = untimed(raw);
    if (line.starts_with(clear)) line.erase(0, clear.size());
    if (line.ends_with("\nbar")) line.erase(line.size() - 3);
    if (line == "bar" || line.empty()) continue;
    int thread = -1, number = -1;
    ASSERT_EQ(std::sscanf(line.c_str(), "T info  thread %d line %d", &thread, &number), 2) << raw;
    ASSERT_EQ(line, concat("T info  thread ", thread, " line ", number, '\n'));
    EXPECT_EQ(number, next[static_cast<size_t>(thread)]++) << "a thread's lines keep their order";
  }
  EXPECT_EQ(next, std::vector<int>(kThreads, kLines));
}

}  // namespace
