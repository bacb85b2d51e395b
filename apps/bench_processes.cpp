#include "apps/bench_processes.h"

#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <exception>
#include <iostream>
#include <vector>

#include "core/error.h"
#include "core/thread_pool.h"
#include "dist/group_error.h"
#include "dist/processes.h"

namespace weft::apps {
namespace {

namespace fs = std::filesystem;
using Program = std::function<void(dist::Group& world, const fs::path& directory)>;

class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    std::string name = (fs::temp_directory_path() / "weft-bench-XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) fail(ErrorKind::kIo, "bench", name, ": no directory can be made");
    path_ = name;
  }
  ~TemporaryDirectory() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

/// The processes beside rank 0, which do not outlive it.
class Forked {
 public:
  Forked() = default;
  Forked(const Forked&) = delete;
  Forked& operator=(const Forked&) = delete;
  ~Forked() {
    for (const pid_t pid : pids_) kill(pid, SIGKILL);
    for (const pid_t pid : pids_) waitpid(pid, nullptr, 0);
  }
  void add(pid_t pid) { pids_.push_back(pid); }
  /// Waits for all; the number of those that failed.
  int wait() {
    int failed = 0;
    for (const pid_t pid : pids_) {
      int status = 0;
      while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {
      }
      if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) ++failed;
    }
    pids_.clear();
    return failed;
  }

 private:
  std::vector<pid_t> pids_;
};

void run_rank(int rank, int ranks, int threads, const fs::path& directory, const Program& program) {
  set_num_threads(threads);
  dist::FileStore store(directory / "store");
  dist::Group world = dist::gloo_group({.rank = rank, .size = ranks}, store);
  program(world, directory);
}

[[noreturn]] void be_rank(int rank, int ranks, int threads, pid_t parent, const fs::path& directory,
                          const Program& program) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) _exit(1);
  int code = 1;
  try {
    run_rank(rank, ranks, threads, directory, program);
    code = 0;
  } catch (const dist::GroupError&) {
    // Another rank says why.
  } catch (const std::exception& error) {
    std::cerr << concat("rank ", rank, ": ", error.what(), "\n") << std::flush;
  }
  _exit(code);
}

size_t threads_of_this_process() {
  size_t count = 0;
  for ([[maybe_unused]] const auto& entry : fs::directory_iterator("/proc/self/task")) ++count;
  return count;
}

}  // namespace

void run_processes(int ranks, const Program& program) {
  const int threads = num_threads(), share = std::max(1, threads / ranks);
  set_num_threads(1);
  if (const size_t running = threads_of_this_process(); running != 1)
    fail(ErrorKind::kState, "bench", "ranks are forked from a process with one thread; this one has ", running);
  const TemporaryDirectory directory;
  std::cout << std::flush;
  Forked others;
  const pid_t parent = getpid();
  for (int rank = 1; rank < ranks; ++rank) {
    const pid_t pid = fork();
    if (pid < 0) fail(ErrorKind::kIo, "bench", "rank ", rank, " cannot be started: ", std::strerror(errno));
    if (pid == 0) be_rank(rank, ranks, share, parent, directory.path(), program);
    others.add(pid);
  }
  run_rank(0, ranks, share, directory.path(), program);
  set_num_threads(threads);
  if (const int failed = others.wait(); failed > 0)
    fail(ErrorKind::kIo, "bench", failed, " of the ", ranks - 1, " other ranks failed");
}

}  // namespace weft::apps
