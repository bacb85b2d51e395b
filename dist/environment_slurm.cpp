// Slurm's compact lists of host names.
#include <algorithm>

#include "core/error.h"
#include "dist/launch_info.h"

namespace weft::dist {
namespace {

constexpr size_t kMaxNodes = 65536;

[[noreturn]] void refuse(const std::string& list, const char* why) {
  fail(ErrorKind::kUsage, "launch", "the Slurm node list ", weft::quoted(list), ' ', why);
}

bool digits(const std::string& text) {
  return !text.empty() && text.size() <= 9 && text.find_first_not_of("0123456789") == std::string::npos;
}

/// Splits at commas outside brackets.
std::vector<std::string> parts_of(const std::string& list) {
  std::vector<std::string> parts(1);
  int depth = 0;
  for (const char c : list) {
    if (c == '[') ++depth;
    if (c == ']') --depth;
    if (depth < 0 || depth > 1) refuse(list, "has brackets that do not match");
    if (c == ',' && depth == 0) {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  if (depth != 0) refuse(list, "has brackets that do not match");
  return parts;
}

/// "01-03" -> 01 02 03: as wide as the first number.
void append_range(const std::string& list, const std::string& range, std::vector<std::string>& out) {
  const size_t dash = range.find('-');
  const std::string first = range.substr(0, dash), last = dash == std::string::npos ? first : range.substr(dash + 1);
  if (!digits(first) || !digits(last)) refuse(list, "has a range that is no number or number-number");
  const int from = std::stoi(first), to = std::stoi(last);
  if (to < from) refuse(list, "has a range that ends before it begins");
  if (static_cast<size_t>(to - from) >= kMaxNodes - out.size()) refuse(list, "names too many nodes");
  for (int value = from; value <= to; ++value) {
    std::string number = std::to_string(value);
    if (number.size() < first.size()) number.insert(0, first.size() - number.size(), '0');
    out.push_back(number);
  }
}

/// All names of one part, "rack[0-1]n[1-2]": later brackets vary fastest.
std::vector<std::string> expand(const std::string& list, const std::string& part) {
  std::vector<std::string> names = {""};
  for (size_t at = 0; at < part.size();) {
    const size_t open = std::min(part.find('[', at), part.size());
    for (std::string& name : names) name += part.substr(at, open - at);
    if (open == part.size()) break;
    const size_t close = part.find(']', open);
    std::vector<std::string> numbers;
    for (size_t begin = open + 1; begin <= close;) {
      const size_t end = std::min(part.find(',', begin), close);
      append_range(list, part.substr(begin, end - begin), numbers);
      begin = end + 1;
    }
    if (numbers.size() * names.size() > kMaxNodes) refuse(list, "names too many nodes");
    std::vector<std::string> longer;
    for (const std::string& name : names) {
      for (const std::string& number : numbers) longer.push_back(name + number);
    }
    names = std::move(longer);
    at = close + 1;
  }
  return names;
}

}  // namespace

std::vector<std::string> expand_node_list(const std::string& list) {
  std::vector<std::string> nodes;
  for (const std::string& part : parts_of(list)) {
    if (part.empty()) refuse(list, "has an empty name");
    for (std::string& name : expand(list, part)) nodes.push_back(std::move(name));
    if (nodes.size() > kMaxNodes) refuse(list, "names too many nodes");
  }
  return nodes;
}

}  // namespace weft::dist
