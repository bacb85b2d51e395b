#pragma once
#include <memory>
#include <optional>

#include "dist/control/client.h"
#include "dist/group.h"
#include "dist/launch_info.h"
#include "dist/mesh.h"
#include "models/checkpoint/shared_check.h"

namespace weft::apps {

/// The ranks of a run: this process alone, or those that a launcher started (docs/parallelism/launching.md), which
/// exchange tensors through Gloo, or NCCL on GPUs.
class World {
 public:
  /// Who launched this process, from its environment. @throws Error kUsage for a launcher's variables that contradict
  /// each other.
  World();
  /// The device of this rank among those of its machine, if `planned` is a GPU and there are several ranks.
  Device device(Device planned) const;
  /// The ranks as they can look at checkpoints before they exchange tensors; meets the others for it. While one of them
  /// reads, it goes on saying that it lives. @throws Error kIo if they do not come.
  CheckingRanks checking_ranks();
  /// Meets the other ranks, which exchange tensors on `device`. @throws Error kIo if they do not come.
  void connect(Device device);

  const dist::LaunchInfo& launched() const { return launched_; }
  int rank() const { return launched_.rank; }
  int size() const { return launched_.world_size; }
  /// Rank 0 writes files and talks for all.
  bool speaks() const { return rank() == 0; }
  /// After connect().
  dist::Group& group() { return *group_; }

 private:
  /// Where the ranks find each other.
  dist::ControlClient& control();

  dist::LaunchInfo launched_;
  std::unique_ptr<dist::ControlClient> control_;
  int gathered_ = 0;  ///< texts exchanged through it
  std::optional<dist::Group> group_;
};

}  // namespace weft::apps
