#include "core/thread_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <numeric>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "tests/error_of.h"

namespace weft {
namespace {

/// Restores the number of threads.
class ThreadPool : public ::testing::Test {
 protected:
  void TearDown() override { set_num_threads(before_); }
  const int before_ = num_threads();
};

TEST_F(ThreadPool, RunsEachIndexOnce) {
  for (const int threads : {1, 2, 3, 8}) {
    set_num_threads(threads);
    EXPECT_EQ(num_threads(), threads);
    for (const int64_t count : {0, 1, 2, 3, 7, 100, 5000}) {
      std::vector<std::atomic<int>> hits(static_cast<size_t>(count));
      parallel_tasks(count, [&](int64_t i) { ++hits[static_cast<size_t>(i)]; });
      for (const auto& hit : hits) ASSERT_EQ(hit.load(), 1) << threads << " threads, " << count << " tasks";
    }
  }
}

TEST_F(ThreadPool, NegativeCountsRunNothing) {
  parallel_tasks(-3, [](int64_t) { FAIL(); });
  parallel_for(-3, 8, [](int64_t, int64_t) { FAIL(); });
  parallel_for(0, 8, [](int64_t, int64_t) { FAIL(); });
}

TEST_F(ThreadPool, ManySmallRunsInARowLoseNothing) {
  set_num_threads(4);
  std::atomic<int64_t> sum = 0;
  for (int run = 0; run < 20000; ++run) parallel_tasks(3, [&](int64_t i) { sum += i; });
  EXPECT_EQ(sum.load(), 20000 * 3);
}

TEST_F(ThreadPool, UsesTheThreadsItWasGiven) {
  set_num_threads(3);
  std::mutex mutex;
  std::set<std::thread::id> ids;
  // Each task waits until three are at work; a pool with fewer threads would not get there.
  std::atomic<int> arrived = 0;
  parallel_tasks(3, [&](int64_t) {
    {
      const std::lock_guard lock(mutex);
      ids.insert(std::this_thread::get_id());
    }
    ++arrived;
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
    while (arrived < 3 && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
  });
  EXPECT_EQ(ids.size(), 3u);
  EXPECT_TRUE(ids.contains(std::this_thread::get_id())) << "the caller works too";
}

TEST_F(ThreadPool, PiecesDependOnCountAndGrainOnly) {
  std::vector<std::vector<std::pair<int64_t, int64_t>>> runs;
  for (const int threads : {1, 2, 5}) {
    set_num_threads(threads);
    std::vector<std::pair<int64_t, int64_t>> pieces(4);
    parallel_for(35, 10, [&](int64_t begin, int64_t end) { pieces[static_cast<size_t>(begin / 10)] = {begin, end}; });
    runs.push_back(pieces);
  }
  const std::vector<std::pair<int64_t, int64_t>> want = {{0, 10}, {10, 20}, {20, 30}, {30, 35}};
  for (const auto& run : runs) EXPECT_EQ(run, want);
}

TEST_F(ThreadPool, ForwardsAnExceptionAndGoesOnWorking) {
  for (const int threads : {1, 3}) {
    set_num_threads(threads);
    for (int round = 0; round < 50; ++round) {
      EXPECT_ERROR(ErrorKind::kValue, "[task] number 5", parallel_tasks(1000, [](int64_t i) {
                     if (i == 5) fail(ErrorKind::kValue, "task", "number ", i);
                   }));
      std::atomic<int> count = 0;
      parallel_tasks(100, [&](int64_t) { ++count; });
      EXPECT_EQ(count.load(), 100);
    }
  }
}

TEST_F(ThreadPool, OneOfManyExceptionsArrives) {
  set_num_threads(4);
  for (int round = 0; round < 50; ++round) {
    EXPECT_THROW(parallel_tasks(64, [](int64_t) { throw std::out_of_range("each"); }), std::out_of_range);
  }
}

TEST_F(ThreadPool, NestedCallsRunInlineAndCompletely) {
  set_num_threads(3);
  std::atomic<int64_t> sum = 0;
  parallel_tasks(20, [&](int64_t) {
    const auto outer = std::this_thread::get_id();
    parallel_tasks(30, [&](int64_t i) {
      EXPECT_EQ(std::this_thread::get_id(), outer);
      parallel_for(10, 3, [&](int64_t begin, int64_t end) { sum += (end - begin) * (i + 1); });
    });
  });
  EXPECT_EQ(sum.load(), 20 * 10 * (30 * 31 / 2));
}

TEST_F(ThreadPool, AnExceptionFromANestedCallArrivesToo) {
  set_num_threads(3);
  EXPECT_THROW(parallel_tasks(4, [](int64_t) { parallel_tasks(4, [](int64_t) { throw std::domain_error("inner"); }); }),
               std::domain_error);
}

TEST_F(ThreadPool, CallersOnManyThreadsAreAllServed) {
  set_num_threads(3);
  std::vector<std::thread> callers;
  std::vector<int64_t> sums(6);
  for (size_t c = 0; c < sums.size(); ++c) {
    callers.emplace_back([&, c] {
      for (int run = 0; run < 500; ++run) {
        std::vector<int64_t> values(40);
        parallel_tasks(40, [&](int64_t i) { values[static_cast<size_t>(i)] = i; });
        sums[c] += std::accumulate(values.begin(), values.end(), int64_t{0});
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (const int64_t sum : sums) EXPECT_EQ(sum, 500 * 780);
}

TEST_F(ThreadPool, RefusesSenselessNumbersOfThreads) {
  for (const int n : {0, -1, 1025}) {
    EXPECT_ERROR(ErrorKind::kValue, concat("[set_num_threads] n must be from 1 to 1024, got ", n), set_num_threads(n));
  }
  EXPECT_EQ(num_threads(), before_);
}

TEST_F(ThreadPool, AtLeastOneProcessorIsAvailable) {
  EXPECT_GE(available_processors(), 1);
  EXPECT_EQ(available_processors(), available_processors());
}

/// What a fresh process prints for the test below under a setting of WEFT_NUM_THREADS.
std::string child(const std::string& setting) {
  const std::string self = std::filesystem::read_symlink("/proc/self/exe").string();
  const std::string command = "env " + setting + " '" + self + "' --gtest_filter=ThreadPoolChild.PrintsItsThreads 2>&1";
  FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return "no child";
  std::string out;
  char buffer[512];
  while (std::fgets(buffer, sizeof buffer, pipe) != nullptr) out += buffer;
  pclose(pipe);
  return out;
}

TEST(ThreadPoolChild, PrintsItsThreads) {
  try {
    std::printf("threads=%d.\n", num_threads());
  } catch (const Error& error) {
    std::printf("kind=%s %s\n", to_string(error.kind()), error.what());
  }
}

TEST(ThreadPoolEnvironment, SetsTheFirstNumberOfThreads) {
  EXPECT_NE(child("WEFT_NUM_THREADS=3").find("threads=3."), std::string::npos);
  EXPECT_NE(child("WEFT_NUM_THREADS=1").find("threads=1."), std::string::npos);
}

TEST(ThreadPoolEnvironment, UnsetOrEmptyMeansTheAvailableProcessors) {
  const std::string want = "threads=" + std::to_string(available_processors()) + ".";
  EXPECT_NE(child("-u WEFT_NUM_THREADS").find(want), std::string::npos);
  EXPECT_NE(child("WEFT_NUM_THREADS=").find(want), std::string::npos);
}

TEST(ThreadPoolEnvironment, NonsenseIsAUsageErrorThatQuotesIt) {
  for (const std::string bad : {"0", "-2", "many", "2x", "1025", "99999999999999999999"}) {
    const std::string out = child("WEFT_NUM_THREADS=" + bad);
    EXPECT_NE(out.find("kind=usage [WEFT_NUM_THREADS] must be a whole number from 1 to 1024, got \"" + bad + "\""),
              std::string::npos)
        << out;
  }
}

}  // namespace
}  // namespace weft
