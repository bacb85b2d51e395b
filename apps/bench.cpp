// weft bench: what this machine can do at best, and how near to it a training step comes.
#include "apps/bench.h"

#include <cstdio>
#include <iostream>

#include "apps/command.h"
#include "apps/commands.h"
#include "apps/options.h"
#include "core/thread_pool.h"
#include "models/speed_of_light.h"
#include "ops/gemm.h"

namespace weft::apps {

int bench_machine(std::span<const std::string> args) {
  int64_t threads = 0;
  Options options("bench machine", "Measures the denominators of every percentage: GEMM peak and copy bandwidth.");
  options.add("threads", &threads, {.min = 0, .max = 1024}, "threads; 0: as many as the process may use");
  if (!options.parse(args)) return 0;
  if (threads > 0) set_num_threads(static_cast<int>(threads));
  const models::MachineSpeed speed = models::measure_machine();
  std::printf("%s, %d threads, %s kernels\nGEMM peak (f32, 1,024^3): %.1f GFLOP/s\ncopy bandwidth (far beyond cache): %.1f GB/s read plus written\n",
              speed.processor.c_str(), speed.threads, gemm_isa(), speed.gemm_flops * 1e-9, speed.copy_bytes * 1e-9);
  return 0;
}

int run_bench(std::span<const std::string> args) {
  static constexpr Command kCommands[] = {
      {"machine", "measures GEMM peak and copy bandwidth", bench_machine},
      {"step", "times whole training steps against their speed of light", bench_step},
  };
  return dispatch("weft bench", "Measures the speed of this machine and of models on it.", kCommands, args, process_environment(), std::cout);
}

}  // namespace weft::apps
