#include "dist/control/client.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <nlohmann/json.hpp>
#include <thread>
#include <zmq.hpp>

#include "core/error.h"
#include "dist/control/message.h"
#include "dist/control/server.h"

namespace weft::dist {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr const char* kMonitorEndpoint = "inproc://weft.control.client";
constexpr size_t kMaxUnsent = 4 << 20;
constexpr milliseconds kOperationPeriod{50};
/// How much longer than the server this side waits for an answer that the server owes at a deadline.
constexpr milliseconds kAnswerMargin{5000};
constexpr milliseconds kLeaveTimeout{2000};

std::string this_host() {
  char host[256] = {};
  return gethostname(host, sizeof host - 1) == 0 ? host : "unknown";
}

milliseconds wait_of(double seconds) {
  const double limited = std::clamp(seconds * 1e3, 0.0, static_cast<double>(kMaxWaitMilliseconds));
  return milliseconds(static_cast<int64_t>(limited));
}

int64_t microseconds_now() {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::microseconds>(now).count();
}

}  // namespace

struct ControlClient::State {
  explicit State(ControlClientOptions given);
  ~State();

  struct Answer {
    bool here = false;
    MessageKind kind = MessageKind::done;
    std::string payload;
  };

  void run();
  void receive(std::vector<Member>& members);
  void watch_connection();
  void send_beat(Clock::time_point now);
  void flush();
  void die(std::string reason);
  void wake() const;
  void post(MessageKind kind, std::string payload);
  Answer ask(MessageKind kind, std::string payload, Clock::time_point deadline, const std::string& what);
  std::string unanswered(const std::string& what) const;

  ControlClientOptions o;
  std::unique_ptr<ControlServer> server;  // where this rank serves the control plane
  zmq::context_t context{1};
  zmq::socket_t dealer, monitor;
  int wake_event = -1;
  std::thread thread;

  mutable std::mutex mutex;  // over what follows
  std::condition_variable answered;
  bool stop = false, joined = false, left = false;
  uint32_t next_request = 1;
  std::deque<std::string> unsent;
  size_t unsent_bytes = 0;
  uint64_t dropped = 0;
  std::map<uint32_t, Answer> answers;  // by request
  std::string operation;
  bool operation_changed = false;
  milliseconds silence{5000};
  Clock::time_point heard = Clock::now(), beaten = {};
  std::string dead;  // why nothing can be asked any more
  std::optional<Member> lost;
  std::map<int, Member> gone;  ///< who left or was lost, by rank
  uint64_t unreached = 0, failed_handshakes = 0;
  int refused_code = 0;
};

ControlClient::State::State(ControlClientOptions given) : o(std::move(given)) {
  if (o.run_id.empty()) o.run_id = o.keys.run_id;
  if (!is_run_id(o.run_id)) fail(ErrorKind::kUsage, "control client", "no run id: ", weft::quoted(o.run_id));
  try {
    dealer = zmq::socket_t(context, zmq::socket_type::dealer);
    dealer.set(zmq::sockopt::linger, 500);
    dealer.set(zmq::sockopt::maxmsgsize, static_cast<int64_t>(kMaxFrame));
    dealer.set(zmq::sockopt::reconnect_ivl, 50);
    dealer.set(zmq::sockopt::reconnect_ivl_max, 1000);
    dealer.set(zmq::sockopt::tcp_keepalive, 1);
    dealer.set(zmq::sockopt::routing_id, "rank " + std::to_string(o.rank) + ' ' + ControlKeys::make().run_id);
    dealer.set(zmq::sockopt::curve_serverkey, o.keys.server_public);
    dealer.set(zmq::sockopt::curve_publickey, o.keys.client_public);
    dealer.set(zmq::sockopt::curve_secretkey, o.keys.client_secret);
    constexpr int kEvents = ZMQ_EVENT_CONNECT_RETRIED | ZMQ_EVENT_HANDSHAKE_FAILED_NO_DETAIL |
                            ZMQ_EVENT_HANDSHAKE_FAILED_PROTOCOL | ZMQ_EVENT_HANDSHAKE_FAILED_AUTH;
    if (zmq_socket_monitor(dealer.handle(), kMonitorEndpoint, kEvents) != 0) throw zmq::error_t();
    monitor = zmq::socket_t(context, zmq::socket_type::pair);
    monitor.connect(kMonitorEndpoint);
    dealer.connect("tcp://" + o.address);
  } catch (const zmq::error_t& error) {
    fail(ErrorKind::kUsage, "control client", "cannot connect to ", weft::quoted(o.address), ": ", error.what(),
         ". Hint: an address is HOST:PORT");
  }
  wake_event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (wake_event < 0) fail(ErrorKind::kIo, "control client", "the system gives no event descriptor");
  thread = std::thread([this] { run(); });
}

ControlClient::State::~State() {
  {
    const std::lock_guard lock(mutex);
    stop = true;
  }
  wake();
  if (thread.joinable()) thread.join();
  if (wake_event >= 0) close(wake_event);
}

void ControlClient::State::wake() const {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = write(wake_event, &one, sizeof one);
}

void ControlClient::State::run() {
  Clock::time_point last = Clock::now();
  for (;;) {
    std::array<zmq::pollitem_t, 3> items = {{{dealer.handle(), 0, ZMQ_POLLIN, 0},
                                             {monitor.handle(), 0, ZMQ_POLLIN, 0},
                                             {nullptr, wake_event, ZMQ_POLLIN, 0}}};
    try {
      zmq::poll(items.data(), items.size(), kOperationPeriod);
    } catch (const zmq::error_t& error) {
      if (error.num() != EINTR) throw;
    }
    std::vector<Member> members;
    {
      const std::lock_guard lock(mutex);
      uint64_t count = 0;
      [[maybe_unused]] const ssize_t got = read(wake_event, &count, sizeof count);
      receive(members);
      watch_connection();
      const Clock::time_point now = Clock::now();
      if (now - last > silence / 2) heard = now;  // this process did not run: the silence is its own
      last = now;
      if (joined && !left && dead.empty()) {
        send_beat(now);
        if (now - heard > silence) {
          die(concat("the control server at ", o.address, " has been silent for ",
                     std::chrono::duration_cast<milliseconds>(now - heard).count(), " ms"));
        }
      }
      flush();
      if (stop) return;
    }
    for (const Member& member : members) {
      if (o.on_member) o.on_member(member);
    }
  }
}

void ControlClient::State::receive(std::vector<Member>& members) {
  for (zmq::message_t frame; dealer.recv(frame, zmq::recv_flags::dontwait);) {
    const std::optional<Message> message = decode({static_cast<const char*>(frame.data()), frame.size()});
    if (!message) continue;
    heard = Clock::now();
    try {
      FieldReader fields(message->payload);
      if (message->kind == MessageKind::member) {
        Member member;
        member.rank = static_cast<int>(fields.number(0, INT32_MAX));
        member.state = static_cast<MemberState>(fields.number(0, 2));
        member.host = fields.text(kMaxName);
        member.pid = fields.number();
        member.operation = fields.text(kMaxName);
        member.reason = fields.text(kMaxName);
        if (member.state == MemberState::lost && !lost) lost = member;
        if (member.state != MemberState::joined) gone[member.rank] = member;
        members.push_back(std::move(member));
        continue;
      }
      const auto waiting = answers.find(message->request);
      if (message->kind == MessageKind::refused && waiting == answers.end()) {
        die("the control server refused this rank: " + fields.text(4 * kMaxName));
      } else if (waiting != answers.end()) {
        waiting->second = {true, message->kind, message->payload};
        answered.notify_all();
      }
    } catch (const Error&) {
      // The server is of this run and its messages are well formed, unless it is of another build.
      die("the control server sent a message that breaks its format. Hint: do all ranks run the same build?");
    }
  }
}

void ControlClient::State::watch_connection() {
  for (zmq::message_t event; monitor.recv(event, zmq::recv_flags::dontwait);) {
    if (!event.more() || event.size() < 6) continue;  // the peer's address
    uint16_t kind = 0;
    uint32_t code = 0;
    std::memcpy(&kind, event.data(), sizeof kind);
    std::memcpy(&code, static_cast<const char*>(event.data()) + 2, sizeof code);
    if (kind == ZMQ_EVENT_CONNECT_RETRIED) {
      ++unreached;
    } else {
      ++failed_handshakes;
    }
    if (kind == ZMQ_EVENT_HANDSHAKE_FAILED_AUTH) refused_code = static_cast<int>(code);
  }
}

void ControlClient::State::send_beat(Clock::time_point now) {
  const auto since = now - beaten;
  if (since < silence / 5 && !(operation_changed && since >= kOperationPeriod)) return;
  beaten = now;
  operation_changed = false;
  unsent.push_back(encode({MessageKind::beat, 0, o.run_id, FieldWriter().text(operation).take()}));
  unsent_bytes += unsent.back().size();
}

void ControlClient::State::flush() {
  while (!unsent.empty()) {
    if (!dealer.send(zmq::buffer(unsent.front()), zmq::send_flags::dontwait)) return;
    unsent_bytes -= unsent.front().size();
    unsent.pop_front();
  }
  if (dropped > 0) {
    const std::string text = concat(dropped, " lines of this rank were dropped while the control server did not read");
    dropped = 0;
    post(MessageKind::log,
         FieldWriter().number(static_cast<int64_t>(log::Level::kWarn)).number(microseconds_now()).text(text).take());
  }
}

/// Ends every wait. The mutex is held.
void ControlClient::State::die(std::string reason) {
  if (dead.empty()) dead = std::move(reason);
  answered.notify_all();
}

/// Sends without an answer. The mutex is held.
void ControlClient::State::post(MessageKind kind, std::string payload) {
  if (left || unsent_bytes + payload.size() > kMaxUnsent) {
    ++dropped;
    return;
  }
  unsent.push_back(encode({kind, 0, o.run_id, std::move(payload)}));
  unsent_bytes += unsent.back().size();
}

ControlClient::State::Answer ControlClient::State::ask(MessageKind kind, std::string payload,
                                                       Clock::time_point deadline, const std::string& what) {
  std::unique_lock lock(mutex);
  if (left) fail(ErrorKind::kState, "control client", what, ": this rank has left the run");
  const uint32_t request = next_request++;
  if (next_request == 0) next_request = 1;
  answers[request];
  unsent.push_back(encode({kind, request, o.run_id, std::move(payload)}));
  unsent_bytes += unsent.back().size();
  wake();
  const auto here = [&] { return answers.at(request).here || !dead.empty(); };
  answered.wait_until(lock, deadline, here);
  Answer answer = std::move(answers.at(request));
  answers.erase(request);
  if (answer.here && answer.kind != MessageKind::refused) return answer;
  if (answer.here) {
    const std::string reason = FieldReader(answer.payload).text(4 * kMaxName);
    fail(ErrorKind::kUsage, "control client", what, ": the control server at ", o.address, " refused rank ", o.rank,
         ": ", reason);
  }
  if (!dead.empty()) fail(ErrorKind::kIo, "control client", what, ": ", dead);
  fail(ErrorKind::kIo, "control client", unanswered(what));
}

std::string ControlClient::State::unanswered(const std::string& what) const {
  std::string out = concat(what, ": no answer from the control server at ", o.address, " in time");
  if (joined) return out;
  if (refused_code != 0) return out + ": it does not know this run's key. Hint: are the keys (WEFT_KEYS) of this run?";
  if (failed_handshakes > 0) {
    return concat(
        out, ": ", failed_handshakes,
        " connections ended in the handshake. Hint: do both sides have the same keys (WEFT_KEYS), and is it a "
        "weft server that listens there?");
  }
  return out + (unreached > 0 ? ": nobody listens there. Hint: is the launcher, or rank 0, running?"
                              : ". Hint: is it this run's server that listens there?");
}

ControlClient::ControlClient(ControlClientOptions options) : state_(std::make_unique<State>(std::move(options))) {
  State& s = *state_;
  const std::string hello = FieldWriter()
                                .number(s.o.rank)
                                .number(s.o.world_size)
                                .text(clipped(this_host(), kMaxName))
                                .number(getpid())
                                .take();
  const auto answer = s.ask(MessageKind::hello, hello, Clock::now() + wait_of(s.o.connect_timeout),
                            concat("rank ", s.o.rank, " of ", s.o.world_size, " joins"));
  const std::lock_guard lock(s.mutex);
  s.silence = milliseconds(FieldReader(answer.payload).number(1, INT32_MAX));
  s.joined = true;
  s.wake();
}

std::unique_ptr<ControlClient> ControlClient::connect(const LaunchInfo& info, double connect_timeout,
                                                      std::function<void(const Member&)> on_member) {
  if (info.keys_file.empty()) {
    fail(ErrorKind::kUsage, "control client", info.describe(),
         ": the run's keys are missing. Hint: make them once with ",
         "weft launch --make-keys FILE, where every rank can read it, and set WEFT_KEYS=FILE for every rank");
  }
  ControlClientOptions options;
  options.address = info.rendezvous;
  options.rank = info.rank;
  options.world_size = info.world_size;
  options.keys = ControlKeys::read(info.keys_file);
  options.run_id = info.run_id.empty() ? derived_run_id(options.keys.run_id, info.job) : info.run_id;
  options.connect_timeout = connect_timeout;
  options.on_member = std::move(on_member);
  if (!info.hosts_server()) return std::make_unique<ControlClient>(std::move(options));

  const size_t colon = info.rendezvous.rfind(':');
  const std::string host = info.rendezvous.substr(0, colon), port = info.rendezvous.substr(colon + 1);
  // The first pod of a PyTorchJob is told that it is localhost; the others know it by name.
  const bool local = info.launcher != Launcher::pytorch_job && (host == "localhost" || host.starts_with("127."));
  ControlServerOptions serve;
  serve.bind = local ? "127.0.0.1" : "*";
  serve.port = std::atoi(port.c_str());
  serve.world_size = info.world_size;
  serve.keys = options.keys;
  serve.run_id = options.run_id;
  serve.on_log = [](const LogRecord& record) {
    if (log::enabled(record.level)) log::write(record.level, concat('[', record.rank, "] ", record.text));
  };
  auto server = std::make_unique<ControlServer>(std::move(serve));
  options.address = "127.0.0.1:" + port;
  options.keys = options.keys.for_client();
  auto client = std::make_unique<ControlClient>(std::move(options));
  client->state_->server = std::move(server);
  return client;
}

ControlClient::~ControlClient() {
  try {
    leave("");
  } catch (const Error&) {
    // The server is gone: there is nobody to tell.
  }
  if (!state_->server) return;
  // The others still need the server: until the last has left or fallen silent.
  const auto anybody = [](const std::vector<Member>& members) {
    return std::any_of(members.begin(), members.end(),
                       [](const Member& member) { return member.state == MemberState::joined; });
  };
  while (anybody(state_->server->members())) std::this_thread::sleep_for(milliseconds(5));
}

void ControlClient::set(const std::string& key, const std::string& value) {
  if (key.size() > kMaxKey || value.size() > kMaxValue) {
    fail(ErrorKind::kValue, "control client", "key ", weft::quoted(key), " of ", key.size(), " and value of ",
         value.size(), " bytes: at most ", kMaxKey, " and ", kMaxValue);
  }
  const auto answer = state_->ask(MessageKind::set, FieldWriter().text(key).text(value).take(),
                                  Clock::now() + kAnswerMargin, concat("set ", weft::quoted(key)));
  if (answer.kind == MessageKind::failed) {
    fail(ErrorKind::kIo, "control client", "set ", weft::quoted(key), ": ",
         FieldReader(answer.payload).text(kMaxName * 4));
  }
}

std::optional<std::string> ControlClient::find(const std::string& key) {
  const auto answer = state_->ask(MessageKind::get, FieldWriter().text(clipped(key, kMaxKey)).number(0).take(),
                                  Clock::now() + kAnswerMargin, concat("find ", weft::quoted(key)));
  if (answer.kind != MessageKind::value) return std::nullopt;  // a rank is lost, and with it whoever might have set it
  FieldReader fields(answer.payload);
  if (fields.number(0, 1) == 0) return std::nullopt;
  return fields.text(kMaxValue);
}

std::string ControlClient::gone(int rank) const {
  const std::lock_guard lock(state_->mutex);
  const auto found = state_->gone.find(rank);
  return found == state_->gone.end() ? "" : found->second.describe();
}

std::string ControlClient::get(const std::string& key, double timeout) {
  const std::string what = concat("rank ", state_->o.rank, " waits for key ", weft::quoted(key));
  const milliseconds wait = wait_of(timeout);
  const auto answer =
      state_->ask(MessageKind::get, FieldWriter().text(clipped(key, kMaxKey)).number(wait.count()).take(),
                  Clock::now() + wait + kAnswerMargin, what);
  FieldReader fields(answer.payload);
  if (answer.kind == MessageKind::failed) fail(ErrorKind::kIo, "control client", what, ": ", fields.text(kMaxName * 4));
  if (fields.number(0, 1) == 0) fail(ErrorKind::kIo, "control client", what, ": nobody set it in ", timeout, " s");
  return fields.text(kMaxValue);
}

void ControlClient::barrier(const std::string& name, double timeout) {
  const std::string what = concat("rank ", state_->o.rank, " waits in barrier ", weft::quoted(name));
  const milliseconds wait = wait_of(timeout);
  const auto answer =
      state_->ask(MessageKind::barrier, FieldWriter().text(clipped(name, kMaxKey)).number(wait.count()).take(),
                  Clock::now() + wait + kAnswerMargin, what);
  if (answer.kind != MessageKind::failed) return;
  fail(ErrorKind::kIo, "control client", what, ": ", FieldReader(answer.payload).text(kMaxName * 4));
}

void ControlClient::set_operation(std::string operation) {
  const std::lock_guard lock(state_->mutex);
  state_->operation = std::move(operation);
  if (state_->operation.size() > kMaxName) state_->operation.resize(kMaxName);
  state_->operation_changed = true;
}

void ControlClient::log(log::Level level, std::string_view text) {
  const std::lock_guard lock(state_->mutex);
  state_->post(MessageKind::log, FieldWriter()
                                     .number(std::min<int64_t>(static_cast<int64_t>(level), 3))
                                     .number(microseconds_now())
                                     .text(clipped(text, kMaxText))
                                     .take());
  state_->wake();
}

void ControlClient::metric(std::string_view json) {
  if (json.size() > kMaxText || !json.starts_with('{') || !nlohmann::json::accept(json)) {
    fail(ErrorKind::kValue, "control client", "a metric must be one JSON object of at most ", kMaxText, " bytes, got ",
         weft::quoted(json));
  }
  const std::lock_guard lock(state_->mutex);
  state_->post(MessageKind::metric, FieldWriter().number(microseconds_now()).text(json).take());
  state_->wake();
}

void ControlClient::leave(const std::string& reason) {
  {
    const std::lock_guard lock(state_->mutex);
    if (state_->left || !state_->joined || !state_->dead.empty()) return;
  }
  state_->ask(MessageKind::leave, FieldWriter().text(clipped(reason, kMaxName)).take(), Clock::now() + kLeaveTimeout,
              "leave");
  const std::lock_guard lock(state_->mutex);
  state_->left = true;
}

void ControlClient::check() const {
  const std::lock_guard lock(state_->mutex);
  if (!state_->dead.empty()) fail(ErrorKind::kIo, "control client", state_->dead);
  if (state_->lost) fail(ErrorKind::kIo, "control client", state_->lost->describe());
}

}  // namespace weft::dist
