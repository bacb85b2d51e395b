// weft launch: the program itself, with shells, a small program that joins the control plane, and weft train as ranks.
#include <pty.h>
#include <sys/ioctl.h>

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "tests/apps_process.h"

namespace {

using namespace weft::apps_test;
using Json = nlohmann::json;

void expect_has(const std::string& text, const std::string& part, int line) {
  EXPECT_NE(text.find(part), std::string::npos) << "line " << line << ": " << text << "\nwanted: " << part;
}
#define EXPECT_HAS(text, part) expect_has(text, part, __LINE__)

bool eventually(const std::function<bool()>& condition, double seconds = 20) {
  for (const double deadline = now() + seconds; now() < deadline; sleep_seconds(0.005)) {
    if (condition()) return true;
  }
  return condition();
}

/// weft launch in a directory whose temporary files are its own.
Args in(const Scratch& scratch, const Args& more = {}) { return Args{"TMPDIR=" + scratch.path().string()} + more; }

Args launch(int ranks, const Args& options, const Args& command) {
  return Args{"launch", "-n", std::to_string(ranks)} + options + Args{"--"} + command;
}

Args shell(const std::string& script) { return {"sh", "-c", script}; }

Outcome run(const Scratch& scratch, const Args& args, const Args& environment = {}) {
  return run_weft(scratch.path(), args, in(scratch, environment));
}

/// The lines of one rank, without its number.
std::vector<std::string> lines_of(const std::string& output, int rank) {
  const std::string prefix = "[" + std::to_string(rank) + "] ";
  std::vector<std::string> lines;
  std::istringstream in(output);
  for (std::string line; std::getline(in, line);) {
    if (line.starts_with(prefix)) lines.push_back(line.substr(prefix.size()));
  }
  return lines;
}

/// Whether a process runs; one that has ended and was not reaped does not.
bool alive(const std::string& pid) {
  const std::string stat = content_of("/proc/" + pid + "/stat");
  const size_t end = stat.rfind(')');
  return end != std::string::npos && stat.size() > end + 2 && stat[end + 2] != 'Z' && stat[end + 2] != 'X';
}

std::vector<std::string> words_of(const std::string& text) {
  std::istringstream in(text);
  return {std::istream_iterator<std::string>(in), {}};
}

size_t files_in(const fs::path& directory, const std::string& begin) {
  return static_cast<size_t>(
      std::count_if(fs::directory_iterator(directory), fs::directory_iterator(),
                    [&](const auto& each) { return each.path().filename().string().starts_with(begin); }));
}

TEST(Launch, GivesEveryRankItsPlaceAndItsShareOfTheProcessors) {
  const Scratch scratch;
  const Outcome outcome = run(scratch, launch(3, {},
                                              shell("echo $WEFT_RANK $WEFT_WORLD_SIZE $WEFT_LOCAL_RANK $WEFT_NODE_RANK "
                                                    "$WEFT_RENDEZVOUS $WEFT_RUN_ID $WEFT_NUM_THREADS")));
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  std::set<std::string> runs;
  const int threads = std::max(1u, std::thread::hardware_concurrency() / 3);
  for (int rank = 0; rank < 3; ++rank) {
    const auto lines = lines_of(outcome.out, rank);
    ASSERT_EQ(lines.size(), 1u) << outcome.out;
    const auto words = words_of(lines[0]);
    ASSERT_EQ(words.size(), 7u) << lines[0];
    EXPECT_EQ(words[0], std::to_string(rank));
    EXPECT_EQ(words[1], "3");
    EXPECT_EQ(words[2], std::to_string(rank));
    EXPECT_EQ(words[3], "0");
    EXPECT_TRUE(words[4].starts_with("127.0.0.1:")) << words[4];
    EXPECT_EQ(words[5].size(), 32u);
    EXPECT_GE(std::stoi(words[6]), 1);
    EXPECT_LE(std::stoi(words[6]), threads);
    runs.insert(words[4] + words[5]);
  }
  EXPECT_EQ(runs.size(), 1u);
  EXPECT_EQ(run(scratch, launch(1, {}, shell("echo $WEFT_NUM_THREADS")), {"WEFT_NUM_THREADS=7"}).out, "[0] 7\n");
}

TEST(Launch, KeysTravelInAFileThatOnlyTheUserReadsAndThatIsGoneAfterwards) {
  const Scratch scratch;
  const Outcome outcome = run(scratch, launch(1, {},
                                              shell("stat -c %a $WEFT_KEYS; cat $WEFT_KEYS; echo ENVIRONMENT; env; "
                                                    "echo COMMANDS; tr '\\0' ' ' < /proc/$PPID/cmdline")));
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_EQ(lines_of(outcome.out, 0).at(0), "600");
  EXPECT_EQ(outcome.out.find("server-secret"), std::string::npos) << "ranks do not need it";
  const std::string label = "client-secret ";
  ASSERT_NE(outcome.out.find(label), std::string::npos);
  const std::string secret = outcome.out.substr(outcome.out.find(label) + label.size(), 40);
  ASSERT_EQ(secret.find_first_of(" \t\n"), std::string::npos) << secret;
  const std::string rest = outcome.out.substr(outcome.out.find("ENVIRONMENT"));
  EXPECT_HAS(rest, "COMMANDS");
  EXPECT_HAS(rest, "launch -n 1");
  EXPECT_EQ(rest.find(secret), std::string::npos);
  EXPECT_EQ(files_in(scratch.path(), "weft-launch"), 0u);
}

TEST(Launch, PrefixesEveryLineAndTearsNone) {
  const Scratch scratch;
  // Lines in pieces, on both streams, and a last one without an end.
  const Outcome outcome =
      run(scratch, launch(4, {},
                          shell("i=0; while [ $i -lt 300 ]; do printf 'rank %s ' $WEFT_RANK; "
                                "printf 'line %s xxxxxxxxxxxxxxxxxxxxxxxx\\n' $i; "
                                "printf 'error ' >&2; echo $i >&2; i=$((i+1)); done; printf last")));
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  const auto count = [](const std::string& text) { return std::count(text.begin(), text.end(), '\n'); };
  EXPECT_EQ(count(outcome.out), 4 * 301);
  EXPECT_EQ(count(outcome.err), 4 * 300);
  for (int rank = 0; rank < 4; ++rank) {
    const auto out = lines_of(outcome.out, rank), err = lines_of(outcome.err, rank);
    ASSERT_EQ(out.size(), 301u);
    ASSERT_EQ(err.size(), 300u);
    for (size_t i = 0; i < 300; ++i) {
      EXPECT_EQ(out[i], "rank " + std::to_string(rank) + " line " + std::to_string(i) + " xxxxxxxxxxxxxxxxxxxxxxxx");
      EXPECT_EQ(err[i], "error " + std::to_string(i));
    }
    EXPECT_EQ(out[300], "last");
  }
}

TEST(Launch, ALineThatIsDrawnOverCountsInItsLastForm) {
  const Scratch scratch;
  const Outcome outcome = run(scratch, launch(1, {}, shell("printf '10%%\\r20%%\\r\\033[K30%%\\nnext\\r\\n'")));
  EXPECT_EQ(outcome.out, "[0] 30%\n[0] next\n");
}

TEST(Launch, ReturnsTheCodeOfTheRankThatFailedFirstAndShowsItsLastLines) {
  const Scratch scratch;
  const double begin = now();
  const Outcome outcome =
      run(scratch, launch(3, {},
                          shell("echo begin; if [ $WEFT_RANK = 1 ]; then sleep 0.3; echo out of data >&2; "
                                "exit 7; fi; sleep 100; exit 9")));
  EXPECT_EQ(outcome.code, 7) << outcome.err;
  EXPECT_LT(now() - begin, 20);
  EXPECT_HAS(outcome.err, "[launch] rank 1 of 3 (pid ");
  EXPECT_HAS(outcome.err, "failed first: exit code 7");
  EXPECT_HAS(outcome.err, "[launch]   out of data");
  const Outcome killed = run(scratch, launch(2, {}, shell("if [ $WEFT_RANK = 0 ]; then kill -SEGV $$; fi; sleep 100")));
  EXPECT_EQ(killed.code, 128 + SIGSEGV);
  EXPECT_HAS(killed.err, "rank 0 of 2");
  EXPECT_HAS(killed.err, "killed by signal 11 (SIGSEGV)");
}

TEST(Launch, WhoIgnoresSigtermIsKilledAfterTheGraceTimeWithItsChildren) {
  const Scratch scratch;
  const double begin = now();
  const Outcome outcome =
      run(scratch, launch(2, {"--grace", "0.5"},
                          shell("trap '' TERM; sleep 100 & echo $! > child$WEFT_RANK; echo $$ > rank$WEFT_RANK; "
                                "if [ $WEFT_RANK = 1 ]; then sleep 0.3; exit 4; fi; wait; sleep 100")));
  EXPECT_EQ(outcome.code, 4) << outcome.err;
  EXPECT_GE(now() - begin, 0.5);
  EXPECT_LT(now() - begin, 20);
  EXPECT_HAS(outcome.err, "did not end in 0.5 s: SIGKILL");
  for (const char* file : {"child0", "child1", "rank0", "rank1"}) {
    const auto pid = words_of(content_of(scratch.path() / file));
    ASSERT_EQ(pid.size(), 1u) << file;
    EXPECT_TRUE(eventually([&] { return !alive(pid[0]); })) << file;
  }
}

TEST(Launch, TheFirstSignalAsksAllRanksAndTheSecondKillsThem) {
  const std::map<int, std::string> signals = {{SIGINT, "INT"}, {SIGTERM, "TERM"}, {SIGHUP, "HUP"}};
  for (const auto& [signal, name] : signals) {
    const Scratch scratch;
    Process polite(scratch.path(),
                   launch(2, {},
                          shell("trap 'echo asked; exit 0' " + name +
                                "; echo > ready$WEFT_RANK; "
                                "while true; do sleep 0.05; done")),
                   in(scratch));
    ASSERT_TRUE(eventually([&] { return files_in(scratch.path(), "ready") == 2; }));
    polite.send(signal);
    const Outcome outcome = polite.wait(20);
    EXPECT_EQ(outcome.code, 0) << name << outcome.err;
    for (int rank = 0; rank < 2; ++rank)
      EXPECT_EQ(lines_of(outcome.out, rank), std::vector<std::string>{"asked"}) << name;
  }
  const Scratch scratch;
  Process deaf(scratch.path(),
               launch(2, {}, shell("trap 'echo no' TERM; echo > ready$WEFT_RANK; while true; do sleep 0.05; done")),
               in(scratch));
  ASSERT_TRUE(eventually([&] { return files_in(scratch.path(), "ready") == 2; }));
  deaf.send(SIGTERM);
  sleep_seconds(0.5);
  EXPECT_TRUE(deaf.running());
  deaf.send(SIGTERM);
  const Outcome outcome = deaf.wait(20);
  EXPECT_EQ(outcome.code, 128 + SIGKILL) << outcome.err;
  EXPECT_EQ(lines_of(outcome.out, 0), std::vector<std::string>{"no"});
}

TEST(Launch, NobodyIsLeftBehindWhenTheLauncherIsKilled) {
  const Scratch scratch;
  Process process(scratch.path(),
                  launch(3, {},
                         shell("trap '' TERM HUP; sleep 100 & echo $! > child$WEFT_RANK; echo $$ > rank$WEFT_RANK; "
                               "echo > ready$WEFT_RANK; wait; sleep 100")),
                  in(scratch));
  ASSERT_TRUE(eventually([&] { return files_in(scratch.path(), "ready") == 3; }));
  EXPECT_EQ(files_in(scratch.path(), "weft-launch"), 1u);
  process.send(SIGKILL);
  EXPECT_EQ(process.wait(20).code, -SIGKILL);
  for (int rank = 0; rank < 3; ++rank) {
    for (const char* what : {"child", "rank"}) {
      const auto pid = words_of(content_of(scratch.path() / (what + std::to_string(rank))));
      ASSERT_EQ(pid.size(), 1u);
      EXPECT_TRUE(eventually([&] { return !alive(pid[0]); })) << what << rank;
    }
  }
  EXPECT_TRUE(eventually([&] { return files_in(scratch.path(), "weft-launch") == 0; })) << "the keys are still there";
}

TEST(Launch, RanksMeetOnTheControlPlaneAndTheirLinesArrive) {
  const Scratch scratch;
  const Outcome outcome = run(scratch, launch(4, {"--metrics", "metrics.jsonl"},
                                              {WEFT_LAUNCH_RANK, "log=mind the gap\x1b[2J", "metric={\"loss\": 1.5}"}));
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  std::set<std::string> views;
  for (int rank = 0; rank < 4; ++rank) {
    const auto lines = lines_of(outcome.out, rank);
    ASSERT_EQ(lines.size(), 2u) << outcome.out << outcome.err;
    EXPECT_HAS(lines[0], "rank " + std::to_string(rank) + " of 4 (local rank " + std::to_string(rank) +
                             ", node 0), started by weft launch");
    views.insert(lines[1]);
    EXPECT_EQ(lines_of(outcome.err, rank), std::vector<std::string>{"warn  mind the gap\\x1b[2J"}) << outcome.err;
  }
  EXPECT_EQ(views.size(), 1u);
  std::set<int> ranks;
  std::istringstream metrics(content_of(scratch.path() / "metrics.jsonl"));
  for (std::string line; std::getline(metrics, line);) {
    const Json entry = Json::parse(line);
    ranks.insert(entry["rank"].get<int>());
    EXPECT_EQ(entry["record"]["loss"], 1.5);
  }
  EXPECT_EQ(ranks, (std::set<int>{0, 1, 2, 3}));
}

TEST(Launch, ARankThatHangsAsAWholeIsFoundNamedAndEndsTheRun) {
  const Scratch scratch;
  const double begin = now();
  const Outcome outcome =
      run(scratch, launch(3, {"--heartbeat", "0.5", "--grace", "0.3"},
                          {WEFT_LAUNCH_RANK, "operation=all_reduce #7", "sleep=0.3", "stop=1", "wait=never"}));
  EXPECT_EQ(outcome.code, 1) << outcome.err;
  EXPECT_LT(now() - begin, 20);
  EXPECT_HAS(outcome.err, "[launch] rank 1 (host ");
  EXPECT_HAS(outcome.err, "was lost: silent for ");
  EXPECT_HAS(outcome.err, "its last operation: all_reduce #7");
}

/// A rank's shell does something before it becomes a rank that joins; what the launcher returned in less than 5 s.
Outcome before_joining(const std::string& what) {
  const Scratch scratch;
  const double begin = now();
  const std::string script = "test $WEFT_RANK = 1 && " + what + "; exec " + WEFT_LAUNCH_RANK;
  Outcome outcome = run(scratch, launch(3, {"--grace", "0.3"}, shell(script)));
  EXPECT_LT(now() - begin, 6) << what;  // 5 s, and what it takes to start and to end
  return outcome;
}

TEST(Launch, ARankThatEndsOrIsStoppedBeforeItJoinsIsNamedByAllInTime) {
  const Outcome killed = before_joining("kill -9 $$");
  EXPECT_EQ(killed.code, 128 + SIGKILL) << killed.err;
  EXPECT_HAS(killed.err, "rank 1 of 3 (pid ");
  const Outcome left = before_joining("exit 0");
  EXPECT_EQ(left.code, 3) << left.err;
  // The first of the others that fails ends those that have not noticed yet.
  EXPECT_HAS(left.err, " waits in barrier \"start\": rank 1 ");
  EXPECT_HAS(left.err, "left: it never joined the run: exit code 0");
  const Outcome stopped = before_joining("kill -STOP $$");
  EXPECT_EQ(stopped.code, 128 + SIGKILL) << stopped.err;
  EXPECT_HAS(stopped.err, "rank 1 has been stopped by a signal for more than 4 s: SIGKILL");
}

TEST(Launch, TheOthersLearnAtOnceWhoDied) {
  const Scratch scratch;
  const double begin = now();
  const Outcome outcome = run(scratch, launch(2, {"--heartbeat", "60"}, {WEFT_LAUNCH_RANK, "kill=1", "wait=never"}));
  EXPECT_EQ(outcome.code, 128 + SIGKILL);
  EXPECT_LT(now() - begin, 20);
  EXPECT_HAS(outcome.err, "rank 1 of 2");
}

/// Launches of two ranks each, all at once.
void launch_at_once(int launches) {
  const Scratch scratch;
  std::vector<std::unique_ptr<Process>> all;
  for (int i = 0; i < launches; ++i) {
    all.push_back(std::make_unique<Process>(
        scratch.path(), launch(2, {}, {WEFT_LAUNCH_RANK, "sleep=" + std::to_string(0.5 + 0.02 * launches)}),
        in(scratch)));
  }
  std::set<std::string> rendezvous;
  for (auto& each : all) {
    const Outcome outcome = each->wait(300);
    EXPECT_EQ(outcome.code, 0) << outcome.out << outcome.err;
    EXPECT_EQ(std::count(outcome.out.begin(), outcome.out.end(), '\n'), 4) << outcome.out;
    const auto lines = lines_of(outcome.out, 0);
    if (!lines.empty()) rendezvous.insert(lines[0].substr(lines[0].find("rendezvous ")));
  }
  std::printf("%d launches at once, %zu ports\n", launches, rendezvous.size());
  EXPECT_EQ(files_in(scratch.path(), "weft-launch"), 0u);
}

TEST(Launch, FortyAtOnceOnOneHostDoNotCollide) { launch_at_once(40); }
TEST(SlowLaunch, TwoHundredAtOnceOnOneHostDoNotCollide) { launch_at_once(200); }

TEST(Launch, StartsAgainAtMostAsOftenAsItMay) {
  const Scratch scratch;
  const std::string script = "echo start $WEFT_RESTART $WEFT_RUN_ID; if [ $WEFT_RANK = 1 ]; then exit 6; fi; sleep 100";
  const Outcome never = run(scratch, launch(2, {"--restarts", "2"}, shell(script)));
  EXPECT_EQ(never.code, 6);
  const auto starts = lines_of(never.out, 1);
  ASSERT_EQ(starts.size(), 3u) << never.out;
  std::set<std::string> runs;
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(words_of(starts[i]).at(1), std::to_string(i));
    runs.insert(words_of(starts[i]).at(2));
  }
  EXPECT_EQ(runs.size(), 3u) << "ranks of different starts must not meet";
  EXPECT_HAS(never.err, "[launch] restart 2 of 2");
  const Outcome once = run(scratch, launch(2, {"--restarts", "2"}, {WEFT_LAUNCH_RANK, "kill-first=1"}));
  EXPECT_EQ(once.code, 0) << once.err;
  EXPECT_HAS(once.err, "restart 1 of 2");
  EXPECT_EQ(once.err.find("restart 2"), std::string::npos);
  EXPECT_EQ(run(scratch, launch(1, {}, shell("echo ${WEFT_RESTART-unset}"))).out, "[0] unset\n");
}

Args train_args(const std::string& out) {
  return Args{"train", "--data", "data", "--out", out, "--steps", "12", "--warmup", "2", "--save-every", "4"} +
         kSmallModel;
}

std::vector<std::string> losses_of(const fs::path& run) {
  std::vector<std::string> losses;
  std::ifstream in(run / "metrics.jsonl");
  for (std::string line; std::getline(in, line);) losses.push_back(Json::parse(line).value("loss", Json()).dump());
  return losses;
}

TEST(Launch, ATrainingThatIsKilledAndStartedAgainEndsAsTheOneThatWasNot) {
  const fs::path& place = workplace();
  // One thread: a busy machine is then no reason to wait for another.
  const Args alone = {"WEFT_NUM_THREADS=1"};
  const Outcome straight = run_weft(place, train_args("straight"), alone, "", 200);
  ASSERT_EQ(straight.code, 0) << straight.err;
  // The first start dies by SIGKILL after a checkpoint, in the middle of its steps.
  std::string train = WEFT_BINARY;
  for (const std::string& word : train_args("killed")) train += " " + word;
  const std::string script =
      "if [ $WEFT_RESTART = 0 ]; then " + train +
      " & while ! ls killed/step* > /dev/null 2>&1; do sleep 0.001; done; kill -9 $!; exit 1; fi; exec " + train;
  const Outcome outcome = run_weft(place, launch(1, {"--restarts", "1"}, shell(script)), alone, "", 200);
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_HAS(outcome.err, "resuming from killed/");
  EXPECT_EQ(losses_of(place / "killed"), losses_of(place / "straight"));
  EXPECT_EQ(losses_of(place / "straight").size(), 13u);
}

/// Some free port, a moment ago.
std::string free_port() {
  static int next = 20000 + getpid() % 8000;
  return std::to_string(next++);
}

/// Launchers of several nodes on this one.
struct Nodes {
  Scratch scratch;
  std::string rendezvous = "127.0.0.1:" + free_port();
  std::vector<std::unique_ptr<Process>> all;
  Nodes() { must_run(scratch.path(), {"launch", "--make-keys", "keys"}); }
  void start(int nodes, int node, int ranks, const Args& options, const Args& command) {
    all.push_back(
        std::make_unique<Process>(scratch.path(),
                                  launch(ranks,
                                         Args{"--nodes", std::to_string(nodes), "--node-rank", std::to_string(node),
                                              "--rendezvous", rendezvous, "--keys", "keys"} +
                                             options,
                                         command),
                                  in(scratch)));
  }
};

TEST(Launch, SeveralNodesMakeOneRun) {
  Nodes nodes;
  nodes.start(2, 1, 1, {}, {WEFT_LAUNCH_RANK});
  nodes.start(2, 0, 2, {}, {WEFT_LAUNCH_RANK});
  const Outcome other = nodes.all[0]->wait(), first = nodes.all[1]->wait();
  EXPECT_EQ(first.code, 0) << first.err;
  EXPECT_EQ(other.code, 0) << other.err;
  EXPECT_HAS(first.out, "[1] rank 1 of 3 (local rank 1, node 0)");
  EXPECT_HAS(other.out, "[2] rank 2 of 3 (local rank 0, node 1)");
}

TEST(Launch, ARankThatFailsOnOneNodeEndsAllNodesWithItsCode) {
  Nodes nodes;
  nodes.start(2, 0, 1, {"--restarts", "1"}, {WEFT_LAUNCH_RANK, "exit=2", "wait=never"});
  nodes.start(2, 1, 2, {}, {WEFT_LAUNCH_RANK, "exit=2", "wait=never"});
  const Outcome first = nodes.all[0]->wait(), other = nodes.all[1]->wait();
  EXPECT_EQ(first.code, 5) << first.err;
  EXPECT_EQ(other.code, 5) << other.err;
  EXPECT_HAS(first.err, "node 1) failed first: exit code 5");
  EXPECT_HAS(first.err, "restart 1 of 1");
  EXPECT_EQ(lines_of(other.out, 2).size(), 4u) << "two lines from each start: " << other.out;
}

TEST(Launch, AnElasticRunGoesOnWithoutANodeThatIsGone) {
  Nodes nodes;
  const Args options = {"--restarts", "1", "--elastic", "2:4", "--heartbeat", "1"};
  const Args command = {WEFT_LAUNCH_RANK, "pid=pid", "sleep=2"};
  nodes.start(2, 0, 2, options, command);
  nodes.start(2, 1, 2, options, command);
  ASSERT_TRUE(eventually([&] { return files_in(nodes.scratch.path(), "pid") == 4; }));
  nodes.all[1]->send(SIGKILL);  // its ranks die with it
  const Outcome first = nodes.all[0]->wait();
  EXPECT_EQ(first.code, 0) << first.err;
  EXPECT_HAS(first.err, "the launchers of nodes 1 are not there: going on without them");
  EXPECT_HAS(first.out, "[1] rank 1 of 2 (local rank 1, node 0), started by weft launch, restart 1");
}

TEST(Launch, AnElasticRunGivesUpThePlaceOfARankThatWasKilledUntilTheFewestAreLeft) {
  const Scratch scratch;
  const std::string script =
      "echo start $WEFT_RESTART of $WEFT_WORLD_SIZE elastic $WEFT_ELASTIC; "
      "if [ $WEFT_RESTART -lt 3 ]; then if [ $WEFT_RANK = 1 ]; then kill -9 $$; fi; sleep 100; fi";
  const Outcome outcome = run(scratch, launch(4, {"--restarts", "4", "--elastic", "2:3"}, shell(script)));
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_EQ(lines_of(outcome.out, 0), (std::vector<std::string>{"start 0 of 3 elastic 1", "start 1 of 3 elastic 1",
                                                                "start 2 of 2 elastic 1", "start 3 of 2 elastic 1"}));
  EXPECT_HAS(outcome.err, "elastic: the place of rank 1 on node 0 is given up, 2 are left");
  EXPECT_HAS(outcome.err, "elastic asks for at least 2 ranks: the place of rank 1 is used again");
  // An error of the program's own is no reason to give up its place.
  const Outcome failing = run(scratch, launch(2, {"--restarts", "1", "--elastic", "1:2"},
                                              shell("echo $WEFT_WORLD_SIZE; if [ $WEFT_RANK = 1 ]; then exit 6; fi; "
                                                    "sleep 100")));
  EXPECT_EQ(failing.code, 6) << failing.err;
  EXPECT_EQ(lines_of(failing.out, 1), (std::vector<std::string>{"2", "2"}));
}

TEST(Launch, ANodeThatDoesNotComeIsNamed) {
  Nodes nodes;
  nodes.start(3, 0, 1, {"--join", "0.5"}, {WEFT_LAUNCH_RANK});
  const Outcome first = nodes.all[0]->wait();
  EXPECT_EQ(first.code, 1);
  EXPECT_HAS(first.err, "the launchers of nodes 1, 2 are not there");
  Nodes alone;
  alone.start(2, 1, 1, {"--join", "0.5"}, {WEFT_LAUNCH_RANK});
  const Outcome other = alone.all[0]->wait();
  EXPECT_EQ(other.code, 1);
  EXPECT_HAS(other.err, "nobody listens there");
}

TEST(Launch, RankZeroDrawsItsProgressOnATerminalAndOthersPassAboveIt) {
  const Scratch scratch;
  winsize size{};
  size.ws_col = 80;
  size.ws_row = 24;
  int terminal = -1;
  const std::string script =
      "if [ $WEFT_RANK = 0 ]; then [ -t 2 ] || exit 9; stty size < /dev/stderr; printf '\\r\\033[Khalf' >&2; "
      "sleep 0.5; printf '\\r\\033[Kdone\\n' >&2; else sleep 0.2; echo other; fi";
  const pid_t child = forkpty(&terminal, nullptr, nullptr, &size);
  ASSERT_GE(child, 0);
  if (child == 0) {
    setenv("TERM", "xterm", 1);
    setenv("TMPDIR", scratch.path().c_str(), 1);
    execl(WEFT_BINARY, "weft", "launch", "-n", "2", "--", "sh", "-c", script.c_str(), nullptr);
    _exit(127);
  }
  std::string shown;
  char bytes[4096];
  for (ssize_t got; (got = read(terminal, bytes, sizeof bytes)) > 0;) shown.append(bytes, static_cast<size_t>(got));
  int status = 0;
  waitpid(child, &status, 0);
  close(terminal);
  EXPECT_EQ(WEXITSTATUS(status), 0) << shown;
  EXPECT_HAS(shown, "[0] 24 76");
  const size_t half = shown.find("[0] half"), other = shown.find("[1] other"), again = shown.find("[0] half", other);
  EXPECT_LT(half, other) << shown;
  EXPECT_LT(other, again) << shown;
  EXPECT_LT(again, shown.find("[0] done\r\n")) << shown;
}

TEST(Launch, RefusesWhatItCannotDo) {
  const Scratch scratch;
  const std::vector<std::pair<Args, std::string>> cases = {
      {{"launch", "-n", "2"}, "there is nothing to launch"},
      {{"launch", "-n", "0", "--", "true"}, "must be an integer from 1 to 4,096"},
      {launch(1, {}, {"launch", "true"}), "a launch cannot be launched"},
      {launch(1, {}, {"tran"}), "did you mean \"train\"?"},
      {launch(1, {}, {"./none"}), "is no program that can be run"},
      {launch(1, {"--nodes", "2"}, {"true"}), "must be HOST:PORT of node 0's launcher"},
      {launch(1, {"--nodes", "2", "--rendezvous", "a:1"}, {"true"}), "weft launch --make-keys FILE"},
      {launch(1, {"--nodes", "2", "--node-rank", "2"}, {"true"}), "must be below nodes = 2"},
      {launch(1, {"--rendezvous", "a:1"}, {"true"}), "is for several nodes"},
      {launch(1, {"--elastic", "2:4"}, {"true"}), "asks for at least 2 ranks, got ranks = 1"},
      {launch(1, {"--elastic", "2:1"}, {"true"}), "must be MIN:MAX"},
      {launch(1, {"--elastic", "2"}, {"true"}), "must be MIN:MAX"}};
  for (const auto& [args, part] : cases) {
    const Outcome outcome = run(scratch, args);
    EXPECT_EQ(outcome.code, 2) << outcome.err;
    EXPECT_HAS(outcome.err, part);
  }
  EXPECT_EQ(files_in(scratch.path(), "weft-launch"), 0u);
}

}  // namespace
