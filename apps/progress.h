#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

namespace weft::apps {

/// Seconds as "h:mm:ss", rounded to the nearest; "-:--:--" for negative, infinite or NaN.
std::string duration_text(double seconds);

/// Remaining time from the speed of the recent past: elapsed time and work both decay with a time constant, so the
/// first slow steps are forgotten and the estimate is a plain average until then.
class EtaEstimate {
 public:
  /// @param memory  seconds after which a step counts 1/e; > 0
  explicit EtaEstimate(double memory = 30) : memory_(memory) {}
  /// `done` units of work were complete at time `now` (seconds on any clock). The first call starts the clock.
  void add(int64_t done, double now);
  /// Units per second; NaN before there is a measure.
  double rate() const;
  /// Seconds until `total` are done at that rate; NaN before there is a measure.
  double remaining(int64_t total) const;

 private:
  double memory_;
  double time_ = 0, work_ = 0;  // decayed sums
  double last_time_ = 0;
  int64_t last_done_ = 0;
  bool started_ = false;
};

/// Where progress is shown.
struct Terminal {
  bool interactive = false;                           ///< a terminal that obeys control codes
  std::function<int()> width;                         ///< columns; asked for at each draw
  std::function<void(std::string_view text)> status;  ///< replaces the last line; "" removes it
  std::function<void(std::string_view text)> line;    ///< prints a line

  /// Standard error through core/log.h, so that log lines and the bar keep apart. Interactive if it is a terminal and
  /// TERM is neither empty nor "dumb".
  static Terminal standard_error();
};

struct ProgressOptions {
  std::string title = "progress";
  int64_t total = 0;          ///< units of work; 0 if unknown: no percentage, no ETA
  int64_t start = 0;          ///< units done before this run (a resumed one): they do not count in the speed
  double line_seconds = 10;   ///< without a terminal: at most one line in so many seconds ...
  int64_t line_steps = 0;     ///< ... or, if > 0, one line each so many units instead
  double draw_seconds = 0.1;  ///< on a terminal: at most one draw in so many seconds
};

/// A progress bar with ETA on a terminal; elsewhere plain lines now and then, without control codes. For one thread.
///
///   Progress progress({.title = "train", .total = steps});
///   for (...) {
///     if (progress.due(step)) progress.update(step, concat("loss ", loss));
///   }
///   progress.finish(concat("loss ", loss));
///
///   train  42% [#####-------]  420/1,000  0:01:23 eta 0:01:55  loss 3.21
class Progress {
 public:
  using Clock = std::function<double()>;  ///< seconds, never going back

  explicit Progress(ProgressOptions options, Terminal terminal = Terminal::standard_error(), Clock clock = {});
  /// Removes the bar; without finish(), nothing claims that the work was finished.
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  /// True if update(done) would print: ask before composing the fields. The last unit is always due.
  bool due(int64_t done) const;
  /// Reports that `done` units (start included) are complete. Prints only when due.
  void update(int64_t done, std::string_view fields);
  /// Replaces the bar by a last line that stays, with the time taken in place of the ETA.
  void finish(std::string_view fields = "");

 private:
  std::string counts() const;
  std::string bar_line(std::string_view fields, double now) const;

  ProgressOptions options_;
  Terminal terminal_;
  Clock clock_;
  EtaEstimate eta_;
  int64_t done_;
  double begin_;
  double printed_at_ = 0;
  int64_t printed_done_ = 0;
  bool printed_ = false, finished_ = false;
};

}  // namespace weft::apps
