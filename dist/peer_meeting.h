#pragma once
#include <chrono>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "dist/store.h"

namespace weft::dist {

/// A descriptor that is closed at the end of its scope.
class Descriptor {
 public:
  explicit Descriptor(int fd = -1) : fd_(fd) {}
  Descriptor(Descriptor&& other) noexcept : fd_(other.release()) {}
  Descriptor& operator=(Descriptor&& other) noexcept;
  ~Descriptor();
  int get() const { return fd_; }
  int release();

 private:
  int fd_;
};

/// How the processes of a world find each other: each leaves its address in the store and connects to those below it.
/// Whoever connects must know a key that rank 0 draws and leaves there too. Ranks also call those above them again and
/// again, until these have connected: a process that is stopped or has ended since it left its address does not answer.
class PeerMeeting {
 public:
  struct Options {
    int rank = 0, size = 1;
    std::string address;          ///< of this process's interface, numeric
    double heartbeat = 0.25;      ///< seconds between two calls
    double silence = 3;           ///< seconds in which a call must be answered
    double connect_timeout = 60;  ///< seconds in which all processes must have come
  };
  PeerMeeting(const Options& options, Store& store);
  ~PeerMeeting();
  PeerMeeting(const PeerMeeting&) = delete;
  PeerMeeting& operator=(const PeerMeeting&) = delete;

  /// Returns when all others have been met, or `over` says that the world has failed meanwhile.
  /// @param met  is given a connection with each, which does not block
  /// @throws GroupError  kIo naming a rank that is gone, is stopped, or has not come in time;
  ///         Error  kData, kIo, kUsage for a store or an address that cannot be used.
  void run(const std::function<void(int peer, int fd)>& met, const std::function<bool()>& over);
  /// Leaves word for those that have not met this process, or are about to, of why it will not answer them: whose fault
  /// that is, and how it is described.
  void give_up(int rank_at_fault, const std::string& why);
  /// That of another.
  static std::optional<std::pair<int, std::string>> word_of(Store& store, int rank);

 private:
  using Clock = std::chrono::steady_clock;
  /// A connection on which both sides have yet to say who they are.
  struct Talk {
    Descriptor fd;
    int peer = -1;  ///< that was called; -1: that called
    bool connecting = false;
    std::string got;
    Clock::time_point since;
  };
  struct Peer {
    std::string address;  ///< "HOST PORT"; "" as long as it is not in the store
    bool met = false;
    Clock::time_point called;
  };

  void listen();
  void look_into_store();
  void call(int peer);
  void accept();
  void wait_for_talk();
  /// Whether the talk is over.
  bool advance(Talk& talk, Clock::time_point now);
  bool greeted(const Talk& talk);
  bool greet(const Talk& talk);
  [[noreturn]] void fail_unreached(int peer, const std::string& how);
  [[noreturn]] void fail_late();

  const Options options_;
  Store& store_;
  std::function<void(int, int)> met_;
  Descriptor listener_;
  std::string key_, here_;
  std::vector<Peer> peers_;
  std::vector<Talk> talks_;
  int missing_ = 0, next_look_ = 0;
};

}  // namespace weft::dist
