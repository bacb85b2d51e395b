// What the other ranks get when one of them dies or stops: before, in and after each operation.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <thread>

#include "core/log.h"
#include "tests/dist_processes.h"
#include "tests/dist_programs.h"

namespace weft::dist::testing {

namespace {

constexpr Collective kOperations[] = {Collective::all_reduce, Collective::reduce_scatter, Collective::all_gather,
                                      Collective::broadcast,  Collective::all_to_all,     Collective::barrier};
enum class Ending { kill, segv, exit, stop };
constexpr const char* kEndings[] = {"Sigkill", "Sigsegv", "ExitsWithZero", "Sigstop"};
enum class Moment { before, in, moving, after };
constexpr const char* kMoments[] = {"Before", "WaitingIn", "MovingIn", "After"};
constexpr int kVictim = 1;

void end(Ending ending) {
  switch (ending) {
    case Ending::kill:
      raise(SIGKILL);
      break;
    case Ending::segv: {
      const rlimit none{0, 0};
      setrlimit(RLIMIT_CORE, &none);
      signal(SIGSEGV, SIG_DFL);
      raise(SIGSEGV);
      break;
    }
    case Ending::exit:
      _exit(0);
    case Ending::stop:
      raise(SIGSTOP);
      break;
  }
}

void run(Group& world, Collective op, int64_t elements) {
  const Tensor t = Tensor::ones({elements});
  switch (op) {
    case Collective::all_reduce:
      return world.all_reduce_(t);
    case Collective::reduce_scatter:
      return void(world.reduce_scatter(t));
    case Collective::all_gather:
      return void(world.all_gather(t));
    case Collective::broadcast:
      return world.broadcast_(t, kVictim);
    case Collective::all_to_all:
      return void(world.all_to_all(t));
    case Collective::send:
    case Collective::recv:
      // Rank 0 sends to the victim, the victim to rank 2.
      if (world.rank() == 0) world.send(t, kVictim);
      if (world.rank() == kVictim) world.recv_(t, 0), world.send(t, 2);
      if (world.rank() == 2) world.recv_(t, kVictim);
      return;
    case Collective::barrier:
      return world.barrier();
  }
}

}  // namespace

int run_rank(const RankArguments& arguments) {
  log::set_level(log::Level::kOff);
  const auto op = static_cast<Collective>(std::stoi(arguments.words.at(0)));
  const auto ending = static_cast<Ending>(std::stoi(arguments.words.at(1)));
  const auto moment = static_cast<Moment>(std::stoi(arguments.words.at(2)));
  FileStore store(arguments.store);
  Group world = gloo_group(arguments.options, store);
  const int me = world.rank();
  const int64_t elements = 3 * (moment == Moment::moving ? int64_t{1} << 20 : 100);
  for (int i = 0; i < 3; ++i) world.barrier();
  const auto ends_later = [&](std::chrono::microseconds delay) {
    std::thread([=] {
      std::this_thread::sleep_for(delay);
      end(ending);
    }).detach();
  };
  if (moment == Moment::in && me == 2) {
    // The victim waits for this rank when it ends.
    store.get("waiting", 30);
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
  if (me == kVictim) {
    if (moment == Moment::before) end(ending);
    if (moment == Moment::in) {
      ends_later(std::chrono::milliseconds(20));
      store.set("waiting", "");
    }
    if (moment == Moment::moving) ends_later(std::chrono::microseconds(500));
  }
  for (int i = 0; i < (moment == Moment::moving ? 1000 : 1); ++i) run(world, op, elements);
  if (me == kVictim) end(ending);
  // Ranks that did not need the victim for this one find out in the next.
  for (int i = 0; i < 1000; ++i) run(world, op, elements);
  return 0;
}

namespace {

class Fault : public ::testing::TestWithParam<std::tuple<Collective, Ending, Moment>> {};

TEST_P(Fault, IsNamedByEverySurvivor) {
  if (*why_no_gloo() != '\0') GTEST_SKIP() << why_no_gloo();
  const auto [op, ending, moment] = GetParam();
  ProcessOptions options;
  if (ending == Ending::stop) options.heartbeat = 0.1, options.silence = 1.2;
  Processes processes(3,
                      {{std::to_string(static_cast<int>(op)), std::to_string(static_cast<int>(ending)),
                        std::to_string(static_cast<int>(moment))}},
                      options);
  const auto start = std::chrono::steady_clock::now();
  for (const int rank : {0, 2}) {
    const auto outcome = processes.wait(rank, 30);
    EXPECT_FALSE(outcome.timed_out) << "rank " << rank << " hangs";
    EXPECT_EQ(outcome.code, 7) << "rank " << rank << ": " << outcome.err;
    EXPECT_NE(outcome.err.find("GroupError, rank at fault 1:"), std::string::npos) << outcome.err;
    const std::string how = ending == Ending::stop ? "rank 1 of 3 has given no sign of life for "
                                                   : "rank 1 of 3 is dead: its connection closed";
    EXPECT_NE(outcome.err.find(how), std::string::npos) << outcome.err;
    EXPECT_NE(outcome.err.find("its last operation was "), std::string::npos) << outcome.err;
    // Where this rank was: operation, number, group and place.
    EXPECT_NE(outcome.err.find(concat("this is rank ", rank, ", in ")), std::string::npos) << outcome.err;
    EXPECT_NE(outcome.err.find(" of group \"world"), std::string::npos) << outcome.err;
    EXPECT_NE(outcome.err.find("at dist_fault_test.cpp:"), std::string::npos) << outcome.err;
  }
  EXPECT_LT(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(), 20);
}

std::string title(const ::testing::TestParamInfo<Fault::ParamType>& info) {
  const auto [op, ending, moment] = info.param;
  return concat(kEndings[static_cast<int>(ending)], kMoments[static_cast<int>(moment)], "_", name(op));
}

INSTANTIATE_TEST_SUITE_P(Death, Fault,
                         ::testing::Combine(::testing::ValuesIn(kOperations),
                                            ::testing::Values(Ending::kill, Ending::segv, Ending::exit),
                                            ::testing::Values(Moment::before, Moment::in, Moment::after)),
                         title);
INSTANTIATE_TEST_SUITE_P(DeathWithData, Fault,
                         ::testing::Combine(::testing::ValuesIn(kOperations), ::testing::Values(Ending::kill),
                                            ::testing::Values(Moment::moving)),
                         title);
INSTANTIATE_TEST_SUITE_P(DeathOfAPeer, Fault,
                         ::testing::Combine(::testing::Values(Collective::send),
                                            ::testing::Values(Ending::kill, Ending::segv, Ending::exit, Ending::stop),
                                            ::testing::Values(Moment::before, Moment::moving)),
                         title);
INSTANTIATE_TEST_SUITE_P(Stop, Fault,
                         ::testing::Combine(::testing::ValuesIn(kOperations), ::testing::Values(Ending::stop),
                                            ::testing::Values(Moment::before, Moment::in)),
                         title);
INSTANTIATE_TEST_SUITE_P(StopWithData, Fault,
                         ::testing::Combine(::testing::Values(Collective::all_reduce, Collective::all_to_all),
                                            ::testing::Values(Ending::stop), ::testing::Values(Moment::moving)),
                         title);

TEST(FaultTimes, ADeathIsNamedWithinTwoSecondsAndAStopWithinFive) {
  if (*why_no_gloo() != '\0') GTEST_SKIP() << why_no_gloo();
  for (const Ending ending : {Ending::kill, Ending::stop}) {
    // The usual heartbeats. The victim makes a file when its end is due, and ends 20 ms later.
    Processes processes(3, {{std::to_string(static_cast<int>(Collective::all_reduce)),
                             std::to_string(static_cast<int>(ending)), std::to_string(static_cast<int>(Moment::in))}});
    processes.await_file("waiting");
    const auto start = std::chrono::steady_clock::now();
    for (const int rank : {0, 2}) EXPECT_EQ(processes.wait(rank, 30).code, 7);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    // A stopped process is given 3 s; the leaving process waits at most one second for those that do not answer.
    EXPECT_LT(seconds, ending == Ending::stop ? 5 : 2);
  }
}

}  // namespace
}  // namespace weft::dist::testing
