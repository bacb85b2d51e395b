#pragma once
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/environment.h"

namespace weft::apps {

using weft::Environment;
using weft::Variable;

/// The WEFT_* variables of this process, sorted by name.
Environment process_environment();

/// A variable that speaks to the whole process rather than to one option of one command.
struct ProcessVariable {
  std::string_view name;
  std::string_view help;
};

/// The complete list: every other WEFT_ variable must belong to a command, as WEFT_<COMMAND>_<OPTION>.
std::span<const ProcessVariable> process_variables();

/// "WEFT_" + the words in upper case with '_' for anything that is not a letter or digit, joined by '_', + "_".
/// "checkpoint verify" -> "WEFT_CHECKPOINT_VERIFY_".
std::string variable_prefix(std::string_view command);

/// Checks that each variable that begins with `prefix` ("WEFT_", "WEFT_CHECKPOINT_") is a process variable or begins
/// with the prefix of one of `commands` below it: a mistyped variable must not be ignored.
/// @throws Error  kUsage, with the name and what it may have meant.
void check_environment(const Environment& environment, std::string_view prefix, std::span<const std::string> commands);

}  // namespace weft::apps
