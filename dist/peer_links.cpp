#include "dist/peer_links.h"

#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <random>
#include <utility>

#include "core/error.h"
#include "dist/wire.h"

namespace weft::dist {
namespace {

using Clock = std::chrono::steady_clock;

constexpr char kLeave = 'l';
/// No message is near this size: a longer one is broken.
constexpr uint32_t kLongestFrame = 1 << 20;
constexpr size_t kKeyBytes = 32;

Clock::duration seconds(double value) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(value));
}

/// A descriptor that is closed at the end of its scope.
class Fd {
 public:
  explicit Fd(int fd) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&&) = delete;
  ~Fd() {
    if (fd_ >= 0) ::close(fd_);
  }
  int get() const { return fd_; }
  int release() { return std::exchange(fd_, -1); }

 private:
  int fd_;
};

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

void set_no_delay(int fd) {
  const int one = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
}

/// Waits for `events` until the deadline.
bool ready(int fd, short events, Clock::time_point deadline) {
  const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
  pollfd poll_fd{fd, events, 0};
  return left >= 0 && ::poll(&poll_fd, 1, static_cast<int>(std::min<int64_t>(left, 1 << 30))) > 0;
}

/// A connection to `address`, which does not block. None, with errno, if there is none by the deadline: an address from
/// which nothing comes back would take the system minutes.
Fd connected(Address& address, Clock::time_point deadline) {
  Fd fd(::socket(address.get()->sa_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (fd.get() < 0 || ::connect(fd.get(), address.get(), address.length) == 0) return fd;
  if (errno != EINPROGRESS) return Fd(-1);
  int error = ETIMEDOUT;
  socklen_t size = sizeof error;
  if (ready(fd.get(), POLLOUT, deadline)) ::getsockopt(fd.get(), SOL_SOCKET, SO_ERROR, &error, &size);
  if (error == 0) return fd;
  errno = error;
  return Fd(-1);
}

/// Says who this is: both sides of a connection do.
bool greet(int fd, const std::string& key, int rank) {
  std::string hello = key;
  hello.append(reinterpret_cast<const char*>(&rank), sizeof rank);
  return ::send(fd, hello.data(), hello.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(hello.size());
}

/// The rank that a connection says it is, or -1 if it does not know the key in time.
int greeted(int fd, const std::string& key, int size, Clock::time_point deadline) {
  std::string got;
  while (got.size() < kKeyBytes + sizeof(int)) {
    char bytes[kKeyBytes + sizeof(int)];
    if (!ready(fd, POLLIN, deadline)) return -1;
    const ssize_t n = ::recv(fd, bytes, sizeof bytes - got.size(), 0);
    if (n <= 0) return -1;
    got.append(bytes, static_cast<size_t>(n));
  }
  int rank = -1;
  std::memcpy(&rank, got.data() + kKeyBytes, sizeof rank);
  return got.compare(0, kKeyBytes, key) == 0 && rank >= 0 && rank < size ? rank : -1;
}

std::string draw_key() {
  std::random_device random;
  std::string key;
  for (size_t i = 0; i < kKeyBytes; ++i) key += "0123456789abcdef"[random() % 16];
  return key;
}

}  // namespace

PeerLinks::PeerLinks(const Options& options, Store& store, Handler handler)
    : options_(options), handler_(std::move(handler)) {
  for (int i = 0; i < options.size; ++i) peers_.push_back(std::make_unique<Peer>());
  wake_fd_ = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  if (wake_fd_ < 0) fail_io("no event descriptor");
  try {
    connect_all(store);
    const auto now = Clock::now();
    for (const auto& peer : peers_) {
      peer->heard = now;
      if (peer->fd >= 0) fcntl(peer->fd, F_SETFL, O_NONBLOCK);
    }
    thread_ = std::thread([this] { serve(); });
  } catch (...) {
    for (const auto& peer : peers_) close_peer(*peer);
    ::close(wake_fd_);
    throw;
  }
}

void PeerLinks::connect_all(Store& store) {
  const auto deadline = Clock::now() + seconds(options_.connect_timeout);
  const auto left = [&] { return std::chrono::duration<double>(deadline - Clock::now()).count(); };

  Address here = resolve(options_.address, "0");
  const Fd listener(::socket(here.get()->sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (listener.get() < 0) fail_io("no socket");
  if (::bind(listener.get(), here.get(), here.length) != 0) {
    fail_io("address " + quoted(options_.address) + " cannot be bound");
  }
  if (::listen(listener.get(), options_.size) != 0) fail_io("listen");
  Address bound;
  bound.length = sizeof bound.storage;
  char port[NI_MAXSERV];
  if (::getsockname(listener.get(), bound.get(), &bound.length) != 0 ||
      getnameinfo(bound.get(), bound.length, nullptr, 0, port, sizeof port, NI_NUMERICSERV) != 0) {
    fail_io("the port of a socket cannot be read");
  }
  if (options_.rank == 0) store.set("key", draw_key());
  store.set(concat("address/", options_.rank), options_.address + " " + port);
  const std::string key = store.get("key", left());
  if (key.size() != kKeyBytes) fail(ErrorKind::kData, "dist", "the key in the store has ", key.size(), " bytes");

  // Each connects to those below it, and is connected to by those above it.
  for (int peer = 0; peer < options_.rank; ++peer) {
    const std::string text = store.get(concat("address/", peer), left());
    const size_t space = text.find(' ');
    if (space == std::string::npos) fail(ErrorKind::kData, "dist", "not an address in the store: ", quoted(text));
    Address address = resolve(text.substr(0, space), text.substr(space + 1));
    Fd fd = connected(address, deadline);
    if (fd.get() < 0) fail_io(concat("rank ", peer, " cannot be reached at ", text));
    set_no_delay(fd.get());
    if (!greet(fd.get(), key, options_.rank)) fail_io(concat("rank ", peer, " does not take a greeting"));
    if (greeted(fd.get(), key, options_.size, deadline) != peer) {
      fail(ErrorKind::kIo, "dist", "rank ", peer, " cannot be reached at ", text,
           ": what listens there does not answer as a process of this run. Hint: is the store that of an earlier run?");
    }
    peers_[static_cast<size_t>(peer)]->fd = fd.release();
  }
  for (int missing = options_.size - 1 - options_.rank; missing > 0;) {
    if (!ready(listener.get(), POLLIN, deadline)) {
      std::string names;
      for (int peer = options_.rank + 1; peer < options_.size; ++peer) {
        if (peers_[static_cast<size_t>(peer)]->fd < 0) names += concat(names.empty() ? "" : ", ", peer);
      }
      fail(ErrorKind::kIo, "dist", "rank ", options_.rank, " of ", options_.size, " has waited ",
           options_.connect_timeout, " s for ranks ", names, ". Hint: are all processes started, with one store?");
    }
    Fd fd(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
    if (fd.get() < 0) continue;
    const int peer = greeted(fd.get(), key, options_.size, std::min(deadline, Clock::now() + seconds(2)));
    if (peer <= options_.rank || peers_[static_cast<size_t>(peer)]->fd >= 0) continue;  // a stranger
    if (!greet(fd.get(), key, options_.rank)) continue;
    set_no_delay(fd.get());
    peers_[static_cast<size_t>(peer)]->fd = fd.release();
    --missing;
  }
}

void PeerLinks::close() {
  if (!thread_.joinable()) return;
  stop_ = true;
  wake();
  thread_.join();
  for (const auto& peer : peers_) close_peer(*peer);
}

PeerLinks::~PeerLinks() {
  close();
  ::close(wake_fd_);
}

void PeerLinks::set_farewell(std::string how) {
  const std::lock_guard lock(farewell_mutex_);
  farewell_ = std::move(how);
}

void PeerLinks::wake() {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t n = ::write(wake_fd_, &one, sizeof one);  // a full counter wakes as well
}

void PeerLinks::send(int to, char type, std::string_view body) {
  Peer& peer = *peers_[static_cast<size_t>(to)];
  bool queued = false;
  {
    const std::lock_guard lock(peer.mutex);
    if (peer.fd < 0) return;
    const auto length = static_cast<uint32_t>(body.size() + 1);
    peer.out.append(reinterpret_cast<const char*>(&length), sizeof length);
    peer.out += type;
    peer.out += body;
    flush(peer);
    queued = !peer.out.empty();
  }
  if (queued) wake();
}

void PeerLinks::flush(Peer& peer) {
  while (!peer.out.empty() && peer.fd >= 0) {
    const ssize_t n = ::send(peer.fd, peer.out.data(), peer.out.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n < 0 && errno == EINTR) continue;
    // What is wrong with a connection shows when it is read.
    if (n < 0 && errno != EAGAIN) peer.out.clear();
    if (n <= 0) return;
    peer.out.erase(0, static_cast<size_t>(n));
  }
}

void PeerLinks::close_peer(Peer& peer) {
  const std::lock_guard lock(peer.mutex);
  if (peer.fd >= 0) ::close(peer.fd);
  peer.fd = -1;
  peer.out.clear();
}

void PeerLinks::lose(int which, const std::string& how) {
  Peer& peer = *peers_[static_cast<size_t>(which)];
  // The handler comes first: what it sends reaches even this peer, should it only have been stopped.
  if (!std::exchange(peer.left, true) && !stop_) handler_.lost(which, how);
  close_peer(peer);
}

void PeerLinks::read_from(int which) {
  Peer& peer = *peers_[static_cast<size_t>(which)];
  char bytes[16384];
  for (;;) {
    const ssize_t n = ::recv(peer.fd, bytes, sizeof bytes, MSG_DONTWAIT);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0) return lose(which, "is dead: its connection closed, so its process has ended");
    peer.heard = Clock::now();
    peer.in.append(bytes, static_cast<size_t>(n));
    take_frames(which);
    if (peer.fd < 0) return;
  }
}

void PeerLinks::take_frames(int which) {
  Peer& peer = *peers_[static_cast<size_t>(which)];
  size_t at = 0;
  for (uint32_t length; peer.in.size() - at >= sizeof length; at += sizeof length + length) {
    std::memcpy(&length, peer.in.data() + at, sizeof length);
    if (length < 1 || length > kLongestFrame) return lose(which, "sent what is no message");
    if (peer.in.size() - at - sizeof length < length) break;
    const std::string_view frame = std::string_view(peer.in).substr(at + sizeof length, length);
    try {
      if (frame[0] == kLeave) {
        peer.left = true;
        if (!stop_) handler_.left(which, std::string(frame.substr(1)));
      } else if (!stop_) {
        handler_.message(which, frame[0], frame.substr(1));
      }
    } catch (const Error& error) {
      return lose(which, concat("sent what is no message: ", error.what()));
    }
  }
  peer.in.erase(0, at);
}

void PeerLinks::serve() {
  auto next_beat = Clock::now(), last_turn = Clock::now();
  while (!stop_) {
    std::vector<pollfd> fds = {{wake_fd_, POLLIN, 0}};
    std::vector<int> who = {-1};
    for (int i = 0; i < options_.size; ++i) {
      Peer& peer = *peers_[static_cast<size_t>(i)];
      const std::lock_guard lock(peer.mutex);
      if (peer.fd < 0) continue;
      fds.push_back({peer.fd, static_cast<short>(peer.out.empty() ? POLLIN : POLLIN | POLLOUT), 0});
      who.push_back(i);
    }
    const auto wait = std::chrono::duration_cast<std::chrono::milliseconds>(next_beat - Clock::now()).count();
    ::poll(fds.data(), fds.size(), static_cast<int>(std::max<int64_t>(wait, 0)));
    // A process that was stopped itself, or got no processor, must first read what came meanwhile.
    const auto now = Clock::now();
    const bool was_away = now - last_turn > seconds(options_.silence / 2);
    last_turn = now;
    uint64_t drained;
    while (::read(wake_fd_, &drained, sizeof drained) > 0) {
    }
    for (size_t i = 1; i < fds.size(); ++i) {
      Peer& peer = *peers_[static_cast<size_t>(who[i])];
      if (was_away) peer.heard = now;
      if (fds[i].revents & POLLOUT) {
        const std::lock_guard lock(peer.mutex);
        flush(peer);
      }
      if (fds[i].revents & (POLLIN | POLLHUP | POLLERR)) read_from(who[i]);
      if (peer.fd >= 0 && !peer.left && now - peer.heard > seconds(options_.silence)) {
        char silence[32];
        std::snprintf(silence, sizeof silence, "%.1f", std::chrono::duration<double>(now - peer.heard).count());
        lose(who[i], concat("has given no sign of life for ", silence, " s: it is stopped or cut off"));
      }
    }
    if (now >= next_beat) {
      next_beat = now + seconds(options_.heartbeat);
      const std::string body = handler_.heartbeat();
      for (const int peer : who) {
        if (peer >= 0) send(peer, kHeartbeat, body);
      }
    }
  }
  finish();
}

void PeerLinks::finish() {
  std::string farewell;
  {
    const std::lock_guard lock(farewell_mutex_);
    farewell = farewell_;
  }
  for (int i = 0; i < options_.size; ++i) send(i, kLeave, farewell);
  // A socket that is closed with bytes unread resets the connection, and what was sent last may be lost: so each is
  // read to its end, which comes as soon as the other side has seen the farewell.
  const auto deadline = Clock::now() + std::chrono::seconds(1);
  for (int i = 0; i < options_.size; ++i) {
    Peer& peer = *peers_[static_cast<size_t>(i)];
    const std::lock_guard lock(peer.mutex);
    while (!peer.out.empty() && peer.fd >= 0 && ready(peer.fd, POLLOUT, deadline)) flush(peer);
    if (peer.fd >= 0) ::shutdown(peer.fd, SHUT_WR);
  }
  for (int i = 0; i < options_.size; ++i) {
    const int fd = peers_[static_cast<size_t>(i)]->fd;
    char bytes[4096];
    while (fd >= 0 && ready(fd, POLLIN, deadline) && ::recv(fd, bytes, sizeof bytes, MSG_DONTWAIT) > 0) {
    }
  }
}

}  // namespace weft::dist
