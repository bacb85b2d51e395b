#include "apps/launch_guard.h"

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstring>

#include "core/error.h"

namespace weft::apps {
namespace {

constexpr int kMaxGroups = 4096;
constexpr pid_t kGoodbye = 0;  // beside pids and negated pids

/// The guard itself, after a fork in a process with threads: nothing but async-signal-safe calls.
[[noreturn]] void guard(int pipe, const char* file, const char* directory) {
  setsid();
  for (const int signal : {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGPIPE}) ::signal(signal, SIG_IGN);
  // Whoever reads the launcher's output must see its end.
  const int null = open("/dev/null", O_RDWR);
  for (const int descriptor : {0, 1, 2}) dup2(null, descriptor);
  if (pipe != 3) dup2(pipe, 3);
  close_range(4, ~0U, 0);
  static pid_t groups[kMaxGroups];
  int count = 0;
  for (;;) {
    pid_t message = 0;
    const ssize_t got = read(3, &message, sizeof message);
    if (got < 0 && errno == EINTR) continue;
    if (got != sizeof message) break;
    if (message == kGoodbye) _exit(0);
    if (message > 0 && count < kMaxGroups) groups[count++] = message;
    if (message < 0) {
      for (int i = 0; i < count; ++i) {
        if (groups[i] == -message) groups[i] = groups[--count];
      }
    }
  }
  for (int i = 0; i < count; ++i) kill(-groups[i], SIGKILL);
  if (*file != '\0') unlink(file);
  if (*directory != '\0') rmdir(directory);
  _exit(0);
}

}  // namespace

LaunchGuard::LaunchGuard(const std::string& remove_file, const std::string& remove_directory) {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) fail(ErrorKind::kIo, "launch", "no pipe: ", std::strerror(errno));
  process_ = fork();
  if (process_ < 0) fail(ErrorKind::kIo, "launch", "no process for the guard: ", std::strerror(errno));
  if (process_ == 0) {
    close(ends[1]);
    guard(ends[0], remove_file.c_str(), remove_directory.c_str());
  }
  close(ends[0]);
  pipe_ = ends[1];
}

LaunchGuard::~LaunchGuard() {
  watch(kGoodbye);
  close(pipe_);
  waitpid(process_, nullptr, 0);
}

void LaunchGuard::watch(pid_t group) { [[maybe_unused]] const ssize_t written = write(pipe_, &group, sizeof group); }

void LaunchGuard::forget(pid_t group) { watch(-group); }

}  // namespace weft::apps
