#include "cuda/nvml.h"

#include <dlfcn.h>

#include "core/error.h"

namespace weft::cuda {
namespace {

// From nvml.h, which the toolkit need not have.
using Device = void*;
constexpr int kSuccess = 0, kSmClock = 1, kMemoryClock = 2, kGpuTemperature = 0;

}  // namespace

template <class Function>
Function* Nvml::find(const char* name) const {
  return library_ == nullptr ? nullptr : reinterpret_cast<Function*>(dlsym(library_, name));
}

Nvml::Nvml() : library_(dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL)) {
  const auto initialise = find<int()>("nvmlInit_v2");
  if (library_ == nullptr || (initialise != nullptr && initialise() == kSuccess)) return;
  dlclose(library_);
  library_ = nullptr;
}

Nvml::~Nvml() {
  if (library_ == nullptr) return;
  if (const auto shut_down = find<int()>("nvmlShutdown"); shut_down != nullptr) shut_down();
  dlclose(library_);
}

std::optional<std::string> Nvml::driver_version() const {
  const auto ask = find<int(char*, unsigned)>("nvmlSystemGetDriverVersion");
  char version[96] = "";
  if (ask == nullptr || ask(version, sizeof version) != kSuccess) return std::nullopt;
  return version;
}

std::optional<std::string> Nvml::state(const std::string& pci_address) const {
  const auto by_address = find<int(const char*, Device*)>("nvmlDeviceGetHandleByPciBusId_v2");
  Device device = nullptr;
  if (by_address == nullptr || by_address(pci_address.c_str(), &device) != kSuccess) return std::nullopt;
  std::string text;
  const auto add = [&](const auto&... parts) { text += concat(text.empty() ? "" : ", ", parts...); };
  using Clock = int(Device, int, unsigned*);
  const auto clock = find<Clock>("nvmlDeviceGetClockInfo"), most = find<Clock>("nvmlDeviceGetMaxClockInfo");
  unsigned now = 0, limit = 0;
  if (clock != nullptr && most != nullptr && clock(device, kSmClock, &now) == kSuccess &&
      most(device, kSmClock, &limit) == kSuccess)
    add("SM ", now, " of at most ", limit, " MHz");
  if (clock != nullptr && clock(device, kMemoryClock, &now) == kSuccess) add("memory ", now, " MHz");
  const auto power = find<int(Device, unsigned*)>("nvmlDeviceGetEnforcedPowerLimit");
  if (power != nullptr && power(device, &limit) == kSuccess) add("power limit ", (limit + 500) / 1000, " W");
  const auto temperature = find<int(Device, int, unsigned*)>("nvmlDeviceGetTemperature");
  if (temperature != nullptr && temperature(device, kGpuTemperature, &now) == kSuccess) add(now, " degrees C");
  if (text.empty()) return std::nullopt;
  return text;
}

}  // namespace weft::cuda
