#include "core/thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/error.h"

namespace weft {
namespace {

/// CPU quota of the control group in processors, or 0 if there is no limit.
double cgroup_processors() {
  std::string quota;
  double period = 0;
  if (std::ifstream v2("/sys/fs/cgroup/cpu.max"); v2 >> quota >> period) {
    return quota == "max" || period <= 0 ? 0 : std::atof(quota.c_str()) / period;
  }
  double microseconds = 0;
  std::ifstream v1_quota("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), v1_period("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
  if (v1_quota >> microseconds && v1_period >> period && microseconds > 0 && period > 0) return microseconds / period;
  return 0;
}

int initial_threads() {
  const char* text = std::getenv("WEFT_NUM_THREADS");
  if (text == nullptr || *text == '\0') return available_processors();
  char* end = nullptr;
  const long n = std::strtol(text, &end, 10);
  if (*end != '\0' || n < 1 || n > 1024) {
    fail(ErrorKind::kUsage, "WEFT_NUM_THREADS", "must be a whole number from 1 to 1024, got ", quoted(text));
  }
  return static_cast<int>(n);
}

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

/// Iterations a thread spins before it sleeps. A step's kernels follow each other within microseconds, so that a short
/// spin meets the next one; more threads than processors must not spin at all.
constexpr int kSpins = 4000;

class Pool {
 public:
  explicit Pool(int threads) : spins_(threads <= available_processors() ? kSpins : 0) {
    try {
      for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
    } catch (const std::system_error& error) {
      const size_t started = workers_.size() + 1;
      stop();
      fail(ErrorKind::kMemory, "threads", "the system gave ", started, " of ", threads, " threads: ", error.what(),
           ". Hint: set WEFT_NUM_THREADS to fewer");
    }
  }
  ~Pool() { stop(); }

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  void run(int64_t count, FunctionRef<void(int64_t)> task) {
    task_ = &task;
    count_ = count;
    error_ = nullptr;
    next_.store(0, std::memory_order_relaxed);
    busy_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
    claim();
    for (int spin = 0;; ++spin) {
      const int busy = busy_.load(std::memory_order_acquire);
      if (busy == 0) break;
      spin < spins_ ? pause() : busy_.wait(busy, std::memory_order_acquire);
    }
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

  std::mutex& owner() { return owner_; }

 private:
  void stop() {
    stop_ = true;
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  void claim() {
    inside = true;
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) {
      try {
        (*task_)(i);
      } catch (...) {
        const std::lock_guard lock(error_mutex_);
        if (!error_) error_ = std::current_exception();
        next_.store(count_, std::memory_order_relaxed);
      }
    }
    inside = false;
  }

  void work() {
    uint32_t seen = 0;
    for (;;) {
      for (int spin = 0; epoch_.load(std::memory_order_acquire) == seen; ++spin) {
        spin < spins_ ? pause() : epoch_.wait(seen, std::memory_order_acquire);
      }
      ++seen;
      if (stop_) return;
      claim();
      if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) busy_.notify_one();
    }
  }

 public:
  static thread_local bool inside;  ///< this thread is running a task

 private:
  const int spins_;
  std::vector<std::thread> workers_;
  std::mutex owner_;
  FunctionRef<void(int64_t)>* task_ = nullptr;
  int64_t count_ = 0;
  std::exception_ptr error_;
  std::mutex error_mutex_;
  std::atomic<bool> stop_ = false;
  alignas(64) std::atomic<int64_t> next_ = 0;
  alignas(64) std::atomic<uint32_t> epoch_ = 0;
  alignas(64) std::atomic<int> busy_ = 0;
};

thread_local bool Pool::inside = false;

std::unique_ptr<Pool>& pool() {
  static std::unique_ptr<Pool> instance = std::make_unique<Pool>(initial_threads());
  return instance;
}

}  // namespace

int available_processors() {
  static const int processors = [] {
    cpu_set_t set;
    // More than 1,024 processors do not fit the set, and the call fails.
    int n = static_cast<int>(std::thread::hardware_concurrency());
    if (sched_getaffinity(0, sizeof set, &set) == 0) n = CPU_COUNT(&set);
    if (const double limit = cgroup_processors(); limit > 0) n = std::min(n, static_cast<int>(std::ceil(limit)));
    return std::max(n, 1);
  }();
  return processors;
}

int num_threads() { return pool()->threads(); }

void set_num_threads(int n) {
  if (n < 1 || n > 1024) fail(ErrorKind::kValue, "set_num_threads", "n must be from 1 to 1024, got ", n);
  if (n != num_threads()) pool() = std::make_unique<Pool>(n);
}

void parallel_tasks(int64_t count, FunctionRef<void(int64_t)> task) {
  if (count <= 0) return;
  Pool& threads = *pool();
  std::unique_lock lock(threads.owner(), std::defer_lock);
  if (count == 1 || Pool::inside || threads.threads() == 1 || !lock.try_lock()) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  threads.run(count, task);
}

}  // namespace weft
