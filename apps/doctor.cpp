// weft doctor: what this machine and this build can do, and what of it is used.
#include <hwy/highway.h>
#include <hwy/targets.h>
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <sched.h>
#include <sys/utsname.h>
#include <unistd.h>
#include <xxhash.h>
#include <iostream>

#include "apps/commands.h"
#include "apps/files.h"
#include "apps/machine.h"
#include "apps/options.h"
#include "core/backend.h"
#include "core/device_report.h"
#include "core/memory.h"
#include "core/thread_pool.h"
#include "dist/processes.h"
#include "models/speed_of_light.h"
#include "ops/gemm.h"

namespace weft::apps {
namespace {

constexpr size_t kColumn = 18;

void line(std::string_view title, const std::string& text) {
  std::cout << title << std::string(title.size() < kColumn ? kColumn - title.size() : 1, ' ') << text << '\n';
}

/// Those of the instruction sets that decide which kernels run.
std::string instruction_sets() {
#if defined(__x86_64__)
  std::string found;
  const auto add = [&](const char* name, bool has) {
    if (has) found += (found.empty() ? "" : " ") + std::string(name);
  };
  add("sse4.2", __builtin_cpu_supports("sse4.2"));
  add("avx", __builtin_cpu_supports("avx"));
  add("avx2", __builtin_cpu_supports("avx2"));
  add("fma", __builtin_cpu_supports("fma"));
  add("avx512f", __builtin_cpu_supports("avx512f"));
  add("avx512bw", __builtin_cpu_supports("avx512bw"));
  add("avx512vl", __builtin_cpu_supports("avx512vl"));
  add("avx512vnni", __builtin_cpu_supports("avx512vnni"));
  add("avx512bf16", __builtin_cpu_supports("avx512bf16"));
  return found.empty() ? "none beyond sse2" : found;
#else
  return "not looked up on this architecture";
#endif
}

/// The best target that this processor has among those that Highway compiles for.
std::string highway_target() {
  const int64_t supported = hwy::SupportedTargets() & HWY_TARGETS;
  return supported == 0 ? "none" : hwy::TargetName(supported & -supported);  // better targets are lower bits
}

std::string processors() {
  cpu_set_t set;
  CPU_ZERO(&set);
  const int affinity = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 0;
  const double quota = processor_quota();
  const std::string limit = quota > 0 ? "control group limit " + fixed(quota, 2) : "no control group limit";
  return concat(available_processors(), " may be used (", sysconf(_SC_NPROCESSORS_ONLN), " online, ", affinity,
                " in the affinity mask, ", limit, ")");
}

std::string memory() {
  const MemorySize size = backend(Device::cpu()).memory();
  return concat(human_bytes(size.total), " may be used at most, ", human_bytes(size.free),
                " of the machine's are free");
}

std::string pcre2_version() {
  char version[64] = "";
  pcre2_config_8(PCRE2_CONFIG_VERSION, version);
  return version;
}

std::string build() {
#if defined(__clang__)
  const std::string compiler = "clang " __clang_version__;
#elif defined(__GNUC__)
  const std::string compiler = "g++ " __VERSION__;
#else
  const std::string compiler = "unknown compiler";
#endif
  std::string text = compiler + ", C++" + std::to_string(__cplusplus / 100 % 100);
#if defined(__OPTIMIZE__)
  text += ", optimised";
#else
  text += ", not optimised: kernels are many times slower than they could be";
#endif
#if defined(__SANITIZE_ADDRESS__)
  text += ", with address sanitizer";
#endif
#if defined(WEFT_BUILD_TYPE)
  text += ", build type " WEFT_BUILD_TYPE;
#endif
  return text;
}

void print_report(const DeviceReport& report) {
  for (const auto& [name, value] : report.backend) line("  " + name, value);
  for (size_t i = 0; i < report.devices.size(); ++i) {
    std::string text;
    for (const auto& [name, value] : report.devices[i])
      text += name == "name" ? value : concat("\n", std::string(kColumn, ' '), name, ' ', value);
    line(concat("  cuda:", i), text);
  }
}

}  // namespace

int run_doctor(std::span<const std::string> args) {
  bool measure = false;
  Options options("doctor", "Tells what this machine and this build can do, and what of it is used.");
  options.action("measure", &measure, "measure the machine's speed anew instead of taking the stored figures");
  if (!options.parse(args)) return 0;
  utsname system{};
  uname(&system);
  line("system", concat(system.sysname, ' ', system.release, ' ', system.machine));
  line("processor", backend(Device::cpu()).name());
  line("instruction sets", instruction_sets());
  line("kernels", concat("products ", gemm_isa(), ", other operations ", highway_target(), " (Highway)"));
  line("processors", processors());
  line("threads", concat(num_threads(), " (WEFT_NUM_THREADS changes it; no result depends on it)"));
  line("memory", memory());
  line("build", build());
  line("libraries",
       concat("highway ", HWY_MAJOR, '.', HWY_MINOR, '.', HWY_PATCH, ", pcre2 ", pcre2_version(), ", xxhash ",
              XXH_versionNumber() / 10000, '.', XXH_versionNumber() / 100 % 100, '.', XXH_versionNumber() % 100));
  const std::string no_cuda = why_no_cuda();
  line("cuda", no_cuda.empty() ? concat("device ", Device::best()) : "none: " + no_cuda);
  print_report(cuda_report());
  line("  NCCL", dist::describe_nccl());
  const models::MachineSpeed speed = measure ? models::measure_machine() : models::machine_speed();
  line("speed", concat("products ", fixed(speed.gemm_flops * 1e-9, 1), " GFLOP/s (f32), copy ",
                       fixed(speed.copy_bytes * 1e-9, 1), " GB/s read plus written, ", speed.threads, " threads",
                       measure ? "" : " (stored figures if there are any; --measure takes new ones)"));
  return 0;
}

}  // namespace weft::apps
