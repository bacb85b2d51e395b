// weft launch -- train: several processes write the checkpoints that one writes, byte for byte.
#include "models/checkpoint.h"
#include "tests/apps_process.h"

namespace {

using namespace weft::apps_test;

constexpr int kSteps = 12;

/// A step of four micro-batches, with dropout and clipping.
Args train(const std::string& out, const Args& more = {}, int steps = kSteps) {
  return Args{
             "train",    "--data", "data",         "--out", out,      "--steps", std::to_string(steps), "--warmup", "2",
             "--device", "cpu",    "--save-every", "6",     "--clip", "0.1"} +
         kSmallModel + Args{"--accumulate", "4"} + more;
}
Args ranks(int n, const Args& command) { return Args{"launch", "-n", std::to_string(n), "--"} + command; }

std::string checkpoint(const std::string& run, const char* file, int step = kSteps) {
  char name[32];
  std::snprintf(name, sizeof name, "step_%08d", step);
  return content_of(workplace() / run / name / file);
}

void expect_same_as_alone(const std::string& run) {
  static const bool trained = [] {
    must_run(workplace(), train("alone", {"--deterministic"}));
    return true;
  }();
  (void)trained;
  for (const char* file : {"model.safetensors", "optimizer.safetensors"}) {
    ASSERT_FALSE(checkpoint("alone", file).empty());
    EXPECT_TRUE(checkpoint(run, file) == checkpoint("alone", file)) << run << ": " << file;
  }
}

TEST(Parallel, RanksWriteTheCheckpointThatOneProcessWrites) {
  for (const auto& [n, zero] : {std::pair(2, "0"), {2, "1"}, {2, "2"}, {3, "0"}, {3, "1"}, {4, "1"}}) {
    const std::string out = "ranks" + std::to_string(n) + "zero" + zero;
    must_run(workplace(), ranks(n, train(out, {"--zero", zero})));
    expect_same_as_alone(out);
  }
}

TEST(Parallel, ARunGoesOnWithAnotherNumberOfRanks) {
  must_run(workplace(), ranks(2, train("spread", {"--zero", "1"})));
  fs::remove_all(workplace() / "spread" / "step_00000012");
  must_run(workplace(), {"train", "--resume", "spread"});
  expect_same_as_alone("spread");
  fs::remove_all(workplace() / "spread" / "step_00000012");
  must_run(workplace(), ranks(4, {"train", "--resume", "spread", "--zero", "2"}));
  expect_same_as_alone("spread");
}

TEST(Parallel, StoppedRanksStopAfterTheSameStepAndGoOn) {
  Process run(workplace(), ranks(2, train("stopped", {"--log-seconds", "0"}, 100000)));
  for (const double deadline = now() + 60;
       now() < deadline && content_of(workplace() / "stopped/metrics.jsonl").empty();)
    sleep_seconds(0.01);
  run.send(SIGTERM);
  const Outcome outcome = run.wait(60);
  EXPECT_EQ(outcome.code, 0) << outcome.err << outcome.out;
  EXPECT_NE(outcome.out.find("to go on: weft train --resume stopped"), std::string::npos) << outcome.out;
  const auto latest = weft::find_latest_checkpoint((workplace() / "stopped").string());
  ASSERT_TRUE(latest.path);
  EXPECT_TRUE(latest.rejected.empty());
}

TEST(Parallel, LayoutsThatDoNotFitAreRefused) {
  const auto refused = [](int n, const Args& more, const std::string& part) {
    const Outcome outcome = run_weft(workplace(), ranks(n, train("refused", more)));
    EXPECT_EQ(outcome.code, 2) << outcome.err;
    EXPECT_NE((outcome.out + outcome.err).find(part), std::string::npos) << outcome.out << outcome.err;
    EXPECT_FALSE(fs::exists(workplace() / "refused"));
  };
  refused(5, {}, "every one of the 5 copies needs a micro-batch of each step, got 4");
  refused(3, {"--zero", "2"}, "must be shared out evenly among 3 copies with zero = 2");
  refused(2, {"--mesh", "dp=4"}, "does not fit the 2 ranks of this run");
  refused(2, {"--precision", "fp8"}, "must not be fp8 where several ranks train");
}

}  // namespace
