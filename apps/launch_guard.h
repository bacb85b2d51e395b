#pragma once
#include <sys/types.h>

#include <string>

namespace weft::apps {

/// A process that outlives the launcher for a moment: if that ends without having said goodbye, by SIGKILL too, the
/// guard kills the process groups that were left running and removes the file of keys. It has a session of its own, so
/// that a terminal's signals do not reach it. Not covered: processes that left their rank's group (setsid) when the
/// launcher is killed, and a guard that is killed first; the ranks themselves then still end with the launcher
/// (PR_SET_PDEATHSIG).
class LaunchGuard {
 public:
  /// @param remove_file, remove_directory  removed (in this order) if the launcher dies; "" for none
  LaunchGuard(const std::string& remove_file, const std::string& remove_directory);
  /// Dismisses the guard: everything has been cleared up.
  ~LaunchGuard();
  LaunchGuard(const LaunchGuard&) = delete;
  LaunchGuard& operator=(const LaunchGuard&) = delete;

  void watch(pid_t group);
  void forget(pid_t group);

 private:
  pid_t process_ = -1;
  int pipe_ = -1;
};

}  // namespace weft::apps
