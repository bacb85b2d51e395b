#include "models/speed_of_light.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "core/autograd.h"
#include "core/backend.h"
#include "core/file.h"
#include "core/random.h"
#include "core/thread_pool.h"
#include "ops/gemm.h"
#include "ops/gemm_types.h"
#include "ops/launch.h"

namespace weft::models {
namespace {

std::filesystem::path cache_file() {
  if (const char* directory = std::getenv("WEFT_CACHE_DIR"); directory != nullptr && *directory != '\0') {
    return std::filesystem::path(directory) / "machine-speed.json";
  }
  const char* home = std::getenv("HOME");
  return std::filesystem::path(home != nullptr && *home != '\0' ? home : "/tmp") / ".cache" / "weft" /
         "machine-speed.json";
}

nlohmann::json read_cache(const std::filesystem::path& path) {
  std::ifstream in(path);
  nlohmann::json all = nlohmann::json::parse(in, nullptr, false);
  return all.is_object() ? all : nlohmann::json::object();
}

/// Seconds of the best of `tries` calls of work() on the device.
template <class Work>
double best_seconds(Device device, int tries, Work&& work) {
  double best = 1e9;
  for (int i = 0; i < tries; ++i) best = std::min(best, backend(device).seconds_of(work));
  return best;
}

/// FLOP/s of the best of `tries` products of random numbers: a GPU's clock depends on the numbers.
double gemm_rate(Device device, DType dtype, int tries, int64_t n) {
  const MemoryScope scope(MemoryCategory::workspace);
  const autograd::NoGrad no_grad;
  if (gemm_widens(dtype, device.kind)) dtype = DType::f32;
  Tensor a = Tensor::empty({n, n}, dtype, device), b = Tensor::empty({n, n}, dtype, device),
         c = Tensor::empty({n, n}, dtype, device);
  fill_uniform(a, RandomStream(0, "speed a"), -1, 1);
  fill_uniform(b, RandomStream(0, "speed b"), -1, 1);
  const double seconds = best_seconds(device, tries, [&] {
    launch(device, "speed", [&](auto on) {
      dispatch_gemm(on, dtype, [&]<class Element>() {
        using T = GemmType<Element>;
        gemm(on, make_gemm(false, true, n, n, n, static_cast<const T*>(a.raw()), n, static_cast<const T*>(b.raw()), n,
                           static_cast<T*>(c.raw()), n));
      });
    });
  });
  return 2.0 * static_cast<double>(n * n * n) / seconds;
}

/// Bytes read plus written per second by the best of `tries` copies far beyond the caches.
double copy_rate(Device device, int tries, int64_t bytes) {
  if (device.kind != DeviceKind::cpu) {
    const MemoryScope scope(MemoryCategory::workspace);
    const Tensor from = Tensor::zeros({bytes}, DType::u8, device);
    Tensor to = Tensor::empty({bytes}, DType::u8, device);
    return 2.0 * static_cast<double>(bytes) / best_seconds(device, tries, [&] { to.copy_(from); });
  }
  constexpr int64_t kPiece = int64_t{1} << 20;
  // Not from the allocator, which would keep it: a training run must not be charged for this.
  const std::vector<char> from(static_cast<size_t>(bytes), 1);
  std::vector<char> to(static_cast<size_t>(bytes), 0);
  return 2.0 * static_cast<double>(bytes) / best_seconds(device, tries, [&] {
           parallel_for(bytes, kPiece, [&](int64_t begin, int64_t end) {
             std::memcpy(to.data() + begin, from.data() + begin, static_cast<size_t>(end - begin));
           });
         });
}

/// Far beyond the caches.
int64_t copy_size(Device device) { return int64_t{device.kind == DeviceKind::cpu ? 96 : 1024} << 20; }

MachineSpeed unmeasured(Device device, DType dtype) {
  return {0, 0, num_threads(), backend(device).name(), device, dtype};
}

std::string machine_key(const MachineSpeed& speed) {
  return speed.device.kind == DeviceKind::cpu
             ? concat(speed.name, ", ", speed.threads, " threads, ", gemm_isa(), ", ", speed.dtype)
             : concat(speed.name, ", ", speed.dtype);
}

/// What is stored for this machine; zeros where nothing is.
MachineSpeed stored_speed(const nlohmann::json& all, MachineSpeed speed) {
  if (const auto found = all.find(machine_key(speed)); found != all.end() && found->is_object()) {
    speed.gemm_flops = found->value("gemm_flops", 0.0);
    speed.copy_bytes = found->value("copy_bytes", 0.0);
  }
  return speed;
}

/// The better of `stored` and `seen`, written to the cache when it is news. A busy machine is measured too slow, never
/// too fast, so the best ever seen is nearest to the truth.
MachineSpeed keep_best(const MachineSpeed& stored, MachineSpeed seen, nlohmann::json all) {
  seen.gemm_flops = std::max(seen.gemm_flops, stored.gemm_flops);
  seen.copy_bytes = std::max(seen.copy_bytes, stored.copy_bytes);
  if (seen.gemm_flops == stored.gemm_flops && seen.copy_bytes == stored.copy_bytes) return seen;
  all[machine_key(seen)] = {{"gemm_flops", seen.gemm_flops}, {"copy_bytes", seen.copy_bytes}};
  try {
    const std::filesystem::path path = cache_file();
    std::filesystem::create_directories(path.parent_path());
    write_file_atomic(path.string(), as_bytes(all.dump(2) + "\n"));
  } catch (const std::exception&) {
    // A cache only: the figures were measured, the next run measures again.
  }
  return seen;
}

MachineSpeed measured(const MachineSpeed& stored, int products, int copies, const nlohmann::json& all) {
  MachineSpeed seen = stored;
  seen.gemm_flops = gemm_rate(stored.device, stored.dtype, products, peak_size(stored.device));
  if (copies > 0) seen.copy_bytes = copy_rate(stored.device, copies, copy_size(stored.device));
  // What a GPU is measured with is far more than a small run needs.
  if (stored.device.kind != DeviceKind::cpu) allocator(stored.device).release_cached();
  return keep_best(stored, seen, all);
}

}  // namespace

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr int64_t kCpuPeakSize = 128;  // instrumented code takes long, and what it measures is the speed of nothing
#else
constexpr int64_t kCpuPeakSize = 1024;
#endif
int64_t peak_size(Device device) { return device.kind == DeviceKind::cpu ? kCpuPeakSize : 8192; }

MachineSpeed speed_now(Device device, DType dtype, bool tiny) {
  constexpr int kProducts = 24, kCopies = 64;  // half a second each on a CPU: neighbours come and go
  MachineSpeed seen = unmeasured(device, dtype);
  seen.gemm_flops = gemm_rate(device, dtype, kProducts, tiny ? 32 : peak_size(device));
  seen.copy_bytes = copy_rate(device, kCopies, tiny ? 1 << 16 : copy_size(device));
  if (device.kind != DeviceKind::cpu) allocator(device).release_cached();
  return seen;
}

MachineSpeed measure_machine(Device device, DType dtype) {
  const nlohmann::json all = read_cache(cache_file());
  return measured(stored_speed(all, unmeasured(device, dtype)), 24, 8, all);
}

MachineSpeed machine_speed(Device device, DType dtype) {
  const nlohmann::json all = read_cache(cache_file());
  const MachineSpeed stored = stored_speed(all, unmeasured(device, dtype));
  if (stored.gemm_flops <= 0 || stored.copy_bytes <= 0) return measured(stored, 24, 8, all);
  // Nobody shares a GPU as programs share a processor, and a look at it would cost seconds of every start.
  return stored.device.kind == DeviceKind::cpu ? measured(stored, 4, 0, all) : stored;
}

StepBound step_bound(const GptConfig& config, int64_t tokens, const MachineSpeed& machine) {
  const double l = static_cast<double>(config.layers), c = static_cast<double>(config.width),
               v = static_cast<double>(config.vocab);
  const double t = static_cast<double>(config.context), n = static_cast<double>(tokens);
  StepBound bound;
  bound.products = n * 6 * (12 * l * c * c + v * c) / machine.gemm_flops;
  bound.attention = n * 7 * l * c * t / machine.gemm_flops;
  bound.passes = n * (18 * c * l + 2 * v) * static_cast<double>(size_of(machine.dtype)) / machine.copy_bytes;
  bound.optimizer = 32.0 * static_cast<double>(config.parameter_count()) / machine.copy_bytes;
  return bound;
}

}  // namespace weft::models
