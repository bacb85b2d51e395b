#include "core/log.h"

#include <unistd.h>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <mutex>
#include <utility>

namespace weft::log {
namespace {

constexpr std::array<std::string_view, 5> kNames = {"debug", "info", "warn", "error", "off"};
constexpr std::string_view kClearLine = "\r\x1b[K";

struct State {
  std::recursive_mutex mutex;  // recursive: a sink may log
  std::string status;
  Sink sink;
  Writer writer;
  bool in_sink = false;
};

/// Never destroyed: threads may still log while the process ends.
State& state() {
  static State* const shared = new State;
  return *shared;
}

std::atomic<Level>& current() {
  static std::atomic<Level> shared = [] {
    const char* text = std::getenv("WEFT_LOG_LEVEL");
    return text == nullptr ? Level::kInfo : parse_level(text, "WEFT_LOG_LEVEL");
  }();
  return shared;
}

/// There is nowhere to report that standard error cannot be written: give up on the line.
void write_bytes(const State& shared, std::string_view bytes) {
  if (shared.writer) return shared.writer(bytes);
  while (!bytes.empty()) {
    const ssize_t written = ::write(STDERR_FILENO, bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) return;
    bytes.remove_prefix(static_cast<size_t>(written));
  }
}

/// UTC, so that logs of several machines line up.
std::string timestamp() {
  using namespace std::chrono;
  const auto now = system_clock::now();
  const std::time_t seconds = system_clock::to_time_t(now);
  const auto milliseconds = duration_cast<std::chrono::milliseconds>(now.time_since_epoch()).count() % 1000;
  std::tm utc{};
  gmtime_r(&seconds, &utc);
  std::array<char, 40> text{};
  const size_t length = std::strftime(text.data(), text.size(), "%Y-%m-%dT%H:%M:%S", &utc);
  std::snprintf(text.data() + length, text.size() - length, ".%03dZ", static_cast<int>(milliseconds));
  return text.data();
}

}  // namespace

std::string_view to_string(Level level) { return kNames[static_cast<size_t>(level)]; }

Level parse_level(std::string_view text, std::string_view where) {
  for (size_t i = 0; i < kNames.size(); ++i) {
    if (kNames[i] == text) return static_cast<Level>(i);
  }
  fail(ErrorKind::kUsage, where, weft::quoted(text), ": must be one of debug, info, warn, error, off",
       did_you_mean(text, kNames));
}

Level level() { return current().load(std::memory_order_relaxed); }

void set_level(Level level) { current().store(level, std::memory_order_relaxed); }

void write(Level level, std::string_view message) {
  State& shared = state();
  const std::lock_guard lock(shared.mutex);
  if (shared.sink && !shared.in_sink) {
    struct Guard {
      bool& flag;
      explicit Guard(bool& f) : flag(f) { flag = true; }
      ~Guard() { flag = false; }
    } const guard(shared.in_sink);
    const Sink sink = shared.sink;  // a sink may replace itself
    return sink(level, message);
  }
  while (message.ends_with('\n')) message.remove_suffix(1);
  std::string line = shared.status.empty() ? "" : std::string(kClearLine);
  std::string name(to_string(level));
  name.resize(6, ' ');
  line += timestamp() + ' ' + name;
  const std::string indent(line.size() - (shared.status.empty() ? 0 : kClearLine.size()), ' ');
  for (const char c : printable(message)) {
    line += c;
    if (c == '\n') line += indent;
  }
  write_bytes(shared, line + '\n' + shared.status);
}

void set_status(std::string_view text) {
  State& shared = state();
  const std::lock_guard lock(shared.mutex);
  if (text.empty() && shared.status.empty()) return;
  shared.status = printable(text, false);
  write_bytes(shared, std::string(kClearLine) + shared.status);
}

Sink set_sink(Sink sink) {
  State& shared = state();
  const std::lock_guard lock(shared.mutex);
  return std::exchange(shared.sink, std::move(sink));
}

Writer set_writer(Writer writer) {
  State& shared = state();
  const std::lock_guard lock(shared.mutex);
  return std::exchange(shared.writer, std::move(writer));
}

std::string printable(std::string_view text, bool breaks) {
  static constexpr char kHex[] = "0123456789abcdef";
  std::string out;
  out.reserve(text.size());
  const auto escape = [&](unsigned char byte) {
    out += "\\x";
    out += kHex[byte >> 4];
    out += kHex[byte & 15];
  };
  for (size_t i = 0; i < text.size(); ++i) {
    const auto byte = static_cast<unsigned char>(text[i]);
    const auto next = i + 1 < text.size() ? static_cast<unsigned char>(text[i + 1]) : 0u;
    if (breaks && (byte == '\n' || byte == '\t')) {
      out += text[i];
    } else if (byte < 0x20 || byte == 0x7f) {
      escape(byte);
    } else if (byte == 0xc2 && next >= 0x80 && next <= 0x9f) {  // U+0080..U+009F: 8-bit control codes
      escape(byte);
      escape(static_cast<unsigned char>(text[++i]));
    } else {
      out += text[i];
    }
  }
  return out;
}

}  // namespace weft::log
