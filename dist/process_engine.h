#pragma once
#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

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
  /// Runs what connects this process with the others. @throws GroupError if it fails or the world does, then on all
  /// processes.
  void connecting(const std::function<void()>& connect);
  /// How the failure reads by which connecting() ends where the transport has thrown `what`.
  std::string connecting_failed(const char* what);
  void passed(std::string_view point) const {
    if (options_.connecting) options_.connecting(point);
  }
  /// Gives each of the others a text, `to[rank]`, and returns theirs. Once in the life of an engine, in connecting().
  std::vector<std::string> exchange(const std::vector<std::string>& to) { return swap(kExchanged, to); }
  /// Returns when all others have come to it too: from then on who leaves is missed where it is needed, not before.
  void be_ready() { swap(kReady, std::vector<std::string>(static_cast<size_t>(options_.size))); }
  /// Leaves the world: the others are told.
  void leave();

 private:
  static std::shared_ptr<Board> make_board(const ProcessOptions& options);
  static constexpr char kExchanged = 'e', kReady = 'r';
  std::vector<std::string> swap(char type, const std::vector<std::string>& to);
  void await_failure(const std::string& what);
  std::string describe_connecting(const Board::Failure& failure) const;
  void missed(int peer, const std::string& how);
  void hear(int peer, char type, std::string_view body);
  void failed(const Board::Failure& failure);
  void tell(const Board::Failure& failure);

  const ProcessOptions options_;
  std::mutex abort_mutex_;
  std::function<void()> abort_;
  bool aborted_ = false;
  std::mutex store_mutex_;
  Store* store_ = nullptr;  ///< while this process connects
  std::mutex swap_mutex_;
  std::condition_variable swapped_;
  bool failed_ = false;                                   ///< the world, for who waits for swapped_
  std::map<std::pair<char, int>, std::string> received_;  ///< by type and rank
  std::mutex links_mutex_;                                ///< of the pointer while it is set: messages may come before
  std::unique_ptr<PeerLinks> links_;
};

/// @throws Error kUsage for ranks, times or sizes that make no sense.
void check_options(const ProcessOptions& options);

}  // namespace weft::dist
