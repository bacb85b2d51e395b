#pragma once
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "dist/control/keys.h"
#include "dist/control/records.h"
#include "dist/launch_info.h"
#include "dist/store.h"

namespace weft::dist {

struct ControlClientOptions {
  std::string address;  ///< HOST:PORT
  int rank = 0, world_size = 1;
  ControlKeys keys;
  std::string run_id;           ///< "": that of the keys
  double connect_timeout = 60;  ///< seconds
  /// A rank left or was lost. Called on the client's thread; must not wait, and not call this client.
  std::function<void(const Member&)> on_member;
};

/// A rank's connection to the control server: store, barriers, log and metric lines, and a heartbeat from a thread of
/// its own. Safe to call from any thread. When a rank is lost, whatever waits here fails at once and names it.
class ControlClient final : public Store {
 public:
  /// Joins the run. @throws Error  kIo if nobody answers in time (with what was seen: no listener, wrong keys); kUsage
  /// if the server refuses this rank (wrong run, rank taken, another world size), with its reason.
  explicit ControlClient(ControlClientOptions options);
  /// The same from what a launcher said; where rank 0 is to serve the control plane, it does so until all ranks have
  /// left.
  static std::unique_ptr<ControlClient> connect(const LaunchInfo& info, double connect_timeout = 60,
                                                std::function<void(const Member&)> on_member = {});
  /// Leaves.
  ~ControlClient() override;
  ControlClient(const ControlClient&) = delete;
  ControlClient& operator=(const ControlClient&) = delete;

  // Keys are at most 512 bytes, values 1 MiB less 4 KiB, all of them together 64 MiB. A key may be set again.
  void set(const std::string& key, const std::string& value) override;
  /// Fails at once, naming it, when a rank that might set the key is lost.
  std::string get(const std::string& key, double timeout) override;
  std::optional<std::string> find(const std::string& key) override;
  /// Why a rank that left, was lost or ended without joining is not there.
  std::string gone(int rank) const override;

  /// Returns when all ranks are in the barrier of that name, which may then be used again.
  /// @param timeout  seconds
  /// @throws Error  kIo when the time is over (names who did not come) or a rank is gone (names it).
  void barrier(const std::string& name, double timeout);

  /// What this rank is doing, for the message that others get when it is lost. Cheap: the last one of every 50 ms
  /// travels.
  void set_operation(std::string operation);

  /// Sends a line, cut after 64 KiB, to whoever runs the server. Does not wait: while the server does not read, lines
  /// beyond 4 MiB are dropped, which a later line says.
  void log(log::Level level, std::string_view text);
  /// Sends one JSON object of at most 64 KiB, likewise. @throws Error  kValue if it is none.
  void metric(std::string_view json);

  /// Says goodbye, with a reason for the others. Nothing may be sent afterwards.
  void leave(const std::string& reason);

  /// @throws Error  kIo, with its name and last operation, if a rank was lost, or if the server is.
  void check() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace weft::dist
