#include "models/checkpoint/background.h"

#include <pthread.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <ctime>
#include <fstream>
#include <optional>
#include <sstream>
#include <string>
#include <system_error>
#include <utility>

#include "core/error.h"

namespace weft::checkpoint {
namespace {

/// How often the thread of normal priority looks whether the other gets on.
constexpr double kLook = 0.01;
/// How often the other looks whether a processor has nothing to do.
constexpr double kIdleLook = 0.1;

double since(std::chrono::steady_clock::time_point then) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - then).count();
}

/// Seconds that the processors of this process have been idle since the system started.
std::optional<double> idle_seconds() {
  cpu_set_t may_use;
  if (::sched_getaffinity(0, sizeof may_use, &may_use) != 0) return std::nullopt;
  std::ifstream stat("/proc/stat");
  std::optional<double> ticks;
  for (std::string line; std::getline(stat, line) && line.starts_with("cpu");) {
    std::istringstream in(line.substr(3));
    size_t processor = 0;
    double user = 0, nice = 0, system = 0, idle = 0;
    if (line[3] == ' ' || !(in >> processor >> user >> nice >> system >> idle)) continue;
    if (processor < CPU_SETSIZE && CPU_ISSET(processor, &may_use)) ticks = ticks.value_or(0) + idle;
  }
  const auto per_second = static_cast<double>(::sysconf(_SC_CLK_TCK));
  return ticks ? std::optional(*ticks / per_second) : std::nullopt;
}

/// Seconds that this thread has had a processor.
double processor_seconds() {
  timespec time{};
  ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
}

}  // namespace

GivenWay give_way() {
  GivenWay given;
  const auto self = static_cast<id_t>(::syscall(SYS_gettid));
  const sched_param none{};
  if (::sched_setscheduler(0, SCHED_IDLE, &none) == 0) {
    given = {true, "idle class of the scheduler"};
  } else if (::setpriority(PRIO_PROCESS, self, 19) == 0) {  // of a thread, on Linux
    given = {true, "nice 19"};
  } else {
    given.text = "no lower priority, which the system refuses";
  }
  constexpr int kWhoProcess = 1, kClassIdle = 3, kClassShift = 13;  // linux/ioprio.h, which not every system has
  const bool disk = ::syscall(SYS_ioprio_set, kWhoProcess, 0, kClassIdle << kClassShift) == 0;
  given.text += disk ? ", idle class of the disk" : ", normal priority of the disk";
  return given;
}

double IdleProcessors::operator()() {
  const std::optional<double> now = idle_seconds(), before = std::exchange(idle_seconds_, now);
  const double elapsed = since(std::exchange(when_, std::chrono::steady_clock::now()));
  return now && before && elapsed > 0 ? (*now - *before) / elapsed : 0;
}

BackgroundWork::BackgroundWork(std::function<bool(bool beside)> piece, double share, std::function<double()> idle)
    : piece_(std::move(piece)), share_(share), idle_processors_(std::move(idle)) {
  try {
    idle_ = std::thread([this] { work_when_idle(); });
    at_a_share_ = std::thread([this] { work_at_a_share(); });
  } catch (const std::system_error& error) {
    tell_to_stop();
    join();
    fail(ErrorKind::kMemory, "save_checkpoint",
         "the system gives no thread to write in the background: ", error.what());
  }
}

BackgroundWork::~BackgroundWork() {
  tell_to_stop();
  join();
}

void BackgroundWork::tell_to_stop() {
  {
    const std::lock_guard lock(stop_mutex_);
    stop_ = true;
  }
  stopping_.notify_all();
  hurry_idle();
}

void BackgroundWork::join() {
  // In this order: the first may still look at the second.
  for (std::thread* thread : {&at_a_share_, &idle_}) {
    if (thread->joinable()) thread->join();
  }
}

void BackgroundWork::finish() {
  tell_to_stop();
  {
    const std::lock_guard lock(piece_mutex_);
    while (!done_) next(false);
  }
  join();
}

/// Does a piece, with piece_mutex_ held; false: that was all.
bool BackgroundWork::next(bool beside) {
  if (!done_ && !piece_(beside)) done_ = true;
  ++pieces_;
  return !done_;
}

/// Ends the part of the thread that has given way, whose last piece goes on at normal priority if the system allows;
/// else others of this process that wait for it leave it their processor.
void BackgroundWork::hurry_idle() {
  idle_may_work_ = false;
  const sched_param none{};
  if (idle_.joinable()) ::pthread_setschedparam(idle_.native_handle(), SCHED_OTHER, &none);
}

void BackgroundWork::work_when_idle() {
  if (!give_way().processor) return;
  bool processor_idle = idle_processors_() >= kIdle;
  while (idle_may_work_ && !done_) {
    const auto looked = std::chrono::steady_clock::now();
    const double used = processor_seconds();
    if (!processor_idle) {
      if (!sleep(kIdleLook)) return;
    } else {
      while (since(looked) < kIdleLook) {
        const std::lock_guard lock(piece_mutex_);
        if (!idle_may_work_ || !next(true)) return;
      }
    }
    processor_idle = idle_processors_() + (processor_seconds() - used) / since(looked) >= kIdle;
  }
}

void BackgroundWork::work_at_a_share() {
  double stalled = 0, pause = kLook;
  for (uint64_t seen = 0; sleep(pause) && !done_;) {
    const bool alone = !idle_may_work_;
    std::unique_lock lock(piece_mutex_, std::defer_lock);
    if (alone) {
      lock.lock();
    } else if (const uint64_t pieces = pieces_; pieces != seen || !lock.try_lock()) {
      // The other thread gets on, or is in the middle of a piece.
      if (pieces == seen && (stalled += pause) >= kPatience) hurry_idle();
      seen = pieces;
      pause = kLook;
      continue;
    }
    const auto began = std::chrono::steady_clock::now();
    const double before = processor_seconds();
    if (!next(true)) return;
    seen = pieces_;
    const double used = processor_seconds() - before;
    pause = std::max(0.0, used / share_ - since(began));
  }
}

/// False: stop.
bool BackgroundWork::sleep(double seconds) {
  std::unique_lock lock(stop_mutex_);
  return !stopping_.wait_for(lock, std::chrono::duration<double>(seconds), [&] { return stop_; });
}

}  // namespace weft::checkpoint
