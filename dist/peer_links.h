#pragma once
#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

namespace weft::dist {

/// Short messages between the processes of one run over TCP, with heartbeats: a connection between each two, served by
/// one thread, which a busy program does not stop and a stopped process does.
class PeerLinks {
 public:
  struct Options {
    int rank = 0, size = 1;
    double heartbeat = 0.25;  ///< seconds between two signs of life
    double silence = 3;       ///< seconds without one after which a process counts as stopped
  };
  /// Called from the thread of the links, one at a time.
  struct Handler {
    std::function<void(int peer, char type, std::string_view body)> message;
    /// The process has gone without leaving: it ended or is silent. Once for each.
    std::function<void(int peer, const std::string& how)> lost;
    /// The process has left and said why.
    std::function<void(int peer, const std::string& how)> left;
    /// What the next heartbeat carries to everyone, as a message of type kHeartbeat.
    std::function<std::string()> heartbeat;
  };
  static constexpr char kHeartbeat = 'b';

  PeerLinks(const Options& options, Handler handler);
  ~PeerLinks();
  PeerLinks(const PeerLinks&) = delete;
  PeerLinks& operator=(const PeerLinks&) = delete;

  /// Takes over a connection with a process, which is served from now on.
  void add(int peer, int fd);
  /// Queues a message; messages to one peer arrive in order. Never waits. Dropped if the peer is gone.
  void send(int peer, char type, std::string_view body);
  /// Sends what is queued, says that it leaves, and waits a moment until the others have seen it. Nothing is called or
  /// sent from then on.
  void close();
  /// What the others are told when this process leaves.
  void set_farewell(std::string how);

 private:
  struct Peer {
    std::mutex mutex;  ///< of fd and out
    int fd = -1;
    std::string out, in;
    std::chrono::steady_clock::time_point heard;
    bool left = false;
  };
  void serve();
  void read_from(int peer);
  void take_frames(int peer);
  void flush(Peer& peer);
  void close_peer(Peer& peer);
  void lose(int peer, const std::string& how);
  void wake();
  void finish();

  const Options options_;
  const Handler handler_;
  std::vector<std::unique_ptr<Peer>> peers_;
  int wake_fd_ = -1;
  std::atomic<bool> stop_ = false;
  std::mutex farewell_mutex_;
  std::string farewell_ = "has left";
  std::thread thread_;
};

}  // namespace weft::dist
