#pragma once
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

namespace weft {

/// What rule was broken. Programs map kinds to exit codes: kUsage is 2, everything else is 1.
enum class ErrorKind : uint8_t {
  kShape,   ///< shapes do not fit each other or the operation
  kDType,   ///< an element type that the operation does not take
  kDevice,  ///< tensors on different devices, or a device that is not there
  kValue,   ///< an argument outside its range
  kIndex,   ///< an index outside a tensor, a vocabulary or a list
  kState,   ///< the right call at the wrong time (a second backward, a released graph)
  kMemory,  ///< memory that could not be had
  kUsage,   ///< a command line or configuration that cannot be understood
  kData,    ///< a file or message whose content breaks its format
  kIo,      ///< the operating system refused to read or write
};

/// "shape", "dtype", ...
const char* to_string(ErrorKind kind);

/// Every failure that a user can cause or meet. what() starts with "[where] ", prints the values, states the rule and
/// gives a hint where there is one.
class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, std::string message) : std::runtime_error(std::move(message)), kind_(kind) {}
  ErrorKind kind() const { return kind_; }

 private:
  ErrorKind kind_;
};

/// Concatenates anything that prints to a stream.
template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return std::move(out).str();
}

/// Throws Error(kind, "[where] parts...").
template <class... Parts>
[[noreturn]] void fail(ErrorKind kind, std::string_view where, const Parts&... parts) {
  throw Error(kind, concat('[', where, "] ", parts...));
}

/// 1234567 -> "1,234,567".
std::string grouped(int64_t value);

/// `text` in double quotes with control characters and invalid UTF-8 escaped, cut after `limit` bytes: for messages.
std::string quoted(std::string_view text, size_t limit = 80);
// For std::string arguments, argument-dependent lookup also finds std::quoted, which would be the better match.
inline std::string quoted(const std::string& text, size_t limit = 80) { return quoted(std::string_view(text), limit); }
inline std::string quoted(std::string& text, size_t limit = 80) { return quoted(std::string_view(text), limit); }
inline std::string quoted(const char* text, size_t limit = 80) { return quoted(std::string_view(text), limit); }

/// The member of `candidates` closest to `word` in edit distance, as "; did you mean \"...\"?", or "" if none is close.
template <class Strings>
std::string did_you_mean(std::string_view word, const Strings& candidates);

/// Number of single-character insertions, deletions, substitutions and swaps of neighbours between two words.
int edit_distance(std::string_view a, std::string_view b);

template <class Strings>
std::string did_you_mean(std::string_view word, const Strings& candidates) {
  std::string best;
  int distance = static_cast<int>(word.size() / 3) + 2;
  for (const auto& candidate : candidates) {
    const int d = edit_distance(word, candidate);
    if (d < distance) distance = d, best = candidate;
  }
  return best.empty() ? "" : "; did you mean \"" + best + "\"?";
}

}  // namespace weft
