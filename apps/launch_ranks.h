#pragma once
#include <sys/resource.h>
#include <sys/types.h>

#include <chrono>
#include <optional>
#include <string>
#include <vector>

#include "apps/launch_guard.h"
#include "apps/launch_output.h"
#include "core/environment.h"

namespace weft::apps {

/// What every rank runs.
struct RankCommand {
  std::string file;                ///< path of the program
  std::vector<std::string> words;  ///< its argv
  rlimit open_files = {};          ///< RLIMIT_NOFILE
};

/// A rank that has ended.
struct RankEnd {
  int rank = -1;
  pid_t pid = 0;
  int code = 0;        ///< exit code; 128 + signal for one that a signal ended
  double seconds = 0;  ///< that it ran
  bool signalled() const { return code > 128; }
  /// "exit code 3", "killed by signal 9 (SIGKILL)".
  std::string how() const;
};

/// The signals that a launcher forwards, as they come. One at a time. SIGPIPE is ignored meanwhile, and SIGHUP if it
/// was.
class LaunchSignals {
 public:
  LaunchSignals();
  ~LaunchSignals();
  LaunchSignals(const LaunchSignals&) = delete;
  LaunchSignals& operator=(const LaunchSignals&) = delete;
  /// Readable when a signal came or a child ended.
  int descriptor() const;
  /// The next SIGINT, SIGTERM or SIGHUP that was not taken yet, 0 if there is none.
  int take();
};

/// The processes of a machine's ranks, each in a process group of its own that ends with it. Standard input is empty.
/// Rank 0's standard error is a terminal where the launcher's is, so that it draws its progress.
class RankProcesses {
 public:
  /// Starts one process for each environment, ranks from `first_rank`. For the thread that lives as long as the
  /// launcher.
  /// @throws Error  kIo if one cannot be started; none is left then.
  RankProcesses(const RankCommand& command, int first_rank, const std::vector<Environment>& environments,
                LaunchOutput& output, LaunchGuard& guard, bool terminal);
  /// Kills what still runs.
  ~RankProcesses();
  RankProcesses(const RankProcesses&) = delete;
  RankProcesses& operator=(const RankProcesses&) = delete;

  int running() const;
  /// Passes output on until a rank has ended, a signal has come, or `milliseconds` are over; returns the ranks that
  /// have ended, their output complete, and kills what is left of their process groups.
  std::vector<RankEnd> wait(int milliseconds, const LaunchSignals& signals);
  /// Ranks that a signal has stopped for longer than that.
  std::vector<int> stopped_for(std::chrono::steady_clock::duration time) const;
  /// Kills the process group of one rank.
  void kill_rank(int rank);
  /// Sends a signal to all process groups.
  void send(int signal);

 private:
  struct Rank {
    int rank = -1;
    pid_t pid = -1;  ///< and process group; -1 once ended
    int out = -1, err = -1;
    std::chrono::steady_clock::time_point started;
    std::optional<std::chrono::steady_clock::time_point> stopped;  ///< since when a signal has it stopped
  };
  void start(const RankCommand& command, Rank& rank, const Environment& environment, bool terminal);
  bool read_some(int rank, LaunchOutput::Stream stream, int& descriptor);
  void drain(Rank& rank);
  static void note_stop(Rank& rank);

  LaunchOutput& output_;
  LaunchGuard& guard_;
  std::vector<Rank> ranks_;
};

}  // namespace weft::apps
