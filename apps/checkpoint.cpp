// weft checkpoint: what the checkpoints of a run are, whether they are intact, and what is in one.
#include "models/checkpoint.h"

#include <iostream>

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

void print_tensors(const char* title, const SafetensorsFile& file) {
  int64_t count = 0;
  size_t widest = 0;
  for (const SafetensorsEntry& entry : file.tensors()) {
    count += numel(entry.shape);
    widest = std::max(widest, entry.name.size());
  }
  std::cout << title << ": " << file.tensors().size() << " tensors, " << grouped(count) << " numbers, "
            << human_bytes(static_cast<int64_t>(file.bytes().size())) << '\n';
  for (const SafetensorsEntry& entry : file.tensors()) {
    std::cout << "  " << entry.name << std::string(widest - entry.name.size(), ' ') << "  " << entry.dtype << ' '
              << entry.shape << '\n';
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

}  // namespace

int run_checkpoint(std::span<const std::string> args) {
  static constexpr Command kCommands[] = {
      {"list", "lists the checkpoints of a run", checkpoint_list},
      {"verify", "makes every check and names the newest intact checkpoint", checkpoint_verify},
      {"show", "tells what is in a checkpoint", checkpoint_show},
  };
  return dispatch("weft checkpoint", "Lists, verifies and shows checkpoints.", kCommands, args, process_environment(),
                  std::cout);
}

}  // namespace weft::apps
