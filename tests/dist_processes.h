#pragma once
#include <chrono>
#include <filesystem>
#include <string>
#include <vector>

#include "dist/processes.h"

// Ranks as processes: the test program starts itself again, once for each rank.

namespace weft::dist::testing {

/// What a rank is started with.
struct RankArguments {
  ProcessOptions options;
  std::string store;   ///< directory
  std::string output;  ///< file for what the rank answers
  std::vector<std::string> words;
};

/// Of a clock that all processes of this machine share.
double steady_seconds();

/// What a rank does, defined by each test program; the exit code. An exception is printed and gives 3, a GroupError 7.
int run_rank(const RankArguments& arguments);

/// Processes of one world, in a directory of their own; all are gone, and so is it, at the end of the scope.
class Processes {
 public:
  struct Outcome {
    int code = 0;  ///< exit code; minus the signal that ended the process
    std::string err, output;
    double seconds = 0;    ///< from the start to its end
    double failed_at = 0;  ///< steady_seconds() when it got a GroupError; 0 if it got none
    bool timed_out = false;
  };
  /// `words[r]` for rank r, or words[0] for all.
  Processes(int size, const std::vector<std::vector<std::string>>& words, const ProcessOptions& options = {});
  ~Processes();
  Processes(const Processes&) = delete;
  Processes& operator=(const Processes&) = delete;

  void send(int rank, int signal) const;
  /// Waits for the end of a rank; ends it itself after that time.
  Outcome wait(int rank, double seconds = 60);
  std::vector<Outcome> wait_all(double seconds = 60);
  /// Ends what still runs.
  void end_all();
  /// Ports on which somebody still listens, and files beside the store's, the ranks' errors and their outputs; "" if
  /// there are none. After end_all().
  std::string left_behind() const;

 private:
  std::filesystem::path directory_;
  std::vector<int> pids_;
  std::chrono::steady_clock::time_point start_;
};

}  // namespace weft::dist::testing
