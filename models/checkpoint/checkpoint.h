#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "models/checkpoint/tensors.h"

/// Checkpoints: directories "step_00000120" under the directory of a run, each with model.safetensors,
/// optimizer.safetensors (or several files of each, where several processes wrote it: models/checkpoint/saver.h), text
/// files, and manifest.json, which lists them with sizes and hashes. The format is in docs/checkpoint-format.md. A
/// directory appears under its name complete and durable or not at all, whenever the process is killed, the power fails
/// or the disk is full; a complete one is never touched until a newer one is complete.
namespace weft {

/// Where a run stood.
struct CheckpointInfo {
  int64_t step = 0;         ///< optimizer steps done
  std::string run_id;       ///< names the run; free text
  int64_t data_cursor = 0;  ///< samples consumed by all ranks together
  uint64_t seed = 0;        ///< of the run's random numbers
  std::string layout;       ///< how tensors were spread when this was written; for information: any layout loads it
  std::map<std::string, std::string> state;  ///< anything else, under names of the caller's choice
};

struct CheckpointContent : CheckpointInfo {
  NamedTensors model;
  NamedTensors optimizer;
  /// Files to keep beside the tensors ("config.toml", "tokenizer.json"): name and content. Names are of letters,
  /// digits,
  /// '.', '_' and '-', do not begin with '.', and have at most 128 characters.
  std::map<std::string, std::string> text_files;
};

struct CheckpointFile {
  std::string name;
  int64_t size = 0;  ///< bytes
  std::string hash;  ///< XXH3-128, 32 hexadecimal digits
};

struct CheckpointManifest : CheckpointInfo {
  std::vector<CheckpointFile> files;
  /// 1: the tensors are whole, in model.safetensors and optimizer.safetensors. 2: they are where `model` and
  /// `optimizer` say.
  int version = 1;
  std::vector<CheckpointTensor> model = {}, optimizer = {};
};

struct SaveCheckpointOptions {
  /// After the save, at most this many complete checkpoints of steps up to this one are left; 0 leaves all.
  int keep_n = 0;
  /// How long to wait for another save into the same directory, in seconds.
  double lock_seconds = 60;
  /// For tests: called after each step of the save with its name; may throw or end the process.
  std::function<void(std::string_view step)> after_step = {};
};

/// Writes root/step_<step> (root is made if it is not there) and returns its path. A checkpoint of the same step is
/// replaced once the new one is complete. Then checkpoints of earlier steps beyond keep_n are removed; one that is
/// incomplete, or that holds files of somebody else, is left alone. What killed saves have left behind is cleaned up.
/// Saves into one root take turns (a lock on root/.weft-lock). Failures to remove old checkpoints are only logged.
/// @throws Error  kValue for content that cannot be stored, before anything is written; kIo naming the file (disk full,
///                no permission, or lock_seconds have passed), with older checkpoints intact and nothing left behind.
std::string save_checkpoint(const std::string& root, const CheckpointContent& content,
                            const SaveCheckpointOptions& options = {});

/// A checkpoint whose files have all been checked against the manifest. Tensors are read when they are loaded.
struct OpenCheckpoint {
  CheckpointManifest manifest;
  CheckpointTensors model;
  CheckpointTensors optimizer;
  std::map<std::string, std::string> text_files;
};

/// Opens the checkpoint in directory `path`, whatever that is called.
/// @throws Error  kIo if a file cannot be read; kData if a size, a hash or a format is wrong, naming the file and both
///                values.
OpenCheckpoint open_checkpoint(const std::string& path);

/// open_checkpoint() and everything in it, tensors whole; counted as parameters and optimizer.
CheckpointContent load_checkpoint(const std::string& path, Device device = Device::cpu());

/// Reads the manifest alone: no other file is looked at. @throws Error  kIo, kData.
CheckpointManifest read_checkpoint_manifest(const std::string& path);

/// Makes every check on the directory `path` and returns what is wrong, each a line; empty if it is complete and
/// intact. Files that the manifest does not list are no fault.
std::vector<std::string> verify_checkpoint(const std::string& path);

struct RejectedCheckpoint {
  std::string path;
  std::string reason;
};

/// The newest intact checkpoint, and the newer ones that are not.
struct LatestCheckpoint {
  std::optional<std::string> path;
  std::vector<RejectedCheckpoint> rejected;  ///< newest first

  /// A line for each rejected one, and one that says what is used instead; empty if none was rejected.
  std::vector<std::string> messages() const;
};

/// Verifies the checkpoints under `root`, newest step first, until one is intact: manifests and hashes decide, no file
/// says which is the latest. No directory `root` means no checkpoint. @throws Error  kIo if root cannot be read.
LatestCheckpoint find_latest_checkpoint(const std::string& root);

struct ListedCheckpoint {
  std::string path;
  CheckpointManifest manifest;  ///< default if it cannot be read
  int64_t bytes = 0;            ///< of all files that the manifest lists
  std::string problem;          ///< empty if the manifest and the sizes of all files are right; hashes are not checked
};

/// The checkpoints under `root`, earliest step first. Reads manifests and sizes only. @throws Error  kIo.
std::vector<ListedCheckpoint> list_checkpoints(const std::string& root);

}  // namespace weft
