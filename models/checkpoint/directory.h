#pragma once
#include <memory>
#include <string>

#include "models/checkpoint/checkpoint.h"

/// The directory of a checkpoint from its first file to its name. Private to models/checkpoint*.cpp.
namespace weft::checkpoint {

/// @throws Error kIo naming the path, the step and the system's message.
[[noreturn]] void fail_io(const std::string& path, const char* step, int error);

/// A checkpoint that is being written: the lock on the root and a directory under a temporary name, which goes with
/// this object if it was not published.
class PendingCheckpoint {
 public:
  /// Makes the root, waits for its lock, deletes what killed saves have left and makes the directory.
  /// @throws Error kIo, with nothing left behind.
  PendingCheckpoint(const std::string& root, int64_t step, const SaveCheckpointOptions& options);
  ~PendingCheckpoint();

  /// Where the files go, under their own names; durable each, the manifest last.
  const std::string& directory() const;
  /// Gives the directory the name of its step and removes what that makes superfluous, as save_checkpoint() says.
  /// Returns its path.
  std::string publish();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace weft::checkpoint
