#include "models/checkpoint/checkpoint.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <filesystem>
#include <random>
#include <set>
#include <thread>

#include "core/log.h"

namespace weft {
namespace {

namespace fs = std::filesystem;

class Checkpoint : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "weft-checkpoint-XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
    root_ = (folder_ / "out").string();
    previous_ = log::set_sink([this](log::Level, std::string_view message) { log_ += std::string(message) + "\n"; });
  }
  void TearDown() override {
    log::set_sink(std::move(previous_));
    fs::remove_all(folder_);
  }

  std::string at(const std::string& name) const { return root_ + "/" + name; }
  /// Names in the root, without the lock file.
  std::vector<std::string> names() const {
    std::vector<std::string> all;
    for (const auto& entry : fs::directory_iterator(root_)) {
      if (entry.path().filename() != ".weft-lock") all.push_back(entry.path().filename().string());
    }
    std::sort(all.begin(), all.end());
    return all;
  }
  /// The newest intact checkpoint's step, -1 if there is none.
  int64_t latest_step() const {
    const LatestCheckpoint latest = find_latest_checkpoint(root_);
    return latest.path ? read_checkpoint_manifest(*latest.path).step : -1;
  }

  fs::path folder_;
  std::string root_;
  std::string log_;
  log::Sink previous_;
};

using Names = std::vector<std::string>;

/// The message of the Error that `call` throws; its kind must be `kind`.
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

/// A checkpoint in which everything depends on the step.
CheckpointContent content_of(int64_t step, int64_t elements = 6) {
  CheckpointContent content;
  content.step = step;
  content.run_id = "run-7";
  content.data_cursor = step * 16;
  content.seed = ~uint64_t{0};
  content.layout = "dp=1";
  content.state = {{"loss", std::to_string(step)}, {"schedule \"x\"", "\u00e9\n"}};
  content.model = {
      {"w", Tensor::from(std::vector<float>(static_cast<size_t>(elements), static_cast<float>(step)), {elements})},
      {"b", Tensor::from(std::vector<uint8_t>{1, 2, 3}, {3})}};
  content.optimizer = {{"w.m", Tensor::from(std::vector<double>{0.5, static_cast<double>(step)}, {2})}};
  content.text_files = {{"config.toml", "lr = 0.1\n"}, {"tokenizer.json", "{}"}};
  return content;
}

void expect_equal(const CheckpointContent& got, const CheckpointContent& expected) {
  EXPECT_EQ(got.step, expected.step);
  EXPECT_EQ(got.run_id, expected.run_id);
  EXPECT_EQ(got.data_cursor, expected.data_cursor);
  EXPECT_EQ(got.seed, expected.seed);
  EXPECT_EQ(got.layout, expected.layout);
  EXPECT_EQ(got.state, expected.state);
  EXPECT_EQ(got.text_files, expected.text_files);
  for (const auto& [mine, other] :
       {std::pair(&got.model, &expected.model), std::pair(&got.optimizer, &expected.optimizer)}) {
    const std::map<std::string, Tensor> a(mine->begin(), mine->end()), b(other->begin(), other->end());
    ASSERT_EQ(a.size(), b.size());
    for (const auto& [name, tensor] : b) {
      ASSERT_TRUE(a.contains(name)) << name;
      EXPECT_EQ(a.at(name).describe(), tensor.describe());
      EXPECT_EQ(a.at(name).to_vector<double>(), tensor.to_vector<double>()) << name;
    }
  }
}

/// A file written in place, as damage or another program would.
void overwrite(const std::string& path, const std::string& bytes) {
  fs::remove(path);
  write_file_atomic(path, bytes);
}

/// Changes one byte where it lies.
void put_byte(const std::string& path, size_t offset, char byte) {
  FILE* file = fopen(path.c_str(), "r+b");
  ASSERT_NE(file, nullptr);
  fseek(file, static_cast<long>(offset), SEEK_SET);
  fputc(byte, file);
  fclose(file);
}

/// The manifest with the right hash at its end again.
std::string rehashed(std::string text) {
  const size_t digits = text.size() - 4 - 32;
  return text.replace(digits, 32, hash_bytes(as_bytes(text.substr(0, digits))));
}

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  const size_t place = text.find(from);
  EXPECT_NE(place, std::string::npos) << from;
  return text.replace(place, from.size(), to);
}

/// Runs `child` in a child process and returns its exit status: 0, what it gave to _exit, or 128 + signal.
template <class Child>
int in_child(Child child) {
  const pid_t pid = ::fork();
  if (pid == 0) {
    try {
      child();
    } catch (const std::exception& error) {
      fprintf(stderr, "%s\n", error.what());
      ::_exit(99);
    }
    ::_exit(0);
  }
  int status = 0;
  ::waitpid(pid, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

TEST_F(Checkpoint, RoundTripsEverything) {
  const std::string path = save_checkpoint(root_, content_of(120));
  EXPECT_EQ(path, at("step_00000120"));
  expect_equal(load_checkpoint(path), content_of(120));
  EXPECT_TRUE(verify_checkpoint(path).empty());
  EXPECT_EQ(find_latest_checkpoint(root_).path, path);
  EXPECT_EQ(names(), Names{"step_00000120"});
}

TEST_F(Checkpoint, RoundTripsWithNothingInIt) {
  const std::string path = save_checkpoint(root_, {});
  EXPECT_EQ(path, at("step_00000000"));
  expect_equal(load_checkpoint(path), {});
}

TEST_F(Checkpoint, ManifestIsTheDocumentedText) {
  CheckpointContent content;
  content.step = 3;
  content.run_id = "r";
  content.state = {{"k", "v"}};
  const std::string path = save_checkpoint(root_, content);
  const std::string hash = hash_file(path + "/model.safetensors");
  const std::string body =
      "{\n  \"format\": \"weft-checkpoint\",\n  \"format_version\": 1,\n  \"run_id\": \"r\",\n  \"step\": 3,\n"
      "  \"data_cursor\": 0,\n  \"seed\": 0,\n  \"layout\": \"\",\n  \"state\": {\n    \"k\": \"v\"\n  },\n  "
      "\"files\": [\n"
      "    {\n      \"name\": \"model.safetensors\",\n      \"size\": 64,\n      \"xxh3_128\": \"" +
      hash +
      "\"\n    },\n"
      "    {\n      \"name\": \"optimizer.safetensors\",\n      \"size\": 64,\n      \"xxh3_128\": \"" +
      hash +
      "\"\n    }\n"
      "  ],\n  \"manifest_xxh3_128\": \"";
  EXPECT_EQ(read_file(path + "/manifest.json"), body + hash_bytes(as_bytes(body)) + "\"\n}\n");
}

TEST_F(Checkpoint, SameContentGivesTheSameBytes) {
  const std::string a = save_checkpoint(root_, content_of(1)), b = save_checkpoint(root_ + "2", content_of(1));
  EXPECT_EQ(read_file(a + "/manifest.json"), read_file(b + "/manifest.json"));  // it holds all hashes
}

TEST_F(Checkpoint, MakesTheDirectoriesAboveIt) {
  const std::string path = save_checkpoint(root_ + "/a/b/", content_of(5));
  EXPECT_TRUE(verify_checkpoint(path).empty());
}

TEST_F(Checkpoint, LoadsFromAnyNameOfTheDirectory) {
  const std::string path = save_checkpoint(root_, content_of(5));
  fs::rename(path, folder_ / "best");
  expect_equal(load_checkpoint((folder_ / "best").string()), content_of(5));
  expect_equal(load_checkpoint((folder_ / "best/").string()), content_of(5));
}

TEST_F(Checkpoint, RefusesTheNameOfAnotherStep) {
  fs::rename(save_checkpoint(root_, content_of(5)), at("step_00000006"));
  EXPECT_NE(message_of(ErrorKind::kData, [&] { load_checkpoint(at("step_00000006")); })
                .find("the manifest is of step 5 but the directory is named step_00000006"),
            std::string::npos);
}

TEST_F(Checkpoint, KeepsTheNewestN) {
  for (const int64_t step : {10, 20, 30, 40}) save_checkpoint(root_, content_of(step), {.keep_n = 2});
  EXPECT_EQ(names(), (Names{"step_00000030", "step_00000040"}));
  save_checkpoint(root_, content_of(50));
  EXPECT_EQ(names().size(), 3u);
  save_checkpoint(root_, content_of(60), {.keep_n = 1});
  EXPECT_EQ(names(), Names{"step_00000060"});
  EXPECT_EQ(log_, "");
}

TEST_F(Checkpoint, RemovesOnlyEarlierCompleteCheckpointsOfItsOwn) {
  for (const int64_t step : {10, 20, 30, 40, 90}) save_checkpoint(root_, content_of(step));
  overwrite(at("step_00000010/model.safetensors"), "short");    // broken: somebody may want what is left
  overwrite(at("step_00000020/notes.txt"), "the best so far");  // somebody else's file
  fs::create_directory(at("step_00000005"));
  overwrite(at("step_7"), "not a name of ours");
  fs::create_directory(at("other"));
  save_checkpoint(root_, content_of(50), {.keep_n = 1});
  EXPECT_EQ(names(), (Names{"other", "step_00000005", "step_00000010", "step_00000020", "step_00000050",
                            "step_00000090", "step_7"}));
  EXPECT_EQ(log_, at("step_00000020") +
                      " is not removed: it holds \"notes.txt\", which is no part of the checkpoint\n" +
                      at("step_00000090") +
                      " is of a later step than 50, which was just saved: a search for the latest "
                      "checkpoint finds it first. Hint: move it away\n");
}

TEST_F(Checkpoint, SavingAStepAgainReplacesIt) {
  save_checkpoint(root_, content_of(10));
  CheckpointContent second = content_of(10);
  second.run_id = "second";
  EXPECT_EQ(save_checkpoint(root_, second, {.keep_n = 1}), at("step_00000010"));
  expect_equal(load_checkpoint(at("step_00000010")), second);
  EXPECT_EQ(names(), Names{"step_00000010"});
}

TEST_F(Checkpoint, SavingAStepAgainReplacesADamagedOneAndSetsStrangersAside) {
  const std::string path = save_checkpoint(root_, content_of(10));
  overwrite(path + "/model.safetensors", "short");
  EXPECT_EQ(save_checkpoint(root_, content_of(10)), path);
  EXPECT_EQ(names(), Names{"step_00000010"});

  overwrite(path + "/manifest.json", "{}");  // nothing says any more that it is ours
  EXPECT_EQ(save_checkpoint(root_, content_of(10)), path);
  EXPECT_EQ(names(), (Names{"step_00000010", "step_00000010.replaced-1"}));
  EXPECT_TRUE(fs::exists(at("step_00000010.replaced-1/model.safetensors")));
  EXPECT_TRUE(verify_checkpoint(path).empty());

  fs::remove_all(path);
  overwrite(path, "a file");
  EXPECT_EQ(save_checkpoint(root_, content_of(10)), path);
  EXPECT_EQ(read_file(at("step_00000010.replaced-2")), "a file");
  EXPECT_EQ(latest_step(), 10);
}

TEST_F(Checkpoint, CleansUpWhatDeadSavesHaveLeft) {
  fs::create_directories(at(".tmp-step_00000010-4242"));
  overwrite(at(".tmp-step_00000010-4242/model.safetensors"), "half");
  fs::create_directories(at(".tmp-removed-step_00000009-4242"));
  fs::create_directories(at(".tmp-mine"));
  fs::create_directories(at(".tmp-step_00000011-1/deep"));  // not made by a save: stays
  save_checkpoint(root_, content_of(20));
  EXPECT_EQ(names(), (Names{".tmp-mine", ".tmp-step_00000011-1", "step_00000020"}));
}

TEST_F(Checkpoint, FindsTheNewestIntactOneAndSaysWhyNotANewerOne) {
  EXPECT_FALSE(find_latest_checkpoint(root_).path);  // no directory: no checkpoint
  for (const int64_t step : {10, 20, 30, 100'000'000}) save_checkpoint(root_, content_of(step));
  EXPECT_EQ(latest_step(), 100'000'000);
  EXPECT_TRUE(find_latest_checkpoint(root_).messages().empty());

  fs::resize_file(at("step_100000000/optimizer.safetensors"), 100);
  fs::remove(at("step_00000030/config.toml"));
  const LatestCheckpoint latest = find_latest_checkpoint(root_);
  EXPECT_EQ(latest.path, at("step_00000020"));
  const std::vector<std::string> lines = latest.messages();
  ASSERT_EQ(lines.size(), 3u);
  EXPECT_EQ(lines[0], at("step_100000000") + " is not used: [load_checkpoint] " +
                          at("step_100000000/optimizer.safetensors") +
                          ": has 100 bytes but the manifest says 144: the file is truncated");
  EXPECT_NE(lines[1].find("config.toml: cannot open: No such file"), std::string::npos) << lines[1];
  EXPECT_EQ(lines[2], "the newest intact checkpoint is " + at("step_00000020"));

  for (const char* name : {"step_00000010", "step_00000020"}) fs::remove(at(std::string(name) + "/manifest.json"));
  EXPECT_FALSE(find_latest_checkpoint(root_).path);
  EXPECT_EQ(find_latest_checkpoint(root_).messages().back(), "there is no intact checkpoint");
  overwrite(at("x"), "");
  message_of(ErrorKind::kIo, [&] { find_latest_checkpoint(at("x")); });
}

TEST_F(Checkpoint, ListsWithSizesAndProblems) {
  for (const int64_t step : {20, 10}) save_checkpoint(root_, content_of(step));
  fs::remove(at("step_00000020/model.safetensors"));
  const std::vector<ListedCheckpoint> list = list_checkpoints(root_);
  ASSERT_EQ(list.size(), 2u);
  EXPECT_EQ(list[0].path, at("step_00000010"));
  EXPECT_EQ(list[0].manifest.run_id, "run-7");
  EXPECT_EQ(list[0].problem, "");
  int64_t bytes = 0;
  for (const CheckpointFile& file : list[0].manifest.files) bytes += file.size;
  EXPECT_EQ(list[0].bytes, bytes);
  EXPECT_NE(list[1].problem.find("model.safetensors: cannot open"), std::string::npos) << list[1].problem;
}

TEST_F(Checkpoint, VerifyNamesEveryProblem) {
  const std::string path = save_checkpoint(root_, content_of(10));
  overwrite(path + "/notes.txt", "no fault");
  EXPECT_TRUE(verify_checkpoint(path).empty());
  overwrite(path + "/config.toml", "lr = 0.2\n");  // the same size
  fs::remove(path + "/tokenizer.json");
  const std::vector<std::string> problems = verify_checkpoint(path);
  ASSERT_EQ(problems.size(), 2u);
  EXPECT_NE(problems[0].find("config.toml: has XXH3-128 "), std::string::npos) << problems[0];
  EXPECT_NE(problems[1].find("tokenizer.json: cannot open"), std::string::npos) << problems[1];
}

TEST_F(Checkpoint, EveryFlippedBitIsFound) {
  const std::string path = save_checkpoint(root_, content_of(10));
  int flips = 0;
  for (const auto& entry : fs::directory_iterator(path)) {
    const std::string file = entry.path().string(), content = read_file(file);
    for (size_t bit = 0; bit < content.size() * 8; ++bit) {
      put_byte(file, bit / 8, static_cast<char>(content[bit / 8] ^ (1 << (bit % 8))));
      EXPECT_FALSE(verify_checkpoint(path).empty()) << file << " bit " << bit;
      put_byte(file, bit / 8, content[bit / 8]);
      ++flips;
    }
  }
  EXPECT_TRUE(verify_checkpoint(path).empty());
  EXPECT_GT(flips, 9'000);
}

TEST_F(Checkpoint, EveryTruncationIsFound) {
  const std::string path = save_checkpoint(root_, content_of(10));
  for (const auto& entry : fs::directory_iterator(path)) {
    const std::string file = entry.path().string(), content = read_file(file);
    for (size_t size = content.size(); size-- > 0;) {
      fs::resize_file(file, size);
      EXPECT_THROW(load_checkpoint(path), Error) << file << " cut to " << size;
    }
    overwrite(file, content);
  }
  expect_equal(load_checkpoint(path), content_of(10));
}

TEST_F(Checkpoint, RefusesAManifestThatBreaksARule) {
  const std::string path = save_checkpoint(root_, content_of(10));
  const std::string good = read_file(path + "/manifest.json");
  const std::string file = path + "/manifest.json";
  struct Case {
    std::string from, to, message;
  };
  const std::vector<Case> cases = {
      {"\"weft-checkpoint\"", "\"other\"", "has \"format\" = \"other\"; expected \"weft-checkpoint\""},
      {"\"format\": \"weft-checkpoint\",", "", "has no \"format\""},
      {"\"format_version\": 1", "\"format_version\": 3",
       "has format version 3; this program reads versions 1 to 2. Hint: "},
      {"\"format_version\": 1", "\"format_version\": \"1\"", "has \"format_version\" = \"1\"; it must be an integer"},
      {"\"step\": 10", "\"step\": -10", "has \"step\" = -10; it must be an integer of at least 0"},
      {"\"step\": 10", "\"step\": 10.0", "has \"step\" = 10.0; it must be an integer of at least 0"},
      {"\"step\": 10", "\"step\": 1e400", "has a number beyond all ranges"},
      {"\"step\": 10", "\"step\": 9223372036854775808", "has \"step\" = 9223372036854775808; it must be below 2^63"},
      {"\"step\": 10,", "", "has no \"step\""},
      {"\"step\": 10,", "\"step\": 10, \"step\": 10,", "has the key \"step\" twice"},
      {"\"step\": 10,", "\"step\": 10, \"epoch\": 1,", "has the unknown key \"epoch\""},
      {"\"step\": 10,", "\"step\": 10", "is not valid JSON at its byte "},
      {"\"step\": 10,", "\"step\": 10,,", "is not valid JSON at its byte "},
      {"\"run-7\"", "\"\xff\"", "is not valid JSON at its byte "},
      {"\"run-7\"", std::string("\"\0\"", 3), "holds a NUL byte"},
      {"\"run-7\"", "7", "has \"run_id\" = 7; it must be a string"},
      {"\"run-7\"", "[[[[[[[[[]]]]]]]]]", "is nested too deeply"},
      {"\"data_cursor\": 160", "\"data_cursor\": -1", "has \"data_cursor\" = -1;"},
      {"\"seed\": 18446744073709551615", "\"seed\": 18446744073709551616", "has \"seed\" = 1.8446744073709552e+19;"},
      {"\"seed\": 18446744073709551615", "\"seed\": -1", "has \"seed\" = -1; it must be an integer of at least 0"},
      {"\"loss\": \"10\"", "\"loss\": 10", "has 10 as \"state\" \"loss\"; it must be a string"},
      {"\"loss\": \"10\"", "\"loss\": \"10\", \"loss\": \"10\"", "has the key \"loss\" twice"},
      {"\"files\": [", "\"files\": [ 1,", "has 1 in \"files\"; each must be an object"},
      {"\"format_version\": 1", "\"format_version\": 2", "has no \"model\""},
      {"\"files\": [", "\"files\": {}, \"more\": [", "has the unknown key \"more\""},
      {"\"size\": 9", "\"size\": -9", "has \"size\" = -9; it must be an integer of at least 0"},
      {"\"size\": 9", "\"size\": 9, \"mode\": 1", "has the unknown key \"mode\" in an entry of \"files\""},
      {"\"size\": 9,", "", "has no \"size\" in an entry of \"files\""},
      {"\"size\": 9,", "\"size\": 9, \"size\": 9,", "has the key \"size\" twice"},
      {"config.toml", "../config.toml", "lists the file name \"../config.toml\"; names are of letters"},
      {"config.toml", "/etc/passwd", "lists the file name \"/etc/passwd\""},
      {"config.toml", "a/b", "lists the file name \"a/b\""},
      {"config.toml", "..", "lists the file name \"..\""},
      {"config.toml", ".hidden", "lists the file name \".hidden\""},
      {"config.toml", "", "lists the file name \"\""},
      {"config.toml", "a\\u0000b", "lists the file name \"a\\x00b\""},
      {"config.toml", "a\\\\b", "lists the file name \"a\\\\b\""},
      {"config.toml", std::string(129, 'a'), "lists the file name \"aaa"},
      {"config.toml", "manifest.json", "lists the file name \"manifest.json\""},
      {"config.toml", "model.safetensors", "lists model.safetensors twice"},
      {"\"optimizer.safetensors\"", "\"momentum.safetensors\"", "does not list optimizer.safetensors"},
      {"\"xxh3_128\": \"", "\"xxh3_128\": \"X", "has the hash \"X"},
      {"  \"manifest_xxh3_128\": \"", "  \"manifest_xxh3_128\" : \"",
       "does not end with its hash of 32 hexadecimal digits"},
  };
  for (const Case& each : cases) {
    SCOPED_TRACE(each.from + " -> " + each.to);
    overwrite(file, rehashed(replaced(good, each.from, each.to)));
    const std::string message = message_of(ErrorKind::kData, [&] { load_checkpoint(path); });
    const std::string expected = "[load_checkpoint] " + file + ": the manifest " + each.message;
    EXPECT_EQ(message.substr(0, expected.size()), expected) << message;
  }
  const std::vector<std::pair<std::string, std::string>> whole = {
      {"", "is not valid JSON at its byte 1"},
      {"[]", "is not a JSON object"},
      {"null", "is not a JSON object"},
      {std::string(1'000'000, '['), "is nested too deeply"},
      {good + " ", "does not end with its hash"},
      {good + good, "is not valid JSON at its byte "},
      {replaced(good, "run-7", "run-8"), "has hash "},
  };
  for (const auto& [text, expected] : whole) {
    overwrite(file, text);
    const std::string message = message_of(ErrorKind::kData, [&] { read_checkpoint_manifest(path); });
    EXPECT_NE(message.find("the manifest " + expected), std::string::npos) << message;
  }
  overwrite(file, rehashed(good));
  EXPECT_TRUE(verify_checkpoint(path).empty());
}

TEST_F(Checkpoint, RefusesContentThatCannotBeStored) {
  const auto refused = [&](auto change, ErrorKind kind = ErrorKind::kValue) {
    CheckpointContent content = content_of(10);
    SaveCheckpointOptions options;
    change(content, options);
    return message_of(kind, [&] { save_checkpoint(root_, content, options); });
  };
  const auto has = [](const std::string& message, const char* part) {
    EXPECT_NE(message.find(part), std::string::npos) << message;
  };
  has(refused([](auto& content, auto&) { content.step = -1; }), "step must not be negative, got -1");
  has(refused([](auto& content, auto&) { content.data_cursor = -1; }), "data_cursor must not be negative, got -1");
  has(refused([](auto&, auto& options) { options.keep_n = -1; }), "keep_n must be 0 (keep all) or more, got -1");
  has(refused([](auto& content, auto&) { content.run_id = "\xff"; }), "is not valid UTF-8");
  has(refused([](auto& content, auto&) { content.state["\xff"] = ""; }), "is not valid UTF-8");
  for (const char* name : {"", "../x", "/x", "a/b", ".x", "a b", "model.safetensors", "manifest.json"}) {
    has(refused([&](auto& content, auto&) { content.text_files[name] = ""; }), "text file");
  }
  EXPECT_FALSE(fs::exists(root_));                                                   // nothing was written
  refused([](auto& content, auto&) { content.model.push_back(content.model[0]); });  // found while writing
  EXPECT_EQ(names(), Names{});
}

TEST_F(Checkpoint, AFailedWriteLeavesOlderCheckpointsAndNothingElse) {
  save_checkpoint(root_, content_of(10));
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit small{65'536, before.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  // The first 64 KiB of the model are written, the rest is refused: what a full disk does.
  const std::string message =
      message_of(ErrorKind::kIo, [&] { save_checkpoint(root_, content_of(20, 100'000), {.keep_n = 1}); });
  ::setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  EXPECT_NE(message.find("model.safetensors: cannot write: "), std::string::npos) << message;
  EXPECT_EQ(names(), Names{"step_00000010"});
  EXPECT_TRUE(verify_checkpoint(at("step_00000010")).empty());
}

TEST_F(Checkpoint, AnUnwritableDirectoryIsAnErrorThatNamesIt) {
  save_checkpoint(root_, content_of(10));
  ASSERT_EQ(::chmod(root_.c_str(), 0555), 0);
  ASSERT_EQ(::chmod(folder_.c_str(), 0755), 0);
  ASSERT_EQ(::chmod(at(".weft-lock").c_str(), 0666), 0);
  const int status = in_child([&] {
    // Permissions do not bind root.
    if (::geteuid() == 0 && ::seteuid(65534) != 0) ::_exit(3);
    try {
      save_checkpoint(root_, content_of(20));
    } catch (const Error& error) {
      const std::string message = error.what();
      const bool good = error.kind() == ErrorKind::kIo && message.find(root_) != std::string::npos &&
                        message.find("Permission denied") != std::string::npos;
      if (!good) fprintf(stderr, "%s\n", message.c_str());
      ::_exit(good ? 7 : 4);
    }
  });
  EXPECT_EQ(status, 7);
  ASSERT_EQ(::chmod(root_.c_str(), 0755), 0);
  EXPECT_EQ(names(), Names{"step_00000010"});
  overwrite(folder_ / "file", "");
  EXPECT_NE(message_of(ErrorKind::kIo, [&] { save_checkpoint((folder_ / "file").string(), content_of(1)); })
                .find("Not a directory"),
            std::string::npos);
  message_of(ErrorKind::kIo, [&] { save_checkpoint((folder_ / "file/out").string(), content_of(1)); });
}

TEST_F(Checkpoint, SavesIntoOneDirectoryTakeTurns) {
  SaveCheckpointOptions options;
  options.after_step = [&](std::string_view step) {
    if (step != "lock") return;
    EXPECT_NE(message_of(ErrorKind::kIo, [&] { save_checkpoint(root_, content_of(2), {.lock_seconds = 0.02}); })
                  .find("another save into this directory has not ended within 0.02 s"),
              std::string::npos);
  };
  save_checkpoint(root_, content_of(1), options);
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] { save_checkpoint(root_, content_of(10 + i % 2)); });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(names(), (Names{"step_00000001", "step_00000010", "step_00000011"}));
  for (const ListedCheckpoint& each : list_checkpoints(root_)) EXPECT_TRUE(verify_checkpoint(each.path).empty());
}

/// The names of the steps of a save into `root`, in order.
std::vector<std::string> steps_of(const std::string& root, const CheckpointContent& content,
                                  SaveCheckpointOptions options) {
  std::vector<std::string> steps;
  options.after_step = [&](std::string_view step) { steps.emplace_back(step); };
  save_checkpoint(root, content, options);
  return steps;
}

TEST_F(Checkpoint, DyingAfterAnyStepOfASaveCostsNothing) {
  // One save that replaces its own step, removes two earlier ones, and cleans up; killed after each step in turn.
  const std::string before = (folder_ / "before").string();
  for (const int64_t step : {10, 20, 30}) save_checkpoint(before, content_of(step));
  fs::create_directory(before + "/.tmp-step_00000030-4242");
  const auto prepare = [&] {
    fs::remove_all(root_);
    fs::copy(before, root_, fs::copy_options::recursive);
  };
  CheckpointContent fresh = content_of(30);
  fresh.run_id = "new";
  prepare();
  const std::vector<std::string> steps = steps_of(root_, fresh, {.keep_n = 1});
  EXPECT_GE(steps.size(), 15u);
  bool renamed = false;
  for (size_t kill_at = 0; kill_at < steps.size(); ++kill_at) {
    SCOPED_TRACE("after step " + std::to_string(kill_at) + ", " + steps[kill_at]);
    prepare();
    SaveCheckpointOptions options{.keep_n = 1};
    size_t count = 0;
    options.after_step = [&](std::string_view) {
      if (count++ == kill_at) ::kill(::getpid(), SIGKILL);
    };
    EXPECT_EQ(in_child([&] { save_checkpoint(root_, fresh, options); }), 128 + SIGKILL);
    renamed |= steps[kill_at] == "rename";
    const LatestCheckpoint latest = find_latest_checkpoint(root_);
    ASSERT_TRUE(latest.path);
    EXPECT_TRUE(latest.rejected.empty());  // nothing half-written has the name of a checkpoint
    expect_equal(load_checkpoint(*latest.path), renamed ? fresh : content_of(30));
    // The next save tidies up.
    save_checkpoint(root_, content_of(40), {.keep_n = 1});
    EXPECT_EQ(names(), Names{"step_00000040"});
  }
  EXPECT_TRUE(renamed);
}

TEST_F(Checkpoint, FailingInAnyStepBeforeTheLastRenameLeavesNothingBehind) {
  save_checkpoint(root_, content_of(10));
  const std::vector<std::string> steps = steps_of(root_ + "2", content_of(20), {});
  for (const std::string& failing : steps) {
    if (failing == "rename") break;
    SaveCheckpointOptions options{.keep_n = 1};
    options.after_step = [&](std::string_view step) {
      if (step == failing) fail(ErrorKind::kIo, "test", "planted");
    };
    EXPECT_EQ(message_of(ErrorKind::kIo, [&] { save_checkpoint(root_, content_of(20), options); }), "[test] planted");
    EXPECT_EQ(names(), Names{"step_00000010"}) << failing;
  }
}

TEST_F(Checkpoint, KillingAtRandomMomentsNeverCostsACompleteCheckpoint) {
  // A child saves on and on, step after step and each step twice, with keep_n = 1, and reports each save that returned.
  // What it reported must be there after SIGKILL, or something newer, complete and with the content of its step.
  const auto start = std::chrono::steady_clock::now();
  save_checkpoint(root_, content_of(1, 50'000), {.keep_n = 1});
  const double one_save = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::mt19937 random(11);
  int64_t reported = 1;
  int leftovers = 0;
  for (int round = 0; round < 20; ++round) {
    int pipe_ends[2];
    ASSERT_EQ(::pipe(pipe_ends), 0);
    const pid_t pid = ::fork();
    if (pid == 0) {
      ::close(pipe_ends[0]);
      try {
        for (int64_t step = reported + 1;; ++step) {
          for (int twice = 0; twice < 2; ++twice) save_checkpoint(root_, content_of(step, 50'000), {.keep_n = 1});
          if (::write(pipe_ends[1], &step, sizeof step) != sizeof step) ::_exit(98);
        }
      } catch (const std::exception& error) {
        fprintf(stderr, "%s\n", error.what());
        ::_exit(99);
      }
    }
    ::close(pipe_ends[1]);
    std::this_thread::sleep_for(
        std::chrono::duration<double>(one_save * 4 * static_cast<double>(random()) / 4294967296.0));
    ::kill(pid, SIGKILL);
    int status = 0;
    ::waitpid(pid, &status, 0);
    EXPECT_TRUE(WIFSIGNALED(status));
    for (int64_t step = 0; ::read(pipe_ends[0], &step, sizeof step) == sizeof step;) reported = step;
    ::close(pipe_ends[0]);

    for (const std::string& name : names()) leftovers += name[0] == '.';
    const LatestCheckpoint latest = find_latest_checkpoint(root_);
    ASSERT_TRUE(latest.path);
    EXPECT_TRUE(latest.rejected.empty()) << latest.messages()[0];
    const CheckpointContent content = load_checkpoint(*latest.path);
    EXPECT_GE(content.step, reported);
    expect_equal(content, content_of(content.step, 50'000));
    reported = content.step;
  }
  EXPECT_GT(leftovers, 0) << "no kill hit a save: the test tested nothing";
  save_checkpoint(root_, content_of(reported + 1), {.keep_n = 1});
  EXPECT_EQ(names().size(), 1u);
}

}  // namespace
}  // namespace weft
