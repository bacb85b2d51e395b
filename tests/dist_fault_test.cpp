// What the other ranks get when one of them dies, stops, leaves or calls something else: every case is named, with
// rank, operation and number, in time, and nothing stays behind.
#include <gtest/gtest.h>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <thread>

#include "core/log.h"
#include "tests/dist_endings.h"
#include "tests/dist_processes.h"
#include "tests/dist_programs.h"

namespace weft::dist::testing {

namespace {

constexpr Collective kOperations[] = {Collective::all_reduce, Collective::reduce_scatter, Collective::all_gather,
                                      Collective::broadcast,  Collective::all_to_all,     Collective::barrier};
enum class Moment { before, in, moving, after };
constexpr const char* kMoments[] = {"Before", "WaitingIn", "MovingIn", "After"};
constexpr int kVictim = 1, kRanks = 3;

void run(Group& world, Collective op, const Tensor& t) {
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

/// A rank of a world in which the victim ends.
void meet_end(const RankArguments& arguments, FileStore& store, Group& world) {
  const auto op = static_cast<Collective>(std::stoi(arguments.words.at(1)));
  const auto ending = static_cast<Ending>(std::stoi(arguments.words.at(2)));
  const auto moment = static_cast<Moment>(std::stoi(arguments.words.at(3)));
  const int me = world.rank();
  const Tensor t = Tensor::ones({kRanks * (moment == Moment::moving ? int64_t{1} << 20 : 100)});
  for (int i = 0; i < 3; ++i) world.barrier();
  // All are past the barriers before anything ends.
  store.set(concat("past/", me), "");
  for (int rank = 0; rank < kRanks; ++rank) store.get(concat("past/", rank), 30);
  const auto ends_later = [&](std::chrono::microseconds delay) {
    std::thread([=, output = arguments.output] {
      std::this_thread::sleep_for(delay);
      end(ending, output);
    }).detach();
  };
  if (moment == Moment::in && me == 2) {
    // The victim waits for this rank when it ends.
    const auto ended = std::filesystem::path(arguments.output).replace_filename(concat("output.", kVictim));
    while (!std::filesystem::exists(ended)) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
  if (me == kVictim) {
    if (moment == Moment::before) end(ending, arguments.output);
    if (moment == Moment::in) ends_later(std::chrono::milliseconds(20));
  }
  for (int i = 0; i < (moment == Moment::moving ? 1000 : 1); ++i) {
    if (i == 1 && me == kVictim) ends_later(std::chrono::microseconds(500));
    run(world, op, t);
  }
  if (me == kVictim) end(ending, arguments.output);
  // Ranks that did not need the victim for this one find out in the next.
  for (int i = 0; i < 1000; ++i) run(world, op, t);
}

/// What the victim does while the others call `op` with f32 [6, 2].
struct Disagreement {
  std::string title;
  Collective op;
  std::function<void(Group&)> victim;
  std::vector<std::string> parts;  ///< of the error
};

std::vector<Disagreement> disagreements() {
  std::vector<Disagreement> all;
  for (size_t i = 0; i < std::size(kOperations); ++i) {
    const Collective op = kOperations[i], other = kOperations[(i + 1) % std::size(kOperations)];
    const std::string mine = concat("rank 0: ", name(op), " #1");
    const auto theirs = [](Collective called) { return concat("rank 1: ", name(called), " #1"); };
    all.push_back({"another operation",
                   op,
                   [=](Group& world) { run(world, other, Tensor::ones({6, 2})); },
                   {"they are different operations", mine, theirs(other)}});
    all.push_back({"none: it has left",
                   op,
                   [](Group&) {},
                   {"rank 1 of 3 has left", concat("will not come to ", name(op), " #1")}});
    if (op == Collective::barrier) continue;
    all.push_back({"another dtype",
                   op,
                   [=](Group& world) { run(world, op, Tensor::ones({6, 2}, DType::f64)); },
                   {"the dtypes differ", mine + " of group \"world\", f32 [6, 2]", theirs(op), "f64 [6, 2]"}});
    all.push_back({"another shape",
                   op,
                   [=](Group& world) { run(world, op, Tensor::ones({6, 3})); },
                   {"the shapes differ", mine, theirs(op), "[6, 2]", "[6, 3]"}});
  }
  const auto add = [&](const char* title, Collective op, std::function<void(Group&)> victim, const char* part) {
    all.push_back({title, op, std::move(victim), {part, concat("rank 1: ", name(op), " #1")}});
  };
  add(
      "another reduction", Collective::all_reduce,
      [](Group& world) { world.all_reduce_(Tensor::ones({6, 2}), Reduction::max); }, "the reductions differ");
  add(
      "another reduction", Collective::reduce_scatter,
      [](Group& world) { world.reduce_scatter(Tensor::ones({6, 2}), Reduction::max); }, "the reductions differ");
  add(
      "other counts", Collective::reduce_scatter,
      [](Group& world) { world.reduce_scatter(Tensor::ones({6, 2}), Reduction::sum, {4, 1, 1}); }, "the counts differ");
  add(
      "other counts", Collective::all_gather, [](Group& world) { world.all_gather(Tensor::ones({5, 2})); },
      "the counts differ");
  add(
      "another root", Collective::broadcast, [](Group& world) { world.broadcast_(Tensor::ones({6, 2}), 0); },
      "the sources differ");
  return all;
}

}  // namespace

/// "ends" OPERATION ENDING MOMENT, or "disagrees" INDEX.
int run_rank(const RankArguments& arguments) {
  log::set_level(log::Level::kOff);
  FileStore store(arguments.store);
  Group world = gloo_group(arguments.options, store);
  if (arguments.words.at(0) == "ends") return meet_end(arguments, store, world), 0;
  const Disagreement disagreement = disagreements().at(std::stoul(arguments.words.at(1)));
  world.barrier();
  std::ofstream(arguments.output) << std::to_string(steady_seconds()) << std::flush;
  if (world.rank() != kVictim) run(world, disagreement.op, Tensor::ones({6, 2}));
  if (world.rank() == kVictim) disagreement.victim(world);
  return 0;
}

namespace {

void expect_has(const std::string& text, const std::string& part) {
  EXPECT_NE(text.find(part), std::string::npos) << text << "\nlacks " << part;
}

int faults = 0;  ///< worlds that this program has seen fail

/// Runs a world for each entry of `words`, some at a time, and checks each.
void for_each_world(const std::vector<std::vector<std::string>>& words, size_t at_once, const ProcessOptions& options,
                    const std::function<void(size_t, Processes&)>& check) {
  for (size_t begin = 0; begin < words.size(); begin += at_once) {
    std::vector<std::unique_ptr<Processes>> worlds;
    for (size_t i = begin; i < std::min(begin + at_once, words.size()); ++i)
      worlds.push_back(std::make_unique<Processes>(kRanks, std::vector(1, words[i]), options));
    for (size_t i = 0; i < worlds.size(); ++i, ++faults) {
      check(begin + i, *worlds[i]);
      worlds[i]->end_all();
      EXPECT_EQ(worlds[i]->left_behind(), "");
    }
  }
}

/// The victim's end, named by both others within five seconds.
void expect_end_named(Processes& world, Collective op, Ending ending, Moment moment) {
  std::vector<Processes::Outcome> survivors;
  for (const int rank : {0, 2}) {
    const auto& outcome = survivors.emplace_back(world.wait(rank, 30));
    EXPECT_FALSE(outcome.timed_out) << "rank " << rank << " hangs";
    EXPECT_EQ(outcome.code, 7) << "rank " << rank << ": " << outcome.err;
    expect_has(outcome.err, ", rank at fault 1:");
    expect_has(outcome.err, ending == Ending::stop ? "rank 1 of 3 has given no sign of life for "
                                                   : "rank 1 of 3 is dead: its connection closed");
    // The victim's operation, and where this rank was: operation, number, group and place.
    const bool pair = op == Collective::send, exact = !pair && moment != Moment::moving;
    // A barrier to which all have come is over: who stopped in it is missed in the next.
    const bool over = moment == Moment::after || (op == Collective::barrier && ending == Ending::stop);
    std::string last = "its last operation was ";
    if (moment == Moment::before) last += "barrier #2 of group \"world\"";
    if (moment != Moment::before && !pair) last += concat(name(op), exact ? " #3 of group \"world\"" : " #");
    expect_has(outcome.err, last);
    std::string here = concat("this is rank ", rank, ", in ");
    if (pair) here += rank == 0 ? "send #" : "recv #";
    if (!pair) here += concat(name(op), exact && !over ? " #3 of group \"world\"" : " #");
    expect_has(outcome.err, here);
    expect_has(outcome.err, "at dist_fault_test.cpp:");
  }
  world.send(kVictim, SIGKILL);  // if it was only stopped
  const std::string ended = world.wait(kVictim).output;
  ASSERT_NE(ended, "");
  for (const auto& outcome : survivors) EXPECT_LT(outcome.failed_at - std::stod(ended), 5);
}

class Fault : public ::testing::TestWithParam<std::tuple<Ending, Moment>> {};

TEST_P(Fault, IsNamedByEverySurvivorOfEveryOperation) {
  if (*why_no_gloo() != '\0') GTEST_SKIP() << why_no_gloo();
  const auto [ending, moment] = GetParam();
  ProcessOptions options;
  if (ending == Ending::stop) options.heartbeat = 0.2, options.silence = 2;
  std::vector<Collective> ops(std::begin(kOperations), std::end(kOperations));
  ops.push_back(Collective::send);
  std::vector<std::vector<std::string>> words;
  for (const Collective op : ops) {
    words.push_back({"ends", std::to_string(static_cast<int>(op)), std::to_string(static_cast<int>(ending)),
                     std::to_string(static_cast<int>(moment))});
  }
  // Worlds that move data keep processors busy; those that wait for a stopped rank do not.
  for_each_world(words, moment == Moment::moving && ending != Ending::stop ? 3 : 7, options,
                 [&](size_t i, Processes& world) {
                   const ::testing::ScopedTrace trace(__FILE__, __LINE__, name(ops[i]));
                   expect_end_named(world, ops[i], std::get<0>(GetParam()), std::get<1>(GetParam()));
                 });
}

INSTANTIATE_TEST_SUITE_P(Of, Fault,
                         ::testing::Combine(::testing::Values(Ending::kill, Ending::segv, Ending::exit, Ending::stop),
                                            ::testing::Values(Moment::before, Moment::in, Moment::moving,
                                                              Moment::after)),
                         [](const auto& info) {
                           return std::string(kEndings[static_cast<int>(std::get<0>(info.param))]) +
                                  kMoments[static_cast<int>(std::get<1>(info.param))];
                         });

TEST(Faults, ADisagreementIsNamedOnAllRanksWithinTwoSeconds) {
  if (*why_no_gloo() != '\0') GTEST_SKIP() << why_no_gloo();
  const std::vector<Disagreement> all = disagreements();
  std::vector<std::vector<std::string>> words;
  for (size_t i = 0; i < all.size(); ++i) words.push_back({"disagrees", std::to_string(i)});
  for_each_world(words, 7, {}, [&](size_t i, Processes& world) {
    const ::testing::ScopedTrace trace(__FILE__, __LINE__, concat(name(all[i].op), ", ", all[i].title));
    const bool left = all[i].title == "none: it has left";
    double begin = 0;
    const auto outcomes = world.wait_all(30);
    for (const auto& outcome : outcomes) begin = std::max(begin, std::atof(outcome.output.c_str()));
    for (size_t rank = 0; rank < outcomes.size(); ++rank) {
      if (left && rank == kVictim) continue;
      EXPECT_EQ(outcomes[rank].code, 7) << outcomes[rank].err;
      EXPECT_LT(outcomes[rank].failed_at - begin, 2);
      for (const std::string& part : all[i].parts) expect_has(outcomes[rank].err, part);
      expect_has(outcomes[rank].err, "at dist_fault_test.cpp:");
    }
  });
}

TEST(Faults, ADeathIsNamedWithinTwoSecondsAndAStopWithinFiveWithTheUsualHeartbeats) {
  if (*why_no_gloo() != '\0') GTEST_SKIP() << why_no_gloo();
  for (const Ending ending : {Ending::kill, Ending::stop}) {
    for_each_world({{"ends", std::to_string(static_cast<int>(Collective::all_reduce)),
                     std::to_string(static_cast<int>(ending)), std::to_string(static_cast<int>(Moment::in))}},
                   1, {}, [&](size_t, Processes& world) {
                     std::vector<double> failed_at;
                     for (const int rank : {0, 2}) failed_at.push_back(world.wait(rank, 30).failed_at);
                     world.send(kVictim, SIGKILL);
                     const double ended = std::stod(world.wait(kVictim).output);
                     // A stopped process is given 3 s.
                     for (const double at : failed_at) EXPECT_LT(at - ended, ending == Ending::stop ? 5 : 2);
                   });
  }
}

class Count : public ::testing::Environment {
  void TearDown() override { std::printf("%d worlds failed and were looked at\n", faults); }
};
[[maybe_unused]] const auto* const kCount = ::testing::AddGlobalTestEnvironment(new Count);

}  // namespace
}  // namespace weft::dist::testing
