#pragma once
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "apps/launch_output.h"
#include "apps/launch_ranks.h"
#include "dist/control/client.h"
#include "dist/control/server.h"

namespace weft::apps {

/// What the launchers of a run agree on before each start.
struct LaunchPlan {
  int attempt = 0;  ///< 0, then counts restarts
  int world_size = 1;
  int first_rank = 0;      ///< of this machine
  int ranks = 1;           ///< of this machine; 0 if it is not needed
  std::string run_id;      ///< another for each start: ranks of different starts must not meet
  std::string rendezvous;  ///< HOST:PORT of the ranks' control server
};

struct LaunchNodesOptions {
  int nodes = 1, node_rank = 0;
  int ranks = 1;           ///< that this machine can run
  std::string rendezvous;  ///< HOST:PORT where node 0's launcher is found; "" with one node
  int restarts = 0;
  std::optional<std::pair<int, int>> elastic;  ///< fewest and most ranks
  double silence = 4;                          ///< seconds after which a silent rank or launcher is lost
  double join_timeout = 60;                    ///< seconds in which all launchers must have come
  std::string metrics;                         ///< file for the ranks' metric records; "" for none
  dist::ControlKeys keys;
};

/// The launchers of a run, one on each machine: node 0's decides and serves the control planes (one of the launchers,
/// at the rendezvous; one of the ranks, another for each start), the others ask it.
class LaunchNodes {
 public:
  static std::unique_ptr<LaunchNodes> make(const LaunchNodesOptions& options, LaunchOutput& output,
                                           LaunchSignals& signals);
  virtual ~LaunchNodes() = default;
  /// The next start, or nothing when the run is over. @throws Error  kIo if launchers do not come, or node 0's is lost.
  virtual std::optional<LaunchPlan> next() = 0;
  /// A rank of this machine has ended.
  virtual void ended(const RankEnd& end) = 0;
  /// A signal came here: no restart follows.
  virtual void asked(int signal) = 0;
  /// A signal that came to node 0's launcher and must be forwarded here, once; else 0.
  virtual int forwarded() = 0;
  /// Whether this start has failed, here or elsewhere: what still runs must be ended.
  virtual bool failing() = 0;
  /// All ranks of this machine have ended; waits for the other machines'.
  virtual void done() = 0;
  /// The exit code, when the run is over.
  virtual int code() const = 0;
};

}  // namespace weft::apps
