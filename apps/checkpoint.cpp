// weft checkpoint: what the checkpoints of a run are, whether they are intact, and what is in one.
#include "models/checkpoint/checkpoint.h"

#include <algorithm>
#include <cstdio>
#include <iostream>
#include <tuple>

#include "apps/command.h"
#include "apps/commands.h"
#include "apps/options.h"
#include "core/memory.h"
#include "models/gpt_checkpoint.h"

namespace weft::apps {
namespace {

namespace fs = std::filesystem;

bool is_checkpoint(const std::string& path) {
  std::error_code ignored;
  return fs::exists(fs::path(path) / "manifest.json", ignored);
}

void require_directory(const std::string& path) {
  std::error_code ignored;
  if (fs::is_directory(path, ignored)) return;
  fail(ErrorKind::kIo, "checkpoint", weft::quoted(path),
       fs::exists(path, ignored) ? " is no directory" : ": there is no such directory");
}

int checkpoint_list(std::span<const std::string> args) {
  std::string directory;
  Options options("checkpoint list", "Lists the checkpoints of a run. Manifests and file sizes are looked at.");
  options.positional("dir", &directory, "the directory of a run");
  if (!options.parse(args)) return 0;
  require_directory(directory);
  const std::vector<ListedCheckpoint> list = list_checkpoints(directory);
  if (list.empty()) {
    std::cout << "no checkpoints in " << directory
              << (is_checkpoint(directory) ? ": it is one itself, see weft checkpoint show" : "") << '\n';
    return 0;
  }
  for (const ListedCheckpoint& each : list) {
    std::cout << each.path << "  step " << grouped(each.manifest.step) << "  " << human_bytes(each.bytes) << "  "
              << (each.problem.empty() ? "complete" : "not complete: " + each.problem) << '\n';
  }
  return 0;
}

/// `path` as the checkpoints to check: itself, or those below it, newest first.
std::vector<std::string> checkpoints_of(const std::string& path) {
  if (is_checkpoint(path)) return {path};
  std::vector<std::string> paths;
  const std::vector<ListedCheckpoint> list = list_checkpoints(path);
  for (auto each = list.rbegin(); each != list.rend(); ++each) paths.push_back(each->path);
  return paths;
}

int checkpoint_verify(std::span<const std::string> args) {
  std::string directory;
  Options options(
      "checkpoint verify",
      "Makes every check (manifest, sizes, hashes, tensors) on the checkpoints of a run and names the newest "
      "intact one. Exit code 1 if there is none.");
  options.positional("dir", &directory, "the directory of a run, or one checkpoint");
  if (!options.parse(args)) return 0;
  require_directory(directory);
  std::string newest;
  for (const std::string& path : checkpoints_of(directory)) {
    const std::vector<std::string> problems = verify_checkpoint(path);
    std::cout << path << ": " << (problems.empty() ? "intact" : "not intact") << '\n';
    for (const std::string& problem : problems) std::cout << "  " << problem << '\n';
    if (problems.empty() && newest.empty()) newest = path;
  }
  if (newest.empty()) fail(ErrorKind::kData, "checkpoint verify", directory, " holds no intact checkpoint");
  std::cout << "newest intact checkpoint: " << newest << '\n';
  return 0;
}

void print_tensors(const char* title, const CheckpointTensors& all) {
  int64_t count = 0;
  size_t widest = 0;
  for (const CheckpointTensor& entry : all.tensors()) {
    count += numel(entry.shape);
    widest = std::max(widest, entry.name.size());
  }
  std::cout << title << ": " << all.tensors().size() << " tensors, " << grouped(count) << " numbers, "
            << human_bytes(all.bytes()) << '\n';
  for (const CheckpointTensor& entry : all.tensors()) {
    std::cout << "  " << entry.name << std::string(widest - entry.name.size(), ' ') << "  " << entry.dtype << ' '
              << entry.shape;
    if (entry.pieces.size() > 1) std::cout << ", " << entry.pieces.size() << " pieces";
    std::cout << '\n';
  }
}

int checkpoint_show(std::span<const std::string> args) {
  std::string directory;
  bool optimizer = true, config = true;
  Options options("checkpoint show", "Tells what is in a checkpoint.");
  options.positional("dir", &directory, "a checkpoint, or the directory of a run: then its newest intact one");
  options.add("optimizer", &optimizer, "list the optimizer's tensors too");
  options.add("config_text", &config, "print config.toml");
  if (!options.parse(args)) return 0;
  require_directory(directory);
  const std::string path =
      models::resolve_checkpoint(directory, [](const std::string& line) { std::cout << "note: " << line << '\n'; });
  const OpenCheckpoint open = open_checkpoint(path);
  const CheckpointManifest& manifest = open.manifest;
  std::cout << path << ": intact\n"
            << "step " << grouped(manifest.step) << ", " << grouped(manifest.data_cursor) << " samples read, seed "
            << manifest.seed << ", run " << manifest.run_id << '\n';
  for (const auto& [name, value] : manifest.state) std::cout << "state " << name << " = " << value << '\n';
  for (const CheckpointFile& file : manifest.files) {
    std::cout << "file " << file.name << ", " << grouped(file.size) << " bytes, XXH3-128 " << file.hash << '\n';
  }
  print_tensors("model", open.model);
  if (optimizer) print_tensors("optimizer", open.optimizer);
  if (const auto found = open.text_files.find("config.toml"); config && found != open.text_files.end()) {
    std::cout << "config.toml:\n" << found->second;
  }
  return 0;
}

/// The bytes of an element as they are stored, and what they stand for.
std::string element(const Tensor& tensor, int64_t at) {
  const Tensor one = tensor.reshape({-1}).narrow(0, at, 1).contiguous();
  const auto* bytes = static_cast<const unsigned char*>(one.raw());
  std::string hex;
  for (int64_t i = size_of(tensor.dtype()); i-- > 0;) {
    char digits[3];
    std::snprintf(digits, sizeof digits, "%02x", bytes[i]);
    hex += digits;
  }
  char value[32];
  std::snprintf(value, sizeof value, "%.9g", one.to(DType::f64).item());
  return concat(value, " (0x", hex, ')');
}

/// The index of an element of a flattened tensor: "[3, 17]".
std::string index_of(const Shape& shape, int64_t at) {
  Shape index = shape;
  for (int i = shape.rank(); i-- > 0; at /= shape[i]) index[i] = at % shape[i];
  return concat(index);
}

struct Difference {
  std::string text;      ///< "" if there is none
  int64_t elements = 0;  ///< compared
  int64_t tensors = 0;
};

/// The first difference between the tensors of one kind, by name; bits count, so that -0 and 0 differ and a NaN equals
/// itself.
Difference difference(const CheckpointTensors& a, const CheckpointTensors& b) {
  Difference result;
  const auto say = [&](const auto&... parts) { result.text = concat(parts...); };
  for (const CheckpointTensor& each : b.tensors()) {
    if (!a.contains(each.name)) return say(quoted(each.name), " is in the second only"), result;
  }
  for (const CheckpointTensor& each : a.tensors()) {
    const std::string name = quoted(each.name);
    if (!b.contains(each.name)) return say(name, " is in the first only"), result;
    const CheckpointTensor& other = b.entry(each.name);
    if (each.dtype != other.dtype || !(each.shape == other.shape)) {
      say(name, " is ", each.dtype, ' ', each.shape, " in the first and ", other.dtype, ' ', other.shape,
          " in the second");
      return result;
    }
    const Tensor left = a.load(each.name), right = b.load(each.name);
    const int64_t size = size_of(each.dtype), bytes = left.numel() * size;
    const auto* first = static_cast<const std::byte*>(left.raw());
    const auto* second = static_cast<const std::byte*>(right.raw());
    const int64_t at = std::mismatch(first, first + bytes, second).first - first;
    if (at < bytes) {
      const int64_t i = at / size;
      say(name, ' ', each.dtype, ' ', each.shape, " differs first at element ", index_of(each.shape, i), ": ",
          element(left, i), " and ", element(right, i));
      return result;
    }
    result.elements += left.numel(), ++result.tensors;
  }
  return result;
}

int checkpoint_compare(std::span<const std::string> args) {
  std::string first, second;
  Options options("checkpoint compare",
                  "Compares the tensors of two checkpoints bit by bit, by name, whatever files they are in, and names "
                  "the first tensor and element that differ. Exit code 1 if any does.");
  options.positional("first", &first, "a checkpoint, or the directory of a run: then its newest intact one");
  options.positional("second", &second, "the other");
  if (!options.parse(args)) return 0;
  const auto open = [](const std::string& directory) {
    require_directory(directory);
    return open_checkpoint(
        models::resolve_checkpoint(directory, [](const std::string& line) { std::cout << "note: " << line << '\n'; }));
  };
  const OpenCheckpoint a = open(first), b = open(second);
  bool same = true;
  for (const auto& [kind, left, right] :
       {std::tuple("model", &a.model, &b.model), std::tuple("optimizer", &a.optimizer, &b.optimizer)}) {
    const Difference found = difference(*left, *right);
    same = same && found.text.empty();
    std::cout << kind << ": "
              << (found.text.empty()
                      ? concat(grouped(found.tensors), " tensors, ", grouped(found.elements), " numbers, all equal")
                      : found.text)
              << '\n';
  }
  if (a.manifest.step != b.manifest.step)
    std::cout << "note: steps " << grouped(a.manifest.step) << " and " << grouped(b.manifest.step) << '\n';
  return same ? 0 : 1;
}

}  // namespace

int run_checkpoint(std::span<const std::string> args) {
  static constexpr Command kCommands[] = {
      {"list", "lists the checkpoints of a run", checkpoint_list},
      {"verify", "makes every check and names the newest intact checkpoint", checkpoint_verify},
      {"show", "tells what is in a checkpoint", checkpoint_show},
      {"compare", "names the first tensor and element in which two checkpoints differ", checkpoint_compare},
  };
  return dispatch("weft checkpoint", "Lists, verifies, shows and compares checkpoints.", kCommands, args,
                  process_environment(), std::cout);
}

}  // namespace weft::apps
