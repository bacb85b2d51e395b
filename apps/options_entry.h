#pragma once
// Internal to options*.cpp.
#include "apps/options.h"

namespace weft::apps {

/// A caller's variable without its type.
struct OptionField {
  std::function<void(const Given&)> assign;  ///< throws Refused
  std::function<std::string()> literal;      ///< its value as TOML
  std::function<bool()> empty;               ///< set for texts, paths and lists
  Given initial;                             ///< its value at declaration
};

/// One declaration.
struct Options::Entry {
  std::string name, section;
  std::string placeholder;  ///< "" for booleans and positionals, which are not followed by a value
  std::string rule;         ///< completes "must be "
  std::string help;
  OptionField field;
  std::string default_literal;
  bool saved = true;  ///< may stand in files and variables, and is written to the resolved file
  bool required = false;
  bool positional = false;
  bool repeated = false;  ///< a positional list
  Origin origin = {};
};

/// One option or positional of a command line.
struct Options::Argument {
  Entry* entry;
  Given value;
  std::string shown_as;
};

}  // namespace weft::apps
