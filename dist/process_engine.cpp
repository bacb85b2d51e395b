#include "dist/process_engine.h"

#include <chrono>
#include <exception>
#include <numeric>
#include <thread>
#include <vector>

#include "dist/wire.h"

namespace weft::dist {
namespace {

constexpr char kIssued = 'i', kFailed = 'f';

}  // namespace

void check_options(const ProcessOptions& options) {
  if (options.size < 1 || options.rank < 0 || options.rank >= options.size) {
    fail(ErrorKind::kUsage, "dist", "rank ", options.rank, " of ", options.size,
         " is no rank: it must be from 0 to size - 1");
  }
  for (const double seconds : {options.timeout, options.connect_timeout, options.heartbeat, options.silence}) {
    if (!(seconds > 0)) fail(ErrorKind::kUsage, "dist", "times must be positive, got ", seconds, " s");
  }
  if (options.silence < 3 * options.heartbeat) {
    fail(ErrorKind::kUsage, "dist", "a silence of ", options.silence, " s is less than three heartbeats of ",
         options.heartbeat, " s: a process that is only late would count as stopped");
  }
}

std::shared_ptr<Board> ProcessEngine::make_board(const ProcessOptions& options) {
  check_options(options);
  auto board = std::make_shared<Board>(options.size, options.rank, options.timeout);
  if (!options.flight_record.empty()) board->flight_record = concat(options.flight_record, ".rank", options.rank);
  return board;
}

ProcessEngine::ProcessEngine(const ProcessOptions& options, Store& store)
    : Engine(make_board(options), options.rank), options_(options) {
  const PeerLinks::Options links{.rank = options.rank,
                                 .size = options.size,
                                 .address = options.address,
                                 .heartbeat = options.heartbeat,
                                 .silence = options.silence,
                                 .connect_timeout = options.connect_timeout};
  PeerLinks::Handler handler;
  handler.message = [this](int peer, char type, std::string_view body) { hear(peer, type, body); };
  handler.lost = [this](int peer, const std::string& how) {
    board().fail_all(ErrorKind::kIo, peer,
                     concat("rank ", peer, " of ", options_.size, ' ', how, "; ", board().last_operation(peer)));
  };
  handler.left = [this](int peer, const std::string& how) { board().gone(peer, how); };
  handler.heartbeat = [this] { return board().waiting_message(); };
  board().on_issue = [this](const Stamp& stamp, std::span<const int> members) {
    const std::string body = stamp.encode();
    for (const int member : members) {
      if (member != rank()) links_->send(member, kIssued, body);
    }
  };
  board().on_failure = [this](const Board::Failure& failure) { failed(failure); };
  const std::lock_guard lock(links_mutex_);
  links_ = std::make_unique<PeerLinks>(links, store, std::move(handler));
}

ProcessEngine::~ProcessEngine() { leave(); }

void ProcessEngine::leave() {
  if (!links_) return;
  if (std::uncaught_exceptions() > 0) links_->set_farewell("has left by an exception");
  // The pointer stays set while the thread of the links ends, which may still use it.
  links_->close();
  const std::lock_guard lock(links_mutex_);
  links_.reset();
}

void ProcessEngine::hear(int peer, char type, std::string_view body) {
  if (type == kIssued) {
    board().issued_elsewhere(peer, Stamp::decode(body));
  } else if (type == PeerLinks::kHeartbeat) {
    board().waiting_elsewhere(peer, body);
  } else if (type == kFailed) {
    WireReader in(body);
    const auto kind = in.get<uint8_t>();
    const int rank = in.get<int>();
    const std::string text = in.text();
    in.end();
    if (kind > static_cast<uint8_t>(ErrorKind::kIo) || rank < -1 || rank >= options_.size) {
      fail(ErrorKind::kData, "dist", "not a failure");
    }
    board().fail_all(static_cast<ErrorKind>(kind), rank, text);
  } else {
    fail(ErrorKind::kData, "dist", "a message of an unknown type ", static_cast<int>(type));
  }
}

void ProcessEngine::failed(const Board::Failure& failure) {
  const std::string body = WireWriter().put(failure.kind).put(failure.rank).text(failure.text).take();
  {
    const std::lock_guard lock(links_mutex_);
    for (int peer = 0; links_ && peer < options_.size; ++peer) {
      if (peer != rank()) links_->send(peer, kFailed, body);
    }
  }
  const std::lock_guard lock(abort_mutex_);
  aborted_ = true;
  if (abort_) abort_();
}

void ProcessEngine::on_abort(std::function<void()> abort) {
  const std::lock_guard lock(abort_mutex_);
  abort_ = std::move(abort);
  if (aborted_ && abort_) abort_();
}

void ProcessEngine::transport_failed(const Operation& op, const std::string& what) {
  // A process that dies closes all its connections, and those of the data may be seen first.
  const auto deadline =
      std::chrono::steady_clock::now() + std::chrono::duration<double>(options_.silence + 2 * options_.heartbeat);
  while (!board().failed() && std::chrono::steady_clock::now() < deadline) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  board().fail_all(ErrorKind::kIo, -1,
                   concat("the connections of rank ", rank(), " failed in ", op.stamp.describe(), ": ", what));
  board().throw_failure(rank(), op.stamp);
}

}  // namespace weft::dist
