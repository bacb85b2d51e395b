// Checkpoints that several ranks write, here as threads: any layout loads what any other has saved.
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <thread>

#include "core/log.h"
#include "dist/threads.h"
#include "models/checkpoint/manifest.h"
#include "models/checkpoint/plan.h"
#include "models/checkpoint/saver.h"

namespace weft {
namespace {

namespace fs = std::filesystem;

/// A tensor of whole numbers of its own.
Tensor whole_tensor(const Shape& shape, DType dtype, int64_t first) {
  const int64_t count = numel(shape);
  std::vector<double> values;
  for (int64_t i = 0; i < count; ++i) values.push_back(static_cast<double>((first + i) % 97));
  Tensor tensor = Tensor::from(values, {count}).to(dtype);
  if (dtype == DType::boolean) tensor = (Tensor::from(values, {count}).to(DType::i64)).to(DType::boolean);
  return tensor.reshape(shape);
}

/// What every layout holds, whole.
NamedTensors whole_tensors() {
  return {{"wte.weight", whole_tensor({13, 6}, DType::f32, 3)}, {"qkv.weight", whole_tensor({5, 12}, DType::f32, 11)},
          {"deep", whole_tensor({2, 5, 4}, DType::bf16, 29)},   {"bias", whole_tensor({7}, DType::f64, 41)},
          {"mask", whole_tensor({3, 8}, DType::boolean, 0)},    {"scalar", whole_tensor({}, DType::i64, 5)},
          {"nothing", whole_tensor({0, 4}, DType::f32, 0)}};
}

/// Which part of a whole tensor a rank holds.
struct Layout {
  const char* name;
  int ranks;
  std::function<TensorPart(const Shape& whole, int rank)> part;
};

/// Range r of n of [0, size), uneven.
IndexRange share(int64_t size, int r, int n) { return {size * r / n, size * (r + 1) / n}; }

TensorPart flat_share(const TensorPart& of, int r, int n) {
  const IndexRange range = share(of.count(), r, n);
  return of.elements(range.begin, range.end);
}

TensorPart slice(const Shape& whole, int64_t dim, int r, int n) {
  return whole.rank() == 0 ? TensorPart::all(whole)
                           : TensorPart::along(whole, dim, {share(whole[static_cast<int>(dim)], r, n)});
}

/// As heads of q, k and v: a range in each third.
TensorPart thirds(const Shape& whole, int r, int n) {
  if (whole.rank() < 2) return TensorPart::all(whole);
  const int64_t third = whole[1] / 3;
  std::vector<IndexRange> ranges;
  for (int64_t i = 0; i < 3; ++i) {
    const int64_t end = i == 2 ? whole[1] - 2 * third : third;
    const IndexRange range = share(end, r, n);
    ranges.push_back({i * third + range.begin, i * third + range.end});
  }
  return TensorPart::along(whole, 1, ranges);
}

const std::vector<Layout>& layouts() {
  static const std::vector<Layout> all = {
      {"one rank", 1, [](const Shape& whole, int) { return TensorPart::all(whole); }},
      {"replicas", 3, [](const Shape& whole, int) { return TensorPart::all(whole); }},
      {"rows", 2, [](const Shape& whole, int r) { return slice(whole, 0, r, 2); }},
      {"rows, more ranks than some have", 4, [](const Shape& whole, int r) { return slice(whole, 0, r, 4); }},
      {"columns", 3, [](const Shape& whole, int r) { return slice(whole, whole.rank() > 1 ? 1 : 0, r, 3); }},
      {"last dimension", 2, [](const Shape& whole, int r) { return slice(whole, whole.rank() - 1, r, 2); }},
      {"a range in each third", 2, [](const Shape& whole, int r) { return thirds(whole, r, 2); }},
      {"elements", 3, [](const Shape& whole, int r) { return flat_share(TensorPart::all(whole), r, 3); }},
      {"elements, very uneven", 4,
       [](const Shape& whole, int r) {
         const TensorPart all = TensorPart::all(whole);
         const int64_t cuts[] = {0, std::min<int64_t>(1, all.count()), std::min<int64_t>(1, all.count()),
                                 std::max(all.count() * 9 / 10, std::min<int64_t>(1, all.count())), all.count()};
         return all.elements(cuts[r], cuts[r + 1]);
       }},
      {"elements of rows", 4,
       [](const Shape& whole, int r) { return flat_share(slice(whole, 0, r / 2, 2), r % 2, 2); }},
      {"elements of columns", 4,
       [](const Shape& whole, int r) {
         return flat_share(slice(whole, whole.rank() > 1 ? 1 : 0, r / 2, 2), r % 2, 2);
       }},
      {"elements of thirds", 4,
       [](const Shape& whole, int r) { return flat_share(thirds(whole, r / 2, 2), r % 2, 2); }},
      {"rows in two replicas", 4, [](const Shape& whole, int r) { return slice(whole, 0, r % 2, 2); }},
      {"pairs that cut differently", 4,
       [](const Shape& whole, int r) {
         const TensorPart all = TensorPart::all(whole);
         const int64_t cut = all.count() * (r < 2 ? 1 : 2) / 3;
         return r % 2 == 0 ? all.elements(0, cut) : all.elements(cut, all.count());
       }},
      {"the last rank has all", 3,
       [](const Shape& whole, int r) {
         const TensorPart all = TensorPart::all(whole);
         return r == 2 ? all : all.elements(0, 0);
       }},
  };
  return all;
}

ShardedContent content_of(const Layout& layout, int rank, int64_t step = 7) {
  ShardedContent content;
  content.step = step;
  content.run_id = "run";
  content.layout = layout.name;
  content.state = {{"k", "v"}};
  content.text_files = {{"config.toml", "lr = 0.1\n"}};
  for (const auto& [name, tensor] : whole_tensors()) {
    const TensorPart part = layout.part(tensor.shape(), rank);
    content.model.push_back({name, part.of(tensor), part});
    content.optimizer.push_back({name + ".mean", part.of(tensor.to(DType::f32)).reshape({-1}), part});
  }
  content.optimizer.push_back({"steps", Tensor::from(std::vector<int64_t>{step}, {1})});
  return content;
}

/// Bit for bit, whatever the dtype: all values here are exact in f64.
void expect_same(const Tensor& got, const Tensor& expected, const std::string& what) {
  EXPECT_EQ(got.describe(), expected.describe()) << what;
  EXPECT_EQ(got.to_vector<double>(), expected.to_vector<double>()) << what;
}

void expect_whole(const CheckpointContent& content) {
  const NamedTensors expected = whole_tensors();
  ASSERT_EQ(content.model.size(), expected.size());
  ASSERT_EQ(content.optimizer.size(), expected.size() + 1);
  const std::map<std::string, Tensor> model(content.model.begin(), content.model.end()),
      optimizer(content.optimizer.begin(), content.optimizer.end());
  for (const auto& [name, tensor] : expected) {
    ASSERT_TRUE(model.contains(name) && optimizer.contains(name + ".mean")) << name;
    expect_same(model.at(name), tensor, name);
    expect_same(optimizer.at(name + ".mean"), tensor.to(DType::f32), name);
  }
  EXPECT_EQ(optimizer.at("steps").item(), static_cast<double>(content.step));
}

class CheckpointGroup : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "weft-group-XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
    root_ = folder_ + "/out";
    previous_ = log::set_sink([](log::Level, std::string_view) {});
  }
  void TearDown() override {
    log::set_sink(std::move(previous_));
    fs::remove_all(folder_);
  }

  /// Saves on all ranks of the layout; the path, equal on all.
  std::string save(const Layout& layout, int64_t step = 7, SaveCheckpointOptions options = {}) {
    std::mutex mutex;
    std::set<std::string> paths;
    dist::run_threads(layout.ranks, [&](dist::Group& group) {
      const std::string path = CheckpointSaver(root_, &group, options).save(content_of(layout, group.rank(), step));
      const std::lock_guard lock(mutex);
      paths.insert(path);
    });
    EXPECT_EQ(paths.size(), 1u);
    return *paths.begin();
  }

  std::string folder_, root_;
  log::Sink previous_;
};

TEST_F(CheckpointGroup, EveryLayoutLoadsWhatEveryOtherHasSaved) {
  for (const Layout& saving : layouts()) {
    SCOPED_TRACE(saving.name);
    const std::string path = save(saving);
    EXPECT_EQ(verify_checkpoint(path), std::vector<std::string>{});
    const CheckpointContent whole = load_checkpoint(path);
    expect_whole(whole);
    EXPECT_EQ(whole.step, 7);
    EXPECT_EQ(whole.layout, saving.name);
    EXPECT_EQ(whole.state, (std::map<std::string, std::string>{{"k", "v"}}));
    EXPECT_EQ(whole.text_files, (std::map<std::string, std::string>{{"config.toml", "lr = 0.1\n"}}));
    const OpenCheckpoint open = open_checkpoint(path);
    for (const Layout& loading : layouts()) {
      for (int rank = 0; rank < loading.ranks; ++rank) {
        for (const auto& [name, tensor] : whole_tensors()) {
          const TensorPart part = loading.part(tensor.shape(), rank);
          const std::string what = concat(loading.name, ", rank ", rank, ", ", name);
          expect_same(open.model.load(name, part), part.of(tensor), what);
          expect_same(open.optimizer.load(name + ".mean", part), part.of(tensor.to(DType::f32)), what);
        }
      }
    }
  }
}

TEST_F(CheckpointGroup, OneRankWritesTheBytesOfASaveByOneProcess) {
  const std::string path = save(layouts()[0]);
  CheckpointContent content;
  static_cast<CheckpointInfo&>(content) = content_of(layouts()[0], 0);
  content.text_files = content_of(layouts()[0], 0).text_files;
  for (const auto& [name, tensor] : whole_tensors()) {
    content.model.emplace_back(name, tensor);
    content.optimizer.emplace_back(name + ".mean", tensor.to(DType::f32).reshape(tensor.shape()));
  }
  content.optimizer.emplace_back("steps", Tensor::from(std::vector<int64_t>{7}, {1}));
  const std::string other = save_checkpoint(root_ + "2", content);
  EXPECT_EQ(read_file(path + "/manifest.json"), read_file(other + "/manifest.json"));  // it holds all hashes
  EXPECT_EQ(read_checkpoint_manifest(path).version, 1);
}

TEST_F(CheckpointGroup, ReplicasCostNoBytesAndAreSpreadOverTheRanks) {
  const Layout& replicas = layouts()[1];
  const std::string path = save(replicas);
  const CheckpointManifest manifest = read_checkpoint_manifest(path);
  EXPECT_EQ(manifest.version, 2);
  const int64_t one = read_checkpoint_manifest(save(layouts()[0], 8)).files[0].size;
  int64_t sum = 0, largest = 0, files = 0;
  for (const CheckpointFile& file : manifest.files) {
    if (!file.name.starts_with("model-")) continue;
    ++files, sum += file.size, largest = std::max(largest, file.size);
  }
  EXPECT_EQ(files, 3);
  EXPECT_LT(sum, one + 2 * 600);  // headers
  for (const auto* tensors : {&manifest.model, &manifest.optimizer}) {
    for (const CheckpointTensor& tensor : *tensors) EXPECT_EQ(tensor.pieces.size(), 1u) << tensor.name;
  }
}

TEST_F(CheckpointGroup, APartReadsOnlyTheFilesThatHoldIt) {
  const Layout& rows = layouts()[2];
  const std::string path = save(rows);
  OpenCheckpoint open = open_checkpoint(path);
  const Shape shape = open.model.entry("wte.weight").shape;
  // What lies under the second rank's rows is another file: it may be damaged after it was opened.
  const std::string second = path + "/" + open.model.entry("wte.weight").pieces[1].file;
  const TensorPart first = rows.part(shape, 0);
  const std::string before = read_file(second);
  std::fstream file(second, std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(-static_cast<std::streamoff>(before.size() / 2), std::ios::end);
  file << std::string(before.size() / 2, '\xff');
  file.close();
  expect_same(open.model.load("wte.weight", first), first.of(whole_tensors()[0].second), "first rows");
  EXPECT_NE(open.model.load("mask", rows.part({3, 8}, 0)).numel(), 0);
  EXPECT_THROW(open.model.load("mask"), Error);  // a BOOL of 0xff
}

std::string message_of(const std::function<void()>& run, ErrorKind kind) {
  try {
    run();
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), kind) << error.what();
    return error.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return "";
}

void expect_part(const std::string& text, const std::string& part) {
  EXPECT_NE(text.find(part), std::string::npos) << text;
}

TEST_F(CheckpointGroup, TensorsThatDoNotMakeWholeOnesAreRefusedOnAllRanksBeforeAnythingIsWritten) {
  const Tensor four = Tensor::from(std::vector<float>{1, 2, 3, 4}, {4});
  const auto rows = [](int64_t begin, int64_t end) { return TensorPart::along({4}, 0, {{begin, end}}); };
  const auto refused = [&](const std::function<void(ShardedContent&, int)>& change, const std::string& part) {
    std::atomic<int> count = 0;
    dist::run_threads(2, [&](dist::Group& group) {
      ShardedContent content;
      change(content, group.rank());
      expect_part(message_of([&] { CheckpointSaver(root_, &group).save(content); }, ErrorKind::kValue), part);
      ++count;
    });
    EXPECT_EQ(count, 2);
    EXPECT_FALSE(fs::exists(root_));
  };
  const auto with = [&](TensorPart first, TensorPart second) {
    return [=](ShardedContent& content, int rank) {
      const TensorPart& part = rank == 0 ? first : second;
      content.model.push_back({"w", part.of(four), part});
    };
  };
  refused(with(rows(0, 1), rows(2, 4)), "tensor \"w\" f32 [4]: indices 1 to 2 of dimension 0: no file has them");
  refused(with(rows(0, 2), rows(2, 3)), "indices 3 to 4 of dimension 0: no file has them");
  refused(with(rows(0, 3), rows(2, 4)), "indices 2 to 3 of dimension 0 are in two pieces, of model-00001-of-00002");
  refused(with(rows(0, 4).elements(0, 1), rows(0, 4).elements(2, 4)), "elements 1 to 2 of [4]: no file has them");
  refused(with(rows(0, 4).elements(0, 0), rows(0, 4).elements(0, 0)), "tensor \"w\" f32 [4]: no file has it");
  refused([&](ShardedContent& content,
              int rank) { content.model.push_back({"w", rank == 0 ? four : four.to(DType::f64)}); },
          "tensor \"w\" is f32 [4] on rank 0 and f64 [4] on rank 1");
  refused([&](ShardedContent& content,
              int rank) { content.model.push_back({"w", rank == 0 ? four : four.reshape({2, 2})}); },
          "tensor \"w\" is f32 [4] on rank 0 and f32 [2, 2] on rank 1");
  refused([&](ShardedContent& content, int rank) { content.step = rank; }, "rank 0 saves step 0 and rank 1 step 1");
  refused(
      [&](ShardedContent& content, int rank) {
        content.model.push_back({"w", four});
        if (rank == 1) content.model.push_back({"w", four});
      },
      "[save_checkpoint] rank 1: two tensors are named \"w\"");
  refused([&](ShardedContent& content, int rank) { content.model.push_back({"w", four, rows(0, 4 - rank)}); },
          "rank 1: tensor \"w\" is f32 [4], which is not the part [4], dimension 0 from 0 to 3 of 3 elements");
  refused([&](ShardedContent& content, int) { content.text_files["model-x.safetensors"] = ""; },
          "a text file may not be named model-x.safetensors");
}

TEST_F(CheckpointGroup, ARankThatFailsToWriteIsNamedOnAllRanksAndLeavesNothing) {
  const Layout& layout = layouts()[7];
  const std::string old = save(layout, 1);
  for (int failing = 0; failing < layout.ranks; ++failing) {
    for (const char* kind : {"model", "optimizer"}) {
      for (const bool background : {false, true}) {
        std::atomic<int> told = 0;
        dist::run_threads(layout.ranks, [&](dist::Group& group) {
          SaveCheckpointOptions options;
          options.keep_n = 1;
          options.after_step = [&](std::string_view step) {
            if (group.rank() == failing && step.starts_with(kind))
              fail(ErrorKind::kIo, "save_checkpoint", step, ": cannot write: No space left on device");
          };
          CheckpointSaver saver(root_, &group, options);
          const std::string message = message_of(
              [&] {
                if (!background) saver.save(content_of(layout, group.rank(), 2));
                saver.begin(content_of(layout, group.rank(), 2));
                saver.finish();
              },
              ErrorKind::kIo);
          expect_part(message, concat("[save_checkpoint] rank ", failing, ": ", kind, "-0000"));
          EXPECT_FALSE(saver.pending());
          ++told;
        });
        EXPECT_EQ(told, layout.ranks);
        std::set<std::string> names;
        for (const auto& entry : fs::directory_iterator(root_)) names.insert(entry.path().filename());
        EXPECT_EQ(names, (std::set<std::string>{".weft-lock", "step_00000001"}));
        EXPECT_TRUE(verify_checkpoint(old).empty());
      }
    }
  }
}

TEST_F(CheckpointGroup, ADirectoryThatCannotBeMadeIsAnErrorOnAllRanks) {
  write_file_atomic(folder_ + "/out", "a file");
  std::atomic<int> told = 0;
  dist::run_threads(2, [&](dist::Group& group) {
    expect_part(message_of([&] { CheckpointSaver(root_, &group).save(content_of(layouts()[2], group.rank())); },
                           ErrorKind::kIo),
                "rank 0: " + root_);
    ++told;
  });
  EXPECT_EQ(told, 2);
}

TEST_F(CheckpointGroup, RanksOpenACheckpointTogetherAndAllHearOfADamagedFile) {
  const Layout& layout = layouts()[7];
  const std::string path = save(layout);
  const auto open = [&](const std::function<void(dist::Group&)>& run) { dist::run_threads(3, run); };
  open([&](dist::Group& group) {
    const OpenCheckpoint opened = open_checkpoint(path, group);
    const Tensor whole = whole_tensors()[0].second;
    const TensorPart part = layout.part(whole.shape(), group.rank());
    expect_same(opened.model.load("wte.weight", part), part.of(whole), "wte.weight");
  });
  const std::string file = path + "/model-00002-of-00003.safetensors";
  std::string bytes = read_file(file);
  bytes.back() = static_cast<char>(bytes.back() ^ 1);
  fs::remove(file);
  write_file_atomic(file, bytes);
  std::atomic<int> told = 0;
  open([&](dist::Group& group) {
    const std::string message = message_of([&] { open_checkpoint(path, group); }, ErrorKind::kData);
    expect_part(message, "model-00002-of-00003.safetensors: has XXH3-128 ");
    ++told;
  });
  EXPECT_EQ(told, 3);
}

/// A manifest with the right hash at its end again.
std::string rehashed(std::string text) {
  const size_t digits = text.size() - 4 - 32;
  return text.replace(digits, 32, hash_bytes(as_bytes(text.substr(0, digits))));
}

TEST_F(CheckpointGroup, AManifestOfPiecesThatBreaksARuleIsRefused) {
  const Tensor whole = whole_tensor({4, 6}, DType::f32, 1);
  std::string path;
  dist::run_threads(2, [&](dist::Group& group) {
    const TensorPart rows = slice(whole.shape(), 0, group.rank(), 2);
    ShardedContent content;
    content.model = {{"w", rows.of(whole), rows}, {"s", Tensor::from(std::vector<int64_t>{3}, {})}};
    content.optimizer = {{"w.m", rows.of(whole), rows}};
    const std::string saved = CheckpointSaver(root_, &group).save(content);
    if (group.rank() == 0) path = saved;
  });
  const std::string file = path + "/manifest.json", good = read_file(file);
  const std::string first = R"({"file":"model-00001-of-00002.safetensors","dim":0,"ranges":[[0,2]],"elements":[0,12]})";
  const std::string second =
      R"({"file":"model-00002-of-00002.safetensors","dim":0,"ranges":[[2,4]],"elements":[0,12]})";
  const std::string tensor = R"({"name":"w","dtype":"F32","shape":[4,6],"pieces":[)";
  struct Case {
    std::string from, to, message;
  };
  const std::vector<Case> cases = {
      // holes and overlaps
      {first + ",", "",
       "does not make whole tensors in \"model\": tensor \"w\" f32 [4, 6]: indices 0 to 2 of dimension 0"},
      {",\n      " + second, "",
       "does not make whole tensors in \"model\": tensor \"w\" f32 [4, 6]: indices 2 to 4 of"},
      {"[[2,4]],\"elements\":[0,12]", "[[3,4]],\"elements\":[0,6]",
       "does not make whole tensors in \"model\": tensor \"w\" f32 [4, 6]: indices 2 to 3 of dimension 0: no file"},
      {"[[2,4]],\"elements\":[0,12]", "[[1,3]],\"elements\":[0,12]",
       "does not make whole tensors in \"model\": tensor \"w\" f32 [4, 6]: indices 1 to 2 of dimension 0 are in two "
       "pieces, of model-00001-of-00002.safetensors and of model-00002"},
      {"[[0,2]],\"elements\":[0,12]", "[[0,2]],\"elements\":[0,11]",
       "does not make whole tensors in \"model\": tensor \"w\" f32 [4, 6]: elements 11 to 12 of [4, 6], dimension 0 "
       "from "
       "0 to 2: no file has them"},
      {"[[2,4]],\"elements\":[0,12]", "[[0,2]],\"elements\":[6,12]",
       "does not make whole tensors in \"model\": tensor \"w\" f32 [4, 6]: elements 6 to 12 of [2, 6] are in two"},
      {"\"dim\":0,\"ranges\":[[2,4]]", "\"dim\":1,\"ranges\":[[2,4]]",
       "has elements 0 to 12 in a piece of the tensor \"w\"; they must be some of the 8 of [4, 6], dimension 1 from 2"},
      {"\"dim\":0,\"ranges\":[[2,4]]", "\"dim\":1,\"ranges\":[[2,5]]",
       "does not make whole tensors in \"model\": tensor \"w\" f32 [4, 6]: it is cut along dimension 0 in model-00001"},
      {"\"pieces\":[\n      " + first + ",\n      " + second + "]", "\"pieces\":[]",
       "does not make whole tensors in \"model\": tensor \"w\" f32 [4, 6]: no file has it"},
      // files
      {"model-00002-of-00002.safetensors\",\"dim", "model-3.safetensors\",\"dim", "does not list model-3.safetensors"},
      {"model-00002-of-00002.safetensors\",\"dim", "../x\",\"dim", "has the file name \"../x\" in a piece of"},
      {"model-00002-of-00002.safetensors\",\"dim", "model-00001-of-00002.safetensors\",\"dim",
       "has two pieces of the tensor \"w\" of \"model\" in model-00001-of-00002.safetensors"},
      {"\"file\":\"optimizer-00001-of-00002.safetensors", "\"file\":\"model-00001-of-00002.safetensors",
       "has tensors of the model and of the optimizer in model-00001-of-00002.safetensors"},
      // values
      {"\"name\":\"s\"", "\"name\":\"w\"", "has the tensor \"w\" twice in \"model\""},
      {tensor, R"({"name":"w","dtype":"F31","shape":[4,6],"pieces":[)",
       "has the dtype \"F31\" in a tensor of \"model\""},
      {tensor, R"({"name":"w","dtype":"F32","shape":[4,-6],"pieces":[)", "has \"shape\" = -6; it must be an integer"},
      {tensor, R"({"name":"w","dtype":"F32","shape":[1,1,1,1,1,4,6],"pieces":[)", "has a shape of 7 sizes"},
      {tensor, R"({"name":"w","dtype":"F32","shape":[4611686018427387904,6],"pieces":[)", "has the shape [4611686018"},
      {tensor, R"({"name":"w","dtype":"F32","shape":{},"pieces":[)", "has \"shape\" = an object; it must be an array"},
      {tensor, R"({"name":"w","dtype":"F32","pieces":[)", "has no \"shape\" in a tensor of \"model\""},
      {tensor, R"({"name":"w","more":1,"dtype":"F32","shape":[4,6],"pieces":[)", "has the unknown key \"more\""},
      {"\"dim\":0,\"ranges\":[[2,4]]", "\"dim\":2,\"ranges\":[[2,4]]", "has dim 2 in a piece of the tensor \"w\""},
      {"[[2,4]]", "[[2,5]]", "has the range 2 to 5 in a piece of the tensor \"w\"; ranges increase"},
      {"[[2,4]]", "[[2,2],[2,4]]", "has the range 2 to 2 in a piece"},
      {"[[2,4]]", "[[2,4],[2,4]]", "has the range 2 to 4 in a piece"},
      {"[[2,4]]", "[[4,2]]", "has a pair 4 to 2 in a piece of the tensor \"w\"; begin comes first"},
      {"[[2,4]]", "[[2,4,4]]", "has an array in a piece of the tensor \"w\"; it must be a pair"},
      {"[[2,4]]", "[2,4]", "has 2 in a piece of the tensor \"w\"; it must be a pair"},
      {"[[2,4]],\"elements\":[0,12]", "[[2,4]],\"elements\":[0,13]", "has elements 0 to 13 in a piece"},
      {"[[2,4]],\"elements\":[0,12]", "[[2,4]],\"elements\":[12,12]", "has elements 12 to 12 in a piece"},
      {"[[2,4]],\"elements\":[0,12]", "[[2,4]],\"elements\":[0,1e3]", "has \"end\" = 1000.0 in a piece"},
  };
  for (const Case& each : cases) {
    SCOPED_TRACE(each.from + " -> " + each.to);
    std::string text = good;
    const size_t place = text.find(each.from);
    ASSERT_NE(place, std::string::npos);
    text.replace(place, each.from.size(), each.to);
    fs::remove(file);
    write_file_atomic(file, rehashed(text));
    const std::string expected = "[load_checkpoint] " + file + ": the manifest " + each.message;
    const std::string message = message_of([&] { load_checkpoint(path); }, ErrorKind::kData);
    EXPECT_EQ(message.substr(0, expected.size()), expected) << message;
    EXPECT_EQ(verify_checkpoint(path), std::vector<std::string>{message});
  }
  // What the manifest says of the files, and what they are.
  const auto with = [&](const std::string& from, const std::string& to) {
    std::string text = good;
    text.replace(text.find(from), from.size(), to);
    fs::remove(file);
    write_file_atomic(file, rehashed(text));
    const std::string message = message_of([&] { load_checkpoint(path); }, ErrorKind::kData);
    EXPECT_EQ(verify_checkpoint(path), std::vector<std::string>{message});
    return message;
  };
  expect_part(with(tensor, R"({"name":"v","dtype":"F32","shape":[4,6],"pieces":[)"),
              "model-00001-of-00002.safetensors: there is no tensor \"v\"");
  expect_part(with(tensor, R"({"name":"w","dtype":"I32","shape":[4,6],"pieces":[)"),
              "model-00001-of-00002.safetensors: tensor \"w\" is f32 [2, 6] but the manifest says i32 [2, 6]");
  const size_t line = good.find("    {\"name\":\"s\""), end = good.find("]},\n", line);
  expect_part(with(good.substr(line, end + 4 - line), ""), "tensors but the manifest says 1");
  fs::remove(file);
  write_file_atomic(file, good);
  EXPECT_TRUE(verify_checkpoint(path).empty());
}

TEST_F(CheckpointGroup, EveryFlippedBitOfAManifestOfPiecesIsFound) {
  std::string path;
  dist::run_threads(2, [&](dist::Group& group) {
    const TensorPart rows = slice({4, 2}, 0, group.rank(), 2);
    ShardedContent content;
    content.model = {{"w", rows.of(whole_tensor({4, 2}, DType::f32, 1)), rows}};
    content.optimizer = {{"steps", Tensor::from(std::vector<int64_t>{3}, {1})}};
    const std::string saved = CheckpointSaver(root_, &group).save(content);
    if (group.rank() == 0) path = saved;
  });
  int flips = 0;
  const std::string file = path + "/manifest.json", good = read_file(file);
  for (size_t bit = 0; bit < good.size() * 8; ++bit) {
    std::string flipped = good;
    flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ (1 << (bit % 8)));
    EXPECT_THROW(checkpoint::parse_manifest(flipped, file), Error) << " bit " << bit;
    ++flips;
  }
  EXPECT_TRUE(verify_checkpoint(path).empty());
  EXPECT_GT(flips, 8'000);
}

TEST_F(CheckpointGroup, WritingInTheBackgroundStoresTheValuesOfTheMomentAndPublishesWhenAllHaveWritten) {
  const Layout& layout = layouts()[7];
  dist::run_threads(layout.ranks, [&](dist::Group& group) {
    std::atomic<bool> go = group.rank() != 1;
    SaveCheckpointOptions options;
    options.after_step = [&](std::string_view step) {
      // One rank's disk is slow.
      while (step.ends_with(".safetensors") && !go) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    };
    CheckpointSaver saver(root_, &group, options);
    EXPECT_FALSE(saver.finish());
    EXPECT_FALSE(saver.poll(false));
    ShardedContent content = content_of(layout, group.rank());
    const auto any = [&] {
      const Tensor flag = Tensor::from(std::vector<int64_t>{saver.writing() ? 1 : 0}, {1});
      group.all_reduce_(flag, dist::Reduction::max);
      return flag.item() > 0;
    };
    saver.begin(content);
    for (StoredTensor& each : content.model) each.tensor.fill_(0);
    for (StoredTensor& each : content.optimizer) each.tensor.fill_(0);
    EXPECT_THROW(saver.begin(content), Error);
    const int64_t calls = group.traffic(dist::Collective::all_gather).calls;
    for (int step = 0; step < 5; ++step) {
      EXPECT_FALSE(saver.poll(any()));
      EXPECT_TRUE(saver.pending());
    }
    EXPECT_EQ(group.traffic(dist::Collective::all_gather).calls, calls);  // a poll in vain talks to nobody
    EXPECT_FALSE(find_latest_checkpoint(root_).path);
    go = true;
    std::optional<std::string> path;
    while (!path) path = saver.poll(any());
    EXPECT_FALSE(saver.pending());
    expect_whole(load_checkpoint(*path));
  });
}

TEST_F(CheckpointGroup, CopiesThatAreBeingWrittenAreCountedAndGivenBack) {
  const auto use = [] {
    return allocator(Device::cpu()).statistics().categories[static_cast<size_t>(MemoryCategory::checkpoint)].current;
  };
  std::atomic<bool> go = false;
  SaveCheckpointOptions options;
  options.after_step = [&](std::string_view step) {
    while (step == "model.safetensors" && !go) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  };
  CheckpointSaver saver(root_, nullptr, options);
  ShardedContent content;
  content.model = {{"w", whole_tensor({100, 100}, DType::f32, 1)}};
  content.optimizer = {{"w.mean", whole_tensor({100, 100}, DType::f32, 1)}};
  ASSERT_EQ(use(), 0);
  saver.begin(content);
  EXPECT_GE(use(), 80'000);
  go = true;
  EXPECT_TRUE(saver.finish());
  EXPECT_EQ(use(), 0);
}

TEST_F(CheckpointGroup, ASaveThatIsNotPublishedIsGone) {
  const std::string old = save(layouts()[7], 1);
  dist::run_threads(3, [&](dist::Group& group) {
    CheckpointSaver saver(root_, &group);
    saver.begin(content_of(layouts()[7], group.rank(), 2));
    group.barrier();
  });
  std::set<std::string> names;
  for (const auto& entry : fs::directory_iterator(root_)) names.insert(entry.path().filename());
  // The files of rank 0 go with its directory; of ranks that wrote later the next save deletes what is left.
  names.erase(".weft-lock");
  for (const std::string& name : names) EXPECT_TRUE(name == "step_00000001" || name.starts_with(".tmp-")) << name;
  EXPECT_EQ(find_latest_checkpoint(root_).path, old);
  save(layouts()[7], 3);
  for (const auto& entry : fs::directory_iterator(root_))
    EXPECT_FALSE(entry.path().filename().string().starts_with(".tmp-"));
}

TEST_F(CheckpointGroup, WhatARankHoldsIsLoadedAndWhatNoRankWantsIsRefused) {
  const std::string path = save(layouts()[9]);
  dist::run_threads(2, [&](dist::Group& group) {
    const OpenCheckpoint open = open_checkpoint(path, group);
    std::vector<StoredTensor> all;
    for (const auto& [name, tensor] : whole_tensors()) all.push_back({name, tensor});
    if (group.rank() == 1) all = {all.back()};
    const NamedTensors loaded = load_stored(open.model, all, &group);
    ASSERT_EQ(loaded.size(), all.size());
    for (size_t i = 0; i < all.size(); ++i) expect_same(loaded[i].second, all[i].tensor, all[i].name);
    if (group.rank() == 0) all.erase(all.begin());
    expect_part(message_of([&] { load_stored(open.model, all, &group); }, ErrorKind::kData),
                path + ": holds the tensor \"wte.weight\", which the program does not have");
    if (group.rank() == 1) all.push_back({"wte.wieght", Tensor::empty({13, 6})});
    expect_part(message_of([&] { load_stored(open.model, all, &group); }, ErrorKind::kData),
                "rank 1: " + path + ": there is no tensor \"wte.wieght\" among its 7; did you mean \"wte.weight\"?");
  });
}

TEST(CheckpointPlan, DistinctPiecesAreWrittenOnceAndSharedOnesEvenTheLoad) {
  using checkpoint::HeldPiece;
  using checkpoint::Kind;
  // Rank 0 alone has a large tensor; of the shared ones the others write most.
  std::vector<std::vector<HeldPiece>> held(3);
  held[0].push_back({Kind::model, "large", DType::f32, TensorPart::all({100})});
  for (auto& rank : held) {
    for (int i = 0; i < 10; ++i) rank.push_back({Kind::model, concat("shared", i), DType::f32, TensorPart::all({20})});
  }
  const checkpoint::SavePlan plan = checkpoint::plan_save(held);
  std::map<std::string, int64_t> elements;
  for (const CheckpointTensor& tensor : plan.tensors[0]) {
    ASSERT_EQ(tensor.pieces.size(), 1u);
    elements[tensor.pieces[0].file] += tensor.pieces[0].part.count();
  }
  EXPECT_EQ(elements.at(plan.files[0][0]), 100);
  EXPECT_EQ(elements.at(plan.files[1][0]), 100);
  EXPECT_EQ(elements.at(plan.files[2][0]), 100);
  EXPECT_EQ(plan.files[0][0], "model-00001-of-00003.safetensors");
  EXPECT_EQ(plan.files[0][1], "");  // nothing of the optimizer
}

TEST(CheckpointPlan, WhatRanksHoldAlikeInPartIsWrittenOnce) {
  // Two groups of ranks share out one tensor, each in its own way.
  const TensorPart all = TensorPart::all({10, 10});
  const std::vector<std::pair<int64_t, int64_t>> held = {{0, 37}, {37, 100}, {0, 0}, {0, 64}, {64, 100}};
  std::vector<std::vector<checkpoint::HeldPiece>> ranks;
  for (const auto& [begin, end] : held)
    ranks.push_back({{checkpoint::Kind::model, "w", DType::f32, all.elements(begin, end)}});
  const checkpoint::SavePlan plan = checkpoint::plan_save(ranks);
  ASSERT_EQ(plan.tensors[0].size(), 1u);
  std::set<std::string> files;
  int64_t at = 0;
  for (const CheckpointPiece& piece : plan.tensors[0][0].pieces) {
    EXPECT_EQ(piece.part.begin, at);
    at = piece.part.end;
    EXPECT_TRUE(files.insert(piece.file).second);
    const auto writer =
        std::find_if(plan.files.begin(), plan.files.end(), [&](const auto& names) { return names[0] == piece.file; });
    const auto& holds = held[static_cast<size_t>(writer - plan.files.begin())];
    EXPECT_LE(holds.first, piece.part.begin);
    EXPECT_GE(holds.second, piece.part.end);
  }
  EXPECT_EQ(at, 100);
}

}  // namespace
}  // namespace weft
