// Groups whose ranks are processes, which exchange data with Gloo.
#include <gtest/gtest.h>

#include <fstream>
#include <mutex>
#include <thread>

#include "dist/threads.h"
#include "tests/dist_processes.h"
#include "tests/dist_programs.h"
#include "tests/error_of.h"

namespace weft::dist {
namespace testing {

int run_rank(const RankArguments& arguments) {
  const std::string& what = arguments.words.at(0);
  FileStore store(arguments.store);
  Group world = gloo_group(arguments.options, store);
  const int me = world.rank();
  if (what == "disagree") {
    const std::string& how = arguments.words.at(1);
    world.barrier();
    const bool odd = me == 1;
    if (how == "op") odd ? world.barrier() : world.all_reduce_(Tensor::ones({4}));
    if (how == "dtype") world.all_reduce_(Tensor::ones({4}, odd ? DType::f64 : DType::f32));
    if (how == "shape") world.all_reduce_(odd ? Tensor::ones({3, 2}) : Tensor::ones({2, 3}));
    if (how == "reduction") world.all_reduce_(Tensor::ones({4}), odd ? Reduction::max : Reduction::sum);
    if (how == "counts") world.all_gather(Tensor::ones({odd ? 2 : 1}));
    if (how == "root") world.broadcast_(Tensor::ones({4}), odd);
    if (how == "message")
      odd ? world.recv_(Tensor::ones({5}), 0) : me == 0 ? world.send(Tensor::ones({4}), 1) : world.barrier();
    if (how == "receivers") world.recv_(Tensor::ones({4}), (me + 1) % world.size());
    if (how == "order") {
      const std::vector<int> all = {0, 1, 2};
      Group a = world.subgroup(all, "a"), b = world.subgroup(all, "b");
      (odd ? a : b).all_reduce_(Tensor::ones({4}));
      (odd ? b : a).all_reduce_(Tensor::ones({4}));
    }
    if (how == "members") {
      const std::vector<int> some = {0, 1}, all = {0, 1, 2};
      world.subgroup(odd ? some : all, "part").barrier();
    }
    if (how == "missing" && !odd) world.barrier();
    return 0;
  }
  if (what == "busy") {
    // Computes much longer than a stopped process is given.
    if (me == 1) {
      const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(2500);
      while (std::chrono::steady_clock::now() < end) {
      }
    }
    const Tensor t = Tensor::ones({3});
    world.all_reduce_(t);
    return t.to_vector<float>() == std::vector<float>(3, static_cast<float>(world.size())) ? 0 : 1;
  }
  const uint64_t digest = program(what).run(world);
  std::ofstream(arguments.output) << digest;
  return 0;
}

namespace {

class Gloo : public ::testing::TestWithParam<std::tuple<int, size_t>> {};

TEST_P(Gloo, ConformsWithTheBitsOfThreads) {
  if (*why_no_gloo() != '\0') GTEST_SKIP() << why_no_gloo();
  const auto [ranks, which] = GetParam();
  const Program& program = programs()[which];
  Processes processes(ranks, {{program.name}});
  std::vector<uint64_t> digests(static_cast<size_t>(ranks));
  run_threads(ranks, [&](Group& world) { digests[static_cast<size_t>(world.rank())] = program.run(world); });
  const auto outcomes = processes.wait_all(120);
  for (size_t rank = 0; rank < outcomes.size(); ++rank) {
    EXPECT_EQ(outcomes[rank].code, 0) << "rank " << rank << ": " << outcomes[rank].err;
    EXPECT_EQ(outcomes[rank].output, std::to_string(digests[rank]))
        << "rank " << rank << " has other bits than threads";
  }
}

INSTANTIATE_TEST_SUITE_P(
    Group, Gloo, ::testing::Combine(::testing::Values(1, 2, 3, 4), ::testing::Range<size_t>(0, programs().size())),
    [](const auto& info) {
      return std::string(programs()[std::get<1>(info.param)].name) + "On" + std::to_string(std::get<0>(info.param));
    });

struct Disagreement {
  const char* how;
  std::vector<std::string> parts;  ///< of the error on every rank
};

class GlooDisagreement : public ::testing::TestWithParam<Disagreement> {};

TEST_P(GlooDisagreement, IsAnErrorOnAllRanksThatNamesEachCall) {
  if (*why_no_gloo() != '\0') GTEST_SKIP() << why_no_gloo();
  Processes processes(3, {{"disagree", GetParam().how}});
  for (const auto& outcome : processes.wait_all()) {
    EXPECT_EQ(outcome.code, 7) << outcome.err;
    for (const std::string& part : GetParam().parts) {
      EXPECT_NE(outcome.err.find(part), std::string::npos) << outcome.err << "\nlacks " << part;
    }
    EXPECT_NE(outcome.err.find("the last operations of this process"), std::string::npos) << outcome.err;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Kinds, GlooDisagreement,
    ::testing::Values(Disagreement{"op",
                                   {"different operations", "rank 0: all_reduce #1", "rank 1: barrier #1",
                                    "rank 2: all_reduce #1", "at dist_process_test.cpp:"}},
                      Disagreement{"dtype",
                                   {"dtypes differ", "rank 1: all_reduce #1 of group \"world\", f64 [4]",
                                    "rank 2: all_reduce #1 of group \"world\", f32 [4]"}},
                      Disagreement{"shape", {"shapes differ", "[3, 2]", "[2, 3]"}},
                      Disagreement{"reduction", {"reductions differ", "sum", "max"}},
                      Disagreement{"counts", {"counts differ", "{2, 2, 2}", "{1, 1, 1}"}},
                      Disagreement{"root", {"sources differ", "from rank 0", "from rank 1"}},
                      Disagreement{"message", {"shapes differ", "send #0", "recv #0"}},
                      Disagreement{
                          "receivers",
                          {"circle", "rank 0 waits for rank 1", "rank 1 waits for rank 2", "rank 2 waits for rank 0"}},
                      Disagreement{"members", {"circle", "they mean groups of different members by \"part\""}},
                      Disagreement{"order", {"circle", "group \"a\"", "group \"b\""}}),
    [](const auto& info) { return std::string(info.param.how); });

TEST(GlooGroup, ARankThatLeavesIsNamedWhereItIsNeeded) {
  if (*why_no_gloo() != '\0') GTEST_SKIP() << why_no_gloo();
  Processes processes(3, {{"disagree", "missing"}});
  const auto outcomes = processes.wait_all();
  EXPECT_EQ(outcomes[1].code, 0) << outcomes[1].err;
  for (const int rank : {0, 2}) {
    const auto& outcome = outcomes[static_cast<size_t>(rank)];
    EXPECT_EQ(outcome.code, 7);
    EXPECT_NE(outcome.err.find("rank 1 of 3 has left and will not come to barrier #1"), std::string::npos)
        << outcome.err;
  }
}

TEST(GlooGroup, ARankThatOnlyComputesIsNotDead) {
  if (*why_no_gloo() != '\0') GTEST_SKIP() << why_no_gloo();
  ProcessOptions options;
  options.heartbeat = 0.1;
  options.silence = 1;
  Processes processes(3, {{"busy"}}, options);
  for (const auto& outcome : processes.wait_all()) {
    EXPECT_EQ(outcome.code, 0) << outcome.err;
    EXPECT_GT(outcome.seconds, 2.4);
  }
}

TEST(GlooGroup, ProcessesThatDoNotComeAreNamed) {
  if (*why_no_gloo() != '\0') GTEST_SKIP() << why_no_gloo();
  const std::string directory = ::testing::TempDir() + "weft_store_" + std::to_string(::getpid());
  FileStore store(directory);
  ProcessOptions options;
  options.size = 3;
  options.connect_timeout = 0.3;
  EXPECT_ERROR(ErrorKind::kIo, "rank 0 of 3 has waited 0.3 s for ranks 1, 2", gloo_group(options, store));
  options.rank = 1;  // finds the word that rank 0 has left
  EXPECT_ERROR(ErrorKind::kIo, "rank 0 of 3 has waited 0.3 s for ranks 1, 2", gloo_group(options, store));
  std::filesystem::remove_all(directory);
}

TEST(GlooGroup, OptionsThatMakeNoSenseAreErrors) {
  if (*why_no_gloo() != '\0') GTEST_SKIP() << why_no_gloo();
  const std::string directory = ::testing::TempDir() + "weft_store_" + std::to_string(::getpid());
  FileStore store(directory);
  ProcessOptions options;
  options.rank = 2;
  EXPECT_ERROR(ErrorKind::kUsage, "rank 2 of 1 is no rank", gloo_group(options, store));
  options.rank = 0;
  options.silence = 0.5;
  EXPECT_ERROR(ErrorKind::kUsage, "less than three heartbeats", gloo_group(options, store));
  options = {};
  options.timeout = 0;
  EXPECT_ERROR(ErrorKind::kUsage, "times must be positive", gloo_group(options, store));
  options = {};
  options.address = "no.such.host";
  EXPECT_ERROR(ErrorKind::kUsage, "\"no.such.host\" cannot be used", gloo_group(options, store));
  std::filesystem::remove_all(directory);
}

TEST(NcclGroup, ABuildWithoutItSaysSo) {
  FileStore store(::testing::TempDir());
  EXPECT_STREQ(why_no_nccl(), "this build has no NCCL");
  EXPECT_ERROR(ErrorKind::kUsage, "this build has no NCCL", nccl_group({}, store, 0));
}

TEST(FileStore, KeysAreSeenWhenTheyAreComplete) {
  const std::string directory = ::testing::TempDir() + "weft_store_" + std::to_string(::getpid());
  FileStore store(directory), other(directory);
  const std::string value(100000, 'x');
  std::thread writer([&] { store.set("a/b", value); });
  EXPECT_EQ(other.get("a/b", 10), value);
  writer.join();
  EXPECT_ERROR(ErrorKind::kIo, "nobody has set \"c\"", other.get("c", 0.05));
  std::filesystem::remove_all(directory);
}

}  // namespace
}  // namespace testing
}  // namespace weft::dist
