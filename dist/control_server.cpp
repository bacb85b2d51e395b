#include "dist/control_server.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <deque>
#include <map>
#include <mutex>
#include <nlohmann/json.hpp>
#include <set>
#include <thread>
#include <zmq.hpp>

#include "core/error.h"
#include "dist/control_message.h"

namespace weft::dist {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr int kHandshakeMilliseconds = 5000;
constexpr size_t kMaxStore = 64 << 20;
constexpr size_t kMaxWaits = 4096;  // of one rank
constexpr const char* kZapEndpoint = "inproc://zeromq.zap.01";
constexpr const char* kMonitorEndpoint = "inproc://weft.control.monitor";

std::string_view view(const zmq::message_t& message) {
  return {static_cast<const char*>(message.data()), message.size()};
}

std::string seconds_text(Clock::duration duration) {
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

struct ControlServer::State {
  explicit State(ControlServerOptions given);
  ~State();

  /// A rank and its connection. Ranks that are gone stay listed.
  struct Peer {
    Member member;
    std::string address;  ///< ZeroMQ's name of the connection; "" if it never joined
    Clock::time_point heard;
  };
  /// What a launcher saw.
  struct End {
    int rank;
    MemberState state;
    std::string reason;
  };
  /// A get or a barrier that waits for others.
  struct Wait {
    MessageKind kind;
    int rank;
    uint32_t request;
    std::string key;
    Clock::time_point deadline;
  };

  void run();
  void check_credentials();
  void count_handshakes();
  void receive();
  void handle(const std::string& address, const Message& message);
  void hello(const std::string& address, const Message& message);
  void serve(Peer& peer, const Message& message);
  void answer_gets(const std::string& key);
  void answer_barrier(const std::string& name);
  void expire();
  void gone(Peer& peer, MemberState state, const std::string& reason);
  void send(const std::string& address, MessageKind kind, uint32_t request, std::string payload);
  void fail_wait(const Wait& wait, const std::string& reason);
  void wait(Wait wait);
  bool store(const std::string& key, std::string value);
  void announce(const Member& member) { announced.push_back(member); }
  void wake() const;

  ControlServerOptions o;
  int port = 0;
  milliseconds silence;
  zmq::context_t context{1};
  zmq::socket_t router, zap, monitor;
  int wake_event = -1;
  std::atomic<bool> stop = false;
  std::thread thread;

  mutable std::mutex mutex;  // over what follows
  ControlStatistics statistics;
  std::map<std::string, std::string> values;
  std::map<int, Peer> peers;           // by rank
  std::map<std::string, int> rank_of;  // by address
  std::vector<Wait> waits;
  std::optional<Member> first_lost;
  std::deque<End> ends;             // from ended(), for the server's thread
  std::deque<std::string> changed;  // keys from set(), likewise
  // Collected under the mutex, handed to the callbacks without it.
  std::vector<Member> announced;
  std::vector<LogRecord> logs;
  std::vector<MetricRecord> metrics;
};

ControlServer::State::State(ControlServerOptions given) : o(std::move(given)) {
  if (o.run_id.empty()) o.run_id = o.keys.run_id;
  silence = milliseconds(static_cast<int64_t>(std::clamp(o.silence * 1e3, 10.0, 1e9)));
  if (o.world_size < 1) fail(ErrorKind::kValue, "control server", "world size must be >= 1, got ", o.world_size);
  if (o.keys.server_secret.empty() || !is_run_id(o.run_id)) {
    fail(ErrorKind::kUsage, "control server", "needs keys with the server's secret, and a run id");
  }
  try {
    zap = zmq::socket_t(context, zmq::socket_type::rep);
    zap.bind(kZapEndpoint);
    router = zmq::socket_t(context, zmq::socket_type::router);
    router.set(zmq::sockopt::linger, 200);
    router.set(zmq::sockopt::router_mandatory, true);
    router.set(zmq::sockopt::router_handover, true);  // a client that connects again keeps its address
    router.set(zmq::sockopt::maxmsgsize, static_cast<int64_t>(kMaxFrame));
    router.set(zmq::sockopt::handshake_ivl, kHandshakeMilliseconds);
    router.set(zmq::sockopt::tcp_keepalive, 1);
    router.set(zmq::sockopt::zap_domain, std::string("weft"));
    router.set(zmq::sockopt::curve_server, true);
    router.set(zmq::sockopt::curve_secretkey, o.keys.server_secret);
    if (zmq_socket_monitor(router.handle(), kMonitorEndpoint,
                           ZMQ_EVENT_HANDSHAKE_FAILED_NO_DETAIL | ZMQ_EVENT_HANDSHAKE_FAILED_PROTOCOL) != 0) {
      throw zmq::error_t();
    }
    monitor = zmq::socket_t(context, zmq::socket_type::pair);
    monitor.connect(kMonitorEndpoint);
    router.bind(concat("tcp://", o.bind, ':', o.port == 0 ? "*" : std::to_string(o.port)));
    const std::string endpoint = router.get(zmq::sockopt::last_endpoint);
    port = std::stoi(endpoint.substr(endpoint.rfind(':') + 1));
  } catch (const zmq::error_t& error) {
    fail(ErrorKind::kIo, "control server", "cannot listen at ", o.bind, ':',
         o.port == 0 ? "(any port)" : std::to_string(o.port), ": ", error.what(),
         o.port == 0 ? "" : ". Hint: another run may use that port");
  }
  wake_event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (wake_event < 0) fail(ErrorKind::kIo, "control server", "the system gives no event descriptor");
  thread = std::thread([this] { run(); });
}

ControlServer::State::~State() {
  stop = true;
  wake();
  if (thread.joinable()) thread.join();
  if (wake_event >= 0) close(wake_event);
}

void ControlServer::State::wake() const {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = write(wake_event, &one, sizeof one);
}

void ControlServer::State::run() {
  Clock::time_point last = Clock::now();
  const auto tick = std::clamp<milliseconds>(silence / 10, milliseconds(5), milliseconds(100));
  while (!stop) {
    std::array<zmq::pollitem_t, 4> items = {{{router.handle(), 0, ZMQ_POLLIN, 0},
                                             {zap.handle(), 0, ZMQ_POLLIN, 0},
                                             {monitor.handle(), 0, ZMQ_POLLIN, 0},
                                             {nullptr, wake_event, ZMQ_POLLIN, 0}}};
    try {
      zmq::poll(items.data(), items.size(), tick);
    } catch (const zmq::error_t& error) {
      if (error.num() != EINTR) throw;
    }
    std::vector<Member> members_now;
    std::vector<LogRecord> logs_now;
    std::vector<MetricRecord> metrics_now;
    {
      const std::lock_guard lock(mutex);
      uint64_t count = 0;
      [[maybe_unused]] const ssize_t got = read(wake_event, &count, sizeof count);
      check_credentials();
      count_handshakes();
      receive();
      for (; !changed.empty(); changed.pop_front()) answer_gets(changed.front());
      for (; !ends.empty(); ends.pop_front()) {
        const End& end = ends.front();
        const auto found = peers.find(end.rank);
        if (found == peers.end() && end.state == MemberState::left) continue;
        if (found != peers.end() && found->second.member.state != MemberState::joined) continue;
        // One that ended before it joined is waited for all the same.
        Peer& peer = peers[end.rank];
        peer.member.rank = end.rank;
        gone(peer, end.state, end.reason);
      }
      // If this thread did not run for long (the machine slept, the process was stopped), silence is its own.
      const Clock::time_point now = Clock::now();
      if (now - last > silence / 2) {
        for (auto& [rank, peer] : peers) peer.heard = now;
      }
      last = now;
      expire();
      members_now.swap(announced);
      logs_now.swap(logs);
      metrics_now.swap(metrics);
    }
    for (const LogRecord& record : logs_now) {
      if (o.on_log) o.on_log(record);
    }
    for (const MetricRecord& record : metrics_now) {
      if (o.on_metric) o.on_metric(record);
    }
    for (const Member& member : members_now) {
      if (o.on_member) o.on_member(member);
    }
  }
}

/// Answers ZeroMQ's authentication protocol (https://rfc.zeromq.org/spec/27): the run's client key, and no other.
void ControlServer::State::check_credentials() {
  std::array<uint8_t, 32> allowed;
  zmq_z85_decode(allowed.data(), o.keys.client_public.c_str());
  for (;;) {
    std::vector<zmq::message_t> request;
    for (bool more = true; more;) {
      zmq::message_t part;
      if (!zap.recv(part, zmq::recv_flags::dontwait)) return;
      more = part.more();
      request.push_back(std::move(part));
    }
    const bool known = request.size() == 7 && view(request[5]) == "CURVE" && request[6].size() == allowed.size() &&
                       std::equal(allowed.begin(), allowed.end(), static_cast<const uint8_t*>(request[6].data()));
    if (!known) ++statistics.denied;
    const std::string sequence = request.size() > 1 ? request[1].to_string() : "";
    const std::array<std::string, 6> reply = {
        "1.0", sequence, known ? "200" : "400", known ? "" : "not a key of this run", "", ""};
    for (size_t i = 0; i < reply.size(); ++i) {
      zap.send(zmq::buffer(reply[i]), i + 1 < reply.size() ? zmq::send_flags::sndmore : zmq::send_flags::none);
    }
  }
}

void ControlServer::State::count_handshakes() {
  for (zmq::message_t event; monitor.recv(event, zmq::recv_flags::dontwait);) {
    if (!event.more()) ++statistics.failed_handshakes;  // the second of an event's two parts: the peer's address
  }
}

void ControlServer::State::receive() {
  // As many as were there at first: a flood must not keep the clock from being looked at.
  for (int i = 0; i < 1000; ++i) {
    zmq::message_t address, body;
    if (!router.recv(address, zmq::recv_flags::dontwait)) return;
    bool parts = false;
    if (address.more()) (void)router.recv(body);
    for (bool more = body.more(); more;) {
      zmq::message_t rest;
      (void)router.recv(rest);
      more = rest.more();
      parts = true;
    }
    const std::optional<Message> message = parts ? std::nullopt : decode(view(body));
    try {
      if (!message) fail(ErrorKind::kData, "control plane", "no message");
      handle(address.to_string(), *message);
    } catch (const Error&) {
      ++statistics.malformed;
    }
  }
}

void ControlServer::State::handle(const std::string& address, const Message& message) {
  if (message.run_id != o.run_id) {
    ++statistics.refused;
    send(address, MessageKind::refused, message.request,
         FieldWriter().text(concat("this server serves run ", o.run_id, ", not ", message.run_id)).take());
    return;
  }
  if (message.kind == MessageKind::hello) return hello(address, message);
  const auto rank = rank_of.find(address);
  if (rank == rank_of.end()) fail(ErrorKind::kData, "control plane", "a message before the hello");
  Peer& peer = peers.at(rank->second);
  if (peer.member.state == MemberState::lost) {
    send(address, MessageKind::refused, message.request, FieldWriter().text(peer.member.describe()).take());
    return;
  }
  peer.heard = Clock::now();
  serve(peer, message);
}

void ControlServer::State::hello(const std::string& address, const Message& message) {
  FieldReader fields(message.payload);
  const int64_t rank = fields.number(), world = fields.number();
  Member member;
  member.host = fields.text(kMaxName);
  member.pid = fields.number();
  fields.end();
  const auto refuse = [&](const std::string& reason) {
    ++statistics.refused;
    send(address, MessageKind::refused, message.request, FieldWriter().text(reason).take());
  };
  if (world != o.world_size) return refuse(concat("the run has ", o.world_size, " ranks; this one expects ", world));
  if (rank < 0 || rank >= world) return refuse(concat("rank ", rank, " is outside [0, ", world, ")"));
  member.rank = static_cast<int>(rank);
  const auto found = peers.find(member.rank);
  if (found != peers.end() && found->second.member.state == MemberState::joined) {
    if (found->second.address != address) {
      return refuse(concat("there is already a ", found->second.member.describe(), "; this one is pid ", member.pid,
                           " on ", member.host));
    }
  } else if (found != peers.end() && o.losses_fail_waits) {
    return refuse(concat(found->second.member.describe(), "; it cannot come back into the same run"));
  } else {
    if (found != peers.end()) rank_of.erase(found->second.address);
    peers[member.rank] = {member, address, Clock::now()};
    rank_of[address] = member.rank;
    announce(member);
  }
  send(address, MessageKind::welcome, message.request, FieldWriter().number(silence.count()).take());
}

void ControlServer::State::serve(Peer& peer, const Message& message) {
  FieldReader fields(message.payload);
  const auto wait_until = [&] { return Clock::now() + milliseconds(fields.number(0, kMaxWaitMilliseconds)); };
  switch (message.kind) {
    case MessageKind::beat: {
      std::string operation = fields.text(kMaxName);
      fields.end();
      peer.member.operation = std::move(operation);
      return send(peer.address, MessageKind::alive, message.request, "");
    }
    case MessageKind::leave: {
      const std::string reason = fields.text(kMaxName);
      fields.end();
      send(peer.address, MessageKind::done, message.request, "");
      return gone(peer, MemberState::left, reason);
    }
    case MessageKind::set: {
      const std::string key = fields.text(kMaxKey);
      std::string value = fields.text(kMaxValue);
      fields.end();
      if (!store(key, std::move(value))) {
        return send(peer.address, MessageKind::failed, message.request,
                    FieldWriter().text(concat("the store is full: it holds at most ", kMaxStore, " bytes")).take());
      }
      send(peer.address, MessageKind::done, message.request, "");
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
      logs.push_back(std::move(record));
      return;
    }
    case MessageKind::metric: {
      MetricRecord record{peer.member.rank, fields.number(), fields.text(kMaxText)};
      fields.end();
      if (!record.json.starts_with('{') || !nlohmann::json::accept(record.json)) break;
      metrics.push_back(std::move(record));
      return;
    }
    default:
      break;
  }
  fail(ErrorKind::kData, "control plane", "not a message that a client sends");
}

bool ControlServer::State::store(const std::string& key, std::string value) {
  const auto found = values.find(key);
  const size_t before = found == values.end() ? 0 : key.size() + found->second.size();
  const size_t after = statistics.stored_bytes - before + key.size() + value.size();
  if (after > kMaxStore) return false;
  statistics.stored_bytes = after;
  values[key] = std::move(value);
  return true;
}

void ControlServer::State::wait(Wait wait) {
  const auto same = [&](const Wait& each) { return each.rank == wait.rank; };
  if (static_cast<size_t>(std::count_if(waits.begin(), waits.end(), same)) >= kMaxWaits) {
    fail(ErrorKind::kData, "control plane", "too many waits of one rank");
  }
  waits.push_back(std::move(wait));
}

void ControlServer::State::answer_gets(const std::string& key) {
  const auto found = values.find(key);
  std::erase_if(waits, [&](const Wait& wait) {
    if (wait.kind != MessageKind::get || wait.key != key) return false;
    if (found != values.end()) {
      send(peers.at(wait.rank).address, MessageKind::value, wait.request,
           FieldWriter().number(1).text(found->second).take());
    } else if (first_lost && o.losses_fail_waits) {
      fail_wait(wait, first_lost->describe());
    } else {
      return false;
    }
    return true;
  });
}

void ControlServer::State::answer_barrier(const std::string& name) {
  std::set<int> here;
  for (const Wait& wait : waits) {
    if (wait.kind == MessageKind::barrier && wait.key == name) here.insert(wait.rank);
  }
  // Nobody can wait for a rank that will not come.
  const Member* missing = nullptr;
  for (const auto& [rank, peer] : peers) {
    const bool counts = peer.member.state == MemberState::left || o.losses_fail_waits;
    if (missing == nullptr && peer.member.state != MemberState::joined && counts) missing = &peer.member;
  }
  const bool complete = static_cast<int>(here.size()) == o.world_size;
  if (!complete && missing == nullptr) return;
  std::erase_if(waits, [&](const Wait& wait) {
    if (wait.kind != MessageKind::barrier || wait.key != name) return false;
    if (complete) {
      send(peers.at(wait.rank).address, MessageKind::done, wait.request, "");
    } else {
      fail_wait(wait, missing->describe());
    }
    return true;
  });
}

void ControlServer::State::fail_wait(const Wait& wait, const std::string& reason) {
  send(peers.at(wait.rank).address, MessageKind::failed, wait.request,
       FieldWriter().text(clipped(reason, 4 * kMaxName)).take());
}

void ControlServer::State::expire() {
  const Clock::time_point now = Clock::now();
  for (auto& [rank, peer] : peers) {
    if (peer.member.state == MemberState::joined && now - peer.heard > silence) {
      gone(peer, MemberState::lost, "silent for " + seconds_text(now - peer.heard));
    }
  }
  std::vector<Wait> late;
  std::erase_if(waits, [&](const Wait& wait) {
    if (wait.deadline > now) return false;
    late.push_back(wait);
    return true;
  });
  for (const Wait& wait : late) {
    if (wait.kind == MessageKind::get) {
      send(peers.at(wait.rank).address, MessageKind::value, wait.request, FieldWriter().number(0).take());
      continue;
    }
    std::set<int> here = {wait.rank};
    for (const std::vector<Wait>* list : {&late, &waits}) {
      for (const Wait& other : *list) {
        if (other.kind == MessageKind::barrier && other.key == wait.key) here.insert(other.rank);
      }
    }
    std::string missing;
    int named = 0, count = 0;
    for (int rank = 0; rank < o.world_size; ++rank) {
      if (here.contains(rank)) continue;
      ++count;
      if (named < 8) missing += (named++ == 0 ? "" : ", ") + std::to_string(rank);
    }
    fail_wait(wait, concat(count, " of ", o.world_size, " ranks did not come in time: ", missing,
                           count > named ? ", ..." : ""));
  }
}

void ControlServer::State::gone(Peer& peer, MemberState state, const std::string& reason) {
  peer.member.state = state;
  peer.member.reason = reason;
  const Member member = peer.member;
  if (state == MemberState::lost && !first_lost) first_lost = member;
  announce(member);
  std::erase_if(waits, [&](const Wait& wait) { return wait.rank == member.rank; });
  const std::string payload = FieldWriter()
                                  .number(member.rank)
                                  .number(static_cast<int64_t>(state))
                                  .text(member.host)
                                  .number(member.pid)
                                  .text(member.operation)
                                  .text(member.reason)
                                  .take();
  std::set<std::string> keys, barriers;
  for (const auto& [rank, other] : peers) {
    if (other.member.state == MemberState::joined) send(other.address, MessageKind::member, 0, payload);
  }
  for (const Wait& wait : waits) (wait.kind == MessageKind::get ? keys : barriers).insert(wait.key);
  for (const std::string& key : keys) answer_gets(key);
  for (const std::string& barrier : barriers) answer_barrier(barrier);
}

/// A peer that is not there any more, or does not read what it is sent, falls silent too, and is then declared lost.
void ControlServer::State::send(const std::string& address, MessageKind kind, uint32_t request, std::string payload) {
  if (address.empty()) return;
  const std::string frame = encode({kind, request, o.run_id, std::move(payload)});
  try {
    if (router.send(zmq::buffer(address), zmq::send_flags::sndmore | zmq::send_flags::dontwait)) {
      (void)router.send(zmq::buffer(frame), zmq::send_flags::dontwait);
    }
  } catch (const zmq::error_t& error) {
    if (error.num() != EHOSTUNREACH && error.num() != EAGAIN) throw;
  }
}

ControlServer::ControlServer(ControlServerOptions options) : state_(std::make_unique<State>(std::move(options))) {}
ControlServer::~ControlServer() = default;

int ControlServer::port() const { return state_->port; }

ControlStatistics ControlServer::statistics() const {
  const std::lock_guard lock(state_->mutex);
  return state_->statistics;
}

std::vector<Member> ControlServer::members() const {
  const std::lock_guard lock(state_->mutex);
  std::vector<Member> out;
  for (const auto& [rank, peer] : state_->peers) out.push_back(peer.member);
  return out;
}

void ControlServer::set(std::string_view key, std::string_view value) {
  const std::lock_guard lock(state_->mutex);
  if (key.size() > kMaxKey || value.size() > kMaxValue || !state_->store(std::string(key), std::string(value))) {
    fail(ErrorKind::kValue, "control server", "key of ", key.size(), " and value of ", value.size(), " bytes: at most ",
         kMaxKey, " and ", kMaxValue, ", and ", kMaxStore, " in all");
  }
  state_->changed.emplace_back(key);
  state_->wake();
}

std::optional<std::string> ControlServer::find(std::string_view key) const {
  const std::lock_guard lock(state_->mutex);
  const auto found = state_->values.find(std::string(key));
  if (found == state_->values.end()) return std::nullopt;
  return found->second;
}

void ControlServer::ended(int rank, bool orderly, const std::string& reason) {
  const std::lock_guard lock(state_->mutex);
  if (rank < 0 || rank >= state_->o.world_size) return;
  state_->ends.push_back({rank, orderly ? MemberState::left : MemberState::lost, reason});
  state_->wake();
}

}  // namespace weft::dist
