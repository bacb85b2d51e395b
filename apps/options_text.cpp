// What the declarations look like to a reader: --help, the resolved file, the documentation page.
#include <algorithm>

#include "apps/options.h"
#include "apps/options_entry.h"

namespace weft::apps {
namespace {

/// `text` broken at spaces into lines of `width` columns, each after the first indented.
std::string wrapped(const std::string& text, size_t indent, size_t width) {
  std::string out;
  size_t column = indent;
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find(' ', at), text.size());
    const size_t length = end - at;
    if (column > indent && column + 1 + length > width) {
      out += '\n' + std::string(indent, ' ');
      column = indent;
    } else if (column > indent) {
      out += ' ';
      ++column;
    }
    out += text.substr(at, length);
    column += length;
    at = end + 1;
  }
  return out + '\n';
}

/// A TOML literal as one types it after an option: no quotes, no brackets.
std::string typed(const std::string& literal) {
  std::string out;
  for (size_t i = 0; i < literal.size(); ++i) {
    const bool after_comma = literal[i] == ' ' && i > 0 && literal[i - 1] == ',';
    if (literal[i] != '"' && literal[i] != '[' && literal[i] != ']' && !after_comma) out += literal[i];
  }
  return out;
}

std::string escaped_cell(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '|' || c == '<' || c == '>') out += '\\';
    out += c == '\n' ? ' ' : c;
  }
  return out;
}

/// A path may hold a line break, which would end a TOML comment.
std::string one_line(std::string text) {
  std::replace_if(
      text.begin(), text.end(), [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7f; }, '?');
  return text;
}

constexpr size_t kHelpColumn = 30;

std::string row(const std::string& left, const std::string& text, size_t width) {
  std::string out = "  " + left;
  out +=
      out.size() + 2 > kHelpColumn ? "\n" + std::string(kHelpColumn, ' ') : std::string(kHelpColumn - out.size(), ' ');
  return out + wrapped(text, kHelpColumn, width);
}

}  // namespace

std::string Options::usage() const {
  std::string out = "usage: weft " + command_ + " [options]";
  for (const auto& entry : entries_) {
    if (!entry->positional) continue;
    const std::string name = spelling(*entry) + (entry->repeated ? "..." : "");
    out += entry->required ? " " + name : " [" + name + "]";
  }
  return out;
}

std::string Options::help(int width) const {
  const size_t columns = static_cast<size_t>(std::max(width, 60));
  std::string out = usage() + "\n\n" + wrapped(summary_, 0, columns);
  std::string arguments;
  for (const auto& entry : entries_) {
    if (entry->positional) arguments += row(spelling(*entry), entry->help, columns);
  }
  if (!arguments.empty()) out += "\nArguments:\n" + arguments;
  for (const auto& [section, title] : sections_) {
    std::string rows;
    for (const auto& entry : entries_) {
      if (entry->section != section || entry->positional) continue;
      const bool flag = entry->placeholder.empty();
      const std::string name = spelling(*entry).substr(2);
      const std::string left = !flag          ? "--" + name + " " + entry->placeholder
                               : entry->saved ? "--[no-]" + name
                                              : "--" + name;
      std::string text = entry->help;
      if (!flag && entry->rule != "a path" && entry->rule != "text") text += "; " + entry->rule;
      if (entry->required) {
        text += " (required)";
      } else if (entry->saved && !typed(entry->default_literal).empty()) {
        text += " (default " + typed(entry->default_literal) + ")";
      }
      rows += row(left, text, columns);
    }
    if (section.empty()) rows += row("-h, --help", "prints this text", columns);
    out += '\n' + (section.empty() ? "Options" : title + " [" + section + "]") + ":\n" + rows;
  }
  out += '\n' +
         wrapped("Every option but those for one call is also a key of its [section] in a TOML file and a variable " +
                     variable_prefix(command_) + "<OPTION>; default < --config file < variable < command line.",
                 0, columns);
  return out;
}

std::string Options::toml(bool sources) const {
  std::string out = "# weft " + command_ + ": every option as it was resolved\n";
  for (const auto& [section, title] : sections_) {
    bool opened = section.empty();
    for (const auto& entry : entries_) {
      if (!entry->saved || entry->section != section) continue;
      if (!opened) out += "\n[" + section + "]\n";
      opened = true;
      out += entry->name + " = " + entry->field.literal();
      out += sources ? "  # " + one_line(entry->origin.place) + "\n" : "\n";
    }
  }
  return out;
}

std::string Options::markdown() const {
  std::string out = "## weft " + command_ + "\n\n" + summary_ + "\n\n`" + usage() + "`\n";
  for (const auto& [section, title] : sections_) {
    std::string rows;
    for (const auto& entry : entries_) {
      if (entry->section != section) continue;
      const bool has_default = entry->saved && !entry->required;
      rows += "| `" + spelling(*entry) + "` | " + (entry->saved ? "`" + variable(*entry) + "`" : "") + " | " +
              escaped_cell(entry->rule) + " | " +
              (entry->required ? "required"
               : has_default   ? "`" + escaped_cell(entry->default_literal) + "`"
                               : "") +
              " | " + escaped_cell(entry->help) + " |\n";
    }
    if (rows.empty()) continue;
    out += section.empty() ? "\n" : "\n### `[" + section + "]` " + title + "\n\n";
    out += "| option | variable | value | default | meaning |\n|---|---|---|---|---|\n" + rows;
  }
  return out;
}

}  // namespace weft::apps
