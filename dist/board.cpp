#include "dist/board.h"

#include <algorithm>
#include <chrono>

#include "core/log.h"
#include "dist/group_error.h"
#include "dist/wire.h"

namespace weft::dist {
namespace {

/// How long a mismatch waits for the stamps of ranks that have not come yet, to name them all.
constexpr std::chrono::milliseconds kGrace{500};

std::chrono::steady_clock::duration seconds(double value) {
  return std::chrono::duration_cast<std::chrono::steady_clock::duration>(std::chrono::duration<double>(value));
}

}  // namespace

Board::Board(int size, int local, double timeout)
    : size_(size),
      local_(local),
      timeout_(timeout),
      waits_(static_cast<size_t>(size)),
      gone_(static_cast<size_t>(size)),
      last_(static_cast<size_t>(size)),
      users_(static_cast<size_t>(size)) {}

// ---- issuing and matching ----

void Board::note(Lane& lane, int rank, const Stamp& stamp, std::span<const int> members) {
  Issued& issued = lane.ranks[rank];
  if (stamp.sequence != issued.next()) {
    fail(ErrorKind::kData, "dist", "rank ", rank, " announced ", stamp.describe(), " where #", issued.next(),
         " was next");
  }
  issued.stamps.push_back(stamp);
  last_[static_cast<size_t>(rank)] = stamp.describe();
  // Waking everybody for each arrival would cost n^2 wake-ups an operation: it is done for the last one, and for one
  // that does not fit an earlier one.
  bool complete = !members.empty(), fits = true;
  for (const int member : members) {
    const auto found = lane.ranks.find(member);
    if (found == lane.ranks.end() || found->second.next() <= stamp.sequence) {
      complete = false;
    } else if (member != rank && fits && found->second.first <= stamp.sequence) {
      const Stamp& other = found->second.stamps[stamp.sequence - found->second.first];
      const auto index = [&](int of) {
        return static_cast<int>(std::find(members.begin(), members.end(), of) - members.begin());
      };
      fits = !conflict(stamp, index(rank), other, index(member));
    }
  }
  if (complete || !fits || members.empty()) lane.changed.notify_all();
}

void Board::issue(int rank, Stamp& stamp, std::span<const int> members) {
  {
    const Lock lock(mutex_);
    see_user(rank);
    Lane& lane = lane_of(stamp);
    stamp.sequence = lane.ranks[rank].next();
    if (failure_) throw_locked(rank, stamp);
    note(lane, rank, stamp, members);
  }
  if (on_issue) on_issue(stamp, members);
}

void Board::issued_elsewhere(int rank, const Stamp& stamp) {
  const Lock lock(mutex_);
  note(lane_of(stamp), rank, stamp, {});
}

void Board::match(int rank, const Stamp& mine, std::span<const int> members, bool user) {
  Lock lock(mutex_);
  Lane& lane = lane_of(mine);
  const int my_index = static_cast<int>(std::find(members.begin(), members.end(), rank) - members.begin());
  const auto deadline = std::chrono::steady_clock::now() + seconds(timeout_);
  std::optional<std::chrono::steady_clock::time_point> grace;
  bool waiting = false;
  const auto finish = [&] {
    if (waiting) end_wait(rank);
  };
  for (;;) {
    if (failure_) {
      finish();
      throw_locked(rank, mine);
    }
    int missing = -1, missing_gone = -1;
    std::optional<std::string> why;
    for (size_t i = 0; i < members.size(); ++i) {
      const Issued& theirs = lane.ranks[members[i]];
      if (theirs.next() <= mine.sequence) {
        missing = members[i];
        if (!gone_[static_cast<size_t>(missing)].empty()) missing_gone = missing;
      } else if (members[i] != rank && !why && theirs.first <= mine.sequence) {
        // A rank that is past this operation has compared its stamp with this one already.
        why = conflict(mine, my_index, theirs.stamps[mine.sequence - theirs.first], static_cast<int>(i));
      }
    }
    const auto now = std::chrono::steady_clock::now();
    if (why && (missing < 0 || (grace && now >= *grace))) {
      std::string text =
          concat("ranks do not agree on operation #", mine.sequence, " of group \"", mine.lane, "\": ", *why);
      for (const int member : members) {
        const Issued& theirs = lane.ranks[member];
        text += concat("\n  rank ", member, ": ",
                       theirs.next() <= mine.sequence ? "not there yet; " + last_locked(member)
                       : theirs.first > mine.sequence ? "past it"
                                                      : theirs.stamps[mine.sequence - theirs.first].describe());
      }
      fail_locked({ErrorKind::kState, -1, text}, lock);
    } else if (!why && missing < 0) {
      lane.ranks[rank].matched = mine.sequence + 1;
      prune(lane, members);
      finish();
      return;
    } else if (!why && missing_gone >= 0) {
      fail_locked({ErrorKind::kIo, missing_gone,
                   concat("rank ", missing_gone, " of ", size_, ' ', gone_[static_cast<size_t>(missing_gone)],
                          " and will not come to ", mine.describe(), "; ", last_locked(missing_gone))},
                  lock);
    } else if (!why && now >= deadline) {
      fail_locked({ErrorKind::kIo, missing,
                   concat("rank ", missing, " of ", size_, " has not come to ", mine.describe(), " for ", timeout_,
                          " s; ", last_locked(missing), ". Hint: a longer timeout, if it has that much to compute")},
                  lock);
    } else {
      if (why && !grace) grace = now + kGrace;
      if (user && !waiting && !why) {
        waiting = true;
        begin_wait(rank, mine, members, lock);
        continue;
      }
      lane.changed.wait_until(lock, grace ? *grace : deadline);
    }
  }
}

void Board::prune(Lane& lane, std::span<const int> members) {
  uint64_t compared = UINT64_MAX;
  for (const int member : members) {
    if (local_ < 0 || member == local_) compared = std::min(compared, lane.ranks[member].matched);
  }
  for (const int member : members) {
    Issued& issued = lane.ranks[member];
    while (!issued.stamps.empty() && issued.first < compared) {
      issued.stamps.pop_front();
      ++issued.first;
    }
  }
}

// ---- waiting in a circle ----

void Board::see_user(int rank) {
  auto& users = users_[static_cast<size_t>(rank)];
  if (users.size() < 2) users.insert(std::this_thread::get_id());
  if (users.size() > 1) end_wait(rank);
}

void Board::begin_wait(int rank, const Stamp& stamp, std::span<const int> members, Lock& lock) {
  see_user(rank);
  // Where several threads issue operations, one of them that waits does not mean that the rank cannot go on.
  if (users_[static_cast<size_t>(rank)].size() > 1) return;
  Wait& wait = waits_[static_cast<size_t>(rank)];
  wait.number = ++waits_begun_;
  wait.stamp = stamp;
  wait.members.assign(members.begin(), members.end());
  wait.on.clear();
  if (local_ < 0) check_circle(lock);
}

void Board::end_wait(int rank) { waits_[static_cast<size_t>(rank)].number = 0; }

Board::Waiting::Waiting(Board& board, int rank, const Stamp& stamp, std::span<const int> members)
    : board_(board), rank_(rank) {
  Lock lock(board_.mutex_);
  board_.begin_wait(rank, stamp, members, lock);
}

Board::Waiting::~Waiting() {
  const Lock lock(board_.mutex_);
  board_.end_wait(rank_);
}

void Board::find_waits(int rank) {
  Wait& wait = waits_[static_cast<size_t>(rank)];
  wait.on.clear();
  if (wait.number == 0) return;
  Lane& lane = lane_of(wait.stamp);
  for (const int member : wait.members) {
    // A wait that was heard of was preceded by all that its rank had issued: what is not here now was not issued
    // before.
    const uint64_t number = waits_[static_cast<size_t>(member)].number;
    if (member != rank && number != 0 && lane.ranks[member].next() <= wait.stamp.sequence) {
      wait.on.emplace_back(member, number);
    }
  }
}

void Board::check_circle(Lock& lock) {
  if (failure_) return;
  if (local_ < 0) {
    for (int rank = 0; rank < size_; ++rank) find_waits(rank);
  } else {
    find_waits(local_);
  }
  // Depth-first over at most size_ ranks; a rank on the current path that is met again closes a circle.
  std::vector<int> path, state(static_cast<size_t>(size_), 0);
  const auto visit = [&](const auto& self, int rank) -> bool {
    state[static_cast<size_t>(rank)] = 1;
    path.push_back(rank);
    for (const auto& [next, number] : waits_[static_cast<size_t>(rank)].on) {
      const auto i = static_cast<size_t>(next);
      if (waits_[static_cast<size_t>(rank)].number == 0 || waits_[i].number != number) continue;
      if (state[i] == 1) {
        path.erase(path.begin(), std::find(path.begin(), path.end(), next));
        return true;
      }
      if (state[i] == 0 && self(self, next)) return true;
    }
    state[static_cast<size_t>(rank)] = 2;
    path.pop_back();
    return false;
  };
  for (int rank = 0; rank < size_; ++rank) {
    if (state[static_cast<size_t>(rank)] != 0 || !visit(visit, rank)) continue;
    std::string text = "ranks do not agree on the order of their operations: they wait for each other in a circle";
    for (size_t i = 0; i < path.size(); ++i) {
      text += concat("\n  rank ", path[i], " waits for rank ", path[(i + 1) % path.size()], " in ",
                     waits_[static_cast<size_t>(path[i])].stamp.describe());
    }
    const Stamp& first = waits_[static_cast<size_t>(path[0])].stamp;
    for (const int rank_in : path) {
      const Stamp& other = waits_[static_cast<size_t>(rank_in)].stamp;
      if (other.lane == first.lane && other.members != first.members) {
        text += concat("\n  they mean groups of different members by \"", first.lane, '"');
        break;
      }
    }
    for (int other = 0; other < size_; ++other) {
      if (std::find(path.begin(), path.end(), other) == path.end()) {
        text += concat("\n  rank ", other, ": ", last_locked(other));
      }
    }
    return fail_locked({ErrorKind::kState, -1, text}, lock);
  }
}

std::string Board::waiting_message() {
  Lock lock(mutex_);
  check_circle(lock);
  const Wait& wait = waits_[static_cast<size_t>(local_)];
  WireWriter out;
  out.put(wait.number).text(wait.stamp.encode()).put(static_cast<uint32_t>(wait.on.size()));
  for (const auto& [rank, number] : wait.on) out.put(rank).put(number);
  return out.take();
}

void Board::waiting_elsewhere(int rank, std::string_view message) {
  WireReader in(message);
  Lock lock(mutex_);
  Wait& wait = waits_[static_cast<size_t>(rank)];
  wait.number = in.get<uint64_t>();
  wait.stamp = Stamp::decode(in.text());
  wait.on.resize(in.count(sizeof(int) + sizeof(uint64_t)));
  for (auto& [other, number] : wait.on) {
    other = in.get<int>();
    number = in.get<uint64_t>();
    if (other < 0 || other >= size_)
      fail(ErrorKind::kData, "dist", "rank ", rank, " says that it waits for rank ", other);
  }
  in.end();
  check_circle(lock);
}

// ---- failure ----

std::string Board::last_locked(int rank) const {
  const std::string& last = last_[static_cast<size_t>(rank)];
  return last.empty() ? "it has issued no operation" : "its last operation was " + last;
}

std::string Board::last_operation(int rank) const {
  const Lock lock(mutex_);
  return last_locked(rank);
}

bool Board::failed() const {
  const Lock lock(mutex_);
  return failure_.has_value();
}

std::optional<Board::Failure> Board::failure() const {
  const Lock lock(mutex_);
  return failure_;
}

void Board::fail_locked(Failure failure, Lock& lock) {
  if (failure_) return;
  failure_ = std::move(failure);
  for (auto& [key, lane] : lanes_) lane.changed.notify_all();
  const Failure first = *failure_;
  lock.unlock();
  if (on_failure) on_failure(first);
  if (flight_record.empty()) {
    const std::string last = recorder_.text(12);
    log::error("collectives failed: ", first.text, last.empty() ? "" : "\nthe last operations of this process:\n",
               last);
  } else if (FILE* file = std::fopen(flight_record.c_str(), "w"); file != nullptr) {
    const std::string text = first.text + "\n\n" + recorder_.text();
    const bool written = std::fwrite(text.data(), 1, text.size(), file) == text.size();
    if (std::fclose(file) != 0 || !written) log::error(flight_record, ": the flight record could not be written");
  } else {
    log::error(flight_record, ": the flight record could not be written");
  }
  lock.lock();
}

void Board::fail_all(ErrorKind kind, int rank, const std::string& text) {
  Lock lock(mutex_);
  fail_locked({kind, rank, text}, lock);
}

void Board::gone(int rank, const std::string& how) {
  const Lock lock(mutex_);
  gone_[static_cast<size_t>(rank)] = how;
  waits_[static_cast<size_t>(rank)].number = 0;
  for (auto& [key, lane] : lanes_) lane.changed.notify_all();
}

void Board::throw_locked(int rank, const Stamp& stamp) const {
  throw GroupError(failure_->kind, failure_->rank,
                   concat("[dist] ", failure_->text, "\nthis is rank ", rank, ", in ", stamp.describe()));
}

void Board::throw_failure(int rank, const Stamp& stamp) const {
  const Lock lock(mutex_);
  throw_locked(rank, stamp);
}

}  // namespace weft::dist
