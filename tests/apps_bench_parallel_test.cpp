// `weft bench collectives`, `parallel`, `overlap` and `checkpoint`: that every row runs and is written, and that what
// ranks send and keep is what the formulas say. How fast they are is for a machine that does nothing else.
#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "dist/pipeline/schedule.h"
#include "dist/processes.h"
#include "tests/apps_process.h"

namespace weft::apps_test {
namespace {

/// The rows that a quick run writes, by their names.
std::map<std::string, nlohmann::json> quick_rows(const std::string& command) {
  const Scratch scratch;
  const Outcome outcome = run_weft(scratch.path(), {"bench", command, "--quick", "--json", "rows.json"}, {}, "", 240);
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  std::map<std::string, nlohmann::json> rows;
  if (outcome.code != 0) return rows;
  const nlohmann::json all = nlohmann::json::parse(content_of(scratch.path() / "rows.json"));
  for (const auto& row : all["rows"]) {
    const auto name = row["case"].get<std::string>();
    EXPECT_TRUE(std::isfinite(row["ratio"].get<double>())) << row;
    EXPECT_NE(outcome.out.find(name), std::string::npos) << row << " is not in\n" << outcome.out;
    EXPECT_TRUE(rows.emplace(name, row).second) << name << " is there twice";
  }
  return rows;
}

bool no_gloo() { return *dist::why_no_gloo() != '\0'; }

TEST(BenchCollectives, EveryOperationIsTimedBetweenProcessesAndBetweenThreads) {
  const auto rows = quick_rows("collectives");
  EXPECT_EQ(rows.size(), no_gloo() ? 3u : 6u);
  for (const auto& [name, row] : rows) EXPECT_GT(row["ratio"].get<double>(), 0) << row;
}

TEST(BenchParallel, RanksSendAndKeepWhatTheFormulasSay) {
  if (no_gloo()) GTEST_SKIP() << dist::why_no_gloo();
  const auto rows = quick_rows("parallel");
  EXPECT_EQ(rows.size(), 25u);
  for (const std::string layout : {"DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3"}) {
    // ZeRO-3 begins tensors at multiples of 64 elements, of which small ones have few.
    const double sent = rows.at(layout + ", sent by a rank in a step")["ratio"].get<double>();
    EXPECT_NEAR(sent, 1, layout == "ZeRO-3" ? 0.03 : 1e-12) << layout;
    EXPECT_GE(sent, 1 - 1e-12) << layout;
    const double kept = rows.at(layout + ", parameters and state")["ratio"].get<double>();
    EXPECT_LE(kept, 1.02) << layout;
    EXPECT_GE(kept, 0.98) << layout;
    EXPECT_GT(rows.at(layout + ", gradients")["ratio"].get<double>(), 0) << layout;
    EXPECT_GT(rows.at(layout + ", 2 ranks")["ratio"].get<double>(), 0) << layout;
    const double exposed = rows.at(layout + ", exposed communication")["ratio"].get<double>();
    EXPECT_GT(exposed, 0) << layout;
    EXPECT_LT(exposed, 1) << layout;
  }
}

TEST(BenchOverlap, EveryScheduleAndEverySlowLinkIsMeasured) {
  const auto rows = quick_rows("overlap");
  EXPECT_EQ(rows.size(), weft::dist::kPipelineKinds.size() * (3 * 3 + 1) + 4);
  for (const auto& [name, row] : rows) {
    EXPECT_GE(row["ratio"].get<double>(), 0) << row;
    EXPECT_LT(row["ratio"].get<double>(), 1) << row;
  }
}

TEST(BenchCheckpoint, StepsBesideASaveAndAsManyWithoutAreTimed) {
  const Scratch scratch;
  const Outcome outcome =
      run_weft(scratch.path(), {"bench", "checkpoint", "--rounds", "2", "--json", "all.json"}, {}, "", 240);
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  const nlohmann::json all = nlohmann::json::parse(content_of(scratch.path() / "all.json"));
  for (const char* per_save : {"plain", "at_once", "copies", "first", "behind", "extra", "steps"})
    EXPECT_EQ(all[per_save].size(), 2u) << per_save;
  const double steps = all["steps"][0].get<double>() + all["steps"][1].get<double>();
  EXPECT_GE(steps, 4);  // a save is there after two looks at the earliest
  EXPECT_EQ(static_cast<double>(all["beside"].size()), steps);
  EXPECT_EQ(static_cast<double>(all["alone"].size()), steps);
  EXPECT_GT(all["bytes"].get<int64_t>(), 9'000'000);
  for (const char* line : {"a plain write:", "at once:", "in the background:", "a step alone:", "a step beside:",
                           "the copy:", "a save in all:", "the writer:         idle class of the scheduler"})
    EXPECT_NE(outcome.out.find(line), std::string::npos) << line << " is not in\n" << outcome.out;
  for (const auto& entry : std::filesystem::directory_iterator(scratch.path()))
    EXPECT_EQ(entry.path().filename(), "all.json");
}

}  // namespace
}  // namespace weft::apps_test
