#pragma once
#include <chrono>
#include <mutex>
#include <string>
#include <vector>

#include "dist/stamp.h"

namespace weft::dist {

/// The last operations of this process, oldest first: what is read after a failure. Thread-safe.
class FlightRecorder {
 public:
  static constexpr size_t kCapacity = 1000;

  /// Notes an operation that `rank` issues now; the number names it below.
  uint64_t issued(int rank, const Stamp& stamp);
  /// All ranks have issued it and their stamps agree: data moves from now on.
  void matched(uint64_t id);
  void finished(uint64_t id, bool ok);

  /// A line for each of the newest `last` operations: time (UTC), rank, state, milliseconds in that state, stamp.
  std::string text(size_t last = kCapacity) const;
  /// How many operations there have been.
  uint64_t count() const;

 private:
  enum class State : uint8_t { issued, matched, done, failed };
  struct Entry {
    int rank = 0;
    Stamp stamp;
    State state = State::issued;
    std::chrono::system_clock::time_point issued_at, changed_at;
  };
  void change(uint64_t id, State state);

  mutable std::mutex mutex_;
  std::vector<Entry> ring_;
  uint64_t count_ = 0;
};

}  // namespace weft::dist
