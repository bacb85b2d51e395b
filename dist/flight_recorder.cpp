#include "dist/flight_recorder.h"

#include <algorithm>
#include <cstdio>
#include <ctime>

namespace weft::dist {

uint64_t FlightRecorder::issued(int rank, const Stamp& stamp) {
  const auto now = std::chrono::system_clock::now();
  const std::lock_guard lock(mutex_);
  const uint64_t id = count_++;
  if (ring_.size() < kCapacity) ring_.emplace_back();
  ring_[id % kCapacity] = {rank, stamp, State::issued, now, now};
  return id;
}

void FlightRecorder::matched(uint64_t id) { change(id, State::matched); }

void FlightRecorder::finished(uint64_t id, bool ok) { change(id, ok ? State::done : State::failed); }

void FlightRecorder::change(uint64_t id, State state) {
  const std::lock_guard lock(mutex_);
  if (count_ - id > kCapacity) return;  // overwritten meanwhile
  Entry& entry = ring_[id % kCapacity];
  entry.state = state;
  entry.changed_at = std::chrono::system_clock::now();
}

std::string FlightRecorder::text(size_t last) const {
  using std::chrono::duration;
  static constexpr const char* kStates[] = {"waits ", "moves ", "done  ", "failed"};
  const std::lock_guard lock(mutex_);
  const auto now = std::chrono::system_clock::now();
  std::string out;
  for (uint64_t id = count_ - std::min<uint64_t>({count_, kCapacity, last}); id < count_; ++id) {
    const Entry& entry = ring_[id % kCapacity];
    const bool over = entry.state == State::done || entry.state == State::failed;
    const duration<double, std::milli> took = (over ? entry.changed_at : now) - entry.issued_at;
    const std::time_t seconds = std::chrono::system_clock::to_time_t(entry.issued_at);
    const auto milliseconds =
        std::chrono::duration_cast<std::chrono::milliseconds>(entry.issued_at.time_since_epoch()).count() % 1000;
    std::tm utc{};
    gmtime_r(&seconds, &utc);
    char line[64];
    std::snprintf(line, sizeof line, "%02d:%02d:%02d.%03d rank %d %s %9.3f ms  ", utc.tm_hour, utc.tm_min, utc.tm_sec,
                  static_cast<int>(milliseconds), entry.rank, kStates[static_cast<size_t>(entry.state)], took.count());
    out += line + entry.stamp.describe() + '\n';
  }
  return out;
}

uint64_t FlightRecorder::count() const {
  const std::lock_guard lock(mutex_);
  return count_;
}

}  // namespace weft::dist
