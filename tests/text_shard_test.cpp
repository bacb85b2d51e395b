#include "models/text/shard.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <numeric>
#include <string>

#include "core/error.h"

namespace weft::text {
namespace {

namespace fs = std::filesystem;
using Ids = std::vector<int32_t>;

template <class Call>
std::string message_of(ErrorKind kind, Call call) {
  try {
    call();
  } catch (const Error& error) {
    EXPECT_EQ(to_string(error.kind()), std::string(to_string(kind))) << error.what();
    return error.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return "";
}

class ShardTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "weft-shard-XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
  }
  void TearDown() override { fs::remove_all(folder_); }
  std::string at(const std::string& name) const { return (folder_ / name).string(); }

  /// The content of a shard of 4 tokens with `bytes` written over it at `offset`.
  std::string edited(size_t offset, const std::string& bytes) {
    write_shard(at("whole"), Ids{1, 2, 3, 99}, 100);
    return read_file(at("whole")).replace(offset, bytes.size(), bytes);
  }

  fs::path folder_;
};

template <class T>
std::string raw(T value) {
  return std::string(reinterpret_cast<const char*>(&value), sizeof value);
}

TEST_F(ShardTest, ReadsBackWhatWasWritten) {
  for (const int64_t vocab_size : {100, 65'536, 65'537, 2'000'000'000}) {
    Ids ids(3'000);
    std::iota(ids.begin(), ids.end(), 0);
    for (int32_t& id : ids) id = static_cast<int32_t>((int64_t{id} * 7'919'003) % vocab_size);
    ids.back() = static_cast<int32_t>(vocab_size - 1);
    write_shard(at("s"), ids, vocab_size);
    const Shard shard = Shard::open(at("s"));
    EXPECT_EQ(shard.type(), vocab_size <= 65'536 ? TokenType::kU16 : TokenType::kU32);
    EXPECT_EQ(shard.vocab_size(), vocab_size);
    EXPECT_EQ(shard.tokens(), ids);
    Ids some(7);
    shard.read(100, some);
    EXPECT_EQ(some, Ids(ids.begin() + 100, ids.begin() + 107));
    EXPECT_EQ(fs::file_size(at("s")), 64 + ids.size() * static_cast<size_t>(shard.type()));
  }
}

TEST_F(ShardTest, HasTheDocumentedLayout) {
  write_shard(at("s"), Ids{1, 2, 300, 0}, 301);
  const std::string bytes = read_file(at("s"));
  std::string expected = std::string("WEFTTOK\0", 8) + raw(uint32_t{1}) + raw(uint32_t{2}) + raw(uint64_t{4}) +
                         raw(uint64_t{301}) + raw(uint64_t{300});
  EXPECT_EQ(bytes.substr(0, 40), expected);
  EXPECT_EQ(bytes.substr(56, 8), std::string(8, '\0'));
  EXPECT_EQ(bytes.substr(64), raw(uint16_t{1}) + raw(uint16_t{2}) + raw(uint16_t{300}) + raw(uint16_t{0}));
}

TEST_F(ShardTest, PiecesMakeTheSameFileAsOneCall) {
  Ids ids(700'000);
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i * i % 50'000);
  write_shard(at("one"), ids, 50'257);
  ShardWriter writer(at("many"), 50'257);
  for (size_t i = 0; i < ids.size(); i += 12'345) {
    writer.append(std::span(ids).subspan(i, std::min<size_t>(12'345, ids.size() - i)));
  }
  EXPECT_FALSE(fs::exists(at("many")));
  writer.finish();
  EXPECT_EQ(hash_file(at("many")), hash_file(at("one")));
}

TEST_F(ShardTest, MayBeEmpty) {
  write_shard(at("s"), {}, 10);
  EXPECT_EQ(Shard::open(at("s")).size(), 0);
}

TEST_F(ShardTest, WriterRefusesIdsOutsideTheVocabularyAndLeavesNothing) {
  {
    ShardWriter writer(at("s"), 10);
    writer.append(Ids{1, 2});
    const std::string message = message_of(ErrorKind::kIndex, [&] { writer.append(Ids{3, 10}); });
    EXPECT_NE(message.find("token 10 at position 3"), std::string::npos) << message;
    message_of(ErrorKind::kIndex, [&] { writer.append(Ids{-1}); });
  }
  EXPECT_TRUE(fs::is_empty(folder_));
  message_of(ErrorKind::kValue, [&] { ShardWriter(at("s"), 0); });
  message_of(ErrorKind::kValue, [&] { ShardWriter(at("s"), int64_t{1} << 31); });
}

TEST_F(ShardTest, RefusesBrokenFilesAndSaysWhy) {
  const struct {
    std::string content, says;
  } cases[] = {
      {"", "shorter than the header"},
      {edited(0, "weft"), "WEFTTOK"},
      {edited(8, raw(uint32_t{2})), "version 2"},
      {edited(12, raw(uint32_t{3})), "must be 2 or 4"},
      {edited(12, raw(uint32_t{4})), "truncated"},
      {edited(16, raw(uint64_t{5})), "truncated"},
      {edited(16, raw(~uint64_t{0})), "truncated"},
      {edited(16, raw(uint64_t{1} << 63)), "truncated"},
      {edited(16, raw(uint64_t{3})), "trailing"},
      {edited(0, "") + "x", "trailing"},
      {edited(0, "").substr(0, 71), "truncated"},
      {edited(24, raw(uint64_t{0})), "vocabulary"},
      {edited(24, raw(uint64_t{65'537})), "vocabulary"},
      {edited(24, raw(uint64_t{99})), "token 99 at position 3"},
      {edited(32, raw(uint64_t{98})), "largest id"},
      {edited(40, std::string(1, '\0') + std::string(1, '\1')), "hash"},
      {edited(56, "x"), "zero"},
      {edited(66, "x"), "hash"},
  };
  for (const auto& c : cases) {
    write_file_atomic(at("broken"), c.content);
    const std::string message = message_of(ErrorKind::kData, [&] { Shard::open(at("broken")); });
    EXPECT_NE(message.find(c.says), std::string::npos) << message << "\nexpected: " << c.says;
    EXPECT_NE(message.find(at("broken")), std::string::npos) << message;
  }
  message_of(ErrorKind::kIo, [&] { Shard::open(at("missing")); });
}

TEST_F(ShardTest, ReadingOutsideIsAnError) {
  write_shard(at("s"), Ids{1, 2, 3}, 10);
  const Shard shard = Shard::open(at("s"));
  Ids two(2);
  message_of(ErrorKind::kIndex, [&] { shard.read(2, two); });
  message_of(ErrorKind::kIndex, [&] { shard.read(-1, two); });
  message_of(ErrorKind::kIndex, [&] { shard.read(INT64_MAX, two); });
  shard.read(3, {});
  const TokenVector memory({1, 2, 3}, 10);
  message_of(ErrorKind::kIndex, [&] { memory.read(2, two); });
  message_of(ErrorKind::kIndex, [&] { TokenVector({1, 10}, 10); });
}

TEST_F(ShardTest, OutlivesItsFileAndIsCheapToCopy) {
  write_shard(at("s"), Ids{4, 5, 6}, 10);
  const Shard shard = Shard::open(at("s"));
  const Shard copy = shard;
  fs::remove(at("s"));
  EXPECT_EQ(copy.tokens(), (Ids{4, 5, 6}));
}

TEST_F(ShardTest, ReadsFilesOfLlmcAndNanoGpt) {
  std::string header(1024, '\0');
  header.replace(0, 12, raw(int32_t{20240520}) + raw(int32_t{1}) + raw(int32_t{2}));
  write_file_atomic(at("llmc"), header + raw(uint16_t{7}) + raw(uint16_t{50256}));
  EXPECT_EQ(Shard::open_llmc(at("llmc"), 50257).tokens(), (Ids{7, 50256}));
  EXPECT_NE(message_of(ErrorKind::kData, [&] { Shard::open_llmc(at("llmc"), 50256); }).find("position 1"),
            std::string::npos);
  write_file_atomic(at("llmc"), header + raw(uint16_t{7}));
  message_of(ErrorKind::kData, [&] { Shard::open_llmc(at("llmc"), 50257); });
  write_file_atomic(at("llmc"), header.substr(0, 1000));
  message_of(ErrorKind::kData, [&] { Shard::open_llmc(at("llmc"), 50257); });
  header.replace(0, 8, raw(int32_t{20240801}) + raw(int32_t{7}));
  write_file_atomic(at("llmc"), header + raw(uint32_t{7}) + raw(uint32_t{128'000}));
  EXPECT_EQ(Shard::open_llmc(at("llmc"), 128'256).tokens(), (Ids{7, 128'000}));

  write_file_atomic(at("bin"), raw(uint16_t{1}) + raw(uint16_t{65}));
  EXPECT_EQ(Shard::open_raw(at("bin"), TokenType::kU16, 66).tokens(), (Ids{1, 65}));
  message_of(ErrorKind::kData, [&] { Shard::open_raw(at("bin"), TokenType::kU16, 65); });
  message_of(ErrorKind::kValue, [&] { Shard::open_raw(at("bin"), TokenType::kU16, 0); });
  write_file_atomic(at("bin"), "odd");
  message_of(ErrorKind::kData, [&] { Shard::open_raw(at("bin"), TokenType::kU16, 66); });
}

}  // namespace
}  // namespace weft::text
