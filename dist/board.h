#pragma once
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "dist/flight_recorder.h"
#include "dist/stamp.h"

namespace weft::dist {

/// What is known of all ranks of a world: which operations each has issued, who waits for whom, who is gone, and the
/// first failure. Ranks that are threads share one board; processes have one each, which messages keep up to date.
///
/// Three things end in a failure of all ranks:
/// - stamps of one operation that do not fit each other (conflict());
/// - a rank that is gone (died, stopped, left, threw) where it is needed;
/// - ranks that wait for each other in a circle: each waits, in an operation that the next has not issued, while that
///   next one itself waits. Nobody in such a circle can ever go on, so that no clock is needed to be sure.
class Board {
 public:
  /// `local`: the rank that this process is, or -1 if all ranks are threads of this process.
  /// `timeout`: seconds after which an operation that not all ranks have issued is a failure.
  Board(int size, int local, double timeout);

  int size() const { return size_; }

  // ---- what ranks of this process do ----
  /// Notes that `rank` issues `stamp`, whose sequence number is given here, to the lane's members (world ranks).
  /// @throws GroupError if the world has failed.
  void issue(int rank, Stamp& stamp, std::span<const int> members);
  /// Returns when all members have issued this operation and the stamps agree.
  /// `user`: the calling thread is the one in which the rank's program runs.
  /// @throws GroupError if it fails.
  void match(int rank, const Stamp& stamp, std::span<const int> members, bool user);
  /// While it lives, the program of `rank` waits for an operation.
  class Waiting {
   public:
    Waiting(Board& board, int rank, const Stamp& stamp, std::span<const int> members);
    ~Waiting();
    Waiting(const Waiting&) = delete;
    Waiting& operator=(const Waiting&) = delete;

   private:
    Board& board_;
    int rank_;
  };

  // ---- what is heard of other processes ----
  void issued_elsewhere(int rank, const Stamp& stamp);
  /// For whom this process's rank waits, for the others; and what another process says of itself.
  std::string waiting_message();
  void waiting_elsewhere(int rank, std::string_view message);

  // ---- failure ----
  /// The first failure is kept, and thrown by every operation from then on. `rank` is at fault, -1 for several.
  void fail_all(ErrorKind kind, int rank, const std::string& text);
  /// A rank that is needed from now on is missing; `how` says what became of it ("returned").
  void gone(int rank, const std::string& how);
  bool failed() const;
  /// Throws the failure, as seen by `rank` in `stamp`.
  [[noreturn]] void throw_failure(int rank, const Stamp& stamp) const;
  /// "its last operation was ..." of a rank, as far as it is known here.
  std::string last_operation(int rank) const;
  struct Failure {
    ErrorKind kind;
    int rank;
    std::string text;
  };
  std::optional<Failure> failure() const;

  /// Called when this process issues an operation, and once at the first failure; set before the first operation.
  std::function<void(const Stamp&, std::span<const int> members)> on_issue;
  std::function<void(const Failure&)> on_failure;
  /// Where the flight record goes at the first failure; "" is the log, with its newest lines only.
  std::string flight_record;

  FlightRecorder& recorder() { return recorder_; }

 private:
  struct Issued {
    uint64_t first = 0;  ///< number of the oldest stamp that is kept
    std::deque<Stamp> stamps;
    uint64_t matched = 0;  ///< operations that this rank, if it is of this process, has compared
    uint64_t next() const { return first + stamps.size(); }
  };
  struct Lane {
    std::map<int, Issued> ranks;
    std::condition_variable changed;
  };
  struct Wait {
    uint64_t number = 0;  ///< the how-manieth wait; 0: this rank does not wait
    Stamp stamp;
    std::vector<std::pair<int, uint64_t>> on;  ///< ranks and their waits, each known to precede what is waited for
    std::vector<int> members;                  ///< of ranks of this process only
  };
  using Lock = std::unique_lock<std::mutex>;

  Lane& lane_of(const Stamp& stamp) { return lanes_[{stamp.lane, stamp.members}]; }
  void note(Lane& lane, int rank, const Stamp& stamp, std::span<const int> members);
  void begin_wait(int rank, const Stamp& stamp, std::span<const int> members, Lock& lock);
  void end_wait(int rank);
  void find_waits(int rank);
  /// Fails all if ranks wait in a circle.
  void check_circle(Lock& lock);
  void fail_locked(Failure failure, Lock& lock);
  [[noreturn]] void throw_locked(int rank, const Stamp& stamp) const;
  std::string last_locked(int rank) const;
  void prune(Lane& lane, std::span<const int> members);
  void see_user(int rank);

  const int size_, local_;
  const double timeout_;
  mutable std::mutex mutex_;
  std::map<std::pair<std::string, uint64_t>, Lane> lanes_;  ///< by name and members
  std::vector<Wait> waits_;
  std::vector<std::string> gone_, last_;
  std::vector<std::set<std::thread::id>> users_;
  uint64_t waits_begun_ = 0;
  std::optional<Failure> failure_;
  FlightRecorder recorder_;
};

}  // namespace weft::dist
