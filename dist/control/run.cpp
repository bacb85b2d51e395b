#include "dist/control/run.h"

#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "core/error.h"

namespace weft::dist {
namespace {

using std::chrono::milliseconds;

constexpr size_t kMaxWaits = 4096;  // of one rank

std::string seconds_text(ControlRun::Clock::duration duration) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f s", std::chrono::duration<double>(duration).count());
  return text;
}

}  // namespace

const char* name(MemberState state) {
  return state == MemberState::joined ? "joined" : state == MemberState::left ? "left" : "was lost";
}

std::string Member::describe() const {
  std::string out = concat("rank ", rank, " (host ", host.empty() ? "unknown" : host, ", pid ", pid, ") ", name(state));
  if (!reason.empty()) out += ": " + reason;
  if (state == MemberState::lost) {
    out += operation.empty() ? "; it had stated no operation" : "; its last operation: " + operation;
  }
  return out;
}

void ControlRun::handle(const std::string& address, const Message& message) {
  if (message.run_id != o_.run_id) {
    ++refused_;
    send_(address, MessageKind::refused, message.request,
          FieldWriter().text(concat("this server serves run ", o_.run_id, ", not ", message.run_id)).take());
    return;
  }
  if (message.kind == MessageKind::hello) return hello(address, message);
  const auto rank = rank_of_.find(address);
  if (rank == rank_of_.end()) fail(ErrorKind::kData, "control plane", "a message before the hello");
  Peer& peer = peers_.at(rank->second);
  if (peer.member.state == MemberState::lost) {
    send_(address, MessageKind::refused, message.request, FieldWriter().text(peer.member.describe()).take());
    return;
  }
  peer.heard = Clock::now();
  serve(peer, message);
}

void ControlRun::hello(const std::string& address, const Message& message) {
  FieldReader fields(message.payload);
  const int64_t rank = fields.number(), world = fields.number();
  Member member;
  member.host = fields.text(kMaxName);
  member.pid = fields.number();
  fields.end();
  const auto refuse = [&](const std::string& reason) {
    ++refused_;
    send_(address, MessageKind::refused, message.request, FieldWriter().text(reason).take());
  };
  if (world != o_.world_size) return refuse(concat("the run has ", o_.world_size, " ranks; this one expects ", world));
  if (rank < 0 || rank >= world) return refuse(concat("rank ", rank, " is outside [0, ", world, ")"));
  member.rank = static_cast<int>(rank);
  const auto found = peers_.find(member.rank);
  if (found != peers_.end() && found->second.member.state == MemberState::joined) {
    if (found->second.address != address) {
      return refuse(concat("there is already a ", found->second.member.describe(), "; this one is pid ", member.pid,
                           " on ", member.host));
    }
  } else if (found != peers_.end() && o_.losses_fail_waits) {
    return refuse(concat(found->second.member.describe(), "; it cannot come back into the same run"));
  } else {
    if (found != peers_.end()) rank_of_.erase(found->second.address);
    never_joined_.erase(member.rank);
    peers_[member.rank] = {member, address, Clock::now()};
    rank_of_[address] = member.rank;
    news_.members.push_back(member);
  }
  send_(address, MessageKind::welcome, message.request, FieldWriter().number(o_.silence.count()).take());
  if (!o_.losses_fail_waits) return;
  const Peer& joined = peers_.at(member.rank);
  for (const auto& [other, peer] : peers_) {
    if (peer.member.state != MemberState::joined) tell(joined, peer.member);
  }
  for (const auto& [other, ended] : never_joined_) tell(joined, ended);
}

void ControlRun::serve(Peer& peer, const Message& message) {
  FieldReader fields(message.payload);
  const auto wait_until = [&] { return Clock::now() + milliseconds(fields.number(0, kMaxWaitMilliseconds)); };
  switch (message.kind) {
    case MessageKind::beat: {
      std::string operation = fields.text(kMaxName);
      fields.end();
      peer.member.operation = std::move(operation);
      return send_(peer.address, MessageKind::alive, message.request, "");
    }
    case MessageKind::leave: {
      const std::string reason = fields.text(kMaxName);
      fields.end();
      send_(peer.address, MessageKind::done, message.request, "");
      return gone(peer, MemberState::left, reason);
    }
    case MessageKind::set: {
      const std::string key = fields.text(kMaxKey);
      std::string value = fields.text(kMaxValue);
      fields.end();
      if (!store(key, std::move(value))) {
        return send_(peer.address, MessageKind::failed, message.request,
                     FieldWriter().text(concat("the store is full: it holds at most ", kMaxStore, " bytes")).take());
      }
      send_(peer.address, MessageKind::done, message.request, "");
      return answer_gets(key);
    }
    case MessageKind::get: {
      const std::string key = fields.text(kMaxKey);
      const Clock::time_point deadline = wait_until();
      fields.end();
      wait({MessageKind::get, peer.member.rank, message.request, key, deadline});
      return answer_gets(key);
    }
    case MessageKind::barrier: {
      const std::string key = fields.text(kMaxKey);
      const Clock::time_point deadline = wait_until();
      fields.end();
      wait({MessageKind::barrier, peer.member.rank, message.request, key, deadline});
      return answer_barrier(key);
    }
    case MessageKind::log: {
      LogRecord record{peer.member.rank, static_cast<log::Level>(fields.number(0, 3)), fields.number(), {}};
      record.text = fields.text(kMaxText);
      fields.end();
      news_.logs.push_back(std::move(record));
      return;
    }
    case MessageKind::metric: {
      MetricRecord record{peer.member.rank, fields.number(), fields.text(kMaxText)};
      fields.end();
      if (!record.json.starts_with('{') || !nlohmann::json::accept(record.json)) break;
      news_.metrics.push_back(std::move(record));
      return;
    }
    default:
      break;
  }
  fail(ErrorKind::kData, "control plane", "not a message that a client sends");
}

bool ControlRun::store(const std::string& key, std::string value) {
  const auto found = values_.find(key);
  const size_t before = found == values_.end() ? 0 : key.size() + found->second.size();
  const size_t after = stored_bytes_ - before + key.size() + value.size();
  if (after > kMaxStore) return false;
  stored_bytes_ = after;
  values_[key] = std::move(value);
  return true;
}

void ControlRun::wait(Wait wait) {
  const auto same = [&](const Wait& each) { return each.rank == wait.rank; };
  if (static_cast<size_t>(std::count_if(waits_.begin(), waits_.end(), same)) >= kMaxWaits) {
    fail(ErrorKind::kData, "control plane", "too many waits_ of one rank");
  }
  waits_.push_back(std::move(wait));
}

void ControlRun::answer_gets(const std::string& key) {
  const auto found = values_.find(key);
  std::erase_if(waits_, [&](const Wait& wait) {
    if (wait.kind != MessageKind::get || wait.key != key) return false;
    if (found != values_.end()) {
      send_(peers_.at(wait.rank).address, MessageKind::value, wait.request,
            FieldWriter().number(1).text(found->second).take());
    } else if (first_lost_ && o_.losses_fail_waits) {
      fail_wait(wait, first_lost_->describe());
    } else {
      return false;
    }
    return true;
  });
}

void ControlRun::answer_barrier(const std::string& name) {
  std::set<int> here;
  for (const Wait& wait : waits_) {
    if (wait.kind == MessageKind::barrier && wait.key == name) here.insert(wait.rank);
  }
  // Nobody can wait for a rank that will not come.
  const Member* missing = nullptr;
  for (const auto& [rank, peer] : peers_) {
    const bool counts = peer.member.state == MemberState::left || o_.losses_fail_waits;
    if (missing == nullptr && peer.member.state != MemberState::joined && counts) missing = &peer.member;
  }
  if (missing == nullptr && !never_joined_.empty()) missing = &never_joined_.begin()->second;
  const bool complete = static_cast<int>(here.size()) == o_.world_size;
  if (!complete && missing == nullptr) return;
  std::erase_if(waits_, [&](const Wait& wait) {
    if (wait.kind != MessageKind::barrier || wait.key != name) return false;
    if (complete) {
      send_(peers_.at(wait.rank).address, MessageKind::done, wait.request, "");
    } else {
      fail_wait(wait, missing->describe());
    }
    return true;
  });
}

void ControlRun::fail_wait(const Wait& wait, const std::string& reason) {
  send_(peers_.at(wait.rank).address, MessageKind::failed, wait.request,
        FieldWriter().text(clipped(reason, 4 * kMaxName)).take());
}

void ControlRun::expire(Clock::time_point now) {
  for (auto& [rank, peer] : peers_) {
    if (peer.member.state == MemberState::joined && now - peer.heard > o_.silence) {
      gone(peer, MemberState::lost, "silent for " + seconds_text(now - peer.heard));
    }
  }
  std::vector<Wait> late;
  std::erase_if(waits_, [&](const Wait& wait) {
    if (wait.deadline > now) return false;
    late.push_back(wait);
    return true;
  });
  for (const Wait& wait : late) {
    if (wait.kind == MessageKind::get) {
      send_(peers_.at(wait.rank).address, MessageKind::value, wait.request, FieldWriter().number(0).take());
      continue;
    }
    std::set<int> here = {wait.rank};
    for (const std::vector<Wait>* list : {&late, &waits_}) {
      for (const Wait& other : *list) {
        if (other.kind == MessageKind::barrier && other.key == wait.key) here.insert(other.rank);
      }
    }
    std::string missing;
    int named = 0, count = 0;
    for (int rank = 0; rank < o_.world_size; ++rank) {
      if (here.contains(rank)) continue;
      ++count;
      if (named < 8) missing += (named++ == 0 ? "" : ", ") + std::to_string(rank);
    }
    fail_wait(wait, concat(count, " of ", o_.world_size, " ranks did not come in time: ", missing,
                           count > named ? ", ..." : ""));
  }
}

void ControlRun::gone(Peer& peer, MemberState state, const std::string& reason) {
  peer.member.state = state;
  peer.member.reason = reason;
  const Member member = peer.member;
  if (state == MemberState::lost && !first_lost_) first_lost_ = member;
  news_.members.push_back(member);
  std::erase_if(waits_, [&](const Wait& wait) { return wait.rank == member.rank; });
  std::set<std::string> keys, barriers;
  for (const auto& [rank, other] : peers_) tell(other, member);
  for (const Wait& wait : waits_) (wait.kind == MessageKind::get ? keys : barriers).insert(wait.key);
  for (const std::string& key : keys) answer_gets(key);
  for (const std::string& barrier : barriers) answer_barrier(barrier);
}

void ControlRun::tell(const Peer& peer, const Member& about) const {
  if (peer.member.state != MemberState::joined) return;
  send_(peer.address, MessageKind::member, 0,
        FieldWriter()
            .number(about.rank)
            .number(static_cast<int64_t>(about.state))
            .text(about.host)
            .number(about.pid)
            .text(about.operation)
            .text(about.reason)
            .take());
}

void ControlRun::ended(int rank, MemberState state, const std::string& reason) {
  const auto found = peers_.find(rank);
  if (found == peers_.end() && state == MemberState::left) {
    // Not every program joins: only whoever waits for this rank misses it.
    Member& member = never_joined_[rank];
    member.rank = rank, member.state = state, member.reason = concat("it never joined the run: ", reason);
    for (const auto& [other, peer] : peers_) tell(peer, member);
    std::set<std::string> barriers;
    for (const Wait& wait : waits_) {
      if (wait.kind == MessageKind::barrier) barriers.insert(wait.key);
    }
    for (const std::string& barrier : barriers) answer_barrier(barrier);
    return;
  }
  if (found != peers_.end() && found->second.member.state != MemberState::joined) return;
  // One that ended before it joined is waited for all the same.
  Peer& peer = peers_[rank];
  peer.member.rank = rank;
  gone(peer, state, reason);
}

void ControlRun::heard_all(Clock::time_point now) {
  for (auto& [rank, peer] : peers_) peer.heard = now;
}

std::optional<std::string> ControlRun::find(const std::string& key) const {
  const auto found = values_.find(key);
  if (found == values_.end()) return std::nullopt;
  return found->second;
}

std::vector<Member> ControlRun::members() const {
  std::vector<Member> out;
  for (const auto& [rank, peer] : peers_) out.push_back(peer.member);
  return out;
}

}  // namespace weft::dist
