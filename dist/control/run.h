#pragma once
// Internal to server.cpp: what a run is, apart from how its messages travel.
#include <chrono>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "dist/control/message.h"
#include "dist/control/records.h"

namespace weft::dist {

/// What a control server knows of its run, and what follows from each message: members, the store, and who waits for
/// what. It has no socket, thread or lock: one thread at a time may use it.
class ControlRun {
 public:
  using Clock = std::chrono::steady_clock;
  struct Options {
    int world_size = 1;
    std::string run_id;
    std::chrono::milliseconds silence{5000};  ///< after which a member is lost
    bool losses_fail_waits = true;
  };
  /// Sends to a connection; "" is one that never was.
  using Send = std::function<void(const std::string& address, MessageKind kind, uint32_t request, std::string payload)>;

  ControlRun(Options options, Send send) : o_(std::move(options)), send_(std::move(send)) {}

  /// A message that came from a connection. @throws Error kData for one that breaks the format.
  void handle(const std::string& address, const Message& message);
  /// What a launcher saw of a rank, which may never have joined. Whoever joins later is told too.
  void ended(int rank, MemberState state, const std::string& reason);
  /// Declares lost who was silent for too long, and answers waits whose time is over.
  void expire(Clock::time_point now);
  /// Nobody was silent: it was this side that did not listen.
  void heard_all(Clock::time_point now);

  /// False if the store is full.
  bool store(const std::string& key, std::string value);
  /// Answers those who wait for a key that was stored.
  void answer_gets(const std::string& key);
  std::optional<std::string> find(const std::string& key) const;

  std::vector<Member> members() const;
  size_t stored_bytes() const { return stored_bytes_; }
  uint64_t refused() const { return refused_; }

  /// What happened since it was last taken, for the server's owner.
  struct News {
    std::vector<Member> members;
    std::vector<LogRecord> logs;
    std::vector<MetricRecord> metrics;
  };
  News take_news() { return std::exchange(news_, {}); }

 private:
  /// A rank and its connection. Ranks that are gone stay listed.
  struct Peer {
    Member member;
    std::string address;  ///< "" if it never joined
    Clock::time_point heard;
  };
  /// A get or a barrier that waits for others.
  struct Wait {
    MessageKind kind;
    int rank;
    uint32_t request;
    std::string key;
    Clock::time_point deadline;
  };

  void hello(const std::string& address, const Message& message);
  void serve(Peer& peer, const Message& message);
  void answer_barrier(const std::string& name);
  void gone(Peer& peer, MemberState state, const std::string& reason);
  void tell(const Peer& peer, const Member& about) const;
  void fail_wait(const Wait& wait, const std::string& reason);
  void wait(Wait wait);

  const Options o_;
  const Send send_;
  std::map<std::string, std::string> values_;
  size_t stored_bytes_ = 0;
  uint64_t refused_ = 0;
  std::map<int, Peer> peers_;           // by rank
  std::map<int, Member> never_joined_;  ///< ended orderly before they joined, by rank
  std::map<std::string, int> rank_of_;  // by address
  std::vector<Wait> waits_;
  std::optional<Member> first_lost_;
  News news_;
};

}  // namespace weft::dist
