#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

/// Work beside training that takes next to nothing from it. Private to models/checkpoint*.cpp.
namespace weft::checkpoint {

/// Puts the calling thread behind all others of the machine: the idle class of the scheduler, else the least nice
/// value, and the idle class for the disk. Returns what the system granted, in words.
struct GivenWay {
  bool processor = false;  ///< false: the thread runs like any other
  std::string text;        ///< "idle class of the scheduler, idle class of the disk"
};
GivenWay give_way();

/// The idle time of the processors that this process may use, from call to call, by the system's count (/proc/stat) per
/// second; 0 at first, and where there is no such count. It has a resolution of some hundredths of a second.
class IdleProcessors {
 public:
  double operator()();

 private:
  std::optional<double> idle_seconds_;  // at the last call
  std::chrono::steady_clock::time_point when_;
};

/// Work in pieces, each some tenths of a millisecond of a processor's time, one after another by whatever thread there
/// is for it:
///
/// - one that has given way takes the time of a processor that has nothing to do. The gaps of a program that keeps all
///   of them busy are none: threads that work together wait for the one that comes late;
/// - where there is no such processor, one of normal priority takes `share` of one processor, and no more: from the
/// begin
///   of a piece to that of the next are at least 1 / share times as long as the piece has kept the processor. So
///   however busy the machine is, by this program or others, the work ends after at most 1 / share times the processor
///   time that it needs, kPatience, and what this thread waits for the disk and, like any other, for its turn. (A
///   thread that has given way may lose its processor within a piece, for long; after kPatience of that in all it does
///   no more of them.)
/// - whoever calls finish() does what is left, at once and at their own priority. No thread needs a privilege for it.
class BackgroundWork {
 public:
  static constexpr double kShare = 0.01;
  static constexpr double kPatience = 0.5;  ///< seconds
  static constexpr double kIdle = 0.5;      ///< of a processor's time: from here on one has nothing to do

  /// @param piece  does the next piece and says whether there is another; called by one thread at a time, never after
  ///               it has returned false; must not throw. `beside`: other work goes on meanwhile.
  /// @param idle   processors with nothing to do since the last call, that thread's own share of one not counted
  /// @throws Error kMemory if the system gives no threads.
  explicit BackgroundWork(std::function<bool(bool beside)> piece, double share = kShare,
                          std::function<double()> idle = IdleProcessors());
  /// Returns when the piece under way is done; others are not.
  ~BackgroundWork();
  BackgroundWork(const BackgroundWork&) = delete;
  BackgroundWork& operator=(const BackgroundWork&) = delete;

  bool done() const { return done_; }
  /// Returns when all is done.
  void finish();

 private:
  bool next(bool beside);
  void work_when_idle();
  void work_at_a_share();
  bool sleep(double seconds);
  void hurry_idle();
  void tell_to_stop();
  void join();

  const std::function<bool(bool)> piece_;
  const double share_;
  const std::function<double()> idle_processors_;
  std::mutex piece_mutex_;  ///< held during a piece
  std::atomic<bool> done_ = false, idle_may_work_ = true;
  std::atomic<uint64_t> pieces_ = 0;
  std::mutex stop_mutex_;
  std::condition_variable stopping_;
  bool stop_ = false;
  std::thread idle_, at_a_share_;
};

}  // namespace weft::checkpoint
