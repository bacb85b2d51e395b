#include "core/file.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <string>

#include "core/error.h"

namespace weft {
namespace {

namespace fs = std::filesystem;

class File : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "weft-file-XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
  }
  void TearDown() override { fs::remove_all(folder_); }
  std::string at(const std::string& name) const { return (folder_ / name).string(); }
  int entries() const {
    return static_cast<int>(std::distance(fs::directory_iterator(folder_), fs::directory_iterator()));
  }

  fs::path folder_;
};

/// The message of the Error that `call` throws; its kind must be `kind`.
template <class Call>
std::string message_of(ErrorKind kind, Call call) {
  try {
    call();
  } catch (const Error& error) {
    EXPECT_EQ(to_string(error.kind()), std::string(to_string(kind)));
    return error.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return "";
}

TEST_F(File, WritesAndReadsBackAnyBytes) {
  std::string bytes;
  for (int i = 0; i < 70'000; ++i) bytes += static_cast<char>(i * 31 % 256);
  write_file_atomic(at("a"), bytes);
  EXPECT_EQ(read_file(at("a")), bytes);
  const MappedFile mapped(at("a"));
  EXPECT_EQ(mapped.text(), bytes);
  EXPECT_EQ(mapped.size(), bytes.size());
  EXPECT_EQ(entries(), 1);  // no temporary file is left
}

TEST_F(File, MapsAndReadsAnEmptyFile) {
  write_file_atomic(at("empty"), "");
  EXPECT_EQ(read_file(at("empty")), "");
  EXPECT_EQ(MappedFile(at("empty")).size(), 0u);
}

TEST_F(File, MovingAMappingKeepsItsBytes) {
  write_file_atomic(at("a"), "first");
  write_file_atomic(at("b"), "second");
  MappedFile a(at("a"));
  MappedFile moved = std::move(a);
  EXPECT_EQ(moved.text(), "first");
  moved = MappedFile(at("b"));
  EXPECT_EQ(moved.text(), "second");
}

TEST_F(File, AMappingOutlivesTheReplacementOfItsFile) {
  write_file_atomic(at("a"), "old content");
  const MappedFile mapped(at("a"));
  write_file_atomic(at("a"), "new");
  EXPECT_EQ(mapped.text(), "old content");
  EXPECT_EQ(read_file(at("a")), "new");
}

TEST_F(File, ErrorsNameThePathAndTheSystemsReason) {
  const std::string missing = at("missing");
  for (const auto& call :
       {+[](const std::string& p) { (void)read_file(p); }, +[](const std::string& p) { MappedFile m(p); },
        +[](const std::string& p) { (void)hash_file(p); }}) {
    const std::string message = message_of(ErrorKind::kIo, [&] { call(missing); });
    EXPECT_NE(message.find(missing), std::string::npos) << message;
    EXPECT_NE(message.find("No such file"), std::string::npos) << message;
  }
  EXPECT_NE(message_of(ErrorKind::kIo, [&] { read_file(folder_.string()); }).find("directory"), std::string::npos);
  EXPECT_NE(message_of(ErrorKind::kIo, [&] { MappedFile m(folder_.string()); }).find("directory"), std::string::npos);
  EXPECT_NE(message_of(ErrorKind::kIo, [&] { write_file_atomic(at("no/such/place"), "x"); }).find("No such file"),
            std::string::npos);
  message_of(ErrorKind::kIo, [&] { write_file_atomic("", "x"); });
  message_of(ErrorKind::kIo, [&] { read_file(std::string("a\0b", 3)); });
}

TEST_F(File, MappingANamedPipeFailsInsteadOfWaiting) {
  ASSERT_EQ(::mkfifo(at("pipe").c_str(), 0600), 0);
  EXPECT_NE(message_of(ErrorKind::kIo, [&] { MappedFile m(at("pipe")); }).find("regular"), std::string::npos);
}

TEST_F(File, ReadsFilesWhoseSizeIsNotKnownBefore) { EXPECT_FALSE(read_file("/proc/self/status").empty()); }

TEST_F(File, AFailedWriteLeavesTheOldFileAndNoTemporaryOne) {
  write_file_atomic(at("a"), "old");
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit small{4096, before.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  // The first 4,096 bytes are written, the rest is refused: what a full disk does.
  const std::string message = message_of(ErrorKind::kIo, [&] { write_file_atomic(at("a"), std::string(10'000, 'x')); });
  ::setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  EXPECT_NE(message.find(at("a")), std::string::npos) << message;
  EXPECT_EQ(read_file(at("a")), "old");
  EXPECT_EQ(entries(), 1);
}

TEST_F(File, AnUncommittedFileLeavesNothing) {
  {
    AtomicFile file(at("a"));
    file.write("half");
    EXPECT_EQ(entries(), 1);
  }
  EXPECT_EQ(entries(), 0);
}

TEST_F(File, AHeaderCanBeFilledInBeforeTheCommit) {
  AtomicFile file(at("a"));
  file.write("????");
  file.write("body");
  file.write_at(0, as_bytes("head"));
  message_of(ErrorKind::kValue, [&] { file.write_at(6, as_bytes("long")); });
  file.commit();
  EXPECT_EQ(read_file(at("a")), "headbody");
  message_of(ErrorKind::kState, [&] { file.write("more"); });
  message_of(ErrorKind::kState, [&] { file.commit(); });
}

TEST_F(File, WritingBackEarlyChangesNoByte) {
  std::string bytes;
  AtomicFile file(at("a"));
  file.write_back();
  for (int i = 0; i < 20; ++i) {
    const std::string piece(static_cast<size_t>(50'000 + 777 * i), static_cast<char>('a' + i));
    file.write(piece);
    if (i % 3 != 0) file.write_back();
    bytes += piece;
  }
  file.commit();
  EXPECT_TRUE(read_file(at("a")) == bytes);
  message_of(ErrorKind::kState, [&] { file.write_back(); });
}

TEST_F(File, ReplacingKeepsTheModeAndFollowsLinks) {
  write_file_atomic(at("real"), "1");
  fs::permissions(at("real"), fs::perms::owner_read | fs::perms::owner_write | fs::perms::group_read);
  fs::create_symlink("real", at("link"));
  write_file_atomic(at("link"), "2");
  EXPECT_TRUE(fs::is_symlink(at("link")));
  EXPECT_EQ(read_file(at("real")), "2");
  struct stat info{};
  ASSERT_EQ(::stat(at("real").c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0640u);
}

TEST_F(File, RefusesToReplaceWhatIsNoRegularFile) {
  ASSERT_EQ(::mkfifo(at("pipe").c_str(), 0600), 0);
  message_of(ErrorKind::kIo, [&] { write_file_atomic(at("pipe"), "x"); });
  message_of(ErrorKind::kIo, [&] { write_file_atomic(folder_.string(), "x"); });
  EXPECT_TRUE(fs::is_fifo(at("pipe")));
}

TEST_F(File, FsyncDirectoryRefusesAFile) {
  write_file_atomic(at("a"), "x");
  fsync_directory(folder_.string());
  message_of(ErrorKind::kIo, [&] { fsync_directory(at("a")); });
}

TEST_F(File, HashIsXxh3OfTheContentHoweverItIsCut) {
  // Published value of XXH3-128 of the empty input (xxHash's own test, seed 0).
  EXPECT_EQ(hash_bytes({}), "99aa06d3014798d86001c324468d497f");
  std::string text;
  for (int i = 0; i < 5000; ++i) text += static_cast<char>(i * i % 251);
  Hasher pieces;
  for (size_t i = 0; i < text.size(); i += 777) pieces.update(as_bytes(std::string_view(text).substr(i, 777)));
  EXPECT_EQ(pieces.hex(), hash_bytes(as_bytes(text)));
  write_file_atomic(at("a"), text);
  EXPECT_EQ(hash_file(at("a")), hash_bytes(as_bytes(text)));
  text[4000] ^= 1;
  EXPECT_NE(hash_bytes(as_bytes(text)), hash_file(at("a")));
}

}  // namespace
}  // namespace weft
