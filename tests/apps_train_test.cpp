// weft train from end to end: the program itself, on a small text with a small model.
#include <sys/stat.h>
#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>

#include "core/device.h"
#include "core/file.h"
#include "models/checkpoint/checkpoint.h"
#include "tests/apps_process.h"

namespace {

using namespace weft;
using namespace weft::apps_test;
using Json = nlohmann::json;

#define EXPECT_HAS(text, part) EXPECT_NE((text).find(part), std::string::npos) << (text)

Args train_args(const std::string& out, int steps, const Args& more = {}) {
  return Args{"train", "--data", "data", "--out", out, "--steps", std::to_string(steps), "--warmup", "2"} +
         kSmallModel + more;
}

std::vector<Json> metrics_of(const fs::path& run) {
  std::vector<Json> lines;
  std::ifstream in(run / "metrics.jsonl");
  for (std::string line; std::getline(in, line);) lines.push_back(Json::parse(line));
  return lines;
}

/// What must not depend on how often a run was stopped: everything but times.
std::vector<std::string> reproducible(const std::vector<Json>& metrics) {
  std::vector<std::string> lines;
  for (Json entry : metrics) {
    for (const char* timed : {"seconds", "tokens_per_second", "percent_of_speed_of_light"}) entry.erase(timed);
    lines.push_back(entry.dump());
  }
  return lines;
}

fs::path checkpoint_of(const fs::path& run) { return find_latest_checkpoint(run.string()).path.value_or("none"); }

size_t lines_in(const fs::path& path) {
  const std::string content = content_of(path);
  return static_cast<size_t>(std::count(content.begin(), content.end(), '\n'));
}

/// Names in a directory that no completed save or run leaves.
std::vector<std::string> leftovers(const fs::path& run) {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(run)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with(".tmp") || name.starts_with(".weft-tmp")) names.push_back(name);
  }
  return names;
}

TEST(Train, WritesMetricsAndACheckpointThatEvalAndGenerateUse) {
  const fs::path& place = workplace();
  const Outcome trained =
      run_weft(place, train_args("first", 12, {"--save_every", "5", "--keep", "2", "--eval_every", "5"}));
  ASSERT_EQ(trained.code, 0) << trained.err;
  EXPECT_HAS(trained.out, "steps 12, ");
  if (Device::best() == Device::cpu()) {  // what was decided is said at the start and in the summary
    for (const std::string& text : {trained.err, trained.out})
      EXPECT_HAS(text, "cuda graph: steps are not recorded: the device is cpu");
  }
  EXPECT_HAS(trained.err, "held-out loss");

  int64_t next = 0, evaluations = 0;
  for (const Json& entry : metrics_of(place / "first")) {
    if (entry.contains("held_out_loss")) {
      ++evaluations;
      EXPECT_GT(entry["held_out_bits_per_byte"].get<double>(), 0) << entry;
      continue;
    }
    EXPECT_EQ(entry["step"].get<int64_t>(), next++) << entry;
    for (const char* key : {"loss", "grad_norm", "lr", "tokens_per_second"})
      EXPECT_GT(entry[key].get<double>(), 0) << entry;
    EXPECT_EQ(entry["tokens"].get<int64_t>(), 4 * 8);
  }
  EXPECT_EQ(next, 12);
  EXPECT_EQ(evaluations, 3) << "after steps 5, 10 and 12";
  EXPECT_EQ(list_checkpoints((place / "first").string()).size(), 2u) << "--keep 2";
  EXPECT_EQ(checkpoint_of(place / "first").filename(), "step_00000012");
  EXPECT_TRUE(leftovers(place / "first").empty());

  const Outcome measured = run_weft(place, {"eval", "--checkpoint", "first", "--data", "data", "--kneser-ney", "3"});
  EXPECT_EQ(measured.code, 0) << measured.err;
  EXPECT_HAS(measured.out, "GPT after step 12");
  EXPECT_HAS(measured.out, "Kneser-Ney 3-gram");
  EXPECT_HAS(measured.out, " is better by ");
  const Outcome alone = run_weft(place, {"eval", "--data", "data"});
  EXPECT_EQ(alone.code, 0) << alone.err;
  EXPECT_HAS(alone.out, "Kneser-Ney 5-gram");
  EXPECT_EQ(alone.out.find("GPT"), std::string::npos) << alone.out;

  const Args generate = {"generate", "--checkpoint", "first", "--prompt", "the king", "--tokens", "40", "--seed", "3"};
  const Outcome one = run_weft(place, generate), again = run_weft(place, generate);
  EXPECT_EQ(one.code, 0) << one.err;
  EXPECT_TRUE(one.out.starts_with("the king")) << one.out;
  EXPECT_GT(one.out.size(), 8u + 20u);
  EXPECT_EQ(one.out, again.out) << "the same seed";
  EXPECT_HAS(one.err, "tokens/s");
  const Outcome bare = run_weft(place, generate + Args{"--no-echo"});
  EXPECT_EQ("the king" + bare.out, one.out);
  const Outcome from_input =
      run_weft(place, {"generate", "--checkpoint", "first", "--prompt_file", "-", "--tokens", "40", "--seed", "3"}, {},
               "the king");
  EXPECT_EQ(from_input.out, one.out);

  for (const char* command : {"list", "verify", "show"}) {
    const Outcome shown = run_weft(place, {"checkpoint", command, "first"});
    EXPECT_EQ(shown.code, 0) << shown.err;
    EXPECT_HAS(shown.out, "step_00000012");
  }
  EXPECT_HAS(run_weft(place, {"checkpoint", "show", "first"}).out, "h.1.mlp.fc.weight");
}

TEST(Train, Fp8CountsWhatSaturatesAndResumesWithTheSameBits) {
  const fs::path& place = workplace();
  const Args fp8 = {"--precision", "fp8", "--accumulate", "2"};
  const Outcome straight = run_weft(place, train_args("fp8", 12, fp8));
  ASSERT_EQ(straight.code, 0) << straight.err;
  EXPECT_HAS(straight.err, "fp8 sat ");
  // Two layers; inputs 7 C and gradients 9 C a token, 2 x 4 x 8 tokens, weights 12 C^2.
  const int64_t converted = 2 * (16 * 16 * 2 * 4 * 8 + 12 * 16 * 16);
  int64_t saturated = 0;
  for (const Json& entry : metrics_of(place / "fp8")) {
    if (entry.contains("held_out_loss")) continue;
    EXPECT_EQ(entry["fp8_converted"].get<int64_t>(), converted) << entry;
    saturated += entry["fp8_saturated"].get<int64_t>();
  }
  EXPECT_HAS(straight.out, concat("fp8: ", grouped(saturated), " of ", grouped(12 * converted), " elements converted"));

  must_run(place, train_args("fp8_halves", 7, fp8 + Args{"--min_lr", "1e-3"}));
  must_run(place, train_args("fp8_whole", 12, fp8 + Args{"--min_lr", "1e-3"}), {"WEFT_NUM_THREADS=1"});
  must_run(place, {"train", "--resume", "fp8_halves", "--steps", "12"}, {"WEFT_NUM_THREADS=2"});
  for (const char* file : {"model.safetensors", "optimizer.safetensors"}) {
    EXPECT_EQ(content_of(checkpoint_of(place / "fp8_halves") / file),
              content_of(checkpoint_of(place / "fp8_whole") / file))
        << file;
  }
  bool stored = false;
  for (const auto& [name, tensor] : load_checkpoint(checkpoint_of(place / "fp8").string()).optimizer)
    stored |= name == "fp8.h.1.mlp.proj.amax_history" && tensor.describe() == "f32 [3, 16]";
  EXPECT_TRUE(stored);

  // Its weights are bf16 ones, and serve as such.
  const Outcome measured = run_weft(place, {"eval", "--checkpoint", "fp8", "--data", "data"});
  EXPECT_EQ(measured.code, 0) << measured.err;
}

TEST(Train, Fp8GoesOnFromAnFp8CheckpointOnlyAndOnlyFp8Does) {
  const fs::path& place = workplace();
  must_run(place, train_args("in_bf16", 3, {"--precision", "bf16"}));
  must_run(place, train_args("in_fp8", 3, {"--precision", "fp8"}));
  const Outcome narrower = run_weft(place, {"train", "--resume", "in_bf16", "--steps", "5", "--precision", "fp8"});
  EXPECT_EQ(narrower.code, 2) << narrower.err;
  EXPECT_HAS(narrower.err, "the checkpoint is of a run that did not multiply in fp8; a run keeps its precision");
  for (const char* precision : {"bf16", "f32"}) {
    const Outcome wider = run_weft(place, {"train", "--resume", "in_fp8", "--steps", "5", "--precision", precision});
    EXPECT_EQ(wider.code, 2) << wider.err;
    EXPECT_HAS(wider.err, "the checkpoint is of a run with precision = fp8");
  }
  const Outcome odd = run_weft(
      place, {"train", "--data", "data", "--out", "odd", "--precision", "fp8", "--width", "24", "--heads", "2"});
  EXPECT_EQ(odd.code, 2) << odd.err;
  EXPECT_HAS(odd.err, "must be a multiple of 16 with precision = fp8");
  const Outcome dry = run_weft(place, train_args("dry_fp8", 3, {"--precision", "fp8", "--dry_run"}));
  EXPECT_EQ(dry.code, 0) << dry.err;
}

TEST(Train, GenerateEndsAtTheStopText) {
  const fs::path& place = workplace();
  must_run(place, train_args("stop_text", 3));
  const Args generate = {"generate", "--checkpoint", "stop_text", "--prompt",
                         "the king", "--tokens",     "60",        "--no-echo"};
  const std::string whole = must_run(place, generate).out;
  ASSERT_GT(whole.size(), 20u);
  size_t begin = 8;  // whole characters only: the model is untrained, and may write half of one
  while (begin + 3 < whole.size() && (whole[begin] < 0 || whole[begin + 1] < 0 || whole[begin + 2] < 0)) ++begin;
  const std::string stop = whole.substr(begin, 3);
  const Outcome cut = run_weft(place, generate + Args{"--stop_at=" + stop});
  EXPECT_EQ(cut.code, 0) << cut.err;
  EXPECT_EQ(cut.out, whole.substr(0, whole.find(stop)) + "\n");
  EXPECT_HAS(cut.err, "ended by the stop text");
}

TEST(Train, StopsAtASignalWithACheckpointAndTheCommandToGoOn) {
  const fs::path& place = workplace();
  for (const int signal : {SIGTERM, SIGINT}) {
    const std::string out = "signal" + std::to_string(signal);
    Process process(place, train_args(out, 1000000, {"--save_every", "0"}));
    for (const double deadline = now() + 30;
         now() < deadline && content_of(place / out / "metrics.jsonl").size() < 500;)
      sleep_seconds(0.01);
    process.send(signal);
    const Outcome outcome = process.wait(30);
    EXPECT_EQ(outcome.code, 0) << outcome.err;
    EXPECT_FALSE(outcome.timed_out);
    EXPECT_HAS(outcome.err, signal == SIGTERM ? "stopped by SIGTERM" : "stopped by SIGINT");
    EXPECT_HAS(outcome.out, "to go on: weft train --resume " + out);
    const std::vector<Json> metrics = metrics_of(place / out);
    const fs::path saved = checkpoint_of(place / out);
    EXPECT_EQ(read_checkpoint_manifest(saved.string()).step, static_cast<int64_t>(metrics.size()));

    // Exactly that command goes on: here to a nearer end.
    const auto steps = std::to_string(metrics.size() + 3);
    const Outcome resumed = run_weft(place, {"train", "--resume", out, "--steps", steps});
    EXPECT_EQ(resumed.code, 0) << resumed.err;
    EXPECT_HAS(resumed.err, "resuming from " + saved.lexically_relative(place).string());
    EXPECT_EQ(read_checkpoint_manifest(checkpoint_of(place / out).string()).step,
              static_cast<int64_t>(metrics.size() + 3));
  }
}

TEST(Train, StopsNowAtASecondSignal) {
  const fs::path& place = workplace();
  // A step of very many micro-batches, so that the first signal finds it at work.
  Process process(place, train_args("twice", 10, {"--accumulate", "300000"}));
  for (const double deadline = now() + 30;
       now() < deadline && process.err().find("speed of light") == std::string::npos;)
    sleep_seconds(0.01);
  sleep_seconds(0.3);
  process.send(SIGTERM);
  sleep_seconds(0.3);
  ASSERT_TRUE(process.running()) << "the step was too short for this test";
  process.send(SIGTERM);
  const double sent = now();
  const Outcome outcome = process.wait(20);
  EXPECT_EQ(outcome.code, 128 + SIGTERM) << outcome.err;
  EXPECT_LT(now() - sent, 5);
  EXPECT_TRUE(list_checkpoints((place / "twice").string()).empty());
}

TEST(Train, DryRunTellsParametersAndMemoryAndMakesNothing) {
  const fs::path& place = workplace();
  const Outcome outcome = run_weft(place, train_args("dry", 10, {"--dry_run"}));
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  // V C + T C + L (12 C^2 + 13 C) + 2 C for V 300, C 16, T 8, L 2
  EXPECT_HAS(outcome.out, "parameters:      11,520");
  for (const char* part :
       {"memory of a step", "parameters", "gradients", "optimizer", "activations", "FLOPs per token", "layers = 2"}) {
    EXPECT_HAS(outcome.out, part);
  }
  EXPECT_FALSE(fs::exists(place / "dry"));
  // A model that would not fit is told of as well: nothing is allocated.
  const Outcome huge =
      run_weft(place, {"train", "--data", "data", "--dry_run", "--layers", "96", "--width", "12288", "--heads", "96"});
  EXPECT_EQ(huge.code, 0) << huge.err;
  EXPECT_HAS(huge.out, "parameters:      17");
}

TEST(Train, DryRunTellsWhatEachSaverSavesAndCosts) {
  const fs::path& place = workplace();
  const Outcome outcome = run_weft(place, train_args("dry", 10, {"--dry_run", "--device", "cpu"}));
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  for (const char* part : {"--recompute norm ", "--recompute activation ", "--recompute attention ",
                           "--recompute block ", "--precision bf16 ", "read and written once more", "of a step's)"}) {
    EXPECT_HAS(outcome.out, part);
  }
  EXPECT_EQ(outcome.out.find("--offload"), std::string::npos) << "for a GPU only";
  const Outcome block = run_weft(place, train_args("dry", 10, {"--dry_run", "--device", "cpu", "--recompute=block"}));
  EXPECT_EQ(block.out.find("--recompute block "), std::string::npos) << block.out;
  EXPECT_HAS(block.out, "--recompute block,norm ");
}

TEST(Train, RefusesAStepThatDoesNotFitAndTellsWhatWould) {
  const fs::path& place = workplace();
  const Outcome outcome =
      run_weft(place, {"train",   "--data",  "data",     "--out",     "large",    "--device", "cpu",
                       "--steps", "9",       "--warmup", "0",         "--layers", "50",       "--width",
                       "1024",    "--heads", "4",        "--context", "512",      "--batch",  "4096"});
  EXPECT_NE(outcome.code, 0);
  for (const char* part : {"[train] a step takes ", "TiB on cpu, which has ", "activations", "What would fit into ",
                           "--batch ", "--recompute block"}) {
    EXPECT_HAS(outcome.err, part);
  }
  EXPECT_FALSE(fs::exists(place / "large"));
}

TEST(Train, RecomputationIsAMatterOfTheRunAndNotOfTheModel) {
  const fs::path& place = workplace();
  must_run(place, train_args("kept", 4, {"--save_every", "2"}));
  must_run(place, train_args("remade", 4, {"--save_every", "2", "--recompute", "norm,activation,attention"}));
  std::vector<std::string> want = reproducible(metrics_of(place / "kept"));
  EXPECT_EQ(reproducible(metrics_of(place / "remade")), want);
  must_run(place, {"train", "--resume", "remade/step_00000002", "--out", "again", "--recompute", "block"});
  want.erase(want.begin(), want.begin() + 2);
  EXPECT_EQ(reproducible(metrics_of(place / "again")), want);
}

TEST(Train, StopsAtANaNAndNamesTheTensor) {
  const fs::path& place = workplace();
  must_run(place, train_args("poisoned", 4, {"--save_every", "0"}));
  const std::string path = checkpoint_of(place / "poisoned").string();
  CheckpointContent content = load_checkpoint(path);
  for (auto& [name, tensor] : content.model) {
    if (name == "h.1.mlp.fc.weight") tensor.data<float>()[5] = std::numeric_limits<float>::quiet_NaN();
  }
  save_checkpoint((place / "poisoned").string(), content);
  const Outcome outcome = run_weft(place, {"train", "--resume", "poisoned", "--steps", "8"});
  EXPECT_EQ(outcome.code, 1) << outcome.err;
  EXPECT_HAS(outcome.err, "weft: error:");
  EXPECT_HAS(outcome.err, "h.1.mlp.fc.weight");
  EXPECT_EQ(checkpoint_of(place / "poisoned").string(), path) << "nothing was saved behind it";

  const Outcome diverged = run_weft(
      place, train_args("diverged", 300, {"--lr", "1e3", "--min_lr", "1e3", "--clip", "0", "--save_every", "1"}));
  EXPECT_EQ(diverged.code, 1) << diverged.err;
  EXPECT_HAS(diverged.err, "weft: error:");
  // What was saved before is finite and goes on to fail in the same way: the weights were not touched by the bad step.
  for (const auto& [name, tensor] : load_checkpoint(checkpoint_of(place / "diverged").string()).model) {
    for (const double value : tensor.to_vector<double>()) ASSERT_TRUE(std::isfinite(value)) << name;
  }
}

TEST(Train, ResumedAfterAnyKillGivesTheSameBits) {
  const fs::path& place = workplace();
  constexpr int kSteps = 24;
  const Args options = {"--save_every", "4", "--keep", "2", "--eval_every", "7"};
  must_run(place, train_args("straight", kSteps, options), {"WEFT_NUM_THREADS=2"});
  const fs::path expected = checkpoint_of(place / "straight");
  ASSERT_EQ(expected.filename(), "step_00000024");
  const std::vector<std::string> metrics = reproducible(metrics_of(place / "straight"));

  // Stops fall anywhere: while starting, in a step, in an evaluation, while saving. SIGKILL leaves no time to tidy up.
  std::mt19937 random(static_cast<unsigned>(std::chrono::system_clock::now().time_since_epoch().count()));
  int stops = 0, resumed_runs = 0, midway = 0;
  for (int run = 0; stops < 20 || midway < 5; ++run) {
    ASSERT_LT(run, 60) << "stops hardly ever fell into a run";
    const std::string out = "stopped" + std::to_string(run);
    for (int attempt = 0;; ++attempt) {
      ASSERT_LT(attempt, 200);
      const bool started = !list_checkpoints((place / out).string()).empty();
      const Args args = started ? Args{"train", "--resume", out} : train_args(out, kSteps, options);
      // Where to stop goes by what the run has written, not by time: a busy machine changes nothing. The few
      // milliseconds more reach into saves and evaluations; a place beyond the end lets the run complete.
      const fs::path written = place / out / "metrics.jsonl";
      const size_t target =
          lines_in(written) + random() % (metrics.size() + 8 - std::min(lines_in(written), metrics.size()));
      const bool at_start = random() % 6 == 0;
      // Another number of threads than above: no bit depends on it. And with one, no thread waits for another that a
      // busy machine has put aside, which made this test many times slower.
      Process process(place, args, {"WEFT_NUM_THREADS=1"});
      // A run that hangs is found by wait(), which then says so.
      const double deadline = now() + 60;
      while (!at_start && process.running() && lines_in(written) <= target && now() < deadline) sleep_seconds(0.0005);
      sleep_seconds(static_cast<double>(random() % 20) / 1000);
      const bool cut = process.running();
      if (cut) process.send(random() % 3 == 0 ? SIGTERM : SIGKILL);
      const Outcome outcome = process.wait(60);
      ASSERT_FALSE(outcome.timed_out) << outcome.err;
      ASSERT_TRUE(outcome.code == 0 || outcome.code == -SIGKILL || outcome.code == -SIGTERM)
          << outcome.code << outcome.err;
      stops += cut;
      const LatestCheckpoint latest = find_latest_checkpoint((place / out).string());
      ASSERT_TRUE(latest.rejected.empty()) << "a kill left a broken checkpoint: " << latest.rejected[0].reason;
      midway += cut && latest.path.has_value();
      if (outcome.code == 0 && outcome.out.find("to go on") == std::string::npos) break;
    }
    ++resumed_runs;
    const fs::path got = checkpoint_of(place / out);
    ASSERT_EQ(got.filename(), expected.filename());
    for (const char* file : {"model.safetensors", "optimizer.safetensors"}) {
      ASSERT_EQ(content_of(got / file), content_of(expected / file)) << file << " of " << out;
    }
    ASSERT_EQ(reproducible(metrics_of(place / out)), metrics) << out;
    fs::remove_all(place / out);
  }
  RecordProperty("stops", stops);
  RecordProperty("stops_after_a_checkpoint", midway);
  RecordProperty("runs", resumed_runs);
}

TEST(Train, RefusesToMixTwoRuns) {
  const fs::path& place = workplace();
  must_run(place, train_args("mixed", 4, {"--save_every", "2"}));
  const std::string weights = content_of(checkpoint_of(place / "mixed") / "model.safetensors");
  const Outcome again = run_weft(place, train_args("mixed", 4));
  EXPECT_EQ(again.code, 2);
  EXPECT_HAS(again.err, "weft train --resume mixed");
  const Outcome earlier = run_weft(place, {"train", "--resume", "mixed/step_00000002"});
  EXPECT_EQ(earlier.code, 2);
  EXPECT_HAS(earlier.err, "later checkpoint");
  const Outcome fewer = run_weft(place, {"train", "--resume", "mixed", "--steps", "3", "--warmup", "0"});
  EXPECT_EQ(fewer.code, 2) << fewer.err;
  EXPECT_HAS(fewer.err, "has taken 4 steps");
  EXPECT_EQ(content_of(checkpoint_of(place / "mixed") / "model.safetensors"), weights);
  EXPECT_EQ(metrics_of(place / "mixed").size(), 5u) << "4 steps, 1 evaluation";

  // Elsewhere, an earlier one may go on; and a run that was moved goes on where it lies.
  const Outcome branch = run_weft(place, {"train", "--resume", "mixed/step_00000002", "--out", "branch"});
  EXPECT_EQ(branch.code, 0) << branch.err;
  EXPECT_EQ(content_of(checkpoint_of(place / "branch") / "model.safetensors"), weights);
  fs::rename(place / "mixed", place / "moved");
  EXPECT_EQ(run_weft(place, {"train", "--resume", "moved", "--steps", "5"}).code, 0);
  EXPECT_FALSE(fs::exists(place / "mixed"));
  EXPECT_EQ(checkpoint_of(place / "moved").filename(), "step_00000005");
  // A completed run has nothing left to do, and says the same.
  const auto before = reproducible(metrics_of(place / "moved"));
  EXPECT_EQ(run_weft(place, {"train", "--resume", "moved", "--steps", "5"}).code, 0);
  EXPECT_EQ(reproducible(metrics_of(place / "moved")), before);
}

}  // namespace
