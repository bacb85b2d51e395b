#pragma once
#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <fstream>
#include <string>

#include "tests/dist_processes.h"

namespace weft::dist::testing {

/// How a rank ends in tests of what the others are told.
enum class Ending { kill, segv, exit, stop };
inline constexpr const char* kEndings[] = {"Sigkill", "Sigsegv", "ExitsWithZero", "Sigstop"};

/// Says when, which the test measures from, and ends.
inline void end(Ending ending, const std::string& output) {
  std::ofstream(output) << std::to_string(steady_seconds()) << std::flush;
  switch (ending) {
    case Ending::kill:
      raise(SIGKILL);
      break;
    case Ending::segv: {
      const rlimit none{0, 0};
      setrlimit(RLIMIT_CORE, &none);
      signal(SIGSEGV, SIG_DFL);
      raise(SIGSEGV);
      break;
    }
    case Ending::exit:
      _exit(0);
    case Ending::stop:
      raise(SIGSTOP);
      break;
  }
}

}  // namespace weft::dist::testing
