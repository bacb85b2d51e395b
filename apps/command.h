#pragma once
#include <iosfwd>
#include <span>
#include <string>
#include <string_view>

#include "apps/environment.h"

namespace weft::apps {

/// A word of the command line and what it runs. `run` gets the arguments after the word and returns the exit code.
struct Command {
  std::string_view name;
  std::string_view summary;  ///< one line
  int (*run)(std::span<const std::string> args);
};

/// The list that `weft` alone and `weft --help` print: `path` is "weft" or "weft checkpoint".
std::string command_list(std::string_view path, std::string_view summary, std::span<const Command> commands);

/// Runs the command that args[0] names; `path` as above, so that a command can have commands of its own. No argument,
/// -h and --help print the list on `out`; `help NAME` is `NAME --help`. Variables that begin with the path's prefix but
/// belong to none of the commands are refused.
/// @throws Error  kUsage for an unknown command or variable; whatever the command throws.
int dispatch(std::string_view path, std::string_view summary, std::span<const Command> commands,
             std::span<const std::string> args, const Environment& environment, std::ostream& out);

/// The whole program: dispatch below "weft", plus --version, with every exception caught here and printed on `err` as
/// `weft: error: ...`. The exit code is the command's, 2 for an Error of kind kUsage, 1 for any other exception and for
/// an `out` that could not be written.
int run_program(std::string_view summary, std::string_view version, std::span<const Command> commands,
                std::span<const std::string> args, const Environment& environment, std::ostream& out,
                std::ostream& err);

}  // namespace weft::apps
