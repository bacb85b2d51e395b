#pragma once
#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

#include "dist/engine.h"
#include "dist/group.h"

namespace weft::dist {

struct Work::State {
  Operation op;
  uint64_t record = 0;  ///< in the flight recorder
  std::shared_ptr<Engine> engine;
  std::function<void(const Operation&, int64_t bytes)> count;
  std::function<void(double seconds)> waited;  ///< told of time in which the rank's program stands still

  std::mutex mutex;
  std::condition_variable changed;
  bool done = false;
  std::exception_ptr error;

  /// Matches, moves the data, and is done. `user`: as in Board::match. Never throws.
  void execute(bool user) noexcept;
};

/// Runs the operations of one lane one after the other: those that nobody waits for on a thread of its own, which is
/// started when it is first needed.
class OperationQueue {
 public:
  OperationQueue() = default;
  /// Returns when all operations are done.
  ~OperationQueue();
  OperationQueue(const OperationQueue&) = delete;
  OperationQueue& operator=(const OperationQueue&) = delete;

  /// Runs it after those before it.
  void push(std::shared_ptr<Work::State> work);
  /// Runs it on this thread if nothing is before it; otherwise like push(), and returns when it is done.
  void run(const std::shared_ptr<Work::State>& work);
  /// The last operation that is not done, or null.
  std::shared_ptr<Work::State> last();

 private:
  void enqueue(std::shared_ptr<Work::State> work);
  void serve();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::shared_ptr<Work::State>> waiting_;
  std::shared_ptr<Work::State> running_;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace weft::dist
