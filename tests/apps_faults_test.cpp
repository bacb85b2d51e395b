// Training runs that lose ranks again and again, and what they end with: the bits of a run that nothing disturbed.
#include <random>

#include "models/checkpoint/checkpoint.h"
#include "tests/apps_ranks.h"
#include "tests/hostile_peers.h"
#include "tests/same_checkpoint.h"

namespace {

using namespace weft::apps_test;

/// A step of four micro-batches, with dropout and clipping.
Args train(const std::string& out, int steps, const Args& more) {
  return Args{"train",    "--data", "data",         "--out", out,      "--steps", std::to_string(steps),
              "--warmup", "2",      "--accumulate", "4",     "--clip", "0.1",     "--deterministic",
              "--device", "cpu"} +
         kSmallModel + more;
}
const Args kOftenSaved = {"--save-every", "3", "--keep", "2"};

std::string checkpoint(const std::string& run, int step) {
  char name[32];
  std::snprintf(name, sizeof name, "step_%08d", step);
  return (workplace() / run / name).string();
}

/// Weights, optimizer and every loss, those of one process that nobody disturbed.
void expect_same_as_alone(const std::string& run, int steps) {
  const fs::path& place = workplace();
  const std::string alone = "alone" + std::to_string(steps);
  if (!fs::exists(place / alone)) must_run(place, train(alone, steps, kOftenSaved));
  weft::testing::expect_same_checkpoint(checkpoint(run, steps), checkpoint(alone, steps));
  EXPECT_EQ(losses_of(place / run), losses_of(place / alone));
}

/// No process, no file.
void expect_nothing_left(const Scratch& temporary) {
  EXPECT_TRUE(eventually([&] { return processes_with(temporary.path()).empty(); }, 10));
  EXPECT_TRUE(fs::is_empty(temporary.path())) << fs::directory_iterator(temporary.path())->path();
}

bool being_saved(const fs::path& run) {
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(run, ignored)) {
    if (entry.path().filename().string().starts_with(".tmp-step_")) return true;
  }
  return false;
}

/// The step of the newest checkpoint that is whole; none that has its name may be broken.
int64_t newest_checkpoint(const fs::path& run) {
  const weft::LatestCheckpoint latest = weft::find_latest_checkpoint(run.string());
  EXPECT_TRUE(latest.rejected.empty()) << latest.rejected[0].path << ": " << latest.rejected[0].reason;
  return latest.path ? weft::read_checkpoint_manifest(*latest.path).step : 0;
}

/// Trains on four ranks and kills one of them with SIGKILL `kills` times: while a checkpoint is written, while a start
/// begins, in any step.
void train_with_kills(int kills, int steps) {
  constexpr int kRanks = 4;
  const fs::path& place = workplace();
  const std::string out = "killed" + std::to_string(kills);
  const Scratch temporary;
  Process run(place,
              Args{"launch", "-n", std::to_string(kRanks), "--restarts", std::to_string(kills), "--"} +
                  train(out, steps, kOftenSaved + Args{"--mesh", "dp=4", "--zero", "2"}),
              {"TMPDIR=" + temporary.path().string(), "WEFT_NUM_THREADS=1"});
  std::mt19937 random(static_cast<uint32_t>(20 + kills));
  std::vector<int64_t> points;  // steps after which a rank is killed
  for (int kill = 0; kill < kills; ++kill) points.push_back(1 + static_cast<int64_t>(random()) % (steps - 6));
  std::sort(points.begin(), points.end());
  int saves_cut = 0;
  int64_t saved = 0;
  for (int start = 0; start < kills; ++start) {
    enum { in_save, in_start, anywhere } moment = start % 3 == 0 ? in_save : start % 3 == 1 ? in_start : anywhere;
    auto victim = static_cast<size_t>(random() % kRanks);
    std::vector<pid_t> pids;
    ASSERT_TRUE(eventually([&] {
      pids = ranks_of_start(temporary.path(), kRanks, start);
      return std::count(pids.begin(), pids.end(), -1) == 0 || !run.running();
    })) << run.err();
    ASSERT_TRUE(run.running()) << run.err();
    if (moment == in_start) sleep_seconds(static_cast<double>(random() % 300) * 1e-3);
    if (moment == anywhere) {
      ASSERT_TRUE(eventually([&] { return last_step(place / out) >= points[static_cast<size_t>(start)]; }));
      sleep_seconds(static_cast<double>(random() % 30) * 1e-3);
    }
    if (moment == in_save) {
      ASSERT_TRUE(eventually([&] { return last_step(place / out) >= points[static_cast<size_t>(start)]; }));
      ASSERT_TRUE(eventually([&] { return being_saved(place / out); }, 60, 1e-5));
    }
    ASSERT_EQ(kill(pids[victim], SIGKILL), 0);
    ASSERT_TRUE(eventually([&] { return variable_of(pids[victim], "WEFT_RANK") == std::nullopt; }));
    saves_cut += moment == in_save && being_saved(place / out);
    const int64_t newest = newest_checkpoint(place / out);
    EXPECT_GE(newest, saved) << "a checkpoint that was complete is lost";
    saved = newest;
  }
  const Outcome outcome = run.wait(120);
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_NE(outcome.err.find("restart " + std::to_string(kills) + " of " + std::to_string(kills)), std::string::npos);
  EXPECT_GE(saves_cut, 1) << "no kill met a checkpoint that was being written";
  std::printf("%d kills, %d of them while a checkpoint was being written\n", kills, saves_cut);
  EXPECT_EQ(newest_checkpoint(place / out), steps);
  EXPECT_FALSE(being_saved(place / out)) << "what cut saves left behind is still there";
  expect_same_as_alone(out, steps);
  expect_nothing_left(temporary);
}

TEST(Faults, ARunThatLosesARankFourTimesEndsWithTheBitsOfOneThatLostNone) { train_with_kills(4, 60); }
TEST(SlowFaults, ARunThatLosesARankTwentyTimesEndsWithTheBitsOfOneThatLostNone) { train_with_kills(20, 200); }

TEST(Faults, AnElasticRunThatLosesRanksGoesOnWithFewerAndTheSameBits) {
  constexpr int kSteps = 40;
  const fs::path& place = workplace();
  const Scratch temporary;
  Process run(place,
              Args{"launch", "-n", "4", "--restarts", "2", "--elastic", "2:4", "--"} +
                  train("elastic", kSteps, kOftenSaved + Args{"--mesh", "dp=4", "--zero", "1"}),
              {"TMPDIR=" + temporary.path().string(), "WEFT_NUM_THREADS=1"});
  for (int start = 0; start < 2; ++start) {
    const int ranks = 4 - start;
    ASSERT_TRUE(eventually([&] { return last_step(place / "elastic") >= 10 + 13 * start; })) << run.err();
    const std::vector<pid_t> pids = ranks_of_start(temporary.path(), 4, start);
    ASSERT_EQ(std::count(pids.begin(), pids.end(), -1), start);
    ASSERT_EQ(kill(pids[static_cast<size_t>(ranks - 1 - start)], SIGKILL), 0);
    ASSERT_TRUE(eventually([&] { return ranks_of_start(temporary.path(), 4, start + 1)[0] != -1; })) << run.err();
  }
  const Outcome outcome = run.wait(120);
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  for (const char* part :
       {"rank 0 of 4", "rank 0 of 3", "rank 0 of 2", "elastic: mesh = dp=4 is dp=3 in this start",
        "elastic: mesh = dp=4 is dp=2 in this start; a step still has accumulate = 4 micro-batches of batch = 4"})
    EXPECT_NE((outcome.out + outcome.err).find(part), std::string::npos) << part << outcome.out << outcome.err;
  expect_same_as_alone("elastic", kSteps);
  expect_nothing_left(temporary);
}

TEST(Faults, AThousandHostileConnectionsToARunChangeNoLossAndTakeLittleMemory) {
  constexpr int kForever = 100000;
  const fs::path& place = workplace();
  const Scratch temporary;
  const auto steps_of = [&](const char* run) { return last_step(place / run) + 1; };
  const Args alone = {"WEFT_NUM_THREADS=1"};
  Process run(place, Args{"launch", "-n", "2", "--"} + train("attacked", kForever, {"--save-every", "0"}),
              alone + Args{"TMPDIR=" + temporary.path().string()});
  ASSERT_TRUE(eventually([&] { return steps_of("attacked") >= 20 || !run.running(); })) << run.err();
  ASSERT_TRUE(run.running()) << run.err();
  // The attackers know where the server is, and its public key.
  pid_t rank = -1;
  for (const pid_t pid : processes_with(temporary.path())) {
    if (variable_of(pid, "WEFT_RANK") == "1") rank = pid;
  }
  const std::string rendezvous = variable_of(rank, "WEFT_RENDEZVOUS").value_or("");
  const auto keys = weft::dist::ControlKeys::read(variable_of(rank, "WEFT_KEYS").value_or(""));
  const int64_t steps_before = steps_of("attacked"), before = weft::testing::resident_bytes(run.pid());
  const pid_t attacker = fork();
  ASSERT_GE(attacker, 0);
  if (attacker == 0) {
    weft::testing::allow_many_connections();
    weft::testing::attack(std::atoi(rendezvous.c_str() + rendezvous.rfind(':') + 1), keys, [] { sleep_seconds(3); });
    _exit(0);
  }
  int64_t most = before;
  int status = 0;
  for (; waitpid(attacker, &status, WNOHANG) == 0; sleep_seconds(0.005))
    most = std::max(most, weft::testing::resident_bytes(run.pid()));
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  const int64_t steps_meanwhile = steps_of("attacked") - steps_before;
  run.send(SIGTERM);
  const Outcome outcome = run.wait(60);
  EXPECT_EQ(outcome.code, 0) << outcome.out << outcome.err;
  std::printf("grown by %.1f MiB; %lld steps meanwhile\n", static_cast<double>(most - before) / (1 << 20),
              static_cast<long long>(steps_meanwhile));
#ifndef __SANITIZE_ADDRESS__  // which keeps freed memory
  EXPECT_LE(most - before, 16 << 20);
#endif
  EXPECT_GE(steps_meanwhile, 20);
  // As many steps of one process that nobody disturbs.
  const std::vector<std::string> losses = losses_of(place / "attacked");
  const auto steps = static_cast<int64_t>(losses.size());
  Process quiet(place, train("quiet", kForever, {"--save-every", "0"}), alone);
  ASSERT_TRUE(eventually([&] { return steps_of("quiet") >= steps || !quiet.running(); }, 120, 0.05));
  quiet.send(SIGTERM);
  EXPECT_EQ(quiet.wait(60).code, 0);
  std::vector<std::string> expected = losses_of(place / "quiet");
  ASSERT_GE(expected.size(), losses.size());
  expected.resize(losses.size());
  EXPECT_EQ(losses, expected);
  expect_nothing_left(temporary);
}

}  // namespace
