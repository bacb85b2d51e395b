#pragma once
#include <compare>
#include <cstdint>
#include <iosfwd>
#include <string>
#include <string_view>

namespace weft {

enum class DeviceKind : uint8_t { cpu, cuda };

/// Where a tensor lives: a kind and an index. It knows no rank.
struct Device {
  DeviceKind kind = DeviceKind::cpu;
  int index = 0;

  static Device cpu() { return {}; }
  static Device cuda(int index = 0) { return {DeviceKind::cuda, index}; }
  /// The first CUDA device if this build and machine have one, else the CPU.
  static Device best();
  /// "auto" (best()), "cpu", "cuda" (the first) or "cuda:2". @throws Error kValue for anything else.
  static Device parse(std::string_view text);

  auto operator<=>(const Device&) const = default;
};

/// "cpu" or "cuda:0".
std::string to_string(Device device);
std::ostream& operator<<(std::ostream& out, Device device);

}  // namespace weft
