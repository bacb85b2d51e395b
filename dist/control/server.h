#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "dist/control/keys.h"
#include "dist/control/records.h"

namespace weft::dist {

struct ControlServerOptions {
  std::string bind = "127.0.0.1";  ///< numeric address, or "*" for all of this machine
  int port = 0;                    ///< 0: one that is free
  int world_size = 1;
  ControlKeys keys;    ///< with the server's secret; clients must show keys.client_public
  std::string run_id;  ///< "": that of the keys
  /// A rank that is silent for so many seconds is declared lost. Ranks are told and say something five times as often.
  double silence = 4;
  /// Whether a lost rank makes all that wait, and will wait, for a key or a barrier fail.
  bool losses_fail_waits = true;
  // Called on the server's thread, one at a time; must not wait.
  std::function<void(const LogRecord&)> on_log;
  std::function<void(const MetricRecord&)> on_metric;
  std::function<void(const Member&)> on_member;  ///< a rank joined, left or was lost
};

struct ControlStatistics {
  uint64_t malformed = 0;          ///< frames of peers with the run's key that were dropped: broken, or before a hello
  uint64_t refused = 0;            ///< hellos: wrong run, rank taken, rank or world size wrong
  uint64_t denied = 0;             ///< peers with a key that is not the run's
  uint64_t failed_handshakes = 0;  ///< connections that spoke no CURVE, or none in time
  uint64_t stored_bytes = 0;       ///< keys and values
};

/// The one place that all ranks of a run talk to: store, membership with heartbeats, barriers, log and metric lines, on
/// a thread of its own over ZeroMQ. Every connection is encrypted and authenticated (CurveZMQ); only holders of the
/// run's client key get to send a message. Every message has a header with a magic, a version, the run's id and its
/// length, sizes are limited before anything is allocated, and what breaks the format is counted and dropped.
class ControlServer {
 public:
  /// @throws Error  kIo if the port cannot be had; kUsage for keys without the server's secret.
  explicit ControlServer(ControlServerOptions options);
  ~ControlServer();
  ControlServer(const ControlServer&) = delete;
  ControlServer& operator=(const ControlServer&) = delete;

  int port() const;
  ControlStatistics statistics() const;
  /// The ranks that ever joined, by rank.
  std::vector<Member> members() const;

  /// The store, from the server's own process.
  void set(std::string_view key, std::string_view value);
  std::optional<std::string> find(std::string_view key) const;

  /// What a rank's launcher saw of its end, before silence tells: it left if that was orderly, else it was lost. No
  /// effect on a rank that left or was lost. One that ended orderly without ever joining fails barriers alone.
  void ended(int rank, bool orderly, const std::string& reason);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace weft::dist
