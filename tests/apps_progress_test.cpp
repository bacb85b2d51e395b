#include "apps/progress.h"

#include <gtest/gtest.h>
#include <limits>
#include <string>
#include <vector>

#include "core/error.h"

namespace {

using weft::apps::duration_text;
using weft::apps::EtaEstimate;
using weft::apps::Progress;
using weft::apps::Terminal;

/// A terminal that keeps what it is told, and a clock that is set by hand.
struct Fake {
  bool interactive = true;
  int width = 80;
  double now = 100;
  std::vector<std::string> drawn, lines;

  Terminal terminal() {
    return {.interactive = interactive,
            .width = [this] { return width; },
            .status = [this](std::string_view text) { drawn.emplace_back(text); },
            .line = [this](std::string_view text) { lines.emplace_back(text); }};
  }
  Progress::Clock clock() {
    return [this] { return now; };
  }
};

TEST(Duration, PrintsHoursMinutesAndSeconds) {
  EXPECT_EQ(duration_text(0), "0:00:00");
  EXPECT_EQ(duration_text(59.6), "0:01:00");
  EXPECT_EQ(duration_text(3599.4), "0:59:59");
  EXPECT_EQ(duration_text(3600 * 123 + 60 * 4 + 5), "123:04:05");
  EXPECT_EQ(duration_text(-1), "-:--:--");
  EXPECT_EQ(duration_text(std::numeric_limits<double>::quiet_NaN()), "-:--:--");
  EXPECT_EQ(duration_text(std::numeric_limits<double>::infinity()), "-:--:--");
}

TEST(Eta, KnowsNothingBeforeTimeHasPassed) {
  EtaEstimate eta;
  EXPECT_FALSE(eta.rate() > 0);
  eta.add(5, 1.0);
  eta.add(6, 1.0);
  EXPECT_FALSE(eta.remaining(10) >= 0);
}

TEST(Eta, IsExactAtASteadySpeed) {
  EtaEstimate eta(30);
  for (int step = 0; step <= 100; ++step) eta.add(step, 0.5 * step);
  EXPECT_NEAR(eta.rate(), 2.0, 1e-9);  // both sums decay alike: only rounding differs
  EXPECT_NEAR(eta.remaining(200), 50.0, 1e-6);
}

TEST(Eta, ForgetsASlowFirstStepButNotAtOnce) {
  EtaEstimate eta(30);
  eta.add(0, 0);
  eta.add(1, 60);  // a first step of a minute
  EXPECT_NEAR(eta.remaining(101), 6000, 1e-6);
  double before = eta.rate();
  for (int step = 2; step <= 301; ++step) {
    eta.add(step, 59 + step);  // one a second from then on
    EXPECT_GT(eta.rate(), before);
    before = eta.rate();
  }
  EXPECT_NEAR(eta.rate(), 1.0, 0.001);  // 300 s are ten time constants: the slow step weighs 60 e^-10 of about 30
}

TEST(Eta, CountsWorkOfNoDurationWithTheNext) {
  EtaEstimate eta;
  eta.add(0, 0);
  eta.add(3, 0);
  eta.add(4, 2);
  EXPECT_NEAR(eta.rate(), 2.0, 1e-9);
}

TEST(Progress, DrawsABarThatFillsTheWidth) {
  Fake fake;
  Progress progress({.title = "train", .total = 1000}, fake.terminal(), fake.clock());
  fake.now += 42;
  progress.update(420, "loss 3.21");
  ASSERT_EQ(fake.drawn.size(), 1u);
  EXPECT_EQ(fake.drawn[0], "train  42% [#########--------------]  420/1,000  0:00:42 eta 0:00:58  loss 3.21");
  EXPECT_EQ(fake.drawn[0].size(), 79u) << "all columns but the last";
}

TEST(Progress, RoundsThePercentageDown) {
  Fake fake;
  Progress progress({.title = "t", .total = 1000}, fake.terminal(), fake.clock());
  fake.now += 1;
  progress.update(570, "");
  fake.now += 1;
  progress.update(999, "");
  EXPECT_NE(fake.drawn[0].find(" 57% "), std::string::npos) << fake.drawn[0];
  EXPECT_NE(fake.drawn[1].find(" 99% "), std::string::npos) << fake.drawn[1];
}

TEST(Progress, DropsTheBarAndCutsTheTextOnANarrowTerminal) {
  Fake fake;
  Progress progress({.title = "train", .total = 1000}, fake.terminal(), fake.clock());
  for (const int width : {60, 40, 10, 1, 0, -5}) {
    fake.width = width;
    fake.now += 1;
    progress.update(420, "loss \xc3\xa9 3.21 and much more to say");
    const std::string& drawn = fake.drawn.back();
    EXPECT_EQ(drawn.find('#'), std::string::npos) << drawn;
    EXPECT_LE(static_cast<int>(drawn.size()), std::max(1, width - 1) + 1) << drawn;  // one character has two bytes
  }
}

TEST(Progress, RedrawsTenTimesASecondAtMost) {
  Fake fake;
  Progress progress({.title = "train", .total = 100000}, fake.terminal(), fake.clock());
  for (int step = 1; step <= 5000; ++step) {
    fake.now += 0.001;
    if (progress.due(step)) progress.update(step, "");
  }
  EXPECT_GE(fake.drawn.size(), 45u);
  EXPECT_LE(fake.drawn.size(), 51u);
  EXPECT_TRUE(progress.due(100000)) << "the last step is always shown";
}

TEST(Progress, EscapesControlCharactersInFields) {
  Fake fake;
  Progress progress({.title = "t", .total = 0}, fake.terminal(), fake.clock());
  progress.update(1, "a\nb\x1b[2J");
  EXPECT_EQ(fake.drawn[0], "t  1  0:00:00  a\\x0ab\\x1b[2J");
}

TEST(Progress, LeavesALineWhenFinishedAndNoBar) {
  Fake fake;
  {
    Progress progress({.title = "train", .total = 10}, fake.terminal(), fake.clock());
    fake.now += 61;
    progress.update(10, "loss 1");
    progress.finish("loss 0.5");
    progress.finish("again");
    progress.update(10, "late");
  }
  ASSERT_EQ(fake.lines.size(), 1u);
  EXPECT_EQ(fake.lines[0], "train 10/10 (100%)  took 0:01:01  loss 0.5");
  EXPECT_EQ(fake.drawn.size(), 2u);
  EXPECT_EQ(fake.drawn.back(), "");
}

TEST(Progress, RemovesTheBarOfWorkThatStopped) {
  Fake fake;
  {
    Progress progress({.title = "train", .total = 10}, fake.terminal(), fake.clock());
    progress.update(1, "");
  }
  EXPECT_EQ(fake.drawn.back(), "");
  EXPECT_TRUE(fake.lines.empty());
}

TEST(Progress, PrintsPlainLinesNowAndThenWithoutATerminal) {
  Fake fake;
  fake.interactive = false;
  Progress progress({.title = "train", .total = 100, .line_seconds = 10}, fake.terminal(), fake.clock());
  for (int step = 1; step <= 100; ++step) {
    fake.now += 0.5;
    progress.update(step, "loss 2");
  }
  progress.finish();
  EXPECT_TRUE(fake.drawn.empty()) << "control codes for something that is not a terminal";
  // at 0.5 s, each 10 s after it, the last step, and finish()
  ASSERT_EQ(fake.lines.size(), 7u);
  EXPECT_EQ(fake.lines[0], "train 1/100 (1%)  elapsed 0:00:01  eta 0:00:50  loss 2");
  EXPECT_EQ(fake.lines[1], "train 21/100 (21%)  elapsed 0:00:11  eta 0:00:40  loss 2");
  EXPECT_EQ(fake.lines[5], "train 100/100 (100%)  elapsed 0:00:50  eta 0:00:00  loss 2");
  EXPECT_EQ(fake.lines[6], "train 100/100 (100%)  took 0:00:50");
}

TEST(Progress, PrintsALineEachSoManyStepsIfAsked) {
  Fake fake;
  fake.interactive = false;
  Progress progress({.title = "train", .total = 100, .line_steps = 25}, fake.terminal(), fake.clock());
  for (int step = 1; step <= 100; ++step) progress.update(step, "");
  EXPECT_EQ(fake.lines.size(), 5u);  // 1, 25, 50, 75, 100
}

TEST(Progress, LeavesStepsOfAnEarlierRunOutOfTheSpeed) {
  Fake fake;
  Progress progress({.title = "train", .total = 1000, .start = 900}, fake.terminal(), fake.clock());
  fake.now += 10;
  progress.update(910, "");
  EXPECT_NE(fake.drawn[0].find("eta 0:01:30"), std::string::npos) << fake.drawn[0];
}

TEST(Progress, RefusesAStartBeyondTheTotal) {
  Fake fake;
  EXPECT_THROW(Progress({.title = "t", .total = 5, .start = 6}, fake.terminal(), fake.clock()), weft::Error);
  EXPECT_THROW(Progress({.title = "t", .total = -1}, fake.terminal(), fake.clock()), weft::Error);
}

}  // namespace
