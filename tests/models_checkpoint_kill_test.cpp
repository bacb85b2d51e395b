// Checkpoints that several processes save together, one of which is killed after each step of the save in turn.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "models/checkpoint/saver.h"
#include "tests/dist_processes.h"

namespace weft {
namespace {

namespace fs = std::filesystem;

constexpr int kRanks = 3;

/// Tensors cut into ranges of elements, and a replica; every value is the step.
ShardedContent content_of(int64_t step, int rank) {
  ShardedContent content;
  content.step = step;
  content.run_id = "run";
  content.text_files = {{"config.toml", "lr = 0.1\n"}};
  const Shape shape = {5, 7};
  const TensorPart all = TensorPart::all(shape), part = all.elements(35 * rank / kRanks, 35 * (rank + 1) / kRanks);
  content.model.push_back({"w", Tensor::full(part.shape(), static_cast<double>(step)), part});
  content.optimizer.push_back({"w.mean", Tensor::full(part.shape(), static_cast<double>(step)), part});
  content.optimizer.push_back({"steps", Tensor::from(std::vector<int64_t>{step}, {1})});
  return content;
}

void expect_whole(const std::string& path, int64_t step) {
  const CheckpointContent content = load_checkpoint(path);
  EXPECT_EQ(content.step, step);
  ASSERT_EQ(content.model.size(), 1u);
  ASSERT_EQ(content.optimizer.size(), 2u);
  for (const NamedTensors* tensors : {&content.model, &content.optimizer}) {
    for (const auto& [name, tensor] : *tensors) {
      for (const double value : tensor.to_vector<double>()) ASSERT_EQ(value, static_cast<double>(step)) << name;
    }
  }
}

std::vector<std::string> names_in(const std::string& root) {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(root)) names.push_back(entry.path().filename());
  std::sort(names.begin(), names.end());
  return names;
}

}  // namespace

namespace dist::testing {

/// ROOT STEP MODE RANK COUNT: saves once; the rank kills itself after its COUNT-th step (-1: never), and lists its
/// steps.
int run_rank(const RankArguments& arguments) {
  const std::string& root = arguments.words.at(0);
  const bool background = arguments.words.at(2) == "background";
  const int doomed = std::stoi(arguments.words.at(3)), kill_at = std::stoi(arguments.words.at(4));
  FileStore store(arguments.store);
  Group world = gloo_group(arguments.options, store);
  std::ofstream steps(arguments.output);
  std::atomic<int> count = 0;
  SaveCheckpointOptions options;
  options.keep_n = 1;
  options.after_step = [&](std::string_view step) {
    steps << step << std::endl;
    if (world.rank() == doomed && count++ == kill_at) ::kill(::getpid(), SIGKILL);
  };
  CheckpointSaver saver(root, &world, options);
  const ShardedContent content = content_of(std::stoll(arguments.words.at(1)), world.rank());
  if (!background) {
    saver.save(content);
    return 0;
  }
  saver.begin(content);
  for (;;) {
    // What a training step does, and its flag.
    const Tensor writing = Tensor::from(std::vector<int64_t>{saver.writing() ? 1 : 0}, {1});
    world.all_reduce_(writing, Reduction::max);
    if (saver.poll(writing.item() > 0)) return 0;
  }
}

}  // namespace dist::testing

namespace {

class CheckpointKill : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "weft-kill-XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    folder_ = pattern, root_ = folder_ + "/out";
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::vector<dist::testing::Processes::Outcome> save(int64_t step, const char* mode, int doomed, int kill_at) {
    dist::testing::Processes ranks(
        kRanks, {{root_, std::to_string(step), mode, std::to_string(doomed), std::to_string(kill_at)}});
    return ranks.wait_all();
  }

  std::string folder_, root_;
};

TEST_F(CheckpointKill, ARankThatDiesAfterAnyStepOfASaveCostsNothing) {
  for (const auto& outcome : save(10, "at once", -1, -1)) ASSERT_EQ(outcome.code, 0) << outcome.err;
  expect_whole(root_ + "/step_00000010", 10);
  const std::string before = folder_ + "/before";
  fs::rename(root_, before);
  const auto prepare = [&] {
    fs::remove_all(root_);
    fs::copy(before, root_, fs::copy_options::recursive);
  };
  int kills = 0, kept_old = 0, have_new = 0;
  for (const char* mode : {"at once", "background"}) {
    prepare();
    const auto whole = save(20, mode, -1, -1);
    for (int rank = 0; rank < kRanks; ++rank) {
      std::vector<std::string> steps;
      std::istringstream lines(whole[static_cast<size_t>(rank)].output);
      for (std::string line; std::getline(lines, line);) steps.push_back(line);
      ASSERT_GE(steps.size(), rank == 0 ? 12u : 5u) << whole[static_cast<size_t>(rank)].err;
      for (size_t at = 0; at < steps.size(); ++at) {
        SCOPED_TRACE(concat(mode, ", rank ", rank, " after ", steps[at]));
        prepare();
        const auto outcomes = save(20, mode, rank, static_cast<int>(at));
        EXPECT_EQ(outcomes[static_cast<size_t>(rank)].code, -SIGKILL);
        ++kills;
        const LatestCheckpoint latest = find_latest_checkpoint(root_);
        ASSERT_TRUE(latest.path);
        EXPECT_TRUE(latest.rejected.empty());  // nothing half-written has the name of a checkpoint
        const int64_t step = read_checkpoint_manifest(*latest.path).step;
        (step == 10 ? kept_old : have_new) += 1;
        expect_whole(*latest.path, step);
        // Until all ranks know that all have written, rank 0 renames nothing.
        const bool before_rename = rank > 0 && steps[at] != "written" && steps[at] != "end";
        EXPECT_TRUE(!before_rename || step == 10);
        EXPECT_TRUE(steps[at] != "end" || step == 20);
        // The next save tidies up.
        CheckpointContent next;
        next.step = 30;
        save_checkpoint(root_, next, {.keep_n = 1});
        for (const std::string& name : names_in(root_)) EXPECT_FALSE(name.starts_with(".tmp")) << name;
      }
    }
  }
  EXPECT_GE(kills, 40);
  EXPECT_GE(kept_old, 20);
  EXPECT_GE(have_new, 12);
}

}  // namespace
}  // namespace weft
