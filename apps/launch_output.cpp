#include "apps/launch_output.h"

#include <unistd.h>

#include <cerrno>

#include "core/error.h"
#include "core/log.h"

namespace weft::apps {
namespace {

constexpr size_t kMaxLine = 1 << 20;
constexpr size_t kLastLines = 20;
constexpr size_t kLastLineBytes = 2000;
constexpr std::string_view kClearLine = "\r\x1b[2K";

/// Without the codes that clear a line: the line begins anew anyway.
std::string without_clears(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    const std::string_view rest = text.substr(i);
    if (rest.starts_with("\x1b[2K") || rest.starts_with("\x1b[0K")) {
      i += 3;
    } else if (rest.starts_with("\x1b[K")) {
      i += 2;
    } else {
      out += text[i];
    }
  }
  return out;
}

}  // namespace

LaunchOutput::~LaunchOutput() {
  if (!status_.empty()) put(STDERR_FILENO, kClearLine);
}

void LaunchOutput::add(int rank, Stream stream, std::string_view bytes) {
  const std::lock_guard lock(mutex_);
  Partial& partial = partial_[{rank, stream}];
  std::string lines;
  for (const char c : bytes) {
    if (c == '\n') {
      take_line(rank, partial, lines);
      continue;
    }
    if (c == '\r') {
      partial.redrawn = true;
      continue;
    }
    if (partial.redrawn) partial.text.clear();
    partial.redrawn = false;
    partial.text += c;
    if (partial.text.size() >= kMaxLine) take_line(rank, partial, lines);
  }
  const bool bar = terminal_ && rank == 0 && stream == Stream::err;
  if (bar) {
    const std::string text = without_clears(partial.text);
    status_ = text.empty() ? "" : "[0] " + text;
  }
  if (bar || !lines.empty()) write(stream, lines);
}

void LaunchOutput::take_line(int rank, Partial& partial, std::string& lines) {
  const std::string text = without_clears(partial.text);
  const bool only_cleared = text.empty() && !partial.text.empty();  // a bar was removed: no line was printed
  partial = {};
  if (only_cleared) return;
  lines += concat('[', rank, "] ", text, '\n');
  std::deque<std::string>& last = last_[rank];
  last.push_back(text.substr(0, kLastLineBytes));
  if (last.size() > kLastLines) last.pop_front();
}

void LaunchOutput::end(int rank, Stream stream) {
  const std::lock_guard lock(mutex_);
  Partial& partial = partial_[{rank, stream}];
  std::string lines;
  if (!partial.text.empty()) take_line(rank, partial, lines);
  if (rank == 0 && stream == Stream::err) status_.clear();
  write(stream, lines);
}

void LaunchOutput::note(std::string_view text) {
  const std::lock_guard lock(mutex_);
  write(Stream::err, concat("[launch] ", log::printable(text), '\n'));
}

void LaunchOutput::line(int rank, std::string_view text) {
  const std::lock_guard lock(mutex_);
  write(Stream::err, concat('[', rank, "] ", log::printable(text, false), '\n'));
}

std::vector<std::string> LaunchOutput::last_lines(int rank) {
  const std::lock_guard lock(mutex_);
  const std::deque<std::string>& last = last_[rank];
  return {last.begin(), last.end()};
}

void LaunchOutput::write(Stream stream, std::string_view lines) {
  if (!terminal_) return put(stream == Stream::out ? STDOUT_FILENO : STDERR_FILENO, lines);
  // The bar is removed, the lines are printed, the bar comes again below them.
  if (stream == Stream::err) return put(STDERR_FILENO, concat(kClearLine, lines, status_));
  put(STDERR_FILENO, kClearLine);
  put(STDOUT_FILENO, lines);
  put(STDERR_FILENO, status_);
}

void LaunchOutput::put(int descriptor, std::string_view bytes) {
  while (!bytes.empty() && !broken_) {
    const ssize_t written = ::write(descriptor, bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) {
      broken_ = true;
      return;
    }
    bytes.remove_prefix(static_cast<size_t>(written));
  }
}

}  // namespace weft::apps
