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

}  // namespace weft::apps
