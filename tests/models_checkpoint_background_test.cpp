// Writing checkpoints beside training: that the writer gives way, that nothing keeps it from ending, and that what it
// writes is what a save at once writes.
#include <gtest/gtest.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <ctime>
#include <filesystem>
#include <set>
#include <thread>

#include "core/file.h"
#include "core/thread_pool.h"
#include "models/checkpoint/background.h"
#include "models/checkpoint/saver.h"
#include "models/checkpoint/snapshot.h"

namespace weft {
namespace {

namespace fs = std::filesystem;
using checkpoint::BackgroundWork;
using Clock = std::chrono::steady_clock;

void sleep_ms(int milliseconds) { std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds)); }

double thread_seconds() {
  timespec time{};
  ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
}

void keep_processor(double seconds) {
  for (const double end = thread_seconds() + seconds; thread_seconds() < end;) {
  }
}

bool gives_way() { return ::sched_getscheduler(0) == SCHED_IDLE; }

void wait_for(const BackgroundWork& work) {
  while (!work.done()) sleep_ms(1);
}

/// Threads that want every processor all the time.
class Busy {
 public:
  Busy() {
    for (int i = 0; i < 2 * available_processors(); ++i) {
      threads_.emplace_back([this] {
        while (!stop_) keep_processor(1e-3);
      });
    }
  }
  ~Busy() {
    stop_ = true;
    for (std::thread& thread : threads_) thread.join();
  }

 private:
  std::atomic<bool> stop_ = false;
  std::vector<std::thread> threads_;
};

TEST(BackgroundWork, AThreadThatGivesWayIsInTheIdleClassOfTheSchedulerAndOfTheDisk) {
  std::thread([] {
    const checkpoint::GivenWay given = checkpoint::give_way();
    EXPECT_TRUE(given.processor);
    EXPECT_EQ(::sched_getscheduler(0), SCHED_IDLE);
    EXPECT_EQ(::syscall(SYS_ioprio_get, 1, 0) >> 13, 3);
    EXPECT_EQ(given.text, "idle class of the scheduler, idle class of the disk");
  }).join();
  EXPECT_EQ(::sched_getscheduler(0), SCHED_OTHER);
}

TEST(BackgroundWork, EveryPieceIsDoneOnceAndByOneThreadAtATime) {
  int left = 1000;
  std::atomic<int> inside = 0, calls = 0;
  BackgroundWork work([&](bool beside) {
    EXPECT_TRUE(beside);
    EXPECT_EQ(++inside, 1);
    ++calls;
    --left;
    --inside;
    return left > 0;
  });
  wait_for(work);
  work.finish();
  EXPECT_EQ(left, 0);
  EXPECT_EQ(calls, 1000);
}

TEST(BackgroundWork, ProcessorsThatAreIdleAreTakenByAThreadThatGivesWay) {
  std::atomic<bool> seen = false;
  const auto deadline = Clock::now() + std::chrono::seconds(120);
  BackgroundWork work(
      [&](bool) {
        if (gives_way()) seen = true;
        return !seen && Clock::now() < deadline;
      },
      BackgroundWork::kShare, [] { return 1.0; });
  wait_for(work);
  EXPECT_TRUE(seen);
}

TEST(BackgroundWork, TheGapsOfThreadsThatKeepAllProcessorsBusyAreLeftToThem) {
  int idle = 0, other = 0;
  BackgroundWork work(
      [&](bool) {
        ++(gives_way() ? idle : other);
        return other < 30;
      },
      0.5, [] { return 0.2; });
  wait_for(work);
  EXPECT_EQ(idle, 0);
  EXPECT_EQ(other, 30);
}

TEST(BackgroundWork, ProcessorsThatSleepAreCountedAsIdle) {
  checkpoint::IdleProcessors idle;
  EXPECT_EQ(idle(), 0);
  sleep_ms(200);
  const double some = idle();
  EXPECT_GE(some, 0);
  EXPECT_LE(some, std::thread::hardware_concurrency() * 1.2);
}

TEST(BackgroundWork, WhereNoProcessorIsIdleAShareOfOneIsTakenAtNormalPriority) {
  const Busy busy;
  constexpr double kShare = 0.05;
  int left = 40, at_a_share = 0;
  Clock::time_point began;
  double last = 0;
  BackgroundWork work(
      [&](bool) {
        const double before = thread_seconds();
        if (!gives_way()) {
          // From piece to piece of this thread are 1 / share times what the first of the two took.
          const Clock::time_point now = Clock::now();
          const double apart = std::chrono::duration<double>(now - began).count();
          EXPECT_TRUE(at_a_share++ == 0 || apart >= last / kShare * 0.9) << apart << " after " << last;
          began = now;
        }
        keep_processor(1e-3);
        if (!gives_way()) last = thread_seconds() - before;
        return --left > 0;
      },
      kShare);
  wait_for(work);
  EXPECT_EQ(left, 0);
  EXPECT_GT(at_a_share, 0);
}

TEST(BackgroundWork, AThreadThatLosesItsProcessorWithinAPieceIsGivenNoMore) {
  std::atomic<bool> stuck = false;
  int idle_after = 0, other_after = 0, before = 0;
  BackgroundWork work(
      [&](bool) {
        const bool idle = gives_way();
        if (!stuck) {
          if (!idle) return ++before < 100'000;
          stuck = true;
          sleep_ms(static_cast<int>(3000 * BackgroundWork::kPatience));  // as if others had its processor
          return true;
        }
        ++(idle ? idle_after : other_after);
        sleep_ms(1);
        return other_after < 20;
      },
      BackgroundWork::kShare, [] { return 1.0; });
  wait_for(work);
  EXPECT_TRUE(stuck);
  EXPECT_EQ(idle_after, 0);
  EXPECT_EQ(other_after, 20);
}

TEST(BackgroundWork, WhoWaitsDoesWhatIsLeft) {
  const std::thread::id caller = std::this_thread::get_id();
  int left = 100, helped = 0;
  std::atomic<int> calls = 0;
  BackgroundWork work([&](bool beside) {
    ++calls;
    if (std::this_thread::get_id() == caller) {
      EXPECT_FALSE(beside);
      ++helped;
    } else {
      EXPECT_TRUE(beside);
      sleep_ms(20);
    }
    return --left > 0;
  });
  while (calls == 0) sleep_ms(1);
  work.finish();
  EXPECT_TRUE(work.done());
  EXPECT_EQ(calls, 100);
  EXPECT_GT(helped, 50);
  work.finish();  // nothing is left
  EXPECT_EQ(calls, 100);
}

TEST(BackgroundWork, TheEndOfItStopsAfterThePieceUnderWay) {
  std::atomic<int> calls = 0;
  {
    const BackgroundWork work([&](bool) {
      ++calls;
      sleep_ms(5);
      return true;
    });
    while (calls == 0) sleep_ms(1);
  }
  const int then = calls;
  sleep_ms(50);
  EXPECT_EQ(calls, then);
}

TEST(Snapshot, HoldsTheValuesOfTheMomentInMemoryOfItsOwn) {
  std::vector<Tensor> tensors;
  for (const int64_t count : {0, 1, 15, 16, 17, 1000, 32'768, 32'769, 200'003})
    tensors.push_back(Tensor::arange(count).to(DType::f32));
  tensors.push_back(Tensor::arange(15).to(DType::f64).reshape({3, 5}).transpose(0, 1));
  tensors.push_back(Tensor::arange(70'000).to(DType::bf16).narrow(0, 3, 60'001));
  tensors.push_back(Tensor::arange(100).to(DType::i64).to(DType::boolean));
  tensors.push_back(Tensor::full({}, 7.0));
  std::vector<std::vector<double>> expected;
  for (const Tensor& tensor : tensors) expected.push_back(tensor.to_vector<double>());
  const std::vector<Tensor> copies = checkpoint::snapshot(tensors);
  for (Tensor& tensor : tensors) tensor.fill_(0);
  ASSERT_EQ(copies.size(), tensors.size());
  for (size_t i = 0; i < copies.size(); ++i) {
    EXPECT_EQ(copies[i].shape(), tensors[i].shape());
    EXPECT_EQ(copies[i].dtype(), tensors[i].dtype());
    EXPECT_TRUE(copies[i].is_contiguous());
    EXPECT_EQ(copies[i].to_vector<double>(), expected[i]) << i;
  }
}

/// Saves of two files of some MB each into a directory of their own.
class SavesBesideTraining : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "weft-background-XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    folder_ = pattern, root_ = folder_ + "/out";
    fill();
  }
  void TearDown() override { fs::remove_all(folder_); }

  void fill() {
    weights_.clear(), state_.clear();
    for (int i = 0; i < 8; ++i)
      weights_.emplace_back(concat("w.", i), Tensor::arange(300'000 + i).to(DType::f32).reshape({1, -1}));
    for (int i = 0; i < 8; ++i) state_.emplace_back(concat("w.", i, ".mean"), Tensor::arange(200'001).to(DType::f32));
    state_.emplace_back("steps", Tensor::full({1}, 3, DType::i64));
  }

  ShardedContent content(int64_t step) const {
    ShardedContent all;
    all.step = step;
    all.run_id = "run";
    all.model = stored_whole(weights_);
    all.optimizer = stored_whole(state_);
    all.text_files = {{"config.toml", "lr = 0.1\n"}, {"tokenizer.json", "{}"}};
    return all;
  }
  void change(double value) {
    for (NamedTensors* tensors : {&weights_, &state_}) {
      for (auto& [name, tensor] : *tensors) tensor.fill_(value);
    }
  }
  void expect_values(const std::string& path, double value) const {
    EXPECT_TRUE(verify_checkpoint(path).empty());
    const CheckpointContent loaded = load_checkpoint(path);
    ASSERT_EQ(loaded.model.size(), weights_.size());
    for (const NamedTensors* tensors : {&loaded.model, &loaded.optimizer}) {
      for (const auto& [name, tensor] : *tensors) {
        const std::vector<double> values = tensor.to_vector<double>();
        EXPECT_EQ(std::set<double>(values.begin(), values.end()), std::set<double>{value}) << name;
      }
    }
  }
  std::set<std::string> names_in(const std::string& directory) const {
    std::set<std::string> names;
    for (const auto& entry : fs::directory_iterator(directory)) names.insert(entry.path().filename());
    return names;
  }
  /// The path of the save that is pending, as a run that only looks once a step has it.
  static std::string poll_until_there(CheckpointSaver& saver) {
    for (;;) {
      if (const auto path = saver.poll(saver.writing())) return *path;
      sleep_ms(1);
    }
  }

  std::string folder_, root_;
  NamedTensors weights_, state_;
};

TEST_F(SavesBesideTraining, HaveTheBytesOfASaveAtOnce) {
  const std::string at_once = CheckpointSaver(folder_ + "/at-once", nullptr).save(content(5));
  CheckpointSaver saver(root_, nullptr);
  saver.begin(content(5));
  change(-1);
  const std::string polled = poll_until_there(saver);
  EXPECT_FALSE(saver.pending());
  fill();
  CheckpointSaver other(folder_ + "/helped", nullptr);
  other.begin(content(5));
  change(-1);
  const std::string helped = *other.finish();
  for (const std::string& path : {polled, helped}) {
    ASSERT_EQ(names_in(path), names_in(at_once));
    for (const std::string& name : names_in(at_once)) {
      EXPECT_EQ(hash_file(path + "/" + name), hash_file(at_once + "/" + name)) << name;
    }
  }
}

TEST_F(SavesBesideTraining, FollowEachOtherEachWithTheValuesOfItsMoment) {
  CheckpointSaver saver(root_, nullptr, {.keep_n = 2});
  std::vector<std::string> paths;
  for (int step = 1; step <= 3; ++step) {
    change(step);
    saver.begin(content(step));
    change(0);
    paths.push_back(step == 2 ? poll_until_there(saver) : *saver.finish());
  }
  EXPECT_EQ(names_in(root_), (std::set<std::string>{".weft-lock", "step_00000002", "step_00000003"}));
  expect_values(paths[1], 2);
  expect_values(paths[2], 3);
}

TEST_F(SavesBesideTraining, AreEndedByWhoWaitsWhileOtherProgramsHaveTheProcessors) {
  const Busy busy;
  change(4);
  CheckpointSaver saver(root_, nullptr);
  saver.begin(content(4));
  expect_values(*saver.finish(), 4);
}

TEST_F(SavesBesideTraining, EndByThemselvesWhileOtherProgramsHaveTheProcessors) {
  change(4);
  CheckpointSaver saver(root_, nullptr);
  const Busy busy;
  saver.begin(content(4));
  expect_values(poll_until_there(saver), 4);
}

TEST_F(SavesBesideTraining, LeaveNothingWhenTheRunEndsWithAnErrorMeanwhile) {
  const std::string old = CheckpointSaver(root_, nullptr).save(content(1));
  {
    CheckpointSaver saver(root_, nullptr);
    saver.begin(content(2));
  }
  EXPECT_EQ(names_in(root_), (std::set<std::string>{".weft-lock", "step_00000001"}));
  EXPECT_TRUE(verify_checkpoint(old).empty());
}

TEST_F(SavesBesideTraining, TellOfAFullDiskAndLeaveTheCheckpointBefore) {
  const std::string old = CheckpointSaver(root_, nullptr).save(content(1));
  for (const bool wait : {false, true}) {
    rlimit before{};
    ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
    const auto handler = std::signal(SIGXFSZ, SIG_IGN);
    // The first pieces are written, a later one is refused: what a full disk does.
    const rlimit small{3 << 20, before.rlim_max};
    ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
    std::string message;
    CheckpointSaver saver(root_, nullptr);
    try {
      saver.begin(content(2));
      if (wait) {
        saver.finish();
      } else {
        poll_until_there(saver);
      }
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::kIo);
      message = error.what();
    }
    ::setrlimit(RLIMIT_FSIZE, &before);
    std::signal(SIGXFSZ, handler);
    EXPECT_NE(message.find("model.safetensors: cannot write"), std::string::npos) << message;
    EXPECT_FALSE(saver.pending());
    EXPECT_EQ(names_in(root_), (std::set<std::string>{".weft-lock", "step_00000001"}));
    EXPECT_TRUE(verify_checkpoint(old).empty());
    // The next one is whole.
    saver.begin(content(3));
    EXPECT_TRUE(verify_checkpoint(*saver.finish()).empty());
    fs::remove_all(root_ + "/step_00000003");
  }
}

}  // namespace
}  // namespace weft
