#pragma once
#include <algorithm>
#include <string>

// Columns of the tables that commands print.

namespace weft::apps {

inline std::string left(std::string text, size_t width) {
  text.resize(std::max(text.size(), width), ' ');
  return text;
}
inline std::string right(const std::string& text, size_t width) {
  return std::string(width - std::min(width, text.size()), ' ') + text;
}

}  // namespace weft::apps
