#pragma once
#include <functional>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "models/checkpoint/checkpoint.h"

/// The parts that reading and saving of checkpoints share. Private to models/checkpoint*.cpp.
namespace weft::checkpoint {

inline constexpr const char* kManifestFile = "manifest.json";
inline constexpr const char* kModelFile = "model.safetensors";
inline constexpr const char* kOptimizerFile = "optimizer.safetensors";

/// "model-00002-of-00004.safetensors": of several files, the second of the model ("model") or the optimizer.
std::string file_name(const std::string& kind, int number, int of);
/// Whether it is one of those names, or one of the two above.
bool is_tensor_file_name(std::string_view name);

/// Whether `name` may be a file of a checkpoint: no path, nothing hidden, nothing that a shell would read differently.
bool is_file_name(std::string_view name);

/// manifest.json. @throws Error  kValue if a text is not UTF-8.
std::string manifest_text(const CheckpointManifest& manifest);

/// The opposite, with every check. @throws Error  kData naming `source`.
CheckpointManifest parse_manifest(std::string_view text, const std::string& source);

/// The files that hold tensors of the model and of the optimizer.
struct TensorFiles {
  std::set<std::string> model, optimizer;
  bool contains(const std::string& name) const { return model.contains(name) || optimizer.contains(name); }
};
TensorFiles tensor_files(const CheckpointManifest& manifest);

/// "step_00000120" is step 120; "step_00000120-2" is another checkpoint of that step, made while the first was there.
struct DirectoryName {
  int64_t step = 0;
  int revision = 1;
};
std::string to_string(const DirectoryName& name);
/// Nothing unless `name` is what to_string() gives.
std::optional<DirectoryName> parse_directory_name(std::string_view name);

/// The entries of `root` with such names, earliest first. No directory `root` means none. @throws Error  kIo.
std::vector<DirectoryName> directories(const std::string& root);

/// Names of everything in a directory but "." and "..", sorted. @throws Error  kIo; nothing if it is not there.
std::optional<std::vector<std::string>> entries(const std::string& directory);

/// open_checkpoint() that checks the hashes of the tensor files for which `check_hash` says so.
OpenCheckpoint open(const std::string& path, const std::function<bool(const CheckpointFile&)>& check_hash);

/// Reads the whole file: its size and hash, and the values of its tensors if it is of those. @throws Error  kIo, kData.
void check_file(const std::string& path, const CheckpointFile& file, bool has_tensors);

/// The manifest of a checkpoint whose files are all there in their full sizes. @throws Error  kIo, kData.
CheckpointManifest check_sizes(const std::string& path);

}  // namespace weft::checkpoint
