#include "apps/device_option.h"

#include "core/backend.h"

namespace weft::apps {

void DeviceOption::declare(Options& o) {
  o.add("device", &text, {.placeholder = "DEVICE"},
        "where to compute: auto (the first GPU, else the CPU), cpu, cuda or cuda:N");
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

}  // namespace weft::apps
