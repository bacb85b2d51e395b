#include "dist/process_engine.h"

#include <algorithm>
#include <chrono>
#include <exception>
#include <optional>
#include <thread>
#include <vector>

#include "dist/group_error.h"
#include "dist/peer_meeting.h"
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
  PeerLinks::Handler handler;
  handler.message = [this](int peer, char type, std::string_view body) { hear(peer, type, body); };
  handler.lost = [this](int peer, const std::string& how) {
    missed(peer, concat(how, "; ", board().last_operation(peer)));
  };
  handler.left = [this](int peer, const std::string& how) {
    bool ready = false;
    {
      const std::lock_guard lock(swap_mutex_);
      ready = received_.contains({kReady, peer});
    }
    if (ready) return board().gone(peer, how);
    missed(peer, concat(how, " before all ranks were connected"));
  };
  handler.heartbeat = [this] { return board().waiting_message(); };
  board().on_issue = [this](const Stamp& stamp, std::span<const int> members) {
    const std::string body = stamp.encode();
    for (const int member : members) {
      if (member != rank()) links_->send(member, kIssued, body);
    }
  };
  board().on_failure = [this](const Board::Failure& failure) { failed(failure); };
  {
    const std::lock_guard lock(links_mutex_);
    links_ = std::make_unique<PeerLinks>(
        PeerLinks::Options{
            .rank = options.rank, .size = options.size, .heartbeat = options.heartbeat, .silence = options.silence},
        std::move(handler));
  }
  const auto use_store = [this](Store* while_connecting) {
    const std::lock_guard lock(store_mutex_);
    store_ = while_connecting;
  };
  use_store(&store);
  std::optional<PeerMeeting> meeting;
  try {
    connecting([&] {
      meeting.emplace(PeerMeeting::Options{.rank = options.rank,
                                           .size = options.size,
                                           .address = options.address,
                                           .heartbeat = options.heartbeat,
                                           .silence = options.silence,
                                           .connect_timeout = options.connect_timeout},
                      store);
      meeting->run([this](int peer, int fd) { links_->add(peer, fd); }, [this] { return board().failed(); });
      passed("linked");
    });
    use_store(nullptr);
  } catch (const GroupError&) {
    const Board::Failure failure = *board().failure();
    try {
      if (meeting) meeting->give_up(failure.rank, failure.text);
    } catch (const Error&) {  // the store is gone: there is nobody to read it
    }
    use_store(nullptr);
    leave();
    throw;
  }
}

ProcessEngine::~ProcessEngine() { leave(); }

void ProcessEngine::leave() {
  if (!links_) return;
  if (std::uncaught_exceptions() > 0) links_->set_farewell("has left by an exception");
  // Whoever was connected since the world failed has not heard of it.
  if (const auto failure = board().failure()) tell(*failure);
  // The pointer stays set while the thread of the links ends, which may still use it.
  links_->close();
  const std::lock_guard lock(links_mutex_);
  links_.reset();
}

void ProcessEngine::connecting(const std::function<void()>& connect) {
  try {
    connect();
    if (!board().failed()) return;
  } catch (const GroupError& error) {
    board().fail_all(error.kind(), error.rank(), error.what());
  } catch (const Error& error) {
    board().fail_all(error.kind(), rank(), concat("rank ", rank(), " cannot connect: ", error.what()));
  } catch (const std::exception& error) {
    connecting_failed(error.what());
  }
  const Board::Failure failure = *board().failure();
  throw GroupError(failure.kind, failure.rank, describe_connecting(failure));
}

std::string ProcessEngine::connecting_failed(const char* what) {
  await_failure(concat("rank ", rank(), " cannot connect: ", what));
  return describe_connecting(*board().failure());
}

std::string ProcessEngine::describe_connecting(const Board::Failure& failure) const {
  constexpr int kNamed = 16;
  std::string ranks;
  for (int member = 0; member < std::min(options_.size, kNamed); ++member)
    ranks += concat(member == 0 ? "" : ", ", member);
  return concat("[dist] ", failure.text, "\nthis is rank ", rank(), ", connecting group \"world\" of ranks ", ranks,
                options_.size > kNamed ? ", ..." : "");
}

std::vector<std::string> ProcessEngine::swap(char type, const std::vector<std::string>& to) {
  for (int peer = 0; peer < options_.size; ++peer) {
    if (peer != rank()) links_->send(peer, type, to[static_cast<size_t>(peer)]);
  }
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(options_.connect_timeout);
  std::vector<std::string> theirs(static_cast<size_t>(options_.size));
  std::unique_lock lock(swap_mutex_);
  for (int peer = 0; peer < options_.size; ++peer) {
    if (peer == rank()) continue;
    const auto here = [&] { return failed_ || received_.contains({type, peer}); };
    if (!swapped_.wait_until(lock, deadline, here)) {
      throw GroupError(ErrorKind::kIo, peer,
                       concat("rank ", peer, " of ", options_.size, " has not connected its data in ",
                              options_.connect_timeout, " s"));
    }
    if (failed_) return theirs;
    theirs[static_cast<size_t>(peer)] = received_.at({type, peer});
  }
  return theirs;
}

void ProcessEngine::hear(int peer, char type, std::string_view body) {
  if (type == kIssued) {
    board().issued_elsewhere(peer, Stamp::decode(body));
  } else if (type == PeerLinks::kHeartbeat) {
    board().waiting_elsewhere(peer, body);
  } else if (type == kExchanged || type == kReady) {
    const std::lock_guard lock(swap_mutex_);
    received_[{type, peer}] = body;
    swapped_.notify_all();
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

/// A process has gone without which the world cannot go on. One that gave up connecting has left word of why.
void ProcessEngine::missed(int peer, const std::string& how) {
  {
    const std::lock_guard lock(store_mutex_);
    try {
      if (store_ != nullptr) {
        if (const auto word = PeerMeeting::word_of(*store_, peer))
          return board().fail_all(ErrorKind::kIo, word->first, word->second);
      }
    } catch (const Error&) {  // what is known of the peer is all that is known
    }
  }
  board().fail_all(ErrorKind::kIo, peer, concat("rank ", peer, " of ", options_.size, ' ', how));
}

void ProcessEngine::tell(const Board::Failure& failure) {
  const std::string body = WireWriter().put(failure.kind).put(failure.rank).text(failure.text).take();
  const std::lock_guard lock(links_mutex_);
  for (int peer = 0; links_ && peer < options_.size; ++peer) {
    if (peer != rank()) links_->send(peer, kFailed, body);
  }
}

void ProcessEngine::failed(const Board::Failure& failure) {
  tell(failure);
  {
    const std::lock_guard lock(swap_mutex_);
    failed_ = true;
    swapped_.notify_all();
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

void ProcessEngine::await_failure(const std::string& what) {
  // A process that dies closes all its connections, and those of the data may be seen first.
  const auto deadline =
      std::chrono::steady_clock::now() + std::chrono::duration<double>(options_.silence + 2 * options_.heartbeat);
  while (!board().failed() && std::chrono::steady_clock::now() < deadline) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  board().fail_all(ErrorKind::kIo, -1, what);
}

void ProcessEngine::transport_failed(const Operation& op, const std::string& what) {
  await_failure(concat("the connections of rank ", rank(), " failed in ", op.stamp.describe(), ": ", what));
  board().throw_failure(rank(), op.stamp);
}

}  // namespace weft::dist
