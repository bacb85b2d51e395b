// Reading checkpoints: every check. The search for the newest intact one is in shared_check.cpp, saving in saver.cpp.
#include "models/checkpoint/checkpoint.h"

#include <dirent.h>

#include <algorithm>
#include <cerrno>
#include <memory>
#include <system_error>

#include "models/checkpoint/manifest.h"
#include "models/checkpoint/shared_check.h"

namespace weft {

using checkpoint::kManifestFile;
using checkpoint::kModelFile;
using checkpoint::kOptimizerFile;

namespace checkpoint {

std::optional<std::vector<std::string>> entries(const std::string& directory) {
  const std::unique_ptr<DIR, int (*)(DIR*)> stream(::opendir(directory.c_str()), &::closedir);
  if (stream == nullptr && errno == ENOENT) return std::nullopt;
  std::vector<std::string> names;
  if (stream != nullptr) {
    errno = 0;
    while (const dirent* entry = ::readdir(stream.get())) {
      const std::string name = entry->d_name;
      if (name != "." && name != "..") names.push_back(name);
    }
  }
  if (errno != 0) {
    fail(ErrorKind::kIo, "checkpoint", directory, ": cannot list: ", std::generic_category().message(errno));
  }
  std::sort(names.begin(), names.end());
  return names;
}

std::vector<DirectoryName> directories(const std::string& root) {
  std::vector<DirectoryName> found;
  for (const std::string& name : entries(root).value_or(std::vector<std::string>{})) {
    if (const auto parsed = parse_directory_name(name)) found.push_back(*parsed);
  }
  std::sort(found.begin(), found.end(), [](const DirectoryName& a, const DirectoryName& b) {
    return std::pair(a.step, a.revision) < std::pair(b.step, b.revision);
  });
  return found;
}

namespace {

MappedFile map_with_size(const std::string& path, const CheckpointFile& file) {
  MappedFile mapped(path + "/" + file.name);
  if (const auto size = static_cast<int64_t>(mapped.size()); size != file.size) {
    fail(ErrorKind::kData, "load_checkpoint", mapped.path(), ": has ", grouped(size), " bytes but the manifest says ",
         grouped(file.size), size < file.size ? ": the file is truncated" : "");
  }
  return mapped;
}

MappedFile map_checked(const std::string& path, const CheckpointFile& file) {
  MappedFile mapped = map_with_size(path, file);
  if (const std::string hash = hash_bytes(mapped.bytes()); hash != file.hash) {
    fail(ErrorKind::kData, "load_checkpoint", mapped.path(), ": has XXH3-128 ", hash, " but the manifest says ",
         file.hash, ": the file is damaged");
  }
  return mapped;
}

}  // namespace

OpenCheckpoint open(const std::string& path, const std::function<bool(const CheckpointFile&)>& check_hash) {
  CheckpointManifest manifest = read_checkpoint_manifest(path);
  const TensorFiles names = tensor_files(manifest);
  std::map<std::string, std::string> text_files;
  std::map<std::string, SafetensorsFile> model, optimizer;
  for (const CheckpointFile& file : manifest.files) {
    if (!names.contains(file.name)) {
      text_files[file.name] = map_checked(path, file).text();
      continue;
    }
    SafetensorsFile tensors(check_hash(file) ? map_checked(path, file) : map_with_size(path, file));
    (names.model.contains(file.name) ? model : optimizer).emplace(file.name, std::move(tensors));
  }
  if (manifest.version == 1) {
    return {std::move(manifest), CheckpointTensors(std::move(model.at(kModelFile))),
            CheckpointTensors(std::move(optimizer.at(kOptimizerFile))), std::move(text_files)};
  }
  CheckpointTensors of_model(manifest.model, std::move(model), path),
      of_optimizer(manifest.optimizer, std::move(optimizer), path);
  return {std::move(manifest), std::move(of_model), std::move(of_optimizer), std::move(text_files)};
}

void check_file(const std::string& path, const CheckpointFile& file, bool has_tensors) {
  MappedFile mapped = map_checked(path, file);
  if (has_tensors) SafetensorsFile(std::move(mapped)).check_values();
}

CheckpointManifest check_sizes(const std::string& path) {
  CheckpointManifest manifest = read_checkpoint_manifest(path);
  for (const CheckpointFile& file : manifest.files) map_with_size(path, file);
  return manifest;
}

}  // namespace checkpoint

using checkpoint::map_checked;

CheckpointManifest read_checkpoint_manifest(const std::string& path) {
  const MappedFile file(path + "/" + kManifestFile);
  CheckpointManifest manifest = checkpoint::parse_manifest(file.text(), file.path());
  // Only under the names that save_checkpoint gives: a copy may be called anything.
  const std::string name = path.substr(path.find_last_of('/') + 1);
  const auto parsed = checkpoint::parse_directory_name(name);
  if (parsed && parsed->step != manifest.step) {
    fail(ErrorKind::kData, "load_checkpoint", file.path(), ": the manifest is of step ", manifest.step,
         " but the directory is named ", name);
  }
  return manifest;
}

OpenCheckpoint open_checkpoint(const std::string& path) {
  return checkpoint::open(path, [](const CheckpointFile&) { return true; });
}

CheckpointContent load_checkpoint(const std::string& path, Device device) {
  OpenCheckpoint open = open_checkpoint(path);
  CheckpointContent content;
  static_cast<CheckpointInfo&>(content) = open.manifest;
  {
    const MemoryScope scope(MemoryCategory::parameters);
    content.model = open.model.load_all(device);
  }
  {
    const MemoryScope scope(MemoryCategory::optimizer);
    content.optimizer = open.optimizer.load_all(device);
  }
  content.text_files = std::move(open.text_files);
  return content;
}

std::vector<std::string> verify_checkpoint(const std::string& path) { return verify_checkpoint(path, CheckingRanks()); }

std::vector<std::string> LatestCheckpoint::messages() const {
  std::vector<std::string> lines;
  for (const RejectedCheckpoint& each : rejected) lines.push_back(each.path + " is not used: " + each.reason);
  if (!lines.empty()) {
    lines.push_back(path ? "the newest intact checkpoint is " + *path : std::string("there is no intact checkpoint"));
  }
  return lines;
}

LatestCheckpoint find_latest_checkpoint(const std::string& root) {
  return find_latest_checkpoint(root, CheckingRanks());
}

std::vector<ListedCheckpoint> list_checkpoints(const std::string& root) {
  std::vector<ListedCheckpoint> list;
  for (const checkpoint::DirectoryName& name : checkpoint::directories(root)) {
    ListedCheckpoint each{.path = root + "/" + checkpoint::to_string(name), .manifest = {}, .bytes = 0, .problem = {}};
    try {
      each.manifest = read_checkpoint_manifest(each.path);
      for (const CheckpointFile& file : each.manifest.files) {
        // Sizes come from a file: their sum may not fit.
        if (__builtin_add_overflow(each.bytes, file.size, &each.bytes)) each.bytes = file.size;
      }
      checkpoint::check_sizes(each.path);
    } catch (const Error& error) {
      each.problem = error.what();
    }
    list.push_back(std::move(each));
  }
  return list;
}

}  // namespace weft
