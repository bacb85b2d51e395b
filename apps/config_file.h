#pragma once
#include <filesystem>
#include <string>
#include <vector>

#include "apps/option_value.h"

namespace weft::apps {

/// `key = value` in a TOML file; lines and columns count from 1.
struct ConfigEntry {
  std::string section;  ///< "" before the first [section]
  std::string key;
  Given value;
  int key_line = 0, key_column = 0;
  int line = 0, column = 0;  ///< of the value
};

/// `[name]` in a TOML file, empty or not.
struct ConfigSection {
  std::string name;
  int line = 0, column = 0;
};

/// A TOML file as sections of keys, each list in the order of the file.
struct ConfigFile {
  std::string path;
  std::vector<ConfigSection> sections;
  std::vector<ConfigEntry> entries;
};

/// Reads a TOML 1.0 file of at most 1 MiB.
/// @throws Error  kIo if it cannot be read; kUsage with "path:line:column" if it is not TOML (duplicate keys included).
ConfigFile read_config_file(const std::filesystem::path& path);

}  // namespace weft::apps
