// The CPU as a Backend: memory from the system and strided copies, fills and sums. The reference for every other one.
#include <sys/mman.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstring>
#include <fstream>
#include <mutex>
#include <ostream>
#include <sstream>
#include <utility>
#include <vector>

#include "core/backend.h"
#include "core/thread_pool.h"

namespace weft {
namespace {

/// Elements a piece of parallel work has at least: some microseconds, far above the cost of handing it out.
constexpr int64_t kGrain = 1 << 15;

/// Up to N arrays walked together, with neighbouring dimensions merged where every array allows it.
template <int N>
struct Walk {
  Shape shape;
  std::array<Strides, N> strides;

  Walk(const Shape& full, const std::array<const Strides*, N>& given) {
    for (int d = 0; d < full.rank(); ++d) {
      if (full[d] == 1) continue;
      const int last = shape.rank() - 1;
      bool merge = last >= 0;
      for (int a = 0; a < N && merge; ++a) merge = strides[a][last] == (*given[a])[d] * full[d];
      if (merge) {
        shape[last] *= full[d];
        for (int a = 0; a < N; ++a) strides[a][last] = (*given[a])[d];
      } else {
        shape.push_back(full[d]);
        for (int a = 0; a < N; ++a) strides[a].push_back((*given[a])[d]);
      }
    }
    if (shape.empty()) {
      shape.push_back(1);
      for (auto& each : strides) each.push_back(1);
    }
  }

  int64_t rows() const {
    int64_t n = 1;
    for (int d = 0; d + 1 < shape.rank(); ++d) n *= shape[d];
    return n;
  }
  int64_t columns() const { return shape.back(); }
  std::array<int64_t, N> offset(int64_t row) const {
    std::array<int64_t, N> at{};
    for (int d = shape.rank() - 2; d >= 0; --d) {
      const int64_t i = row % shape[d];
      row /= shape[d];
      for (int a = 0; a < N; ++a) at[a] += i * strides[a][d];
    }
    return at;
  }

  /// body(offsets, strides of the last dimension, count) over all elements in pieces, in parallel.
  template <class Body>
  void run(Body&& body) const {
    std::array<int64_t, N> step;
    for (int a = 0; a < N; ++a) step[a] = strides[a].back();
    const int64_t n = columns(), count = rows();
    if (count == 1) {
      return parallel_for(n, kGrain, [&](int64_t begin, int64_t end) {
        std::array<int64_t, N> at;
        for (int a = 0; a < N; ++a) at[a] = begin * step[a];
        body(at, step, end - begin);
      });
    }
    parallel_for(count, std::max<int64_t>(1, kGrain / n), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) body(offset(row), step, n);
    });
  }
};

template <class To, class From>
To convert(From x) {
  if constexpr (std::is_same_v<To, From>)
    return x;
  else if constexpr (std::is_same_v<To, bool>)
    return static_cast<double>(x) != 0;
  else if constexpr (std::is_same_v<From, bool>)
    return To(static_cast<int>(x));
  else if constexpr (std::is_integral_v<To> && std::is_integral_v<From>) {
    if (std::cmp_less(x, std::numeric_limits<To>::min())) return std::numeric_limits<To>::min();
    if (std::cmp_greater(x, std::numeric_limits<To>::max())) return std::numeric_limits<To>::max();
    return static_cast<To>(x);
  } else if constexpr (std::is_integral_v<To>) {
    // Casting a value that does not fit is undefined in C++; here it saturates, and NaN gives 0.
    const double value = static_cast<double>(x);
    if (value != value) return 0;
    if (value <= static_cast<double>(std::numeric_limits<To>::min())) return std::numeric_limits<To>::min();
    if (value >= static_cast<double>(std::numeric_limits<To>::max())) return std::numeric_limits<To>::max();
    return static_cast<To>(value);
  } else if constexpr (std::is_arithmetic_v<To> && std::is_class_v<From>)
    return static_cast<To>(static_cast<float>(x));
  else if constexpr (std::is_class_v<To> && std::is_class_v<From>)
    return To(static_cast<float>(x));
  else
    return To(x);
}

/// A value of /proc/meminfo in bytes, 0 if it is not there.
int64_t meminfo(const std::string& key) {
  std::ifstream in("/proc/meminfo");
  for (std::string entry; std::getline(in, entry);) {
    if (!entry.starts_with(key + ":")) continue;
    std::istringstream rest(entry.substr(key.size() + 1));
    int64_t kibibytes = 0;
    rest >> kibibytes;
    return kibibytes * 1024;
  }
  return 0;
}

class CpuBackend final : public Backend {
 public:
  void* system_allocate(size_t bytes) override {
    void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) return nullptr;
    madvise(data, bytes, MADV_HUGEPAGE);  // advice only: fewer page faults and TLB misses where the kernel grants it
    return data;
  }
  void system_free(void* data, size_t bytes) override { munmap(data, bytes); }

  void copy(const StridedView& dst, const StridedView& src) override {
    if (numel(dst.shape) == 0) return;
    const Walk<2> walk(dst.shape, {&dst.strides, &src.strides});
    dispatch_all(dst.dtype, [&]<class To>() {
      dispatch_all(src.dtype, [&]<class From>() {
        walk.run([&](const auto& at, const auto& step, int64_t n) {
          To* to = static_cast<To*>(dst.data) + at[0];
          const From* from = static_cast<const From*>(src.data) + at[1];
          if (step[0] == 1 && step[1] == 1) {
            if constexpr (std::is_same_v<To, From>) {
              std::memcpy(to, from, static_cast<size_t>(n) * sizeof(To));
            } else {
              for (int64_t i = 0; i < n; ++i) to[i] = convert<To>(from[i]);
            }
          } else {
            for (int64_t i = 0; i < n; ++i) to[i * step[0]] = convert<To>(from[i * step[1]]);
          }
        });
      });
    });
  }

  void fill(const StridedView& dst, double value) override {
    if (numel(dst.shape) == 0) return;
    const Walk<1> walk(dst.shape, {&dst.strides});
    dispatch_all(dst.dtype, [&]<class T>() {
      const T element = convert<T>(value);
      walk.run([&](const auto& at, const auto& step, int64_t n) {
        T* to = static_cast<T*>(dst.data) + at[0];
        for (int64_t i = 0; i < n; ++i) to[i * step[0]] = element;
      });
    });
  }

  void add(const StridedView& dst, const StridedView& src) override {
    if (numel(dst.shape) == 0) return;
    const Walk<2> walk(dst.shape, {&dst.strides, &src.strides});
    dispatch_float(dst.dtype, "accumulate", [&]<class T>() {
      walk.run([&](const auto& at, const auto& step, int64_t n) {
        using A = Accumulate<T>;
        T* to = static_cast<T*>(dst.data) + at[0];
        const T* from = static_cast<const T*>(src.data) + at[1];
        if (step[0] == 1 && step[1] == 1) {
          for (int64_t i = 0; i < n; ++i) to[i] = T(static_cast<A>(to[i]) + static_cast<A>(from[i]));
        } else {
          for (int64_t i = 0; i < n; ++i)
            to[i * step[0]] = T(static_cast<A>(to[i * step[0]]) + static_cast<A>(from[i * step[1]]));
        }
      });
    });
  }

  void sum_broadcast(const StridedView& dst, const StridedView& src) override {
    // Kept dimensions are walked in parallel, summed ones inside: every output element belongs to one piece.
    Shape kept, summed;
    Strides kept_dst, kept_src, summed_src;
    for (int d = 0; d < dst.shape.rank(); ++d) {
      const bool sum = dst.strides[d] == 0 && dst.shape[d] != 1;
      (sum ? summed : kept).push_back(dst.shape[d]);
      (sum ? summed_src : kept_src).push_back(src.strides[d]);
      if (!sum) kept_dst.push_back(dst.strides[d]);
    }
    const int64_t outputs = numel(kept), terms = numel(summed);
    if (outputs == 0) return;
    const Walk<2> out(kept, {&kept_dst, &kept_src});
    const Walk<1> in(summed, {&summed_src});
    dispatch_float(dst.dtype, "sum_broadcast", [&]<class T>() {
      const int64_t n = out.columns();
      const auto piece = [&](int64_t row, int64_t begin, int64_t end) {
        const auto base = out.offset(row);
        const int64_t to_step = out.strides[0].back(), from_step = out.strides[1].back();
        // A strip of outputs at a time, so that the walk over the terms reads neighbouring elements together.
        constexpr int64_t kStrip = 64;
        double sums[kStrip];
        for (int64_t first = begin; first < end; first += kStrip) {
          const int64_t width = std::min(kStrip, end - first);
          std::fill_n(sums, width, 0.0);
          for (int64_t r = 0; r < (terms == 0 ? 0 : in.rows()); ++r) {
            const int64_t offset = in.offset(r)[0], step = in.strides[0].back();
            for (int64_t c = 0; c < in.columns(); ++c) {
              const T* from = static_cast<const T*>(src.data) + base[1] + offset + c * step;
              for (int64_t i = 0; i < width; ++i) sums[i] += static_cast<double>(from[(first + i) * from_step]);
            }
          }
          T* to = static_cast<T*>(dst.data) + base[0];
          for (int64_t i = 0; i < width; ++i) to[(first + i) * to_step] = T(sums[i]);
        }
      };
      const int64_t rows = out.rows(), grain = std::max<int64_t>(64, kGrain / std::max<int64_t>(terms, 1));
      const int64_t strips = (n + grain - 1) / grain;
      parallel_tasks(rows * strips, [&](int64_t task) {
        const int64_t begin = task % strips * grain;
        piece(task / strips, begin, std::min(n, begin + grain));
      });
    });
  }

  void to_device(void* dst, const void* src, size_t bytes) override { std::memcpy(dst, src, bytes); }
  void to_host(void* dst, const void* src, size_t bytes) override { std::memcpy(dst, src, bytes); }
  void synchronize() override {}

  MemorySize memory() override {
    const int64_t machine = meminfo("MemTotal"), available = meminfo("MemAvailable");
    for (const char* file : {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"}) {
      int64_t limit = 0;
      if (std::ifstream in(file); in >> limit && limit > 0)
        return {available, machine > 0 ? std::min(machine, limit) : limit};
    }
    return {available, machine};
  }
  void* host_allocate(size_t bytes) override { return system_allocate(bytes); }
  void host_free(void* data, size_t bytes) override { system_free(data, bytes); }
  std::shared_ptr<Event> copy_async(void* dst, const void* src, size_t bytes, Direction, const Event*) override {
    std::memcpy(dst, src, bytes);
    return std::make_shared<Event>();
  }
  void wait(const Event&) override {}

  std::string name() const override {
    std::ifstream in("/proc/cpuinfo");
    for (std::string line; std::getline(in, line);) {
      if (line.starts_with("model name")) return line.substr(std::min(line.find(':') + 2, line.size()));
    }
    return "unknown processor";
  }
};

}  // namespace

std::unique_ptr<Graph> Backend::capture(const std::function<void()>&) {
  fail(ErrorKind::kDevice, "capture", name(), " records no work: its kernels run when they are called");
}

double Backend::seconds_of(const std::function<void()>& work) {
  synchronize();
  const auto begin = std::chrono::steady_clock::now();
  work();
  synchronize();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

Backend& backend(Device device) {
  static CpuBackend& cpu = *new CpuBackend;  // never destroyed, like the allocators that call it
  if (device.kind == DeviceKind::cpu) {
    if (device.index != 0) fail(ErrorKind::kDevice, "device", "there is one CPU device, cpu; got index ", device.index);
    return cpu;
  }
  static std::mutex& mutex = *new std::mutex;
  static auto& devices = *new std::vector<std::unique_ptr<Backend>>;
  const std::lock_guard lock(mutex);
  if (device.index < 0) fail(ErrorKind::kDevice, "device", "an index must not be negative, got ", device);
  const auto index = static_cast<size_t>(device.index);
  if (index >= devices.size() || devices[index] == nullptr) {
    if (*why_no_cuda() != '\0') fail(ErrorKind::kDevice, "device", device, " is not available: ", why_no_cuda());
    std::unique_ptr<Backend> made = make_cuda_backend(device.index);
    if (made == nullptr) fail(ErrorKind::kDevice, "device", "this machine has no ", device);
    devices.resize(std::max(devices.size(), index + 1));
    devices[index] = std::move(made);
  }
  return *devices[index];
}

Device Device::best() { return *why_no_cuda() == '\0' ? cuda() : cpu(); }

Device Device::parse(std::string_view text) {
  if (text == "auto") return best();
  if (text == "cpu") return cpu();
  if (text == "cuda") return cuda();
  int index = 0;
  const char* end = text.data() + text.size();
  if (text.starts_with("cuda:")) {
    const auto [stop, error] = std::from_chars(text.data() + 5, end, index);
    if (error == std::errc() && stop == end && index >= 0) return cuda(index);
  }
  fail(ErrorKind::kValue, "device", "must be auto, cpu, cuda or cuda:N, got ", quoted(text));
}

std::string to_string(Device device) {
  return device.kind == DeviceKind::cpu ? "cpu" : "cuda:" + std::to_string(device.index);
}

std::ostream& operator<<(std::ostream& out, Device device) { return out << to_string(device); }

}  // namespace weft
