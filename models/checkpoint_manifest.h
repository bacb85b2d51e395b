#pragma once
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "models/checkpoint.h"

/// The parts that reading and saving of checkpoints share. Private to models/checkpoint*.cpp.
namespace weft::checkpoint {

inline constexpr const char* kManifestFile = "manifest.json";
inline constexpr const char* kModelFile = "model.safetensors";
inline constexpr const char* kOptimizerFile = "optimizer.safetensors";

/// Whether `name` may be a file of a checkpoint: no path, nothing hidden, nothing that a shell would read differently.
bool is_file_name(std::string_view name);

/// manifest.json. @throws Error  kValue if a text is not UTF-8.
std::string manifest_text(const CheckpointManifest& manifest);

/// The opposite, with every check. @throws Error  kData naming `source`.
CheckpointManifest parse_manifest(std::string_view text, const std::string& source);

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

/// The manifest of a checkpoint whose files are all there in their full sizes. @throws Error  kIo, kData.
CheckpointManifest check_sizes(const std::string& path);

}  // namespace weft::checkpoint
