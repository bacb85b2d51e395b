#pragma once
#include <string>
#include <utility>
#include <vector>

namespace weft {

/// What a backend tells of itself and of its devices, for people to read: names and values, in that order.
struct DeviceReport {
  using Facts = std::vector<std::pair<std::string, std::string>>;
  Facts backend;               ///< what was compiled in, and the versions of what it runs on
  std::vector<Facts> devices;  ///< of each device, its name first
};

/// Of CUDA. Defined by cuda/ or its stub. What cannot be told is said to be unknown; nothing is thrown for it.
DeviceReport cuda_report();

}  // namespace weft
