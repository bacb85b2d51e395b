#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

#include "core/error.h"

/// Log lines on standard error: "2025-03-01T12:34:56.789Z info  message". Safe to call from any thread; a line is never
/// torn. The last terminal line may belong to a progress display (set_status), which log lines pass above.
namespace weft::log {

enum class Level : uint8_t { kDebug, kInfo, kWarn, kError, kOff };

/// "debug", "info", "warn", "error", "off".
std::string_view to_string(Level level);

/// The level with that name.
/// @throws Error  kUsage otherwise; `where` begins the message.
Level parse_level(std::string_view text, std::string_view where);

/// Lines below this level are dropped. First value: WEFT_LOG_LEVEL if set, else info.
/// @throws Error  kUsage if WEFT_LOG_LEVEL is not a level (from whichever of these functions is called first).
Level level();
void set_level(Level level);
inline bool enabled(Level at) { return at >= level(); }

/// Writes one message, whatever the level. Lines of a message after the first are indented; control characters are
/// escaped, so that no file name or remote message can steer the terminal.
void write(Level level, std::string_view message);

template <class... Parts>
void debug(const Parts&... parts) {
  if (enabled(Level::kDebug)) write(Level::kDebug, concat(parts...));
}
template <class... Parts>
void info(const Parts&... parts) {
  if (enabled(Level::kInfo)) write(Level::kInfo, concat(parts...));
}
template <class... Parts>
void warn(const Parts&... parts) {
  if (enabled(Level::kWarn)) write(Level::kWarn, concat(parts...));
}
template <class... Parts>
void error(const Parts&... parts) {
  if (enabled(Level::kError)) write(Level::kError, concat(parts...));
}

/// Keeps `text` (one line, no control characters) as the last line of the terminal until it is replaced; "" removes it.
/// For terminals only: it is written with control codes.
void set_status(std::string_view text);

/// Takes messages instead of standard error (tests, another machine); an empty function restores it. Called under the
/// logger's lock, one message at a time; what it logs itself goes to standard error. Returns the previous one.
using Sink = std::function<void(Level level, std::string_view message)>;
Sink set_sink(Sink sink);

/// Takes the bytes that would go to standard error; an empty function restores it. Returns the previous one.
using Writer = std::function<void(std::string_view bytes)>;
Writer set_writer(Writer writer);

/// `text` with everything a terminal could obey escaped as \xNN; line breaks and tabs are kept if `breaks`.
std::string printable(std::string_view text, bool breaks = true);

}  // namespace weft::log
