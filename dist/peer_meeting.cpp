#include "dist/peer_meeting.h"

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <random>
#include <utility>

#include "core/error.h"
#include "dist/group_error.h"
#include "dist/wire.h"

namespace weft::dist {
namespace {

constexpr size_t kKeyBytes = 32, kGreetingBytes = kKeyBytes + sizeof(int);
constexpr int kTurn = 5;  // milliseconds
/// Keys that are looked for in a turn: every look may be a message to a server.
constexpr int kLooks = 8;
constexpr double kStrangerSeconds = 2;
constexpr const char* kNoProcess =
    ", or what listens there is no process of this run. Hint: is the store that of an earlier run?";

std::chrono::steady_clock::duration seconds(double value) {
  return std::chrono::duration_cast<std::chrono::steady_clock::duration>(std::chrono::duration<double>(value));
}

std::string with_tenths(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f", value);
  return text;
}

struct Address {
  sockaddr_storage storage{};
  socklen_t length = 0;
  sockaddr* get() { return reinterpret_cast<sockaddr*>(&storage); }
};

Address resolve(const std::string& host, const std::string& port) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV;
  addrinfo* found = nullptr;
  if (const int error = getaddrinfo(host.c_str(), port.c_str(), &hints, &found); error != 0) {
    fail(ErrorKind::kUsage, "dist", "the address ", quoted(host), " cannot be used: ", gai_strerror(error),
         ". Hint: give the numeric address of a network interface of this machine");
  }
  Address address;
  std::memcpy(&address.storage, found->ai_addr, found->ai_addrlen);
  address.length = found->ai_addrlen;
  freeaddrinfo(found);
  return address;
}

[[noreturn]] void fail_io(const std::string& what) { fail(ErrorKind::kIo, "dist", what, ": ", std::strerror(errno)); }

std::string draw_key() {
  std::random_device random;
  std::string key;
  for (size_t i = 0; i < kKeyBytes; ++i) key += "0123456789abcdef"[random() % 16];
  return key;
}

}  // namespace

Descriptor& Descriptor::operator=(Descriptor&& other) noexcept {
  std::swap(fd_, other.fd_);
  return *this;
}
Descriptor::~Descriptor() {
  if (fd_ >= 0) ::close(fd_);
}
int Descriptor::release() { return std::exchange(fd_, -1); }

PeerMeeting::PeerMeeting(const Options& options, Store& store)
    : options_(options), store_(store), peers_(static_cast<size_t>(options.size)), missing_(options.size - 1) {
  listen();
}

PeerMeeting::~PeerMeeting() = default;

void PeerMeeting::listen() {
  Address here = resolve(options_.address, "0");
  listener_ = Descriptor(::socket(here.get()->sa_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (listener_.get() < 0) fail_io("no socket");
  if (::bind(listener_.get(), here.get(), here.length) != 0)
    fail_io("address " + quoted(options_.address) + " cannot be bound");
  if (::listen(listener_.get(), std::max(options_.size, 16)) != 0) fail_io("listen");
  Address bound;
  bound.length = sizeof bound.storage;
  char port[NI_MAXSERV];
  if (::getsockname(listener_.get(), bound.get(), &bound.length) != 0 ||
      getnameinfo(bound.get(), bound.length, nullptr, 0, port, sizeof port, NI_NUMERICSERV) != 0) {
    fail_io("the port of a socket cannot be read");
  }
  here_ = options_.address + " " + port;
}

void PeerMeeting::run(const std::function<void(int peer, int fd)>& met, const std::function<bool()>& over) {
  met_ = met;
  const auto deadline = Clock::now() + seconds(options_.connect_timeout);
  if (options_.rank == 0) store_.set("key", draw_key());
  for (auto last = Clock::now(); missing_ > 0;) {
    if (over()) return;
    look_into_store();
    wait_for_talk();
    const auto now = Clock::now();
    // A process that did not run for long was itself the one that was silent.
    const bool was_away = now - last > seconds(options_.silence / 2);
    last = now;
    for (size_t i = 0; i < talks_.size() && missing_ > 0;) {
      if (was_away) talks_[i].since = now;
      if (advance(talks_[i], now)) {
        talks_.erase(talks_.begin() + static_cast<std::ptrdiff_t>(i));
      } else {
        ++i;
      }
    }
    if (now > deadline && missing_ > 0) fail_late();
  }
  talks_.clear();
}

void PeerMeeting::give_up(int rank_at_fault, const std::string& why) {
  store_.set(concat("failure/", options_.rank), WireWriter().put(rank_at_fault).text(why).take());
}

std::optional<std::pair<int, std::string>> PeerMeeting::word_of(Store& store, int rank) {
  const std::optional<std::string> word = store.find(concat("failure/", rank));
  if (!word) return std::nullopt;
  WireReader in(*word);
  const int at_fault = in.get<int>();
  return std::pair(at_fault, in.text());
}

void PeerMeeting::look_into_store() {
  for (int peer = 0; peer < options_.size; ++peer) {
    if (peer == options_.rank || peers_[static_cast<size_t>(peer)].met) continue;
    if (const std::string why = store_.gone(peer); !why.empty()) throw GroupError(ErrorKind::kIo, peer, why);
  }
  if (key_.empty()) {
    const std::optional<std::string> key = store_.find("key");
    if (!key) return;
    if (key->size() != kKeyBytes) fail(ErrorKind::kData, "dist", "the key in the store has ", key->size(), " bytes");
    key_ = *key;
    // Who sees this address may call: from now on callers are answered.
    store_.set(concat("address/", options_.rank), here_);
  }
  const auto now = Clock::now();
  int looks = 0;
  for (int i = 0; i < options_.size && looks < kLooks; ++i) {
    const int rank = next_look_;
    Peer& peer = peers_[static_cast<size_t>(rank)];
    next_look_ = (next_look_ + 1) % options_.size;
    if (rank == options_.rank || peer.met) continue;
    if (peer.address.empty()) {
      ++looks;
      peer.address = store_.find(concat("address/", rank)).value_or("");
    }
    const bool talks = std::any_of(talks_.begin(), talks_.end(), [&](const Talk& talk) { return talk.peer == rank; });
    if (peer.address.empty() || talks || now < peer.called + seconds(options_.heartbeat)) continue;
    peer.called = now;
    call(rank);
  }
}

void PeerMeeting::call(int peer) {
  const std::string& text = peers_[static_cast<size_t>(peer)].address;
  const size_t space = text.find(' ');
  if (space == std::string::npos) fail(ErrorKind::kData, "dist", "not an address in the store: ", quoted(text));
  Address address = resolve(text.substr(0, space), text.substr(space + 1));
  Talk talk;
  talk.fd = Descriptor(::socket(address.get()->sa_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (talk.fd.get() < 0) fail_io("no socket");
  talk.peer = peer, talk.connecting = true, talk.since = Clock::now();
  if (::connect(talk.fd.get(), address.get(), address.length) != 0 && errno != EINPROGRESS)
    fail_unreached(peer, std::strerror(errno));
  talks_.push_back(std::move(talk));
}

void PeerMeeting::accept() {
  for (;;) {
    Talk talk;
    talk.fd = Descriptor(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (talk.fd.get() < 0) return;
    talk.since = Clock::now();
    talks_.push_back(std::move(talk));
  }
}

void PeerMeeting::wait_for_talk() {
  std::vector<pollfd> fds;
  if (!key_.empty()) fds.push_back({listener_.get(), POLLIN, 0});
  for (const Talk& talk : talks_)
    fds.push_back({talk.fd.get(), static_cast<short>(talk.connecting ? POLLOUT : POLLIN), 0});
  ::poll(fds.data(), fds.size(), kTurn);
  if (!key_.empty()) accept();
}

bool PeerMeeting::greet(const Talk& talk) {
  std::string hello = key_;
  hello.append(reinterpret_cast<const char*>(&options_.rank), sizeof options_.rank);
  return ::send(talk.fd.get(), hello.data(), hello.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(hello.size());
}

/// The other side has said who it is. Both of a pair may have called: the one above makes the connection.
bool PeerMeeting::greeted(const Talk& talk) {
  int rank = -1;
  std::memcpy(&rank, talk.got.data() + kKeyBytes, sizeof rank);
  const bool known = talk.got.compare(0, kKeyBytes, key_) == 0 && rank >= 0 && rank < options_.size &&
                     rank != options_.rank && (talk.peer < 0 || talk.peer == rank);
  if (talk.peer >= 0 && !known)
    fail_unreached(talk.peer,
                   "what listens there does not answer as a process of this run. Hint: is the store that of "
                   "an earlier run?");
  return known && (talk.peer >= 0 || greet(talk));
}

bool PeerMeeting::advance(Talk& talk, Clock::time_point now) {
  if (talk.peer >= 0 && peers_[static_cast<size_t>(talk.peer)].met) return true;
  if (talk.connecting) {
    pollfd writable{talk.fd.get(), POLLOUT, 0};
    if (::poll(&writable, 1, 0) > 0) {
      int error = 0;
      socklen_t size = sizeof error;
      ::getsockopt(talk.fd.get(), SOL_SOCKET, SO_ERROR, &error, &size);
      if (error != 0) fail_unreached(talk.peer, std::strerror(error));
      talk.connecting = false;
      if (!greet(talk)) fail_unreached(talk.peer, "it does not take a greeting");
    }
  } else {
    char bytes[kGreetingBytes];
    const ssize_t n = ::recv(talk.fd.get(), bytes, sizeof bytes - talk.got.size(), 0);
    if (n > 0) talk.got.append(bytes, static_cast<size_t>(n));
    if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR)) {
      if (talk.peer < 0) return true;
      fail_unreached(talk.peer, concat("the connection closed without an answer: its process has ended", kNoProcess));
    }
  }
  if (talk.got.size() < kGreetingBytes) {
    const double waited = std::chrono::duration<double>(now - talk.since).count();
    if (talk.peer < 0) return waited > kStrangerSeconds;
    if (waited <= options_.silence) return false;
    fail_unreached(talk.peer, talk.connecting ? std::strerror(ETIMEDOUT)
                                              : concat("it has given no sign of life for ", with_tenths(waited),
                                                       " s: it is stopped or cut off", kNoProcess));
  }
  if (!greeted(talk)) return true;
  int rank = -1;
  std::memcpy(&rank, talk.got.data() + kKeyBytes, sizeof rank);
  Peer& peer = peers_[static_cast<size_t>(rank)];
  const bool above = talk.peer < 0 ? rank > options_.rank : rank < options_.rank;
  if (!above || peer.met) return true;  // it lives, and that was the question
  const int one = 1;
  setsockopt(talk.fd.get(), IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  peer.met = true;
  --missing_;
  met_(rank, talk.fd.release());
  return true;
}

void PeerMeeting::fail_unreached(int peer, const std::string& how) {
  if (const std::string why = store_.gone(peer); !why.empty()) throw GroupError(ErrorKind::kIo, peer, why);
  if (const auto word = word_of(store_, peer)) throw GroupError(ErrorKind::kIo, word->first, word->second);
  throw GroupError(
      ErrorKind::kIo, peer,
      concat("rank ", peer, " cannot be reached at ", peers_[static_cast<size_t>(peer)].address, ": ", how));
}

void PeerMeeting::fail_late() {
  if (key_.empty()) {
    throw GroupError(ErrorKind::kIo, 0,
                     concat("rank ", options_.rank, " of ", options_.size, " has waited ", options_.connect_timeout,
                            " s for rank 0: nobody has set \"key\" in the store. Hint: is rank 0 started, with this "
                            "store?"));
  }
  for (const Talk& talk : talks_) {
    if (talk.peer < 0) continue;
    fail_unreached(talk.peer, talk.connecting ? std::strerror(ETIMEDOUT) : concat("it does not answer", kNoProcess));
  }
  std::string names;
  int first = -1;
  for (int peer = 0; peer < options_.size; ++peer) {
    if (peer == options_.rank || peers_[static_cast<size_t>(peer)].met) continue;
    names += concat(names.empty() ? "" : ", ", peer);
    if (first < 0) first = peer;
  }
  throw GroupError(ErrorKind::kIo, missing_ == 1 ? first : -1,
                   concat("rank ", options_.rank, " of ", options_.size, " has waited ", options_.connect_timeout,
                          " s for ranks ", names, ". Hint: are all processes started, with one store?"));
}

}  // namespace weft::dist
