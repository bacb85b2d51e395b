#pragma once
#include <string>

#include "models/gpt.h"

namespace weft::models {

/// What a device of this machine can do at best, measured: the denominators of every "% of speed of light".
struct MachineSpeed {
  double gemm_flops = 0;  ///< matrix product of `dtype`, FLOP/s: best of products of n^3, n = 1,024 (CPU) or 8,192
  double copy_bytes = 0;  ///< bytes read plus bytes written per second by a copy far beyond the caches
  int threads = 0;
  std::string name;  ///< of the processor or GPU
  Device device;
  DType dtype = DType::f32;  ///< f32, bf16 or f16
};

/// Measures, in about a second, and keeps the better of what it sees and what was stored: other programs make a machine
/// look slower than it is, nothing makes it look faster. Stored per device, dtype, threads and kernels in
/// `$WEFT_CACHE_DIR/machine-speed.json` (default ~/.cache/weft); a file that cannot be read or written is measured
/// around.
MachineSpeed measure_machine(Device device = Device::cpu(), DType dtype = DType::f32);

/// The stored measurement, on a CPU with a short look (four products) at whether the products do better today; measures
/// where nothing is stored.
MachineSpeed machine_speed(Device device = Device::cpu(), DType dtype = DType::f32);

/// n of the product n x n x n that measures a device's peak.
int64_t peak_size(Device device);

/// What the device does at this moment; nothing stored is read or written. For shares that are measured in one run.
/// f16 on a CPU is measured as f32, in which its products are made. @param tiny  sizes for a look at whether it runs
MachineSpeed speed_now(Device device, DType dtype, bool tiny = false);

/// Least time of a training step, in seconds: its products at the GEMM peak, all other passes over memory at the copy
/// bandwidth. Formulas in docs/speed-of-light.md.
struct StepBound {
  double products = 0;   ///< 6 (12 L C^2 + V C) FLOP per token
  double attention = 0;  ///< 7 L C T FLOP per token
  double passes = 0;     ///< 18 C elements per layer and 2 V per token
  double optimizer = 0;  ///< 32 bytes per parameter: AdamW and the gradient norm
  double total() const { return products + attention + passes + optimizer; }
};
StepBound step_bound(const GptConfig& config, int64_t tokens, const MachineSpeed& machine);

}  // namespace weft::models
