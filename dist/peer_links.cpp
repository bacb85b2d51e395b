#include "dist/peer_links.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "core/error.h"

namespace weft::dist {
namespace {

using Clock = std::chrono::steady_clock;

constexpr char kLeave = 'l';
/// No message is near this size: a longer one is broken.
constexpr uint32_t kLongestFrame = 1 << 20;

Clock::duration seconds(double value) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(value));
}

/// Waits for `events` until the deadline.
bool ready(int fd, short events, Clock::time_point deadline) {
  const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
  pollfd poll_fd{fd, events, 0};
  return left >= 0 && ::poll(&poll_fd, 1, static_cast<int>(std::min<int64_t>(left, 1 << 30))) > 0;
}

}  // namespace

PeerLinks::PeerLinks(const Options& options, Handler handler) : options_(options), handler_(std::move(handler)) {
  for (int i = 0; i < options.size; ++i) peers_.push_back(std::make_unique<Peer>());
  wake_fd_ = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  if (wake_fd_ < 0) fail(ErrorKind::kIo, "dist", "no event descriptor: ", std::strerror(errno));
  thread_ = std::thread([this] { serve(); });
}

void PeerLinks::add(int peer, int fd) {
  {
    Peer& added = *peers_[static_cast<size_t>(peer)];
    const std::lock_guard lock(added.mutex);
    added.heard = Clock::now();
    added.fd = fd;
  }
  wake();
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
