#include "apps/progress.h"

#include <sys/ioctl.h>
#include <unistd.h>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <utility>

#include "core/error.h"
#include "core/log.h"

namespace weft::apps {
namespace {

constexpr int kDefaultWidth = 80;
constexpr int kMaxBar = 30;
constexpr int kMinBar = 8;

double steady_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

int terminal_width() {
  winsize size{};
  return ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : kDefaultWidth;
}

bool is_continuation(char c) { return (static_cast<unsigned char>(c) & 0xc0) == 0x80; }

/// Columns of `text`, a code point each.
int columns(std::string_view text) {
  return static_cast<int>(std::count_if(text.begin(), text.end(), [](char c) { return !is_continuation(c); }));
}

/// Rounded down, so that 100 means done.
int percent(int64_t done, int64_t total) {
  return static_cast<int>(std::clamp(100.0 * static_cast<double>(done) / static_cast<double>(total), 0.0, 100.0));
}

/// The first `limit` code points.
std::string_view cut(std::string_view text, int limit) {
  size_t end = 0;
  for (int taken = 0; end < text.size(); ++end) {
    if (!is_continuation(text[end]) && taken++ == limit) break;
  }
  return text.substr(0, end);
}

}  // namespace

std::string duration_text(double seconds) {
  // 1e10 seconds are 300 years: beyond that an estimate says nothing.
  if (!(seconds >= 0) || seconds > 1e10) return "-:--:--";
  const int64_t whole = std::llround(seconds);
  const auto two = [](int64_t value) { return (value < 10 ? "0" : "") + std::to_string(value); };
  return std::to_string(whole / 3600) + ':' + two(whole / 60 % 60) + ':' + two(whole % 60);
}

void EtaEstimate::add(int64_t done, double now) {
  if (started_ && now > last_time_) {
    const double elapsed = now - last_time_;
    const double keep = std::exp(-elapsed / memory_);
    time_ = time_ * keep + elapsed;
    work_ = work_ * keep + static_cast<double>(done - last_done_);
  } else if (started_) {
    return;  // no time has passed: this work is counted with the next
  }
  started_ = true;
  last_time_ = now;
  last_done_ = done;
}

double EtaEstimate::rate() const { return time_ > 0 ? work_ / time_ : std::numeric_limits<double>::quiet_NaN(); }

double EtaEstimate::remaining(int64_t total) const {
  return rate() > 0 ? static_cast<double>(total - last_done_) / rate() : std::numeric_limits<double>::quiet_NaN();
}

Terminal Terminal::standard_error() {
  const char* term = std::getenv("TERM");
  Terminal terminal;
  terminal.interactive = isatty(STDERR_FILENO) == 1 && term != nullptr && *term != '\0' &&
                         std::string_view(term) != "dumb" && log::enabled(log::Level::kInfo);
  terminal.width = terminal_width;
  terminal.status = [](std::string_view text) { log::set_status(text); };
  terminal.line = [](std::string_view text) { log::info(text); };
  return terminal;
}

Progress::Progress(ProgressOptions options, Terminal terminal, Clock clock)
    : options_(std::move(options)),
      terminal_(std::move(terminal)),
      clock_(clock ? std::move(clock) : Clock(steady_seconds)),
      done_(options_.start),
      begin_(clock_()) {
  if (options_.total < 0 || options_.start < 0 || (options_.total > 0 && options_.start > options_.total)) {
    fail(ErrorKind::kValue, "progress", "start ", options_.start, " and total ", options_.total,
         " must be >= 0, start <= total unless total is 0 (unknown)");
  }
  eta_.add(done_, begin_);
}

Progress::~Progress() {
  if (terminal_.interactive && printed_ && !finished_) terminal_.status("");
}

bool Progress::due(int64_t done) const {
  if (finished_) return false;
  if (!printed_ || (options_.total > 0 && done >= options_.total)) return true;
  if (!terminal_.interactive && options_.line_steps > 0) {
    return done / options_.line_steps != printed_done_ / options_.line_steps;
  }
  return clock_() - printed_at_ >= (terminal_.interactive ? options_.draw_seconds : options_.line_seconds);
}

void Progress::update(int64_t done, std::string_view fields) {
  if (finished_) return;
  const double now = clock_();
  done_ = done;
  eta_.add(done, now);
  if (!due(done)) return;
  printed_ = true;
  printed_at_ = now;
  printed_done_ = done;
  if (terminal_.interactive) {
    terminal_.status(bar_line(fields, now));
    return;
  }
  std::string line = options_.title + ' ' + counts() + "  elapsed " + duration_text(now - begin_);
  if (options_.total > 0) line += "  eta " + duration_text(eta_.remaining(options_.total));
  if (!fields.empty()) line += "  " + log::printable(fields, false);
  terminal_.line(line);
}

void Progress::finish(std::string_view fields) {
  if (finished_) return;
  finished_ = true;
  if (terminal_.interactive && printed_) terminal_.status("");
  std::string line = options_.title + ' ' + counts() + "  took " + duration_text(clock_() - begin_);
  if (!fields.empty()) line += "  " + log::printable(fields, false);
  terminal_.line(line);
}

/// "420/1,000 (42%)".
std::string Progress::counts() const {
  if (options_.total == 0) return grouped(done_);
  return concat(grouped(done_), '/', grouped(options_.total), " (", percent(done_, options_.total), "%)");
}

std::string Progress::bar_line(std::string_view fields, double now) const {
  const int width = std::max(1, terminal_.width() - 1);  // the last column would wrap on some terminals
  std::string tail;
  std::string head = options_.title;
  double share = 0;
  if (options_.total == 0) {
    tail = "  " + grouped(done_) + "  " + duration_text(now - begin_);
  } else {
    share = std::clamp(static_cast<double>(done_) / static_cast<double>(options_.total), 0.0, 1.0);
    const std::string shown = std::to_string(percent(done_, options_.total));
    head += std::string(4 - shown.size(), ' ') + shown + '%';
    tail = "  " + grouped(done_) + '/' + grouped(options_.total) + "  " + duration_text(now - begin_) + " eta " +
           duration_text(eta_.remaining(options_.total));
  }
  if (!fields.empty()) tail += "  " + log::printable(fields, false);
  // The text comes first: the bar takes what is left, or nothing.
  const int room = std::min(kMaxBar, width - columns(head) - columns(tail) - 3);
  if (options_.total > 0 && room >= kMinBar) {
    const int filled = static_cast<int>(share * room);
    head += " [" + std::string(static_cast<size_t>(filled), '#') +
            std::string(static_cast<size_t>(room - filled), '-') + ']';
  }
  return std::string(cut(head + tail, width));
}

}  // namespace weft::apps
