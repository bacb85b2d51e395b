#include "optim/schedule.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "tests/error_of.h"

namespace weft::optim {
namespace {

TEST(CosineSchedule, WarmsUpLinearlyToThePeak) {
  const CosineSchedule schedule{.peak = 0.4, .floor = 0.1, .warmup = 4, .total = 10};
  for (int64_t step = 0; step < 4; ++step) EXPECT_DOUBLE_EQ(schedule.at(step), 0.1 * static_cast<double>(step + 1));
  EXPECT_EQ(schedule.at(3), 0.4) << "the last step of the warm-up has the peak itself";
  EXPECT_EQ(schedule.at(4), 0.4) << "and so has the first after it";
}

TEST(CosineSchedule, FallsByHalfACosineToTheFloorAndStaysThere) {
  const CosineSchedule schedule{.peak = 1.0, .floor = 0.2, .warmup = 10, .total = 110};
  EXPECT_DOUBLE_EQ(schedule.at(60), 0.6) << "half way, the mean of peak and floor";
  for (int64_t step = 10; step < 110; ++step) {
    EXPECT_NEAR(schedule.at(step), 0.2 + 0.4 * (1 + std::cos(std::acos(-1.0) * static_cast<double>(step - 10) / 100)),
                1e-15);
    EXPECT_GE(schedule.at(step), schedule.at(step + 1));
    EXPECT_NEAR(schedule.at(step) + schedule.at(120 - step), 1.2, 1e-15) << "symmetric about the middle";
  }
  EXPECT_EQ(schedule.at(110), 0.2);
  EXPECT_EQ(schedule.at(111), 0.2);
  EXPECT_EQ(schedule.at(std::numeric_limits<int64_t>::max()), 0.2);
}

TEST(CosineSchedule, WorksWithoutWarmUpWithoutFloorAndForOneStep) {
  const CosineSchedule plain{.peak = 0.5, .floor = 0, .warmup = 0, .total = 2};
  EXPECT_EQ(plain.at(0), 0.5);
  EXPECT_DOUBLE_EQ(plain.at(1), 0.25);
  EXPECT_EQ(plain.at(2), 0);
  EXPECT_EQ((CosineSchedule{.peak = 0.5, .floor = 0.1, .warmup = 0, .total = 1}).at(0), 0.5);
  EXPECT_EQ((CosineSchedule{.peak = 0.5, .floor = 0.1, .warmup = 1, .total = 1}).at(0), 0.5);
  EXPECT_EQ((CosineSchedule{.peak = 0.5, .floor = 0.5, .warmup = 0, .total = 9}).at(5), 0.5) << "constant";
}

TEST(CosineSchedule, RefusesWhatMakesNoSense) {
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  for (const double peak : {-1.0, 0.05, kNaN, HUGE_VAL}) {
    EXPECT_ERROR(ErrorKind::kValue, "[schedule] needs 0 <= floor <= peak, got floor 0.1 and peak",
                 (CosineSchedule{.peak = peak, .floor = 0.1, .warmup = 0, .total = 5}).at(0));
  }
  for (const double floor : {-0.1, kNaN, HUGE_VAL}) {
    EXPECT_ERROR(ErrorKind::kValue, "[schedule] needs 0 <= floor <= peak",
                 (CosineSchedule{.peak = 1, .floor = floor, .warmup = 0, .total = 5}).at(0));
  }
  for (const int64_t warmup : {-1, 5, 6}) {
    EXPECT_ERROR(ErrorKind::kValue,
                 concat("[schedule] needs 0 <= warmup < total, got warmup ", warmup, " and total 5 steps"),
                 (CosineSchedule{.peak = 1, .floor = 0, .warmup = warmup, .total = 5}).at(0));
  }
  EXPECT_ERROR(ErrorKind::kValue, "got warmup 0 and total 0",
               (CosineSchedule{.peak = 1, .floor = 0, .warmup = 0, .total = 0}).at(0));
  EXPECT_ERROR(ErrorKind::kValue, "[schedule] steps count from 0, got -1",
               (CosineSchedule{.peak = 1, .floor = 0, .warmup = 2, .total = 5}).at(-1));
}

}  // namespace
}  // namespace weft::optim
