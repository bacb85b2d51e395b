#include "core/environment.h"

#include <unistd.h>

#include <algorithm>

namespace weft {

Environment process_environment(std::string_view prefix) {
  Environment found;
  for (char** at = environ; at != nullptr && *at != nullptr; ++at) {
    const std::string_view entry = *at;
    const size_t equals = entry.find('=');
    if (entry.starts_with(prefix) && equals != std::string_view::npos) {
      found.push_back({std::string(entry.substr(0, equals)), std::string(entry.substr(equals + 1))});
    }
  }
  std::sort(found.begin(), found.end(), [](const Variable& a, const Variable& b) { return a.name < b.name; });
  return found;
}

const std::string* find_variable(const Environment& environment, std::string_view name) {
  const auto found =
      std::find_if(environment.begin(), environment.end(), [&](const Variable& each) { return each.name == name; });
  return found == environment.end() ? nullptr : &found->value;
}

}  // namespace weft
