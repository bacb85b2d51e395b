#pragma once
#include <string>
#include <string_view>
#include <vector>

namespace weft {

/// NAME=value of one environment variable.
struct Variable {
  std::string name;
  std::string value;
};

/// Variables, each name once. Functions of an Environment instead of getenv can be tested and say what they depend on.
using Environment = std::vector<Variable>;

/// The variables of this process whose names begin with `prefix`, sorted by name.
Environment process_environment(std::string_view prefix);

/// The value of a variable, nullptr if it is not there.
const std::string* find_variable(const Environment& environment, std::string_view name);

}  // namespace weft
