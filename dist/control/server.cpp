#include "dist/control/server.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <deque>
#include <mutex>
#include <optional>
#include <thread>
#include <zmq.hpp>

#include "core/error.h"
#include "dist/control/message.h"
#include "dist/control/run.h"

namespace weft::dist {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr int kHandshakeMilliseconds = 5000;
constexpr const char* kZapEndpoint = "inproc://zeromq.zap.01";
constexpr const char* kMonitorEndpoint = "inproc://weft.control.monitor";

std::string_view view(const zmq::message_t& message) {
  return {static_cast<const char*>(message.data()), message.size()};
}

}  // namespace

struct ControlServer::State {
  explicit State(ControlServerOptions given);
  ~State();

  /// What a launcher saw.
  struct End {
    int rank;
    MemberState state;
    std::string reason;
  };
  void run();
  void check_credentials();
  void count_handshakes();
  void receive();
  void send(const std::string& address, MessageKind kind, uint32_t request, std::string payload);
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
  std::optional<ControlRun> known;  ///< what is known of the run
  std::deque<End> ends;             // from ended(), for the server's thread
  std::deque<std::string> changed;  // keys from set(), likewise
};

ControlServer::State::State(ControlServerOptions given) : o(std::move(given)) {
  if (o.run_id.empty()) o.run_id = o.keys.run_id;
  silence = milliseconds(static_cast<int64_t>(std::clamp(o.silence * 1e3, 10.0, 1e9)));
  if (o.world_size < 1) fail(ErrorKind::kValue, "control server", "world size must be >= 1, got ", o.world_size);
  if (o.keys.server_secret.empty() || !is_run_id(o.run_id)) {
    fail(ErrorKind::kUsage, "control server", "needs keys with the server's secret, and a run id");
  }
  known.emplace(ControlRun::Options{o.world_size, o.run_id, silence, o.losses_fail_waits},
                [this](const std::string& address, MessageKind kind, uint32_t request, std::string payload) {
                  send(address, kind, request, std::move(payload));
                });
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
    ControlRun::News news;
    {
      const std::lock_guard lock(mutex);
      uint64_t count = 0;
      [[maybe_unused]] const ssize_t got = read(wake_event, &count, sizeof count);
      check_credentials();
      count_handshakes();
      receive();
      for (; !changed.empty(); changed.pop_front()) known->answer_gets(changed.front());
      for (; !ends.empty(); ends.pop_front()) known->ended(ends.front().rank, ends.front().state, ends.front().reason);
      // If this thread did not run for long (the machine slept, the process was stopped), silence is its own.
      const Clock::time_point now = Clock::now();
      if (now - last > silence / 2) known->heard_all(now);
      last = now;
      known->expire(now);
      news = known->take_news();
    }
    for (const LogRecord& record : news.logs) {
      if (o.on_log) o.on_log(record);
    }
    for (const MetricRecord& record : news.metrics) {
      if (o.on_metric) o.on_metric(record);
    }
    for (const Member& member : news.members) {
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
      known->handle(address.to_string(), *message);
    } catch (const Error&) {
      ++statistics.malformed;
    }
  }
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
  ControlStatistics statistics = state_->statistics;
  statistics.refused = state_->known->refused();
  statistics.stored_bytes = state_->known->stored_bytes();
  return statistics;
}

std::vector<Member> ControlServer::members() const {
  const std::lock_guard lock(state_->mutex);
  return state_->known->members();
}

void ControlServer::set(std::string_view key, std::string_view value) {
  const std::lock_guard lock(state_->mutex);
  if (key.size() > kMaxKey || value.size() > kMaxValue || !state_->known->store(std::string(key), std::string(value))) {
    fail(ErrorKind::kValue, "control server", "key of ", key.size(), " and value of ", value.size(), " bytes: at most ",
         kMaxKey, " and ", kMaxValue, ", and ", kMaxStore, " in all");
  }
  state_->changed.emplace_back(key);
  state_->wake();
}

std::optional<std::string> ControlServer::find(std::string_view key) const {
  const std::lock_guard lock(state_->mutex);
  return state_->known->find(std::string(key));
}

void ControlServer::ended(int rank, bool orderly, const std::string& reason) {
  const std::lock_guard lock(state_->mutex);
  if (rank < 0 || rank >= state_->o.world_size) return;
  state_->ends.push_back({rank, orderly ? MemberState::left : MemberState::lost, reason});
  state_->wake();
}

}  // namespace weft::dist
