#include "apps/environment.h"

#include <algorithm>

#include "core/error.h"

namespace weft::apps {
namespace {

constexpr ProcessVariable kProcessVariables[] = {
    {"WEFT_CACHE_DIR", "directory for files that can be made again"},
    {"WEFT_ELASTIC",
     "1 where another start of the run may have another number of ranks; weft launch --elastic sets it"},
    {"WEFT_KEYS", "file with the keys of the run's control plane; weft launch sets it"},
    {"WEFT_LOCAL_RANK", "which of its machine's processes this is; weft launch sets it"},
    {"WEFT_LOG_LEVEL", "debug, info (default), warn, error or off"},
    {"WEFT_NODE_RANK", "which of the run's machines this is; weft launch sets it"},
    {"WEFT_NUM_THREADS", "threads that kernels use; default: the processors this process may use"},
    {"WEFT_RANK", "which process of the run this is; weft launch sets it"},
    {"WEFT_RENDEZVOUS", "HOST:PORT of the run's control server; weft launch sets it"},
    {"WEFT_RESTART", "how often weft launch --restarts has started the run again"},
    {"WEFT_RUN_ID", "32 hexadecimal digits that all processes of a run share; weft launch sets it"},
    {"WEFT_WORLD_SIZE", "how many processes the run has; weft launch sets it"},
    {"WEFT_TEST_DATA", "directory of data files for the tests that need one"},
};

std::string upper(std::string_view text) {
  std::string out;
  for (const char c : text) {
    const bool lower = c >= 'a' && c <= 'z', kept = (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
    out += lower ? static_cast<char>(c - 'a' + 'A') : kept ? c : '_';
  }
  return out;
}

}  // namespace

Environment process_environment() { return weft::process_environment("WEFT_"); }

std::span<const ProcessVariable> process_variables() { return kProcessVariables; }

std::string variable_prefix(std::string_view command) { return "WEFT_" + upper(command) + "_"; }

void check_environment(const Environment& environment, std::string_view prefix, std::span<const std::string> commands) {
  for (const Variable& variable : environment) {
    const std::string_view name = variable.name;
    if (!name.starts_with(prefix)) continue;
    std::vector<std::string> candidates;
    bool known = false;
    for (const ProcessVariable& process : kProcessVariables) {
      known = known || process.name == name;
      candidates.emplace_back(process.name);
    }
    // The word after the prefix names the command: a misspelled one is compared without its option.
    const size_t word_end = std::min(name.size(), name.find('_', prefix.size()));
    for (const std::string& command : commands) {
      const std::string begin = std::string(prefix) + upper(command) + "_";
      known = known || name.starts_with(begin);
      if (word_end < name.size()) candidates.push_back(begin + std::string(name.substr(word_end + 1)));
    }
    if (known) continue;
    fail(ErrorKind::kUsage, "environment", variable.name, '=', weft::quoted(variable.value), ": no such variable",
         did_you_mean(name, candidates), " Options are read from ", prefix,
         "<COMMAND>_<OPTION>. Unset it if it is not meant.");
  }
}

}  // namespace weft::apps
