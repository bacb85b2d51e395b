#include "apps/device_option.h"

#include "apps/gemm_algorithms_file.h"
#include "core/backend.h"
#include "core/log.h"
#include "ops/gemm_algorithms.h"

namespace weft::apps {

void DeviceOption::declare(Options& o) {
  o.add("device", &text, {.placeholder = "DEVICE"},
        "where to compute: auto (the first GPU, else the CPU), cpu, cuda or cuda:N");
  o.add(
      "gemm_algorithms", &gemm_algorithms, {.placeholder = "FILE"},
      "algorithms of matrix products on a GPU, as `weft bench gemm --tune` wrote them there; without it, the library's "
      "first choice");
}

Device DeviceOption::planned(const Options& options) const {
  try {
    return Device::parse(text);
  } catch (const Error&) {
    options.reject("device", "must be auto, cpu, cuda or cuda:N, got ", weft::quoted(text));
  }
}

Device DeviceOption::device(const Options& options) const {
  const Device device = planned(options);
  backend(device);
  if (gemm_algorithms.empty()) return device;
  if (device.kind == DeviceKind::cpu) {
    options.reject("gemm_algorithms", "is for a GPU, but the device is ", device, ", got ",
                   weft::quoted(gemm_algorithms.string()));
  }
  use_gemm_algorithms_file(device, gemm_algorithms.string());
  return device;
}

void declare_cuda_graph(Options& o, models::GraphUse* use) {
  using models::GraphUse;
  o.add("cuda_graph", use, {{"auto", GraphUse::automatic}, {"on", GraphUse::on}, {"off", GraphUse::off}},
        "record a training step once and launch it as a whole, with the same bits: auto where it is possible, on or an "
        "error, off");
}

std::string describe_cuda_graph(const std::string& why_not) {
  return why_not.empty() ? "steps are recorded, after two that are not" : "steps are not recorded: " + why_not;
}

void DeviceOption::report(Device device) const {
  if (gemm_algorithms.empty()) return;
  const GemmAlgorithmUse use = gemm_algorithm_use(device);
  log::info(gemm_algorithms.string(), ": ", use.found, " products were computed by its algorithms, ",
            use.missing.size(), " are not in it and were computed by the library's first choice",
            use.missing.empty() ? "" : concat(", the first of them ", use.missing.front()));
}

}  // namespace weft::apps
