// What the other ranks get when one ends or is stopped in the first moments of a world, before there is an operation
// that could miss it, or in the last ones.
#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/log.h"
#include "dist/mesh.h"
#include "tests/dist_endings.h"
#include "tests/dist_processes.h"

namespace weft::dist::testing {

namespace {

/// Points in the life of a world, in their order. From kConnected on all have it.
const std::vector<std::string> kPoints = {"listed",          "linked",    "addressed",    "paired with one",
                                          "paired with all", "connected", "one subgroup", "at the end"};
constexpr size_t kConnected = 5;
constexpr int kRanks = 4;

/// Tells when this process has left its address.
class WatchedStore final : public FileStore {
 public:
  WatchedStore(const std::string& directory, std::function<void()> listed)
      : FileStore(directory), listed_(std::move(listed)) {}
  void set(const std::string& key, const std::string& value) override {
    FileStore::set(key, value);
    if (key.starts_with("address/")) listed_();
  }

 private:
  std::function<void()> listed_;
};

}  // namespace

/// VICTIM ENDING POINT
int run_rank(const RankArguments& arguments) {
  log::set_level(log::Level::kOff);
  ProcessOptions options = arguments.options;
  const bool victim = options.rank == std::stoi(arguments.words.at(0));
  const auto ending = static_cast<Ending>(std::stoi(arguments.words.at(1)));
  const std::string& point = arguments.words.at(2);
  const auto reach = [&](const std::string& reached) {
    if (victim && reached == point) end(ending, arguments.output);
  };
  int pairs = 0;
  options.connecting = [&](std::string_view reached) {
    if (reached != "paired") return reach(std::string(reached));
    if (++pairs == 1) reach("paired with one");
    if (pairs == kRanks - 1) reach("paired with all");
  };
  WatchedStore store(arguments.store, [&] { reach("listed"); });
  Group world = gloo_group(options, store);
  // All are past a point before anything ends there.
  const auto all_reach = [&](const std::string& reached) {
    store.set(concat(reached, '/', options.rank), "");
    for (int rank = 0; rank < kRanks; ++rank) store.get(concat(reached, '/', rank), 30);
    reach(reached);
  };
  all_reach("connected");
  const Mesh mesh = Mesh::parse("dp=2,tp=2");
  const Axis dp = Axis::dp, tp = Axis::tp;
  Group rows = world.subgroup(mesh, std::span(&dp, 1));
  reach("one subgroup");
  Group columns = world.subgroup(mesh, std::span(&tp, 1));
  const Tensor t = Tensor::ones({8});
  for (int i = 0; i < 3; ++i) rows.all_reduce_(t), columns.all_reduce_(t), world.barrier();
  all_reach("at the end");
  return 0;
}

namespace {

class ConnectFault : public ::testing::TestWithParam<Ending> {};

TEST_P(ConnectFault, IsNamedByEverySurvivorAtEveryPointWhoeverItIs) {
  if (*why_no_gloo() != '\0') GTEST_SKIP() << why_no_gloo();
  const Ending ending = GetParam();
  ProcessOptions options;
  if (ending == Ending::stop) options.heartbeat = 0.2, options.silence = 2;
  for (size_t point = 0; point < kPoints.size(); ++point) {
    std::vector<std::unique_ptr<Processes>> worlds;
    for (int victim = 0; victim < kRanks; ++victim) {
      const std::vector<std::string> words = {std::to_string(victim), std::to_string(static_cast<int>(ending)),
                                              kPoints[point]};
      worlds.push_back(std::make_unique<Processes>(kRanks, std::vector(1, words), options));
    }
    for (int victim = 0; victim < kRanks; ++victim) {
      const ::testing::ScopedTrace trace(__FILE__, __LINE__, concat("rank ", victim, ", ", kPoints[point]));
      Processes& world = *worlds[static_cast<size_t>(victim)];
      const bool last = kPoints[point] == "at the end";
      std::vector<std::pair<int, Processes::Outcome>> survivors;
      for (int rank = 0; rank < kRanks; ++rank) {
        if (rank != victim) survivors.emplace_back(rank, world.wait(rank, 30));
      }
      world.send(victim, SIGKILL);  // if it was only stopped
      const std::string ended = world.wait(victim).output;
      ASSERT_NE(ended, "");
      for (const auto& [rank, outcome] : survivors) {
        EXPECT_FALSE(outcome.timed_out) << "rank " << rank << " hangs";
        // 1 where Gloo's thread has seen it, for which this process ends with the same words.
        const bool by_gloo = outcome.code == 1 && point < kConnected;
        EXPECT_EQ(outcome.code, last ? 0 : by_gloo ? 1 : 7) << "rank " << rank << ": " << outcome.err;
        if (last) continue;  // nobody needs it any more
        if (!by_gloo) {
          EXPECT_LT(outcome.failed_at - std::stod(ended), 5) << outcome.err;
        }
        const auto expect_has = [&text = outcome.err](const std::string& part) {
          EXPECT_NE(text.find(part), std::string::npos) << text << "\nlacks " << part;
        };
        if (!by_gloo) expect_has(concat(", rank at fault ", victim, ":"));
        expect_has(concat("rank ", victim, kPoints[point] == "listed" ? " cannot be reached" : " of 4 "));
        expect_has(concat("this is rank ", rank, ", "));
        expect_has(point < kConnected ? "connecting group \"world\" of ranks 0, 1, 2, 3" : ", in ");
      }
      world.end_all();
      EXPECT_EQ(world.left_behind(), "");
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Of, ConnectFault, ::testing::Values(Ending::kill, Ending::exit, Ending::stop),
                         [](const auto& info) { return kEndings[static_cast<int>(info.param)]; });

}  // namespace
}  // namespace weft::dist::testing
