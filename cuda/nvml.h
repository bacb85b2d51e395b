#pragma once
#include <optional>
#include <string>

#include "core/shared_library.h"

namespace weft::cuda {

/// NVIDIA's management library, which comes with the driver and is looked for when the program runs.
class Nvml {
 public:
  Nvml();
  Nvml(const Nvml&) = delete;
  Nvml& operator=(const Nvml&) = delete;
  ~Nvml();

  /// "580.82.07"; nothing without the library.
  std::optional<std::string> driver_version() const;
  /// Clocks in MHz, the power limit in watts and the temperature of the device at a PCI address, as far as the driver
  /// tells them: "SM 1980 of at most 1980 MHz, memory 3201 MHz, power limit 700 W, 34 degrees C".
  std::optional<std::string> state(const std::string& pci_address) const;

 private:
  SharedLibrary library_;
  bool works_ = false;
};

}  // namespace weft::cuda
