#pragma once
#include <cfloat>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <iosfwd>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "apps/environment.h"
#include "apps/option_value.h"
#include "core/error.h"

namespace weft::apps {

struct ConfigEntry;
struct OptionField;

/// Where an option's value came from; a later one wins.
enum class Source : uint8_t { kDefault, kFile, kEnvironment, kCommandLine };

/// A source and the place in it.
struct Origin {
  Source source = Source::kDefault;
  std::string place = "default";  ///< "train.toml:3:6", "environment WEFT_TRAIN_LR", "command line"
};

/// Which integers an option takes. `unit` is printed after the range: "bytes", "tokens".
struct IntRule {
  int64_t min = INT64_MIN;
  int64_t max = INT64_MAX;
  std::string_view unit = "";
};

/// Which numbers an option takes: min <= x <= max and above < x < below. Never NaN or infinite.
struct NumberRule {
  double min = -DBL_MAX;
  double max = DBL_MAX;
  double above = -DBL_MAX;
  double below = DBL_MAX;
  std::string_view unit = "";
};

/// Which texts an option takes: one of `choices` if there are any. A required one must be given and not be empty.
struct TextRule {
  std::vector<std::string> choices = {};
  bool required = false;
  std::string_view placeholder = "TEXT";
};

/// Like TextRule for a path; existence is not checked here. Relative paths start at the working directory, in a file
/// too.
struct PathRule {
  bool required = false;
  std::string_view placeholder = "PATH";
};

/// Switches of an option that turns on any of them: "norm,attention", or "none".
struct SwitchRule {
  std::vector<std::pair<std::string, bool*>> switches;
  std::string was_bool = {};  ///< of an option that was true or false before: what that is now, for the message
};

/// How many elements a list takes.
struct ListSize {
  size_t min = 0;
  size_t max = SIZE_MAX;
};

/// The options of one command, each declared once: that declaration serves the command line, a TOML file, environment
/// variables, --help, the documentation page and the resolved file saved with a run.
///
///   TrainOptions o;
///   Options options("train", "Trains a model.");
///   options.section("model", "The model");
///   options.add("layers", &o.layers, {.min = 1, .max = 1000}, "transformer blocks");
///   if (!options.parse(args)) return 0;  // --help was printed
///
/// One option, three spellings (the name is unique within the command):
///   command line   --layers 6, --layers=6; `-` and `_` are the same; booleans --flag, --no-flag, --flag=true
///   TOML file      [model] layers = 6, in the file given with --config
///   environment    WEFT_TRAIN_LAYERS=6
/// Precedence: default < load() < --config < environment < command line. The fields' values at declaration are the
/// defaults; the fields must outlive this object. Any other key, variable, argument or value is an Error (kUsage) that
/// names its place, the value, the rule and the nearest name; the fields then hold a mixture and must not be used.
/// A wrong declaration (a name twice, a default outside its range) is an Error (kState).
class Options {
 public:
  /// @param command  the words after the program's name, "train" or "checkpoint verify"
  Options(std::string command, std::string summary);
  ~Options();
  Options(const Options&) = delete;
  Options& operator=(const Options&) = delete;

  /// What follows belongs to [name]; before the first call, to the file's top level.
  void section(std::string name, std::string title);

  /// Whole numbers: 6, 1_000, 1e6, 1.5M, 64Ki (see read_integer). An optional one also takes "none".
  void add(std::string name, int64_t* field, IntRule rule, std::string help);
  void add(std::string name, std::optional<int64_t>* field, IntRule rule, std::string help);
  void add(std::string name, double* field, NumberRule rule, std::string help);
  void add(std::string name, std::optional<double>* field, NumberRule rule, std::string help);
  void add(std::string name, bool* field, std::string help);
  void add(std::string name, std::string* field, TextRule rule, std::string help);
  void add(std::string name, std::filesystem::path* field, PathRule rule, std::string help);
  /// Lists: 0.9,0.95 on the command line and in variables, [0.9, 0.95] in a file.
  void add(std::string name, std::vector<int64_t>* field, IntRule each, ListSize size, std::string help);
  void add(std::string name, std::vector<double>* field, NumberRule each, ListSize size, std::string help);
  void add(std::string name, std::vector<std::string>* field, TextRule each, ListSize size, std::string help);
  /// One of a few names, each standing for a value of an enumeration.
  template <class Enum>
    requires std::is_enum_v<Enum>
  void add(std::string name, Enum* field, std::vector<std::pair<std::string, Enum>> choices, std::string help);

  /// Any of a few switches, joined by commas, or "none"; in a file it is that text too.
  void add(std::string name, SwitchRule rule, std::string help);

  /// --name for this call only (--dry-run, --yes): not in files, variables or the resolved file.
  void action(std::string name, bool* field, std::string help);
  /// The same with a value: --resume DIR.
  void action(std::string name, std::string* field, std::string_view placeholder, std::string help);

  /// Arguments without a name, in this order, command line only; a list takes all that are left and stands last.
  void positional(std::string name, std::string* field, std::string help, bool required = true);
  void positional(std::string name, std::filesystem::path* field, std::string help, bool required = true);
  void positional_list(std::string name, std::vector<std::string>* field, ListSize size, std::string help);

  /// Reads a TOML file below everything that parse() reads: the file saved with the run that is being resumed.
  void load(const std::filesystem::path& file);

  /// Reads the arguments after the command's name, the file that --config names, and the environment.
  /// @return false if -h or --help was among the arguments: the help is printed on `out`, nothing was read. The same
  /// for --help=markdown alone, which prints the section of the documentation page.
  [[nodiscard]] bool parse(std::span<const std::string> args);
  [[nodiscard]] bool parse(std::span<const std::string> args, const Environment& environment, std::ostream& out);

  /// Where the value of an option came from.
  const Origin& origin(std::string_view name) const;
  /// True if a file, a variable or the command line gave it.
  bool given(std::string_view name) const { return origin(name).source != Source::kDefault; }

  /// Names of all options that a file may give, as declared.
  std::vector<std::string> names() const;

  /// Throws the Error for a value that is wrong only in company: reject("heads", "must divide width = ", o.width).
  template <class... Parts>
  [[noreturn]] void reject(std::string_view name, const Parts&... parts) const {
    reject_text(name, concat(parts...));
  }

  /// The text of --help, wrapped at `width` columns.
  std::string help(int width = 100) const;
  /// The values as they stand, as a TOML file that gives the same values bit for bit. With `sources`, each line tells
  /// where its value came from: `lr = 0.001  # command line`.
  std::string toml(bool sources) const;
  /// A page section: one Markdown table per section of options.
  std::string markdown() const;

 private:
  struct Entry;
  struct Argument;
  Entry& declare(std::string name, std::string_view placeholder, std::string rule, std::string help, OptionField field);
  void declare_choice(std::string name, std::vector<std::string> names, std::function<void(size_t)> set,
                      std::function<size_t()> get, std::string help);
  void declare_positional(std::string name, std::string rule, std::string help, OptionField field, bool required);
  static void check_default(Entry& entry, bool required = false);
  Entry* find(std::string_view name) const;
  const Entry& at(std::string_view name) const;
  std::string spelling(const Entry& entry) const;
  std::string variable(const Entry& entry) const;

  std::optional<std::vector<Argument>> read_arguments(std::span<const std::string> args) const;
  void assign(Entry& entry, const Given& value, Source source, const std::string& place, const std::string& shown_as);
  void apply_file(const std::filesystem::path& path);
  void apply_environment(const Environment& environment);
  void check_required() const;
  [[noreturn]] void unknown_option(const std::string& argument) const;
  [[noreturn]] void unknown_key(const std::string& place, const ConfigEntry& found) const;
  [[noreturn]] void reject_text(std::string_view name, const std::string& text) const;
  std::string usage() const;

  std::string command_, summary_;
  std::vector<std::pair<std::string, std::string>> sections_;  // name, title
  std::vector<std::unique_ptr<Entry>> entries_;                // as declared
  std::filesystem::path config_;
};

template <class Enum>
  requires std::is_enum_v<Enum>
void Options::add(std::string name, Enum* field, std::vector<std::pair<std::string, Enum>> choices, std::string help) {
  std::vector<std::string> names;
  std::vector<Enum> values;
  for (auto& [choice, value] : choices) {
    names.push_back(choice);
    values.push_back(value);
  }
  const auto set = [field, values](size_t i) { *field = values[i]; };
  const auto get = [field, values] {
    size_t i = 0;
    while (i < values.size() && values[i] != *field) ++i;
    return i;
  };
  declare_choice(std::move(name), std::move(names), set, get, std::move(help));
}

}  // namespace weft::apps
