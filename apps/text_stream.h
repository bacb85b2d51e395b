#pragma once
#include <optional>
#include <string>
#include <string_view>

namespace weft::apps {

/// Turns the bytes of generated tokens, which may cut a character in two, into text that can be shown as it comes:
/// whole UTF-8 characters only, bytes that can be part of none replaced by U+FFFD, and nothing from a stop text on.
class TextStream {
 public:
  /// @param stop  ends the stream where it first occurs; "" never does
  explicit TextStream(std::string stop = "") : stop_(std::move(stop)) {}

  /// Takes bytes and returns the text that is now certain: what may yet become a character or the stop text is held.
  std::string push(std::string_view bytes);
  /// The rest, when nothing more will come.
  std::string finish();
  /// Whether the stop text has occurred; push() and finish() then return nothing more.
  bool stopped() const { return stopped_; }

 private:
  std::string take_characters(bool last);

  std::string stop_;
  std::string raw_;         ///< bytes that may be the beginning of the stop text
  std::string characters_;  ///< bytes before it that are no whole character yet
  bool stopped_ = false;
};

}  // namespace weft::apps
