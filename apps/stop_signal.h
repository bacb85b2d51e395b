#pragma once

namespace weft::apps {

/// While it lives, the first SIGINT or SIGTERM asks the program to stop at the next convenient point, and the second
/// ends it at once (exit code 128 + signal). One at a time.
class StopSignal {
 public:
  StopSignal();
  ~StopSignal();
  StopSignal(const StopSignal&) = delete;
  StopSignal& operator=(const StopSignal&) = delete;

  bool requested() const;
  /// "SIGINT" or "SIGTERM"; "" before one came.
  const char* name() const;
};

}  // namespace weft::apps
