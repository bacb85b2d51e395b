#include "apps/command.h"

#include <algorithm>
#include <exception>
#include <new>
#include <ostream>
#include <vector>

#include "core/error.h"
#include "core/log.h"
#include "core/thread_pool.h"

namespace weft::apps {
namespace {

constexpr int kFailed = 1;
constexpr int kUsageError = 2;

std::vector<std::string> names_of(std::span<const Command> commands) {
  std::vector<std::string> names;
  for (const Command& command : commands) names.emplace_back(command.name);
  return names;
}

const Command* find(std::span<const Command> commands, std::string_view name) {
  const auto found =
      std::find_if(commands.begin(), commands.end(), [&](const Command& command) { return command.name == name; });
  return found == commands.end() ? nullptr : &*found;
}

/// The words after the program's name, as in a variable's: "weft checkpoint" -> "WEFT_CHECKPOINT_".
std::string prefix_of(std::string_view path) {
  const size_t space = path.find(' ');
  return space == std::string_view::npos ? "WEFT_" : variable_prefix(path.substr(space + 1));
}

/// Standard output is buffered and may be a full disk: a program that lost its output did not succeed.
int flushed(std::ostream& out, std::ostream& err, int code) {
  out.flush();
  if (out) return code;
  err << "weft: error: standard output could not be written\n";
  return code == 0 ? kFailed : code;
}

}  // namespace

std::string command_list(std::string_view path, std::string_view summary, std::span<const Command> commands) {
  size_t longest = 0;
  for (const Command& command : commands) longest = std::max(longest, command.name.size());
  std::string out = concat("usage: ", path, " COMMAND [options]\n\n", summary, "\n\nCommands:\n");
  for (const Command& command : commands) {
    out += concat("  ", command.name, std::string(longest - command.name.size() + 3, ' '), command.summary, '\n');
  }
  return out + concat("\n", path, " COMMAND --help tells a command's options.\n");
}

int dispatch(std::string_view path, std::string_view summary, std::span<const Command> commands,
             std::span<const std::string> args, const Environment& environment, std::ostream& out) {
  const bool help_word = args.size() == 2 && args[0] == "help";
  if (args.empty() || args[0] == "-h" || args[0] == "--help" || (args.size() == 1 && args[0] == "help")) {
    out << command_list(path, summary, commands);
    return 0;
  }
  const std::string& name = help_word ? args[1] : args[0];
  const Command* command = find(commands, name);
  if (command == nullptr) {
    fail(ErrorKind::kUsage, "command line", name.starts_with('-') ? "unknown option " : "unknown command ",
         weft::quoted(name), did_you_mean(name, names_of(commands)), " ", path, " --help lists the commands");
  }
  if (help_word) return command->run(std::vector<std::string>{"--help"});
  check_environment(environment, prefix_of(path), names_of(commands));
  return command->run(args.subspan(1));
}

int run_program(std::string_view summary, std::string_view version, std::span<const Command> commands,
                std::span<const std::string> args, const Environment& environment, std::ostream& out,
                std::ostream& err) {
  const auto report = [&](const char* what, int code) {
    log::set_status("");
    out.flush();  // what was printed before the error comes before it
    err << "weft: error: " << log::printable(what) << '\n';
    return code;
  };
  try {
    // A bad WEFT_LOG_LEVEL or WEFT_NUM_THREADS is refused before anything runs.
    log::level();
    num_threads();
    if (args.size() == 1 && args[0] == "--version") {
      out << "weft " << version << '\n';
      return flushed(out, err, 0);
    }
    return flushed(out, err, dispatch("weft", summary, commands, args, environment, out));
  } catch (const Error& error) {
    return report(error.what(), error.kind() == ErrorKind::kUsage ? kUsageError : kFailed);
  } catch (const std::bad_alloc&) {
    return report("out of memory", kFailed);
  } catch (const std::exception& error) {
    return report(error.what(), kFailed);
  } catch (...) {
    return report("an exception of unknown type", kFailed);
  }
}

}  // namespace weft::apps
