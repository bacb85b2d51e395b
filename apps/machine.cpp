#include "apps/machine.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>

namespace weft::apps {
namespace {

/// A value of /proc/meminfo in bytes, 0 if it is not there.
int64_t meminfo(const std::string& key) {
  std::ifstream in("/proc/meminfo");
  for (std::string entry; std::getline(in, entry);) {
    if (!entry.starts_with(key + ":")) continue;
    std::istringstream rest(entry.substr(key.size() + 1));
    int64_t kibibytes = 0;
    rest >> kibibytes;
    return kibibytes * 1024;
  }
  return 0;
}

}  // namespace

int64_t memory_limit() {
  const int64_t machine = meminfo("MemTotal");
  for (const char* file : {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"}) {
    int64_t limit = 0;
    if (std::ifstream in(file); in >> limit && limit > 0) return machine > 0 ? std::min(machine, limit) : limit;
  }
  return machine;
}

int64_t memory_available() { return meminfo("MemAvailable"); }

double processor_quota() {
  std::string quota;
  double period = 0;
  if (std::ifstream v2("/sys/fs/cgroup/cpu.max"); v2 >> quota >> period) {
    return quota == "max" || period <= 0 ? 0 : std::strtod(quota.c_str(), nullptr) / period;
  }
  double microseconds = 0;
  std::ifstream v1_quota("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), v1_period("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
  if (v1_quota >> microseconds && v1_period >> period && microseconds > 0 && period > 0) return microseconds / period;
  return 0;
}

}  // namespace weft::apps
