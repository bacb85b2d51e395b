#include "apps/launch_ranks.h"

#include <fcntl.h>
#include <poll.h>
#include <pty.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstring>

#include "core/error.h"

namespace weft::apps {
namespace {

constexpr std::array kForwarded = {SIGINT, SIGTERM, SIGHUP};
constexpr int kPrefixColumns = 4;  // "[0] " before rank 0's progress

int signal_pipe[2] = {-1, -1};
std::array<std::atomic<int>, kForwarded.size()> pending;
static_assert(std::atomic<int>::is_always_lock_free);

void on_signal(int signal) {
  const int saved = errno;
  for (size_t i = 0; i < kForwarded.size(); ++i) {
    if (kForwarded[i] == signal) ++pending[i];
  }
  [[maybe_unused]] const ssize_t written = write(signal_pipe[1], "", 1);
  errno = saved;
}

void handle(int signal, void (*handler)(int)) {
  struct sigaction action = {};
  action.sa_handler = handler;
  action.sa_flags = SA_RESTART;
  sigaction(signal, &action, nullptr);
}

struct Surroundings {
  rlimit open_files;
  int in, out, err, report;
};

/// The rank's side of a fork: nothing but async-signal-safe calls.
[[noreturn]] void become(const char* file, char* const* words, char* const* environment, pid_t launcher,
                         const Surroundings& with) {
  setpgid(0, 0);
  for (int signal = 1; signal < NSIG; ++signal) {
    if (signal != SIGKILL && signal != SIGSTOP) ::signal(signal, SIG_DFL);
  }
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  // Killed with the thread that forked; it may have ended before this call.
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != launcher) _exit(127);
  setrlimit(RLIMIT_NOFILE, &with.open_files);
  if (dup2(with.in, 0) == 0 && dup2(with.out, 1) == 1 && dup2(with.err, 2) == 2) {
    execve(file, words, environment);
  }
  const int error = errno;
  [[maybe_unused]] const ssize_t written = write(with.report, &error, sizeof error);
  _exit(127);
}

void close_both(int (&ends)[2]) {
  for (int& end : ends) {
    if (end >= 0) close(end);
    end = -1;
  }
}

/// A terminal as wide as ours less the prefix, that changes nothing of what is written to it.
bool open_terminal(int (&ends)[2]) {
  winsize size{};
  if (ioctl(STDERR_FILENO, TIOCGWINSZ, &size) != 0) return false;
  if (size.ws_col > kPrefixColumns) size.ws_col = static_cast<uint16_t>(size.ws_col - kPrefixColumns);
  if (openpty(&ends[0], &ends[1], nullptr, nullptr, &size) != 0) return false;
  termios mode{};
  tcgetattr(ends[1], &mode);
  cfmakeraw(&mode);
  tcsetattr(ends[1], TCSANOW, &mode);
  for (const int end : ends) fcntl(end, F_SETFD, FD_CLOEXEC);
  return true;
}

}  // namespace

std::string RankEnd::how() const {
  if (!signalled()) return concat("exit code ", code);
  const char* const name = sigabbrev_np(code - 128);
  return concat("killed by signal ", code - 128, name != nullptr ? concat(" (SIG", name, ")") : "");
}

LaunchSignals::LaunchSignals() {
  if (pipe2(signal_pipe, O_CLOEXEC | O_NONBLOCK) != 0)
    fail(ErrorKind::kIo, "launch", "no pipe: ", std::strerror(errno));
  for (auto& count : pending) count = 0;
  for (const int signal : kForwarded) {
    struct sigaction before = {};
    sigaction(signal, nullptr, &before);
    // nohup asks that SIGHUP does nothing.
    if (signal != SIGHUP || before.sa_handler != SIG_IGN) handle(signal, on_signal);
  }
  handle(SIGCHLD, on_signal);
  handle(SIGPIPE, SIG_IGN);
}

LaunchSignals::~LaunchSignals() {
  for (const int signal : kForwarded) handle(signal, SIG_DFL);
  handle(SIGCHLD, SIG_DFL);
  handle(SIGPIPE, SIG_DFL);
  close_both(signal_pipe);
}

int LaunchSignals::descriptor() const { return signal_pipe[0]; }

int LaunchSignals::take() {
  for (size_t i = 0; i < kForwarded.size(); ++i) {
    if (pending[i] > 0) {
      --pending[i];
      return kForwarded[i];
    }
  }
  return 0;
}

RankProcesses::RankProcesses(const RankCommand& command, int first_rank, const std::vector<Environment>& environments,
                             LaunchOutput& output, LaunchGuard& guard, bool terminal)
    : output_(output), guard_(guard) {
  ranks_.reserve(environments.size());
  try {
    for (const Environment& environment : environments) {
      Rank& rank = ranks_.emplace_back();
      rank.rank = first_rank + static_cast<int>(ranks_.size()) - 1;
      start(command, rank, environment, terminal && rank.rank == 0);
    }
  } catch (...) {
    send(SIGKILL);
    for (Rank& rank : ranks_) drain(rank);
    throw;
  }
}

RankProcesses::~RankProcesses() {
  send(SIGKILL);
  for (Rank& rank : ranks_) {
    if (rank.pid > 0) {
      guard_.forget(rank.pid);
      waitpid(rank.pid, nullptr, 0);
    }
    drain(rank);
  }
}

void RankProcesses::start(const RankCommand& command, Rank& rank, const Environment& environment, bool terminal) {
  std::vector<std::string> entries;
  for (const Variable& variable : environment) entries.push_back(variable.name + '=' + variable.value);
  std::vector<char*> words, variables;
  for (const std::string& word : command.words) words.push_back(const_cast<char*>(word.c_str()));
  for (const std::string& entry : entries) variables.push_back(const_cast<char*>(entry.c_str()));
  words.push_back(nullptr);
  variables.push_back(nullptr);

  int out[2] = {-1, -1}, err[2] = {-1, -1}, report[2] = {-1, -1};
  const int in = open("/dev/null", O_RDONLY | O_CLOEXEC);
  const bool piped = in >= 0 && pipe2(out, O_CLOEXEC) == 0 && pipe2(report, O_CLOEXEC) == 0 &&
                     ((terminal && open_terminal(err)) || pipe2(err, O_CLOEXEC) == 0);
  const pid_t launcher = getpid();
  rank.started = std::chrono::steady_clock::now();
  rank.pid = piped ? fork() : -1;
  if (rank.pid == 0)
    become(command.file.c_str(), words.data(), variables.data(), launcher,
           {command.open_files, in, out[1], err[1], report[1]});
  int error = rank.pid < 0 ? errno : 0;
  if (rank.pid > 0) {
    setpgid(rank.pid, rank.pid);  // whoever of the two comes first
    guard_.watch(rank.pid);
  }
  for (const int end : {in, out[1], err[1], report[1]}) {
    if (end >= 0) close(end);
  }
  rank.out = out[0];
  rank.err = err[0];
  for (const int end : {rank.out, rank.err}) {
    if (end >= 0) fcntl(end, F_SETFL, O_NONBLOCK);
  }
  // Ends without a byte when the program runs.
  if (rank.pid > 0 && read(report[0], &error, sizeof error) != sizeof error) error = 0;
  if (report[0] >= 0) close(report[0]);
  if (error == 0) return;
  if (rank.pid > 0) {
    guard_.forget(rank.pid);
    waitpid(rank.pid, nullptr, 0);
    rank.pid = -1;
  }
  fail(ErrorKind::kIo, "launch", "rank ", rank.rank, ": ", command.file, " cannot be started: ", std::strerror(error));
}

int RankProcesses::running() const {
  int count = 0;
  for (const Rank& rank : ranks_) count += rank.pid > 0 ? 1 : 0;
  return count;
}

void RankProcesses::send(int signal) {
  for (const Rank& rank : ranks_) {
    if (rank.pid > 0) kill(-rank.pid, signal);
  }
}

/// Passes on what is there. Returns whether there may be more now.
bool RankProcesses::read_some(int rank, LaunchOutput::Stream stream, int& descriptor) {
  if (descriptor < 0) return false;
  char bytes[64 << 10];
  const ssize_t got = read(descriptor, bytes, sizeof bytes);
  if (got > 0) {
    output_.add(rank, stream, {bytes, static_cast<size_t>(got)});
    return true;
  }
  if (got < 0 && errno == EINTR) return true;
  if (got < 0 && errno == EAGAIN) return false;
  // The end; a terminal whose other side is closed says EIO.
  close(descriptor);
  descriptor = -1;
  output_.end(rank, stream);
  return false;
}

/// Everything that a rank that has ended printed.
void RankProcesses::drain(Rank& rank) {
  using enum LaunchOutput::Stream;
  for (const auto& [stream, descriptor] : {std::pair(out, &rank.out), std::pair(err, &rank.err)}) {
    while (read_some(rank.rank, stream, *descriptor)) {
    }
    if (*descriptor < 0) continue;
    // A process that left the group still holds it: what it prints from now on belongs to nobody.
    close(*descriptor);
    *descriptor = -1;
    output_.end(rank.rank, stream);
  }
}

void RankProcesses::note_stop(Rank& rank) {
  siginfo_t info = {};
  if (rank.pid <= 0 || waitid(P_PID, static_cast<id_t>(rank.pid), &info, WSTOPPED | WCONTINUED | WNOHANG) != 0) return;
  if (info.si_pid != rank.pid) return;
  rank.stopped.reset();
  if (info.si_code == CLD_STOPPED) rank.stopped = std::chrono::steady_clock::now();
}

std::vector<int> RankProcesses::stopped_for(std::chrono::steady_clock::duration time) const {
  std::vector<int> found;
  for (const Rank& rank : ranks_) {
    if (rank.pid > 0 && rank.stopped && std::chrono::steady_clock::now() - *rank.stopped > time)
      found.push_back(rank.rank);
  }
  return found;
}

void RankProcesses::kill_rank(int which) {
  for (Rank& rank : ranks_) {
    if (rank.rank != which || rank.pid <= 0) continue;
    kill(-rank.pid, SIGKILL);
    rank.stopped.reset();
  }
}

std::vector<RankEnd> RankProcesses::wait(int milliseconds, const LaunchSignals& signals) {
  std::vector<pollfd> polled = {{signals.descriptor(), POLLIN, 0}};
  for (const Rank& rank : ranks_) {
    for (const int descriptor : {rank.out, rank.err}) {
      if (descriptor >= 0) polled.push_back({descriptor, POLLIN, 0});
    }
  }
  poll(polled.data(), polled.size(), milliseconds);
  char ignored[256];
  while (read(signals.descriptor(), ignored, sizeof ignored) > 0) {
  }
  for (Rank& rank : ranks_) {
    read_some(rank.rank, LaunchOutput::Stream::out, rank.out);
    read_some(rank.rank, LaunchOutput::Stream::err, rank.err);
  }
  std::vector<RankEnd> ended;
  for (Rank& rank : ranks_) {
    note_stop(rank);
    siginfo_t info = {};
    if (rank.pid <= 0 || waitid(P_PID, static_cast<id_t>(rank.pid), &info, WEXITED | WNOHANG | WNOWAIT) != 0) continue;
    if (info.si_pid != rank.pid) continue;
    // As long as it is not reaped, its group's number cannot belong to anybody else.
    kill(-rank.pid, SIGKILL);
    guard_.forget(rank.pid);
    waitpid(rank.pid, nullptr, 0);
    drain(rank);
    const std::chrono::duration<double> ran = std::chrono::steady_clock::now() - rank.started;
    ended.push_back(
        {rank.rank, rank.pid, info.si_code == CLD_EXITED ? info.si_status : 128 + info.si_status, ran.count()});
    rank.pid = -1;
  }
  return ended;
}

}  // namespace weft::apps
