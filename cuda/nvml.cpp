#include "cuda/nvml.h"

#include "core/error.h"

namespace weft::cuda {
namespace {

// From nvml.h, which the toolkit need not have.
using Device = void*;
constexpr int kSuccess = 0, kSmClock = 1, kMemoryClock = 2, kGpuTemperature = 0;

}  // namespace

Nvml::Nvml() : library_("NVML", {"libnvidia-ml.so.1"}) {
  const auto initialise = library_.find<int()>("nvmlInit_v2");
  works_ = initialise != nullptr && initialise() == kSuccess;
}

Nvml::~Nvml() {
  if (!works_) return;
  if (const auto shut_down = library_.find<int()>("nvmlShutdown"); shut_down != nullptr) shut_down();
}

std::optional<std::string> Nvml::driver_version() const {
  const auto ask = library_.find<int(char*, unsigned)>("nvmlSystemGetDriverVersion");
  char version[96] = "";
  if (ask == nullptr || ask(version, sizeof version) != kSuccess) return std::nullopt;
  return version;
}

std::optional<std::string> Nvml::state(const std::string& pci_address) const {
  const auto by_address = library_.find<int(const char*, Device*)>("nvmlDeviceGetHandleByPciBusId_v2");
  Device device = nullptr;
  if (by_address == nullptr || by_address(pci_address.c_str(), &device) != kSuccess) return std::nullopt;
  std::string text;
  const auto add = [&](const auto&... parts) { text += concat(text.empty() ? "" : ", ", parts...); };
  using Clock = int(Device, int, unsigned*);
  const auto clock = library_.find<Clock>("nvmlDeviceGetClockInfo"),
             most = library_.find<Clock>("nvmlDeviceGetMaxClockInfo");
  unsigned now = 0, limit = 0;
  if (clock != nullptr && most != nullptr && clock(device, kSmClock, &now) == kSuccess &&
      most(device, kSmClock, &limit) == kSuccess)
    add("SM ", now, " of at most ", limit, " MHz");
  if (clock != nullptr && clock(device, kMemoryClock, &now) == kSuccess) add("memory ", now, " MHz");
  const auto power = library_.find<int(Device, unsigned*)>("nvmlDeviceGetEnforcedPowerLimit");
  if (power != nullptr && power(device, &limit) == kSuccess) add("power limit ", (limit + 500) / 1000, " W");
  const auto temperature = library_.find<int(Device, int, unsigned*)>("nvmlDeviceGetTemperature");
  if (temperature != nullptr && temperature(device, kGpuTemperature, &now) == kSuccess) add(now, " degrees C");
  if (text.empty()) return std::nullopt;
  return text;
}

}  // namespace weft::cuda
