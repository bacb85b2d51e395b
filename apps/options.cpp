#include "apps/options.h"

#include <algorithm>

#include "apps/options_entry.h"

namespace weft::apps {
namespace {

std::string with_unit(std::string rule, std::string_view unit) {
  return unit.empty() ? rule : concat(rule, " (", unit, ')');
}

std::string text(const IntRule& rule) {
  const bool low = rule.min != INT64_MIN, high = rule.max != INT64_MAX;
  std::string out = "an integer";
  if (low && high) {
    out += " from " + grouped(rule.min) + " to " + grouped(rule.max);
  } else if (low) {
    out += " >= " + grouped(rule.min);
  } else if (high) {
    out += " <= " + grouped(rule.max);
  }
  return with_unit(out, rule.unit);
}

std::string text(const NumberRule& rule) {
  std::string out = "a number", separator = " ";
  const auto bound = [&](bool set, const char* sign, double value) {
    if (set) out += separator + sign + shortest(value), separator = " and ";
  };
  bound(rule.above != -DBL_MAX, "> ", rule.above);
  bound(rule.min != -DBL_MAX, ">= ", rule.min);
  bound(rule.below != DBL_MAX, "< ", rule.below);
  bound(rule.max != DBL_MAX, "<= ", rule.max);
  return with_unit(out, rule.unit);
}

std::string one_of(const std::vector<std::string>& names) {
  std::string out = "one of ";
  for (size_t i = 0; i < names.size(); ++i) out += (i == 0 ? "" : ", ") + names[i];
  return out;
}

std::string text(const TextRule& rule) { return rule.choices.empty() ? "text" : one_of(rule.choices); }

std::string list_of(const ListSize& size, const std::string& rule) {
  std::string count;
  if (size.min == size.max) {
    count = concat(size.min, ' ');
  } else if (size.max != SIZE_MAX) {
    count = concat(size.min, " to ", size.max, ' ');
  } else if (size.min > 0) {
    count = concat("at least ", size.min, ' ');
  }
  return "a list of " + count + "elements, each " + rule;
}

/// "did you mean ..." as a remark of its own, or nothing.
Refused not_among(const std::string& word, const std::vector<std::string>& names) {
  const std::string remark = did_you_mean(word, names);
  return Refused{remark.empty() ? remark : remark.substr(2)};
}

int64_t read(const Given& value, const IntRule& rule) {
  const int64_t number = read_integer(value);
  if (number < rule.min || number > rule.max) throw Refused{};
  return number;
}

double read(const Given& value, const NumberRule& rule) {
  const double number = read_number(value);
  const bool above = rule.above == -DBL_MAX || number > rule.above;
  const bool below = rule.below == DBL_MAX || number < rule.below;
  if (!above || !below || number < rule.min || number > rule.max) throw Refused{};
  return number;
}

std::string read(const Given& value, const TextRule& rule) {
  std::string word = read_text(value);
  const auto& choices = rule.choices;
  if (!choices.empty() && std::find(choices.begin(), choices.end(), word) == choices.end()) {
    throw not_among(word, choices);
  }
  return word;
}

/// A boolean and a path have no rule beyond their type.
struct AnyBool {};
struct AnyPath {};

bool read(const Given& value, AnyBool) { return read_bool(value); }

std::filesystem::path read(const Given& value, AnyPath) { return read_text(value); }

bool is_none(const Given& value) {
  if (const auto* raw = std::get_if<Raw>(&value)) return raw->text == "none";
  const auto* string = std::get_if<std::string>(&value);
  return string != nullptr && *string == "none";
}

/// Reads into a field of each kind; an optional also takes "none", a list reads element by element.
template <class T, class Rule>
void read_into(T& field, const Given& value, const Rule& rule, ListSize) {
  field = read(value, rule);
}

template <class T, class Rule>
void read_into(std::optional<T>& field, const Given& value, const Rule& rule, ListSize) {
  if (is_none(value)) {
    field.reset();
  } else {
    field = read(value, rule);
  }
}

template <class T, class Rule>
void read_into(std::vector<T>& field, const Given& value, const Rule& rule, ListSize size) {
  const std::vector<Given> items = read_list(value);
  if (items.size() < size.min || items.size() > size.max) throw Refused{concat("it has ", items.size())};
  std::vector<T> elements;
  for (size_t i = 0; i < items.size(); ++i) {
    try {
      elements.push_back(read(items[i], rule));
    } catch (const Refused& refused) {
      const char* colon = refused.detail.empty() ? "" : ": ";
      throw Refused{concat("element ", i + 1, " is ", shown(items[i]), colon, refused.detail)};
    }
  }
  field = std::move(elements);
}

template <class T>
std::string literal_of(const T& value) {
  return toml_literal(value);
}

template <class T>
std::string literal_of(const std::optional<T>& value) {
  return value.has_value() ? toml_literal(*value) : "\"none\"";
}

template <class T>
std::string literal_of(const std::vector<T>& value) {
  std::string out = "[";
  for (size_t i = 0; i < value.size(); ++i) out += (i == 0 ? "" : ", ") + toml_literal(value[i]);
  return out + "]";
}

std::string literal_of(const std::filesystem::path& value) { return toml_literal(std::string_view(value.native())); }

template <class T>
Given given_of(const T& value) {
  return value;
}

template <class T>
Given given_of(const std::optional<T>& value) {
  return value.has_value() ? Given(*value) : Given(std::string("none"));
}

template <class T>
Given given_of(const std::vector<T>& value) {
  return std::vector<Scalar>(value.begin(), value.end());
}

Given given_of(const std::filesystem::path& value) { return value.native(); }

/// Binds a caller's variable to what reads and writes it.
template <class T, class Rule>
OptionField bind(T* field, Rule rule, ListSize size = {}) {
  OptionField bound;
  bound.assign = [field, rule, size](const Given& value) { read_into(*field, value, rule, size); };
  bound.literal = [field] { return literal_of(*field); };
  bound.initial = given_of(*field);
  if constexpr (requires { field->empty(); }) bound.empty = [field] { return field->empty(); };
  return bound;
}

bool valid_name(std::string_view name) {
  const auto allowed = [](char c) { return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_'; };
  return !name.empty() && name[0] >= 'a' && name[0] <= 'z' && std::all_of(name.begin(), name.end(), allowed);
}

}  // namespace

Options::Options(std::string command, std::string summary)
    : command_(std::move(command)), summary_(std::move(summary)), sections_{{"", ""}} {
  Entry& entry = declare("config", "FILE", "a path", "TOML file with options; the environment and the command line win",
                         bind(&config_, AnyPath{}));
  entry.saved = false;
}

Options::~Options() = default;

void Options::section(std::string name, std::string title) {
  const bool known = std::any_of(sections_.begin(), sections_.end(), [&](const auto& s) { return s.first == name; });
  if (!valid_name(name) || known)
    fail(ErrorKind::kState, "options", "section ", weft::quoted(name), " is not a new lower-case name");
  sections_.emplace_back(std::move(name), std::move(title));
}

Options::Entry& Options::declare(std::string name, std::string_view placeholder, std::string rule, std::string help,
                                 OptionField field) {
  if (!valid_name(name) || name == "help" || name.starts_with("no_") || find(name) != nullptr) {
    fail(ErrorKind::kState, "options", weft::quoted(name),
         " is not a new lower-case name (\"help\" and \"no_...\" are taken)");
  }
  auto entry = std::make_unique<Entry>();
  entry->name = std::move(name);
  entry->section = sections_.back().first;
  entry->placeholder = placeholder;
  entry->rule = std::move(rule);
  entry->help = std::move(help);
  entry->field = std::move(field);
  entry->default_literal = entry->field.literal();
  for (const ProcessVariable& taken : process_variables()) {
    if (taken.name != variable(*entry)) continue;
    fail(ErrorKind::kState, "options", entry->name, " would be read from ", taken.name);
  }
  entries_.push_back(std::move(entry));
  return *entries_.back();
}

/// Checks that a default satisfies its own rule: only then does a resolved file always read back. A required option has
/// no default.
void Options::check_default(Entry& entry, bool required) {
  entry.required = required;
  if (required && entry.field.empty()) return;
  try {
    entry.field.assign(entry.field.initial);
  } catch (const Refused&) {
    fail(ErrorKind::kState, "options", "the default of ", entry.name, ", ", entry.default_literal, ", must be ",
         entry.rule);
  }
}

void Options::add(std::string name, int64_t* field, IntRule rule, std::string help) {
  check_default(declare(std::move(name), "INT", text(rule), std::move(help), bind(field, rule)));
}

void Options::add(std::string name, std::optional<int64_t>* field, IntRule rule, std::string help) {
  check_default(declare(std::move(name), "INT", text(rule) + ", or none", std::move(help), bind(field, rule)));
}

void Options::add(std::string name, double* field, NumberRule rule, std::string help) {
  check_default(declare(std::move(name), "NUMBER", text(rule), std::move(help), bind(field, rule)));
}

void Options::add(std::string name, std::optional<double>* field, NumberRule rule, std::string help) {
  check_default(declare(std::move(name), "NUMBER", text(rule) + ", or none", std::move(help), bind(field, rule)));
}

void Options::add(std::string name, bool* field, std::string help) {
  declare(std::move(name), "", "true or false", std::move(help), bind(field, AnyBool{}));
}

void Options::add(std::string name, std::string* field, TextRule rule, std::string help) {
  check_default(declare(std::move(name), rule.placeholder, text(rule), std::move(help), bind(field, rule)),
                rule.required);
}

void Options::add(std::string name, std::filesystem::path* field, PathRule rule, std::string help) {
  check_default(declare(std::move(name), rule.placeholder, "a path", std::move(help), bind(field, AnyPath{})),
                rule.required);
}

void Options::add(std::string name, std::vector<int64_t>* field, IntRule each, ListSize size, std::string help) {
  check_default(
      declare(std::move(name), "INT,...", list_of(size, text(each)), std::move(help), bind(field, each, size)));
}

void Options::add(std::string name, std::vector<double>* field, NumberRule each, ListSize size, std::string help) {
  check_default(
      declare(std::move(name), "NUMBER,...", list_of(size, text(each)), std::move(help), bind(field, each, size)));
}

void Options::add(std::string name, std::vector<std::string>* field, TextRule each, ListSize size, std::string help) {
  const std::string placeholder = concat(each.placeholder, ",...");
  check_default(
      declare(std::move(name), placeholder, list_of(size, text(each)), std::move(help), bind(field, each, size)),
      each.required);
}

void Options::declare_choice(std::string name, std::vector<std::string> names, std::function<void(size_t)> set,
                             std::function<size_t()> get, std::string help) {
  if (get() >= names.size()) fail(ErrorKind::kState, "options", "the default of ", name, " must be ", one_of(names));
  OptionField field;
  field.assign = [names, set](const Given& value) {
    const std::string word = read(value, TextRule{.choices = names});
    set(static_cast<size_t>(std::find(names.begin(), names.end(), word) - names.begin()));
  };
  field.literal = [names, get, name] {
    const size_t i = get();
    if (i >= names.size()) fail(ErrorKind::kState, "options", name, " holds a value that has no name");
    return toml_literal(std::string_view(names[i]));
  };
  declare(std::move(name), "NAME", one_of(names), std::move(help), std::move(field));
}

void Options::add(std::string name, SwitchRule rule, std::string help) {
  std::string names;
  for (const auto& [each, on] : rule.switches) names += (names.empty() ? "" : ", ") + each;
  OptionField field;
  field.assign = [rule](const Given& value) {
    const auto* raw = std::get_if<Raw>(&value);
    if (!rule.was_bool.empty() &&
        (std::holds_alternative<bool>(value) || (raw != nullptr && (raw->text == "true" || raw->text == "false")))) {
      throw Refused{rule.was_bool};
    }
    const std::string words = read_text(value);
    std::vector<bool*> on;
    for (const Given& item : is_none(value) ? std::vector<Given>() : read_list(Raw{words})) {
      const std::string word = read_text(item);
      const auto found = std::find_if(rule.switches.begin(), rule.switches.end(),
                                      [&](const auto& each) { return each.first == word; });
      if (found == rule.switches.end()) {
        std::vector<std::string> candidates = {"none"};
        for (const auto& each : rule.switches) candidates.push_back(each.first);
        throw not_among(word, candidates);
      }
      on.push_back(found->second);
    }
    if (words.empty()) throw Refused{"it is empty"};
    for (const auto& each : rule.switches) *each.second = std::find(on.begin(), on.end(), each.second) != on.end();
  };
  field.literal = [rule] {
    std::string words;
    for (const auto& [each, on] : rule.switches) {
      if (*on) words += (words.empty() ? "" : ",") + each;
    }
    return toml_literal(std::string_view(words.empty() ? "none" : words));
  };
  declare(std::move(name), "NAME,...", "none or some of " + names + ", joined by commas", std::move(help),
          std::move(field));
}

void Options::action(std::string name, bool* field, std::string help) {
  add(std::move(name), field, std::move(help));
  entries_.back()->saved = false;
}

void Options::action(std::string name, std::string* field, std::string_view placeholder, std::string help) {
  add(std::move(name), field, TextRule{.placeholder = placeholder}, std::move(help));
  entries_.back()->saved = false;
}

void Options::declare_positional(std::string name, std::string rule, std::string help, OptionField field,
                                 bool required) {
  for (const auto& entry : entries_) {
    const bool optional = entry->positional && !entry->required;
    if (entry->repeated || (optional && required)) {
      fail(ErrorKind::kState, "options", name, " may not follow ", entry->name,
           ", which does not always take one argument");
    }
  }
  Entry& entry = declare(std::move(name), "", std::move(rule), std::move(help), std::move(field));
  entry.positional = true;
  entry.saved = false;
  entry.required = required;
}

void Options::positional(std::string name, std::string* field, std::string help, bool required) {
  declare_positional(std::move(name), "text", std::move(help), bind(field, TextRule{}), required);
}

void Options::positional(std::string name, std::filesystem::path* field, std::string help, bool required) {
  declare_positional(std::move(name), "a path", std::move(help), bind(field, AnyPath{}), required);
}

void Options::positional_list(std::string name, std::vector<std::string>* field, ListSize size, std::string help) {
  OptionField bound = bind(field, TextRule{}, size);
  declare_positional(std::move(name), list_of(size, "text"), std::move(help), std::move(bound), size.min > 0);
  entries_.back()->repeated = true;
}

Options::Entry* Options::find(std::string_view name) const {
  for (const auto& entry : entries_) {
    if (entry->name == name) return entry.get();
  }
  return nullptr;
}

const Options::Entry& Options::at(std::string_view name) const {
  const Entry* entry = find(name);
  if (entry == nullptr)
    fail(ErrorKind::kState, "options", "weft ", command_, " declares no option ", weft::quoted(name));
  return *entry;
}

const Origin& Options::origin(std::string_view name) const { return at(name).origin; }

/// --weight-decay, or FILE for a positional.
std::string Options::spelling(const Entry& entry) const {
  std::string out = entry.name;
  std::replace(out.begin(), out.end(), '_', '-');
  if (!entry.positional) return "--" + out;
  std::transform(out.begin(), out.end(), out.begin(),
                 [](char c) { return c >= 'a' && c <= 'z' ? static_cast<char>(c - 32) : c; });
  return out;
}

std::string Options::variable(const Entry& entry) const {
  std::string prefix = variable_prefix(command_ + " " + entry.name);
  prefix.pop_back();
  return prefix;
}

std::vector<std::string> Options::names() const {
  std::vector<std::string> out;
  for (const auto& entry : entries_) {
    if (entry->saved) out.push_back(entry->name);
  }
  return out;
}

}  // namespace weft::apps
