// weft bench: what this machine can do at best, and how near to it a training step comes.
#include "apps/bench.h"

#include <iostream>

#include "apps/command.h"
#include "apps/commands.h"
#include "apps/device_option.h"
#include "apps/files.h"
#include "apps/options.h"
#include "core/thread_pool.h"
#include "models/speed_of_light.h"
#include "ops/gemm.h"

namespace weft::apps {

int bench_machine(std::span<const std::string> args) {
  int64_t threads = 0;
  DType precision = DType::f32;
  DeviceOption device;
  Options options("bench machine", "Measures the denominators of every percentage: GEMM peak and copy bandwidth.");
  options.add("threads", &threads, {.min = 0, .max = 1024}, "threads; 0: as many as the process may use");
  options.add("precision", &precision, {{"f32", DType::f32}, {"bf16", DType::bf16}, {"f16", DType::f16}},
              "of the product");
  device.declare(options);
  if (!options.parse(args)) return 0;
  if (threads > 0) set_num_threads(static_cast<int>(threads));
  const models::MachineSpeed speed = models::measure_machine(device.device(options), precision);
  const bool cpu = speed.device.kind == DeviceKind::cpu;
  std::cout << speed.name << (cpu ? concat(", ", speed.threads, " threads, ", gemm_isa(), " kernels") : "")
            << "\nGEMM peak (" << speed.dtype << ", " << (cpu ? "1,024" : "8,192")
            << "^3): " << fixed(speed.gemm_flops * 1e-9, 1)
            << " GFLOP/s\ncopy bandwidth (far beyond cache): " << fixed(speed.copy_bytes * 1e-9, 1)
            << " GB/s read plus written\n";
  return 0;
}

int run_bench(std::span<const std::string> args) {
  static constexpr Command kCommands[] = {
      {"machine", "measures GEMM peak and copy bandwidth", bench_machine},
      {"ops", "times every op against the copy bandwidth or the GEMM peak", bench_ops},
      {"attention", "times attention, forward and backward, against the GEMM peak", bench_attention},
      {"gemm", "times the matrix products of a training step against the GEMM peak", bench_gemm},
      {"step", "times whole training steps against their speed of light", bench_step},
      {"collectives", "times collectives between ranks against plain Gloo and a copy", bench_collectives},
      {"parallel", "times training on two processes against one, and counts what they send and keep", bench_parallel},
      {"overlap", "measures how long ranks wait, in pipelines and behind slow links", bench_overlap},
      {"checkpoint", "times checkpoints, at once and in the background, and steps beside them", bench_checkpoint},
  };
  return dispatch("weft bench", "Measures the speed of this machine and of models on it.", kCommands, args,
                  process_environment(), std::cout);
}

}  // namespace weft::apps
