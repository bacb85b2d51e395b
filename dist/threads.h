#pragma once
#include <functional>
#include <string>

#include "dist/group.h"

namespace weft::dist {

/// A group of one rank, for tensors on `device`: every operation is a copy at most.
Group self_group(Device device = Device::cpu());

struct ThreadsOptions {
  /// Seconds after which an operation that not all ranks have come to is an error: longer than any rank computes
  /// between two operations.
  double timeout = 1800;
  /// File for the last 1,000 operations when something fails; "": the newest go to the log.
  std::string flight_record = {};
  /// What a rank's groups move data with, made of what they would; for programs that watch or disturb it. Null: that.
  std::function<std::shared_ptr<Engine>(std::shared_ptr<Engine> engine)> engine = {};
};

/// Runs program(world) on `ranks` threads of this process, each a rank of one group "world"; returns when all have
/// ended. Each thread starts with fresh thread-local state (grad mode, memory category). Kernels of all ranks share the
/// process's thread pool: while one rank's kernel has it, those of others run on their own threads, with the same bits.
///
/// A rank that throws ends the operations of all others with a GroupError that names it. Rethrows the first exception
/// that is not such a consequence, as it is but with the rank in front of its text if it is an Error.
/// @throws Error kValue for ranks outside 1 to 1024.
void run_threads(int ranks, const std::function<void(Group& world)>& program, const ThreadsOptions& options = {});

}  // namespace weft::dist
