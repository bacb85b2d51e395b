#include "dist/control/keys.h"

#include <fcntl.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zmq.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <sstream>
#include <string_view>

#include "core/error.h"
#include "core/file.h"

namespace weft::dist {
namespace {

constexpr std::string_view kFirstLine = "weft-keys 1";
constexpr size_t kKeyCharacters = 40;
constexpr size_t kMaxFile = 4096;

void make_pair(std::string& public_key, std::string& secret_key) {
  char of_public[kKeyCharacters + 1], of_secret[kKeyCharacters + 1];
  if (zmq_curve_keypair(of_public, of_secret) != 0) {
    fail(ErrorKind::kState, "control keys", "this libzmq makes no CURVE keys: ", zmq_strerror(zmq_errno()),
         ". Hint: it must be built with libsodium or tweetnacl");
  }
  public_key = of_public;
  secret_key = of_secret;
}

bool is_key(const std::string& text) {
  std::array<uint8_t, 32> bytes;
  return text.size() == kKeyCharacters && zmq_z85_decode(bytes.data(), text.c_str()) != nullptr;
}

}  // namespace

bool is_run_id(const std::string& text) {
  return text.size() == 32 && text.find_first_not_of("0123456789abcdef") == std::string::npos;
}

std::string derived_run_id(const std::string& run_id, const std::string& part) {
  return hash_bytes(as_bytes(run_id + '\n' + part));
}

ControlKeys ControlKeys::make() {
  ControlKeys keys;
  make_pair(keys.server_public, keys.server_secret);
  make_pair(keys.client_public, keys.client_secret);
  std::array<std::byte, 32> bytes;
  if (getrandom(bytes.data(), bytes.size(), 0) != static_cast<ssize_t>(bytes.size())) {
    fail(ErrorKind::kIo, "control keys", "the system gives no random bytes: ", std::strerror(errno));
  }
  keys.run_id = hash_bytes(bytes);
  return keys;
}

ControlKeys ControlKeys::for_client() const {
  ControlKeys keys = *this;
  keys.server_secret.clear();
  return keys;
}

void ControlKeys::write(const std::string& path) const {
  std::string text = concat(kFirstLine, "\nrun ", run_id, "\nserver-public ", server_public, "\n");
  if (!server_secret.empty()) text += "server-secret " + server_secret + "\n";
  text += concat("client-public ", client_public, "\nclient-secret ", client_secret, "\n");
  const int file = open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (file < 0) {
    fail(ErrorKind::kIo, "control keys", path, ": cannot be made: ", std::strerror(errno),
         errno == EEXIST ? ". Hint: keys are never overwritten; remove the file or name another" : "");
  }
  // The umask may have taken bits away, never added any.
  const ssize_t written = ::write(file, text.data(), text.size());
  const int error = written < 0 ? errno : ENOSPC;
  if (close(file) != 0 || written != static_cast<ssize_t>(text.size())) {
    unlink(path.c_str());
    fail(ErrorKind::kIo, "control keys", path, ": could not be written: ", std::strerror(error));
  }
}

ControlKeys ControlKeys::read(const std::string& path) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file < 0) fail(ErrorKind::kIo, "control keys", path, ": cannot be opened: ", std::strerror(errno));
  struct stat status{};
  std::string text(kMaxFile + 1, '\0');
  const bool known = fstat(file, &status) == 0;
  const ssize_t got = ::read(file, text.data(), text.size());
  const int error = errno;
  close(file);
  if (!known || got < 0) fail(ErrorKind::kIo, "control keys", path, ": cannot be read: ", std::strerror(error));
  if ((status.st_mode & 077) != 0 || (status.st_uid != geteuid() && status.st_uid != 0)) {
    fail(ErrorKind::kUsage, "control keys", path, ": whoever reads the keys can join the run, so that the file must be",
         " this user's and of mode 0600; it has owner ", status.st_uid, " and mode 0", std::oct,
         static_cast<unsigned>(status.st_mode & 07777), ". Hint: chmod 600 ", path);
  }
  text.resize(static_cast<size_t>(got));

  ControlKeys keys;
  std::istringstream lines(text);
  std::string line;
  bool good = std::getline(lines, line) && line == kFirstLine;
  while (good && std::getline(lines, line)) {
    const size_t space = std::min(line.find(' '), line.size());
    const std::string name = line.substr(0, space), value = space < line.size() ? line.substr(space + 1) : "";
    std::string* const field = name == "run"             ? &keys.run_id
                               : name == "server-public" ? &keys.server_public
                               : name == "server-secret" ? &keys.server_secret
                               : name == "client-public" ? &keys.client_public
                               : name == "client-secret" ? &keys.client_secret
                                                         : nullptr;
    good = field != nullptr && field->empty() && (name == "run" ? is_run_id(value) : is_key(value));
    if (good) *field = value;
  }
  good = good && !keys.run_id.empty() && !keys.server_public.empty() && !keys.client_public.empty() &&
         !keys.client_secret.empty();
  if (!good) {
    fail(ErrorKind::kData, "control keys", path, ": is not a file of keys, or is cut short",
         ". Hint: weft launch --make-keys FILE makes one");
  }
  return keys;
}

}  // namespace weft::dist
