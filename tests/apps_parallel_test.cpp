// weft launch -- train: what several processes save together are the tensors that one process saves, bit for bit.
#include <algorithm>
#include <nlohmann/json.hpp>
#include <sstream>

#include "models/checkpoint/checkpoint.h"
#include "tests/apps_process.h"
#include "tests/same_checkpoint.h"

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

std::string checkpoint(const std::string& run, int step = kSteps) {
  char name[32];
  std::snprintf(name, sizeof name, "step_%08d", step);
  return (workplace() / run / name).string();
}

const std::string& alone() {
  static const std::string path = [] {
    must_run(workplace(), train("alone", {"--deterministic"}));
    return checkpoint("alone");
  }();
  return path;
}

void expect_same_as_alone(const std::string& run) { weft::testing::expect_same_checkpoint(checkpoint(run), alone()); }

TEST(Parallel, RanksWriteTheCheckpointThatOneProcessWrites) {
  for (const auto& [n, zero] : {std::pair(2, "0"), {2, "1"}, {2, "2"}, {3, "0"}, {3, "1"}, {4, "1"}}) {
    const std::string out = "ranks" + std::to_string(n) + "zero" + zero;
    must_run(workplace(), ranks(n, train(out, {"--zero", zero})));
    expect_same_as_alone(out);
  }
}

TEST(Parallel, StagesOfAPipelineSaveTheirLayersAndOthersGoOnFromThem) {
  must_run(workplace(), ranks(2, train("stages", {"--mesh", "pp=2", "--zero", "1"})));
  expect_same_as_alone("stages");
  fs::remove_all(checkpoint("stages"));
  must_run(workplace(), ranks(4, {"train", "--resume", "stages", "--mesh", "dp=2,pp=2", "--zero", "2"}));
  expect_same_as_alone("stages");
}

TEST(Parallel, LayersMayBeSharedOutByTheirMeasuredTime) {
  must_run(workplace(), ranks(2, train("measured", {"--mesh", "pp=2", "--pipeline-measure"})));
  expect_same_as_alone("measured");
}

TEST(Parallel, RanksOfTensorParallelismSaveSlicesThatMakeWholeTensors) {
  // Sums over the ranks of tp are added up in another order: the numbers are near those of one process, not equal.
  must_run(workplace(), ranks(2, train("slices", {"--mesh", "tp=2", "--zero", "1"})));
  const weft::CheckpointContent expected = weft::load_checkpoint(alone()),
                                got = weft::load_checkpoint(checkpoint("slices"));
  ASSERT_EQ(got.model.size(), expected.model.size());
  for (size_t i = 0; i < expected.model.size(); ++i) {
    const auto& [name, tensor] = expected.model[i];
    ASSERT_EQ(got.model[i].first, name);
    ASSERT_EQ(got.model[i].second.describe(), tensor.describe()) << name;
    const std::vector<double> a = tensor.to_vector<double>(), b = got.model[i].second.to_vector<double>();
    // Weights move by up to 12 steps of 1e-3; a slice in a wrong place would be off by its initial weights' 0.02.
    for (size_t k = 0; k < a.size(); ++k) ASSERT_NEAR(a[k], b[k], 2e-3) << name << ' ' << k;
  }
  fs::remove_all(checkpoint("slices"));
  must_run(workplace(), {"train", "--resume", "slices", "--mesh", "", "--zero", "0"});
  EXPECT_TRUE(weft::verify_checkpoint(checkpoint("slices")).empty());
}

TEST(Parallel, InFp8RanksCountWhatOneProcessCountsAndSaveItsScales) {
  const Args fp8 = {"--precision", "fp8"};
  must_run(workplace(), train("narrow", fp8 + Args{"--deterministic"}));
  const auto counts_of = [](const std::string& run) {
    std::vector<std::string> counts;
    std::ifstream in(workplace() / run / "metrics.jsonl");
    for (std::string line; std::getline(in, line);) {
      const auto entry = nlohmann::json::parse(line);
      if (entry.contains("loss"))
        counts.push_back(entry["fp8_converted"].dump() + ' ' + entry["fp8_saturated"].dump() + ' ' +
                         entry["loss"].dump());
    }
    return counts;
  };
  ASSERT_EQ(counts_of("narrow").size(), static_cast<size_t>(kSteps));
  const auto expect_as_alone = [&](const std::string& run) {
    weft::testing::expect_same_checkpoint(checkpoint(run), checkpoint("narrow"));
    EXPECT_EQ(counts_of(run), counts_of("narrow")) << run;
  };
  must_run(workplace(), ranks(2, train("narrow_shared", fp8 + Args{"--zero", "3"})));
  expect_as_alone("narrow_shared");
  must_run(workplace(), ranks(2, train("narrow_stages", fp8 + Args{"--mesh", "pp=2"})));
  expect_as_alone("narrow_stages");
  fs::remove_all(checkpoint("narrow_stages"));
  must_run(workplace(), ranks(4, {"train", "--resume", "narrow_stages", "--mesh", "dp=2,pp=2", "--zero", "1"}));
  expect_as_alone("narrow_stages");
  Args slices = train("narrow_slices", fp8 + Args{"--mesh", "tp=2"});
  *(std::find(slices.begin(), slices.end(), "--width") + 1) = "32";
  must_run(workplace(), ranks(2, slices));
  fs::remove_all(checkpoint("narrow_slices"));
  must_run(workplace(), {"train", "--resume", "narrow_slices", "--mesh", ""});
  EXPECT_TRUE(weft::verify_checkpoint(checkpoint("narrow_slices")).empty());
}

TEST(Parallel, WeightsThatNoRankHasWholeAreSavedAndLoadedInPieces) {
  must_run(workplace(), ranks(2, train("shared", {"--zero", "3"})));
  expect_same_as_alone("shared");
  fs::remove_all(checkpoint("shared"));
  must_run(workplace(), ranks(4, {"train", "--resume", "shared", "--mesh", "dp=2,pp=2", "--zero", "3", "--pipeline",
                                  "zero-bubble"}));
  expect_same_as_alone("shared");
  fs::remove_all(checkpoint("shared"));
  must_run(workplace(), {"train", "--resume", "shared", "--mesh", "", "--zero", "0", "--deterministic"});
  expect_same_as_alone("shared");
}

TEST(Parallel, SequencesMayBeSharedOut) {
  must_run(workplace(), ranks(2, train("sequences", {"--mesh", "cp=2"})));
  EXPECT_TRUE(weft::verify_checkpoint(checkpoint("sequences")).empty());
}

TEST(Parallel, CheckpointsWrittenInTheBackgroundHaveTheSameBits) {
  must_run(workplace(), train("behind", {"--deterministic", "--save-async"}));
  expect_same_as_alone("behind");
  EXPECT_EQ(content_of(checkpoint("behind") + "/model.safetensors"), content_of(alone() + "/model.safetensors"));
  EXPECT_TRUE(weft::verify_checkpoint(checkpoint("behind", 6)).empty());
  must_run(workplace(), ranks(2, train("behind2", {"--zero", "1", "--save-async"})));
  expect_same_as_alone("behind2");
  EXPECT_TRUE(weft::verify_checkpoint(checkpoint("behind2", 6)).empty());
}

TEST(Parallel, CompareNamesTheFirstElementThatDiffers) {
  must_run(workplace(), ranks(2, train("compared", {"--zero", "1"})));
  const Outcome same = run_weft(workplace(), {"checkpoint", "compare", alone(), "compared"});
  EXPECT_EQ(same.code, 0) << same.err;
  EXPECT_NE(same.out.find("numbers, all equal\noptimizer: "), std::string::npos) << same.out;
  const Outcome other = run_weft(workplace(), {"checkpoint", "compare", alone(), checkpoint("compared", 6)});
  EXPECT_EQ(other.code, 1) << other.out;
  EXPECT_NE(other.out.find(" differs first at element ["), std::string::npos) << other.out;
  EXPECT_NE(other.out.find("note: steps 12 and 6"), std::string::npos) << other.out;
  for (const char* command : {"verify", "show", "list"}) {
    const Outcome outcome = run_weft(workplace(), {"checkpoint", command, "compared"});
    EXPECT_EQ(outcome.code, 0) << outcome.err;
    EXPECT_NE(outcome.out.find(command == std::string("show") ? "of-00002.safetensors" : "step_00000012"),
              std::string::npos)
        << outcome.out;
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

/// The samples of a run as it prints them: the lines from "sample after step" to the next message.
std::string samples_of(const Outcome& run) {
  std::string samples;
  std::istringstream lines(run.out + run.err);
  bool in_sample = false;
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with("[0] ")) line.erase(0, 4);
    if (line.starts_with("[1] ") || line.starts_with("[2] ") || line.starts_with("[3] ")) continue;
    const size_t begin = line.find("sample after step ");
    if (begin != std::string::npos) line.erase(0, begin);
    in_sample = begin != std::string::npos || (in_sample && line.find("saved ") == std::string::npos);
    if (in_sample) samples += line + "\n";
  }
  return samples;
}

TEST(Parallel, SamplesAreThoseOfOneProcessWhereNoRankHasTheWholeModel) {
  const Args sampled = {"--sample-every", "6", "--sample-tokens", "24", "--sample-prompt", "the king"};
  const auto run = [&](const std::string& out, const Args& more) { return train(out, sampled + more); };
  const std::string expected = samples_of(must_run(workplace(), run("sampled", {"--deterministic"})));
  for (const std::string part : {"sample after step 6:\n", "sample after step 12:\n", " the king"})
    EXPECT_NE(expected.find(part), std::string::npos) << part << "\nin: " << expected;
  const auto expect_the_same = [&](int n, const std::string& out, const Args& more) {
    const Outcome outcome = must_run(workplace(), ranks(n, run(out, more)));
    EXPECT_EQ(samples_of(outcome), expected) << out << outcome.out << outcome.err;
  };
  expect_the_same(2, "sampled2", {});
  expect_the_same(2, "sampled-stages", {"--mesh", "pp=2"});
  expect_the_same(2, "sampled-shards", {"--zero", "3"});
  expect_the_same(2, "sampled-slices", {"--mesh", "tp=2"});
  expect_the_same(4, "sampled-all", {"--mesh", "pp=2,tp=2", "--sequence-parallel"});
}

TEST(Parallel, ADamagedCheckpointMakesAllRanksGoOnFromTheOneBefore) {
  must_run(workplace(), ranks(2, train("damaged", {"--zero", "1"})));
  const fs::path shard = fs::path(checkpoint("damaged")) / "optimizer-00002-of-00002.safetensors";
  std::string bytes = content_of(shard);
  ASSERT_FALSE(bytes.empty());
  bytes[bytes.size() - 5] ^= 1;
  write_content(shard, bytes);
  const Outcome outcome = must_run(workplace(), ranks(2, {"train", "--resume", "damaged", "--zero", "1"}));
  const std::string text = outcome.out + outcome.err;
  for (const std::string part :
       {"step_00000012 is not used: rank ", "optimizer-00002-of-00002.safetensors: has XXH3-128",
        "the newest intact checkpoint is damaged/step_00000006", "resuming from damaged/step_00000006 at step 6"})
    EXPECT_NE(text.find(part), std::string::npos) << part << "\nin: " << text;
  expect_same_as_alone("damaged");
  // To go back on purpose, where a later one is intact, is refused on all ranks.
  const Outcome back = run_weft(workplace(), ranks(2, {"train", "--resume", checkpoint("damaged", 6)}));
  EXPECT_EQ(back.code, 2) << back.out << back.err;
  EXPECT_NE((back.out + back.err).find("a later checkpoint than the one to go on from is there"), std::string::npos)
      << back.out << back.err;
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
  refused(2, {"--precision", "fp8", "--mesh", "tp=2"}, "heads = 2 and width = 16 do not make such parts for tp = 2");
}

}  // namespace
