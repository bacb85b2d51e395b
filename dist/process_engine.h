#pragma once
#include <functional>
#include <memory>
#include <mutex>

#include "dist/engine.h"
#include "dist/peer_links.h"
#include "dist/processes.h"

namespace weft::dist {

/// An engine of one process: its board is kept up to date by messages between the processes.
class ProcessEngine : public Engine {
 public:
  ProcessEngine(const ProcessOptions& options, Store& store);
  ~ProcessEngine() override;

 protected:
  /// `abort` is called once, from any thread, when the world has failed (at once if it has): it must end every wait of
  /// the data's transport. An empty function ends that: no call is under way on return.
  void on_abort(std::function<void()> abort);
  /// Where the transport has failed: throws the failure of the world, which the links name within moments, or, if there
  /// is none, makes `what` one.
  [[noreturn]] void transport_failed(const Operation& op, const std::string& what);
  /// Leaves the world: the others are told.
  void leave();

 private:
  static std::shared_ptr<Board> make_board(const ProcessOptions& options);
  void hear(int peer, char type, std::string_view body);
  void failed(const Board::Failure& failure);

  const ProcessOptions options_;
  std::mutex abort_mutex_;
  std::function<void()> abort_;
  bool aborted_ = false;
  std::mutex links_mutex_;  ///< of the pointer while it is set: messages may come before
  std::unique_ptr<PeerLinks> links_;
};

/// @throws Error kUsage for ranks, times or sizes that make no sense.
void check_options(const ProcessOptions& options);

}  // namespace weft::dist
