#pragma once
#include <unistd.h>

#include <cstdlib>
#include <optional>

#include "tests/apps_process.h"

/// The ranks of a `weft launch`, as somebody sees them who looks at the machine's processes.
namespace weft::apps_test {

/// The value of a variable in the environment that a process was started with.
inline std::optional<std::string> variable_of(pid_t pid, const std::string& name) {
  const std::string environment = '\0' + content_of("/proc/" + std::to_string(pid) + "/environ");
  const std::string begin = '\0' + name + '=';
  const size_t at = environment.find(begin);
  if (at == std::string::npos) return std::nullopt;
  return std::string(environment.c_str() + at + begin.size());
}

inline std::vector<pid_t> all_processes() {
  std::vector<pid_t> pids;
  for (const auto& entry : fs::directory_iterator("/proc")) {
    if (const int pid = std::atoi(entry.path().filename().c_str()); pid > 0) pids.push_back(pid);
  }
  return pids;
}

/// Processes, also grandchildren, that have this temporary directory.
inline std::vector<pid_t> processes_with(const fs::path& temporary) {
  std::vector<pid_t> found;
  for (const pid_t pid : all_processes()) {
    if (variable_of(pid, "TMPDIR") == temporary.string()) found.push_back(pid);
  }
  return found;
}

/// pids of the ranks of one start, in the order of ranks; -1 for those that do not run.
inline std::vector<pid_t> ranks_of_start(const fs::path& temporary, int ranks, int start) {
  std::vector<pid_t> pids(static_cast<size_t>(ranks), -1);
  for (const pid_t pid : processes_with(temporary)) {
    if (variable_of(pid, "WEFT_RESTART") != std::to_string(start)) continue;
    const std::string rank = variable_of(pid, "WEFT_RANK").value_or("none");
    if (rank != "none" && std::atoi(rank.c_str()) < ranks) pids[static_cast<size_t>(std::atoi(rank.c_str()))] = pid;
  }
  return pids;
}

/// The last step of a run's metrics, from 0; -1 before the first.
inline int64_t last_step(const fs::path& run) {
  const std::string text = content_of(run / "metrics.jsonl"), label = "\"step\":";
  const size_t at = text.rfind(label, text.rfind('\n'));
  return at == std::string::npos ? -1 : std::atoll(text.c_str() + at + label.size());
}

/// The losses of all steps, as they are written.
inline std::vector<std::string> losses_of(const fs::path& run) {
  std::vector<std::string> losses;
  std::ifstream in(run / "metrics.jsonl");
  for (std::string line; std::getline(in, line);) {
    if (const size_t at = line.find("\"loss\":"); at != std::string::npos)
      losses.push_back(line.substr(at, line.find(',', at) - at));
  }
  return losses;
}

template <class Condition>
bool eventually(const Condition& condition, double seconds = 60, double pause = 0.002) {
  for (const double deadline = now() + seconds; now() < deadline; sleep_seconds(pause)) {
    if (condition()) return true;
  }
  return condition();
}

}  // namespace weft::apps_test
