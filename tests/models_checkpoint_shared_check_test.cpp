// Ranks look at checkpoints together: no file is read by two of them, and all come to the same verdict.
#include "models/checkpoint/shared_check.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <mutex>

#include "dist/texts.h"
#include "dist/threads.h"
#include "tests/apps_process.h"
#include "tests/error_of.h"

namespace weft {
namespace {

namespace fs = std::filesystem;
using apps_test::Scratch;

/// Four files: two of tensors, two of text.
std::string save(const fs::path& root, int64_t step) {
  CheckpointContent content;
  content.step = step;
  content.model = {{"weight", Tensor::full({1000}, 0.5)}};
  content.optimizer = {{"weight.m", Tensor::full({1000}, 1.5)}, {"weight.v", Tensor::full({1000}, 2.5)}};
  content.text_files = {{"config.toml", "steps = 3\n"}, {"tokenizer.json", "{}"}};
  return save_checkpoint(root.string(), content);
}

void flip_a_bit(const fs::path& file) {
  std::string bytes = apps_test::content_of(file);
  bytes[bytes.size() / 2] ^= 4;
  apps_test::write_content(file, bytes);
}

enum class Through { group, store };

/// What each rank read, and what `look` gave it, as text.
struct Looks {
  std::map<std::string, int> reads;  ///< of each file's name, by all ranks
  std::vector<int64_t> bytes;        ///< that each rank read
  std::vector<std::string> answers;  ///< of each
};

Looks look(int size, Through through, const std::function<std::string(const CheckingRanks&)>& look) {
  Looks looks{{}, std::vector<int64_t>(static_cast<size_t>(size)), std::vector<std::string>(static_cast<size_t>(size))};
  std::mutex mutex;
  const Scratch scratch;
  dist::run_threads(size, [&](dist::Group& world) {
    dist::FileStore store(scratch.path() / "store");
    const auto rank = static_cast<size_t>(world.rank());
    int exchange = 0;
    CheckingRanks ranks;
    ranks.rank = world.rank(), ranks.size = world.size();
    ranks.gather = [&](const std::string& own) {
      if (through == Through::group) return dist::gather_texts(world, own);
      return dist::gather_texts(store, concat("exchange ", exchange++), world.rank(), world.size(), own, 60);
    };
    ranks.on_read = [&](const CheckpointFile& file) {
      const std::lock_guard lock(mutex);
      ++looks.reads[file.name];
      looks.bytes[rank] += file.size;
    };
    looks.answers[rank] = look(ranks);
    world.barrier();
  });
  return looks;
}

std::string text_of(const LatestCheckpoint& latest) {
  std::string text = latest.path.value_or("none");
  for (const std::string& line : latest.messages()) text += "\n" + line;
  return text;
}

TEST(SharedCheck, EachFileIsReadOnceAndTheBytesAreSharedOut) {
  const Scratch root;
  const std::string path = save(root.path(), 7);
  for (const int size : {1, 2, 3, 5}) {
    for (const Through through : {Through::group, Through::store}) {
      const Looks looks = look(size, through, [&](const CheckingRanks& ranks) {
        EXPECT_TRUE(verify_checkpoint(path, ranks).empty());
        return text_of(find_latest_checkpoint(root.path().string(), ranks));
      });
      EXPECT_EQ(looks.reads.size(), 4u);
      for (const auto& [name, count] : looks.reads) EXPECT_EQ(count, 2) << name << ", in two looks by " << size;
      for (const std::string& answer : looks.answers) EXPECT_EQ(answer, path);
      // The two files of tensors are nearly all bytes, and not on the same rank.
      if (size == 1) continue;
      EXPECT_LT(*std::max_element(looks.bytes.begin(), looks.bytes.end()), 2 * 10'000);
    }
  }
}

TEST(SharedCheck, DamageThatOneRankFindsMakesAllFallBackAndIsNamed) {
  const Scratch root;
  const std::string good = save(root.path(), 7), bad = save(root.path(), 8), torn = save(root.path(), 9);
  flip_a_bit(fs::path(bad) / "optimizer.safetensors");
  fs::resize_file(fs::path(torn) / "tokenizer.json", 1);
  const LatestCheckpoint alone = find_latest_checkpoint(root.path().string());
  EXPECT_EQ(alone.path, good);
  for (const int size : {2, 4}) {
    const Looks looks = look(size, Through::store, [&](const CheckingRanks& ranks) {
      return text_of(find_latest_checkpoint(root.path().string(), ranks));
    });
    for (const auto& [name, count] : looks.reads) EXPECT_EQ(count, 3) << name;
    for (const std::string& answer : looks.answers) {
      EXPECT_EQ(answer, looks.answers[0]);
      EXPECT_TRUE(answer.starts_with(good + "\n" + torn + " is not used: rank ")) << answer;
      EXPECT_NE(answer.find("\n" + bad + " is not used: rank "), std::string::npos) << answer;
      EXPECT_NE(answer.find("optimizer.safetensors: has XXH3-128 "), std::string::npos) << answer;
      EXPECT_NE(answer.find("the newest intact checkpoint is " + good), std::string::npos) << answer;
    }
  }
}

TEST(SharedCheck, WhatRankZeroCannotListFailsOnAllRanks) {
  const Scratch scratch;
  apps_test::write_content(scratch.path() / "file", "");
  look(3, Through::group, [&](const CheckingRanks& ranks) {
    EXPECT_FALSE(find_latest_checkpoint((scratch.path() / "nothing").string(), ranks).path);
    EXPECT_ERROR(ErrorKind::kIo, "cannot list", find_latest_checkpoint((scratch.path() / "file").string(), ranks));
    return "";
  });
}

TEST(SharedCheck, AVerifiedCheckpointIsOpenedWithoutReadingItsTensorsOnceMore) {
  const Scratch root;
  const std::string path = save(root.path(), 7);
  EXPECT_EQ(open_verified_checkpoint(path).model.load("weight").to_vector<float>(), std::vector<float>(1000, 0.5f));
  flip_a_bit(fs::path(path) / "model.safetensors");
  EXPECT_NO_THROW(open_verified_checkpoint(path));
  EXPECT_THROW(open_checkpoint(path), Error);
  fs::resize_file(fs::path(path) / "model.safetensors", 100);
  EXPECT_ERROR(ErrorKind::kData, "the file is truncated", open_verified_checkpoint(path));
}

}  // namespace
}  // namespace weft
