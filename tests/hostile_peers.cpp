#include "tests/hostile_peers.h"

#include <arpa/inet.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <random>
#include <string>
#include <vector>
#include <zmq.hpp>

namespace weft::testing {
namespace {

int connect_to(int port) {
  const int socket = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (socket < 0 || ::connect(socket, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0) _exit(3);
  return socket;
}

void push(int socket, const std::string& bytes) {
  (void)!::send(socket, bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
}

}  // namespace

void attack(int port, const dist::ControlKeys& keys, const std::function<void()>& hold) {
  std::mt19937 random(7);
  const auto noise = [&](size_t size) {
    std::string bytes(size, '\0');
    for (char& byte : bytes) byte = static_cast<char>(random());
    return bytes;
  };
  std::string greeting(64, '\0');  // ZMTP 3.0: signature, version, mechanism
  greeting[0] = '\xff', greeting[8] = 1, greeting[9] = '\x7f', greeting[10] = 3;
  std::copy_n("CURVE", 5, greeting.begin() + 12);
  std::vector<int> open;
  for (int i = 0; i < 250; ++i) {
    open.push_back(connect_to(port));  // half open: says nothing
    open.push_back(connect_to(port));
    push(open.back(), noise(1 + random() % 4096));
    open.push_back(connect_to(port));
    // A command of 2^62 bytes, then some of them.
    push(open.back(), greeting + std::string("\x06\x40\0\0\0\0\0\0\0", 9) + noise(512));
  }
  zmq::context_t context;
  context.set(zmq::ctxopt::max_sockets, 2048);
  const dist::ControlKeys wrong = dist::ControlKeys::make();
  std::vector<zmq::socket_t> sockets;
  for (int i = 0; i < 250; ++i) {
    zmq::socket_t& socket = sockets.emplace_back(context, zmq::socket_type::dealer);
    socket.set(zmq::sockopt::linger, 0);
    socket.set(zmq::sockopt::reconnect_ivl, -1);
    socket.set(zmq::sockopt::curve_serverkey, keys.server_public);
    socket.set(zmq::sockopt::curve_publickey, wrong.client_public);
    socket.set(zmq::sockopt::curve_secretkey, wrong.client_secret);
    socket.connect("tcp://127.0.0.1:" + std::to_string(port));
    socket.send(zmq::buffer(noise(100)), zmq::send_flags::dontwait);
  }
  hold();
  for (const int socket : open) close(socket);
}

void allow_many_connections() {
  rlimit limit{};
  getrlimit(RLIMIT_NOFILE, &limit);
  limit.rlim_cur = std::min<rlim_t>(limit.rlim_max, 8192);
  setrlimit(RLIMIT_NOFILE, &limit);
}

int64_t resident_bytes(pid_t pid) {
  std::ifstream in("/proc/" + std::to_string(pid) + "/statm");
  int64_t pages = 0;
  in >> pages >> pages;
  return pages * sysconf(_SC_PAGESIZE);
}

}  // namespace weft::testing
