// Where values come from: arguments, files and variables, each checked key by key.
#include <algorithm>
#include <iostream>
#include <map>

#include "apps/config_file.h"
#include "apps/options.h"
#include "apps/options_entry.h"

namespace weft::apps {
namespace {

constexpr std::string_view kCommandLine = "command line";

std::string place_of(const std::string& path, int line, int column) { return concat(path, ':', line, ':', column); }

}  // namespace

bool Options::parse(std::span<const std::string> args) { return parse(args, process_environment(), std::cout); }

bool Options::parse(std::span<const std::string> args, const Environment& environment, std::ostream& out) {
  if (args.size() == 1 && args[0] == "--help=markdown") {
    out << markdown();
    return false;
  }
  const std::optional<std::vector<Argument>> arguments = read_arguments(args);
  if (!arguments.has_value()) {
    out << help();
    return false;
  }
  const auto apply = [&](const Argument& argument) {
    assign(*argument.entry, argument.value, Source::kCommandLine, std::string(kCommandLine), argument.shown_as);
  };
  // --config first, whatever its position: the file is the lowest of the three sources.
  for (const Argument& argument : *arguments) {
    if (argument.entry->name != "config") continue;
    apply(argument);
    if (config_.empty()) fail(ErrorKind::kUsage, kCommandLine, "--config \"\": must be the path of a file");
    apply_file(config_);
  }
  apply_environment(environment);
  for (const Argument& argument : *arguments) {
    if (argument.entry->name != "config") apply(argument);
  }
  check_required();
  return true;
}

void Options::load(const std::filesystem::path& file) { apply_file(file); }

/// Splits the arguments into options and positionals; nullopt if help was asked for. Values are not looked at yet.
std::optional<std::vector<Options::Argument>> Options::read_arguments(std::span<const std::string> args) const {
  std::vector<Argument> found;
  std::map<const Entry*, std::string> before;
  std::vector<std::string> words;
  bool options_end = false;
  for (size_t i = 0; i < args.size(); ++i) {
    const std::string& argument = args[i];
    if (options_end || argument.size() < 2 || argument[0] != '-') {
      words.push_back(argument);
      continue;
    }
    if (argument == "-h" || argument == "--help") return std::nullopt;
    if (argument == "--") {
      options_end = true;
      continue;
    }
    if (!argument.starts_with("--")) unknown_option(argument);
    const size_t equals = argument.find('=');
    const std::string typed = argument.substr(0, equals);
    std::string name = typed.substr(2);
    std::replace(name.begin(), name.end(), '-', '_');
    Entry* entry = find(name);
    const bool negated = entry == nullptr && name.starts_with("no_");
    if (negated) entry = find(name.substr(3));
    const bool takes_value = entry != nullptr && !entry->placeholder.empty();
    if (entry == nullptr || entry->positional || (negated && takes_value)) unknown_option(argument);

    Argument option{entry, true, argument};
    if (equals != std::string::npos) {
      if (negated) fail(ErrorKind::kUsage, kCommandLine, weft::quoted(argument), ": ", typed, " takes no value");
      option.value = Raw{argument.substr(equals + 1)};
      option.shown_as = typed + " " + weft::quoted(argument.substr(equals + 1));
    } else if (takes_value) {
      const bool missing = i + 1 == args.size();
      if (missing || args[i + 1].starts_with("--")) {
        fail(ErrorKind::kUsage, kCommandLine, typed, " needs a value: ", entry->rule,
             missing ? ""
                     : "; found " + weft::quoted(args[i + 1]) + ". Write " + typed + "=" + args[i + 1] +
                           " if that is the value");
      }
      option.value = Raw{args[++i]};
      option.shown_as = typed + " " + weft::quoted(args[i]);
    } else {
      option.value = !negated;
    }
    const auto [first, is_new] = before.emplace(entry, option.shown_as);
    if (!is_new) {
      fail(ErrorKind::kUsage, kCommandLine, spelling(*entry), " is given twice: ", first->second, " and ",
           option.shown_as);
    }
    found.push_back(std::move(option));
  }

  size_t word = 0;
  for (const auto& entry : entries_) {
    if (!entry->positional || word == words.size()) continue;
    if (entry->repeated) {
      found.push_back({entry.get(), std::vector<Scalar>(words.begin() + static_cast<std::ptrdiff_t>(word), words.end()),
                       spelling(*entry)});
      word = words.size();
    } else {
      found.push_back({entry.get(), Raw{words[word]}, spelling(*entry) + " " + weft::quoted(words[word])});
      ++word;
    }
  }
  if (word < words.size()) {
    const std::string name = words[word].substr(0, words[word].find('='));
    const Entry* meant = find(name);
    fail(ErrorKind::kUsage, kCommandLine, "unexpected argument ", weft::quoted(words[word]),
         meant != nullptr && !meant->positional ? "; did you mean \"" + spelling(*meant) + "\"?" : ".", " See weft ",
         command_, " --help");
  }
  return found;
}

void Options::unknown_option(const std::string& argument) const {
  std::string name = argument.substr(0, argument.find('='));
  std::vector<std::string> candidates = {"--help"};
  for (const auto& entry : entries_) {
    if (entry->positional) continue;
    candidates.push_back(spelling(*entry));
    if (entry->placeholder.empty()) candidates.push_back("--no-" + spelling(*entry).substr(2));
  }
  // --model.layers: sections belong in files only.
  const size_t dot = name.find('.');
  const std::string bare = dot == std::string::npos ? name : "--" + name.substr(dot + 1);
  const std::string meant = did_you_mean(bare, candidates);
  fail(ErrorKind::kUsage, kCommandLine, "unknown option ", weft::quoted(name), meant.empty() ? "." : meant,
       " See weft ", command_, " --help");
}

void Options::assign(Entry& entry, const Given& value, Source source, const std::string& place,
                     const std::string& shown_as) {
  try {
    entry.field.assign(value);
  } catch (const Refused& refused) {
    const std::string detail = refused.detail.empty() ? "" : " (" + refused.detail + ")";
    fail(ErrorKind::kUsage, place, shown_as, ": must be ", entry.rule, detail);
  }
  entry.origin = {source, source == Source::kEnvironment ? "environment " + variable(entry) : place};
}

void Options::apply_file(const std::filesystem::path& path) {
  const ConfigFile file = read_config_file(path);
  for (const ConfigSection& section : file.sections) {
    const auto known = [&](const auto& declared) { return declared.first == section.name; };
    if (std::any_of(sections_.begin(), sections_.end(), known)) continue;
    const std::string place = place_of(file.path, section.line, section.column);
    if (const Entry* entry = find(section.name); entry != nullptr) {
      unknown_key(place, ConfigEntry{"", section.name, Other{"a table"}});
    }
    std::vector<std::string> candidates;
    for (const auto& declared : sections_) candidates.push_back(declared.first);
    fail(ErrorKind::kUsage, place, "unknown section [", section.name, ']', did_you_mean(section.name, candidates));
  }
  for (const ConfigEntry& found : file.entries) {
    Entry* entry = find(found.key);
    if (entry == nullptr || !entry->saved || entry->section != found.section) {
      unknown_key(place_of(file.path, found.key_line, found.key_column), found);
    }
    assign(*entry, found.value, Source::kFile, place_of(file.path, found.line, found.column),
           found.key + " = " + shown(found.value));
  }
}

void Options::unknown_key(const std::string& place, const ConfigEntry& found) const {
  const auto in = [](const std::string& section) {
    return section.empty() ? "above the first [section]" : "in [" + section + "]";
  };
  const Entry* entry = find(found.key);
  if (entry != nullptr && !entry->saved) {
    fail(ErrorKind::kUsage, place, found.key, " is for the command line only");
  }
  if (entry != nullptr && entry->section != found.section) {
    fail(ErrorKind::kUsage, place, found.key, " belongs ", in(entry->section), ", not ", in(found.section));
  }
  if (entry != nullptr)
    fail(ErrorKind::kUsage, place, found.key, ": must be ", entry->rule, " (it is ", shown(found.value), ')');
  fail(ErrorKind::kUsage, place, "unknown key ", weft::quoted(found.key), ' ', in(found.section),
       did_you_mean(found.key, names()), " weft ", command_, " --help lists them");
}

void Options::apply_environment(const Environment& environment) {
  const std::string prefix = variable_prefix(command_);
  for (const Variable& given : environment) {
    if (!given.name.starts_with(prefix)) continue;
    const auto processes = process_variables();
    const auto same = [&](const ProcessVariable& process) { return process.name == given.name; };
    if (std::any_of(processes.begin(), processes.end(), same)) continue;
    const auto meant = std::find_if(entries_.begin(), entries_.end(),
                                    [&](const auto& entry) { return entry->saved && variable(*entry) == given.name; });
    const std::string shown_as = given.name + "=" + weft::quoted(given.value);
    if (meant == entries_.end()) {
      std::vector<std::string> candidates;
      for (const auto& entry : entries_) {
        if (entry->saved) candidates.push_back(variable(*entry));
      }
      fail(ErrorKind::kUsage, "environment", shown_as, ": weft ", command_, " has no such option",
           did_you_mean(given.name, candidates));
    }
    assign(**meant, Raw{given.value}, Source::kEnvironment, "environment", shown_as);
  }
}

void Options::check_required() const {
  for (const auto& entry : entries_) {
    if (!entry->required || !entry->field.empty()) continue;
    if (entry->positional) {
      fail(ErrorKind::kUsage, kCommandLine, "missing argument ", spelling(*entry), ": ", entry->help, "\n", usage());
    }
    const std::string key = entry->section.empty() ? entry->name : "[" + entry->section + "] " + entry->name;
    fail(ErrorKind::kUsage, kCommandLine, spelling(*entry), " is required: ", entry->help, ". Give ", spelling(*entry),
         ' ', entry->placeholder, ", ", key, " in a --config file, or ", variable(*entry));
  }
}

void Options::reject_text(std::string_view name, const std::string& text) const {
  const Entry& entry = at(name);
  const std::string value = entry.field.literal();
  fail(ErrorKind::kUsage, entry.origin.place,
       entry.origin.source == Source::kCommandLine ? spelling(entry) + " " : entry.name + " = ", value, ": ", text);
}

}  // namespace weft::apps
