#pragma once
#include <cstddef>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

namespace weft::apps {

/// What the ranks of a launch print, as one output: every line whole and after its rank, "[3] step 10 ...". A line that
/// is drawn over with carriage returns (a progress bar) counts in its last form; rank 0's is kept as the terminal's
/// last line, which others pass above. A line of more than 1 MiB is cut into lines.
class LaunchOutput {
 public:
  enum class Stream : uint8_t { out, err };

  /// @param terminal  standard error is a terminal that obeys control codes
  explicit LaunchOutput(bool terminal) : terminal_(terminal) {}
  ~LaunchOutput();

  /// Bytes that a rank printed on one of its streams.
  void add(int rank, Stream stream, std::string_view bytes);
  /// The rank prints no more: a last line without an end gets one.
  void end(int rank, Stream stream);
  /// A line of the launcher's own on standard error, after "[launch]"; safe to call from any thread.
  void note(std::string_view text);
  /// A line that arrived over the control plane, after its rank, on standard error; safe to call from any thread.
  void line(int rank, std::string_view text);
  /// The last lines of a rank on both streams, oldest first; at most 20.
  std::vector<std::string> last_lines(int rank);
  /// Standard output or error could not be written: nobody reads any more.
  bool broken() const { return broken_; }

 private:
  struct Partial {
    std::string text;
    bool redrawn = false;  ///< the next character begins the line anew
  };
  void take_line(int rank, Partial& partial, std::string& lines);
  void write(Stream stream, std::string_view lines);
  void put(int descriptor, std::string_view bytes);

  const bool terminal_;
  std::mutex mutex_;
  std::map<std::pair<int, Stream>, Partial> partial_;
  std::map<int, std::deque<std::string>> last_;
  std::string status_;
  bool broken_ = false;
};

}  // namespace weft::apps
