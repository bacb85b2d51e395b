#pragma once
#include <functional>
#include <string>
#include <vector>

#include "models/checkpoint/checkpoint.h"

namespace weft {

/// Ranks that look at checkpoints together, so that no file is read by more of them than need it. All see the same
/// directories and make the same calls. The default is one process.
struct CheckingRanks {
  using Gather = std::function<std::vector<std::string>(const std::string& own)>;
  int rank = 0, size = 1;
  /// A text of every rank, on every rank (dist/texts.h).
  Gather gather = [](const std::string& own) { return std::vector<std::string>{own}; };
  /// For tests: called with each file whose bytes this rank reads to check them.
  std::function<void(const CheckpointFile&)> on_read = {};
};

/// verify_checkpoint() by all ranks together: each file is read by one of them, which have about as many bytes each.
/// The answer is the same on all, and names the rank that has found a problem if there are several.
std::vector<std::string> verify_checkpoint(const std::string& path, const CheckingRanks& ranks);

/// find_latest_checkpoint() likewise; rank 0 says what there is. @throws Error kIo on all ranks if it cannot read root.
LatestCheckpoint find_latest_checkpoint(const std::string& root, const CheckingRanks& ranks);

/// open_checkpoint() of one that has just been verified: files of tensors are not read once more to check them.
OpenCheckpoint open_verified_checkpoint(const std::string& path);

}  // namespace weft
