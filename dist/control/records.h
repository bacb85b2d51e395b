#pragma once
#include <cstdint>
#include <string>

#include "core/log.h"

namespace weft::dist {

enum class MemberState : uint8_t {
  joined,
  left,  ///< said goodbye
  lost,  ///< fell silent, or its launcher saw it end
};
const char* name(MemberState state);

/// What the control server knows of a rank.
struct Member {
  int rank = -1;
  MemberState state = MemberState::joined;
  std::string host;
  int64_t pid = 0;
  std::string operation;  ///< what it last said it was doing; "" before it said anything
  std::string reason;     ///< why it left or was lost

  /// "rank 1 (host a, pid 12) was lost: silent for 5.0 s; its last operation: all_reduce #7".
  std::string describe() const;
};

/// A log line of a rank.
struct LogRecord {
  int rank = -1;
  log::Level level = log::Level::kInfo;
  int64_t microseconds = 0;  ///< since 1970, by the rank's clock
  std::string text;
};

/// A record of a rank: one JSON object, checked to be one.
struct MetricRecord {
  int rank = -1;
  int64_t microseconds = 0;
  std::string json;
};

}  // namespace weft::dist
