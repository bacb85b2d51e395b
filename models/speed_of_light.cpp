#include "models/speed_of_light.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "core/file.h"
#include "core/thread_pool.h"
#include "ops/gemm.h"

namespace weft::models {
namespace {

template <class F>
double seconds_of(F&& f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

std::filesystem::path cache_file() {
  if (const char* directory = std::getenv("WEFT_CACHE_DIR"); directory != nullptr && *directory != '\0') {
    return std::filesystem::path(directory) / "machine-speed.json";
  }
  const char* home = std::getenv("HOME");
  return std::filesystem::path(home != nullptr && *home != '\0' ? home : "/tmp") / ".cache" / "weft" / "machine-speed.json";
}

nlohmann::json read_cache(const std::filesystem::path& path) {
  std::ifstream in(path);
  nlohmann::json all = nlohmann::json::parse(in, nullptr, false);
  return all.is_object() ? all : nlohmann::json::object();
}

}  // namespace

std::string processor_name() {
  std::ifstream in("/proc/cpuinfo");
  for (std::string line; std::getline(in, line);) {
    if (line.starts_with("model name")) return line.substr(std::min(line.find(':') + 2, line.size()));
  }
  return "unknown processor";
}

namespace {

/// FLOP/s of the best of `tries` products.
double gemm_rate(int tries) {
  constexpr int64_t n = 1024;
  const MemoryScope scope(MemoryCategory::workspace);
  Tensor a = Tensor::empty({n, n}), b = Tensor::empty({n, n}), c = Tensor::empty({n, n});
  fill_uniform(a, RandomStream(0, "speed a"), -1, 1);
  fill_uniform(b, RandomStream(0, "speed b"), -1, 1);
  double best = 1e9;
  for (int i = 0; i < tries; ++i) {
    best = std::min(best, seconds_of([&] { gemm(make_gemm(false, true, n, n, n, a.data<float>(), n, b.data<float>(), n, c.data<float>(), n)); }));
  }
  return 2.0 * n * n * n / best;
}

/// Bytes read plus written per second by the best of `tries` copies.
double copy_rate(int tries) {
  constexpr int64_t kBytes = int64_t{96} << 20, kPiece = int64_t{1} << 20;
  // Not from the allocator, which would keep it: a training run must not be charged for this.
  const std::vector<char> from(kBytes, 1);
  std::vector<char> to(kBytes, 0);
  double best = 1e9;
  for (int i = 0; i < tries; ++i) {
    best = std::min(best, seconds_of([&] {
             parallel_for(kBytes, kPiece, [&](int64_t begin, int64_t end) {
               std::memcpy(to.data() + begin, from.data() + begin, static_cast<size_t>(end - begin));
             });
           }));
  }
  return 2.0 * kBytes / best;
}

std::string machine_key() { return concat(processor_name(), ", ", num_threads(), " threads, ", gemm_isa()); }

/// What is stored for this machine; zeros where nothing is.
MachineSpeed stored_speed(const nlohmann::json& all) {
  MachineSpeed speed{0, 0, num_threads(), processor_name()};
  if (const auto found = all.find(machine_key()); found != all.end() && found->is_object()) {
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
  all[machine_key()] = {{"gemm_flops", seen.gemm_flops}, {"copy_bytes", seen.copy_bytes}};
  try {
    const std::filesystem::path path = cache_file();
    std::filesystem::create_directories(path.parent_path());
    write_file_atomic(path.string(), as_bytes(all.dump(2) + "\n"));
  } catch (const std::exception&) {
    // A cache only: the figures were measured, the next run measures again.
  }
  return seen;
}

}  // namespace

MachineSpeed measure_machine() {
  const nlohmann::json all = read_cache(cache_file());
  return keep_best(stored_speed(all), {gemm_rate(24), copy_rate(8), num_threads(), processor_name()}, all);
}

MachineSpeed machine_speed() {
  const nlohmann::json all = read_cache(cache_file());
  const MachineSpeed stored = stored_speed(all);
  if (stored.gemm_flops <= 0 || stored.copy_bytes <= 0) return measure_machine();
  return keep_best(stored, {gemm_rate(4), 0, num_threads(), processor_name()}, all);
}

StepBound step_bound(const GptConfig& config, int64_t tokens, const MachineSpeed& machine, DType dtype) {
  const double l = static_cast<double>(config.layers), c = static_cast<double>(config.width), v = static_cast<double>(config.vocab);
  const double t = static_cast<double>(config.context), n = static_cast<double>(tokens);
  StepBound bound;
  bound.products = n * 6 * (12 * l * c * c + v * c) / machine.gemm_flops;
  bound.attention = n * 7 * l * c * t / machine.gemm_flops;
  bound.passes = n * (18 * c * l + 2 * v) * static_cast<double>(size_of(dtype)) / machine.copy_bytes;
  bound.optimizer = 32.0 * static_cast<double>(config.parameter_count()) / machine.copy_bytes;
  return bound;
}

}  // namespace weft::models
