#pragma once
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "apps/options.h"
#include "dist/group.h"

// What the benchmarks of several ranks have in common: ratios of two things that are measured in turns.

namespace weft::apps {

struct RatioOptions {
  int64_t rounds = 9;
  std::filesystem::path json;
  bool quick = false;

  void declare(Options& options);
  /// Rounds that are measured.
  int64_t count() const { return quick ? 2 : rounds; }
};

/// Seconds of rounds in which two things were done in turns: the i-th of both follow each other.
struct Rounds {
  std::vector<double> ours, other;
  double ours_median() const;
  double other_median() const;
  /// What `ours` does in the time of `other`: other[i] / ours[i], sorted.
  std::vector<double> ratios() const;
};

/// Does both in turns, `rounds` times, after one time that is not counted. Each begins when all ranks have come, and
/// takes as long as the rank that takes longest; the same answer on all ranks.
Rounds take_turns(dist::Group& world, int64_t rounds, const std::function<void()>& ours,
                  const std::function<void()>& other);
/// The same where one process does both.
Rounds take_turns(int64_t rounds, const std::function<void()>& ours, const std::function<void()>& other);

/// "1.23 GB/s".
std::string bytes_per_second(double bytes, double seconds);

/// One line: a figure, what it is compared with, and the ratio that is wanted.
struct RatioRow {
  std::string name, figure, denominator;
  std::vector<double> ratios;           ///< sorted, at least one
  std::optional<double> at_least = {};  ///< the ratio that is wanted
  std::optional<double> at_most = {};
  double median() const { return ratios[ratios.size() / 2]; }
};

class RatioTable {
 public:
  /// Prints the heading. @throws Error kIo for a JSON file that cannot be made.
  RatioTable(std::string command, const RatioOptions& options);
  void add(RatioRow row);
  /// Writes the JSON file, if one was asked for.
  void finish();

 private:
  const std::string command_;
  const RatioOptions& options_;
  std::vector<RatioRow> rows_;
};

}  // namespace weft::apps
