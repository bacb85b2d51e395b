// manifest.json and directory names of checkpoints: writing, and reading with every check.
#include "models/checkpoint_manifest.h"

#include <algorithm>
#include <charconv>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>

#include "core/file.h"

namespace weft::checkpoint {
namespace {

using Json = nlohmann::json;

constexpr const char* kFormat = "weft-checkpoint";
constexpr int64_t kFormatVersion = 1;
/// The last lines of a manifest: the hash of all bytes before its own digits.
constexpr std::string_view kHashKey = "manifest_xxh3_128";
constexpr std::string_view kHashBegin = ",\n  \"manifest_xxh3_128\": \"";
constexpr std::string_view kHashEnd = "\"\n}\n";
constexpr size_t kHashDigits = 32;

constexpr size_t kLargestManifest = size_t{64} << 20;
constexpr size_t kLongestFileName = 128;

bool is_hash(std::string_view text) {
  return text.size() == kHashDigits && text.find_first_not_of("0123456789abcdef") == std::string_view::npos;
}

/// Reads a manifest; every failure names the file and the key.
class ManifestReader {
 public:
  explicit ManifestReader(const std::string& source) : source_(source) {}

  CheckpointManifest read(std::string_view text) {
    if (text.size() > kLargestManifest)
      refuse("has ", text.size(), " bytes; at most ", kLargestManifest, " are allowed");
    const Json json = parse(text);
    if (!json.is_object()) refuse("is not a JSON object");
    // Format and version come first: another version may have other rules for all the rest.
    if (string(json, "format") != kFormat)
      refuse("has \"format\" = ", json["format"].dump(), "; expected \"", kFormat, '"');
    if (const int64_t version = integer(json, "format_version"); version != kFormatVersion) {
      refuse("has format version ", version, "; this program reads version ", kFormatVersion,
             ". Hint: use the version of weft that wrote it");
    }
    check_hash(text, string(json, kHashKey));
    check_keys(
        json,
        {"format", "format_version", "run_id", "step", "data_cursor", "seed", "layout", "state", "files", kHashKey},
        "");

    CheckpointManifest manifest;
    manifest.run_id = string(json, "run_id");
    manifest.step = integer(json, "step");
    manifest.data_cursor = integer(json, "data_cursor");
    manifest.seed = unsigned_integer(json, "seed");
    manifest.layout = string(json, "layout");
    const Json& state = json["state"];
    if (!state.is_object()) refuse("has \"state\" = ", shown(state), "; it must be an object of strings");
    for (const auto& [key, value] : state.items()) {
      if (!value.is_string())
        refuse("has ", shown(value), " as \"state\" ", weft::quoted(key), "; it must be a string");
      manifest.state[key] = value.get<std::string>();
    }
    const Json& files = json["files"];
    if (!files.is_array()) refuse("has \"files\" = ", shown(files), "; it must be an array of objects");
    for (const Json& file : files) manifest.files.push_back(read_file_entry(file));
    check_files(manifest.files);
    return manifest;
  }

 private:
  template <class... Parts>
  [[noreturn]] void refuse(const Parts&... parts) const {
    fail(ErrorKind::kData, "load_checkpoint", source_, ": the manifest ", parts...);
  }

  /// A value in an error message: never long.
  static std::string shown(const Json& value) {
    if (value.is_structured()) return value.is_array() ? "an array" : "an object";
    return weft::concat(value.dump().substr(0, 60));
  }

  Json parse(std::string_view text) const {
    std::vector<std::set<std::string>> keys;  // of the objects that are open
    const auto watch = [&](int depth, Json::parse_event_t event, Json& value) {
      if (depth > 3) refuse("is nested too deeply");
      if (event == Json::parse_event_t::object_start) keys.emplace_back();
      if (event == Json::parse_event_t::object_end) keys.pop_back();
      if (event == Json::parse_event_t::key && !keys.back().insert(value.get<std::string>()).second) {
        refuse("has the key ", weft::quoted(value.get<std::string>()), " twice");
      }
      return true;
    };
    try {
      // The parser would take a NUL for the end of its input.
      if (text.find('\0') != std::string_view::npos) refuse("holds a NUL byte: it is damaged");
      return Json::parse(text.begin(), text.end(), watch);
    } catch (const Json::parse_error& error) {
      refuse("is not valid JSON at its byte ", error.byte, ": it is truncated or damaged");
    } catch (const Json::out_of_range&) {
      refuse("has a number beyond all ranges");
    }
  }

  void check_keys(const Json& object, const std::vector<std::string_view>& wanted, const char* where) const {
    for (const std::string_view key : wanted) {
      if (!object.contains(key)) refuse("has no \"", key, '"', where);
    }
    for (const auto& [key, value] : object.items()) {
      if (std::find(wanted.begin(), wanted.end(), key) == wanted.end()) {
        refuse("has the unknown key ", weft::quoted(key), where);
      }
    }
  }

  const Json& member(const Json& object, std::string_view key) const {
    if (!object.contains(key)) refuse("has no \"", key, '"');
    return object[std::string(key)];
  }

  std::string string(const Json& object, std::string_view key) const {
    const Json& value = member(object, key);
    if (!value.is_string()) refuse("has \"", key, "\" = ", shown(value), "; it must be a string");
    return value.get<std::string>();
  }

  uint64_t unsigned_integer(const Json& object, std::string_view key) const {
    const Json& value = member(object, key);
    if (!value.is_number_unsigned()) {
      refuse("has \"", key, "\" = ", shown(value), "; it must be an integer of at least 0");
    }
    return value.get<uint64_t>();
  }

  int64_t integer(const Json& object, std::string_view key) const {
    const uint64_t value = unsigned_integer(object, key);
    if (value > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
      refuse("has \"", key, "\" = ", value, "; it must be below 2^63");
    }
    return static_cast<int64_t>(value);
  }

  /// So that no flipped bit of the manifest itself goes unseen.
  void check_hash(std::string_view text, const std::string& given) const {
    const size_t tail = kHashBegin.size() + kHashDigits + kHashEnd.size();
    const std::string_view end = text.substr(text.size() - std::min(tail, text.size()));
    if (!is_hash(given) || end != weft::concat(kHashBegin, given, kHashEnd)) {
      refuse("does not end with its hash of ", kHashDigits, " hexadecimal digits: it was edited or damaged");
    }
    const std::string found = hash_bytes(as_bytes(text.substr(0, text.size() - kHashDigits - kHashEnd.size())));
    if (found != given) refuse("has hash ", found, " but says ", given, ": it was edited or damaged");
  }

  CheckpointFile read_file_entry(const Json& json) const {
    if (!json.is_object()) refuse("has ", shown(json), " in \"files\"; each must be an object");
    check_keys(json, {"name", "size", "xxh3_128"}, " in an entry of \"files\"");
    CheckpointFile file{.name = string(json, "name"), .size = integer(json, "size"), .hash = string(json, "xxh3_128")};
    if (!is_file_name(file.name) || file.name == kManifestFile) {
      refuse("lists the file name ", weft::quoted(file.name),
             "; names are of letters, digits, '.', '_' and '-', do not ", "begin with '.', and have at most ",
             kLongestFileName, " characters");
    }
    if (!is_hash(file.hash)) {
      refuse("has the hash ", weft::quoted(file.hash), " for ", file.name, "; it must be ", kHashDigits,
             " lower-case hexadecimal digits");
    }
    return file;
  }

  void check_files(const std::vector<CheckpointFile>& files) const {
    std::set<std::string> names;
    for (const CheckpointFile& file : files) {
      if (!names.insert(file.name).second) refuse("lists ", file.name, " twice");
    }
    for (const char* needed : {kModelFile, kOptimizerFile}) {
      if (!names.contains(needed)) refuse("does not list ", needed);
    }
  }

  const std::string& source_;
};

}  // namespace

bool is_file_name(std::string_view name) {
  constexpr std::string_view kAllowed = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-";
  return !name.empty() && name.size() <= kLongestFileName && name[0] != '.' &&
         name.find_first_not_of(kAllowed) == std::string_view::npos;
}

std::string manifest_text(const CheckpointManifest& manifest) {
  nlohmann::ordered_json json;
  json["format"] = kFormat;
  json["format_version"] = kFormatVersion;
  json["run_id"] = manifest.run_id;
  json["step"] = manifest.step;
  json["data_cursor"] = manifest.data_cursor;
  json["seed"] = manifest.seed;
  json["layout"] = manifest.layout;
  json["state"] = nlohmann::ordered_json::object();
  for (const auto& [key, value] : manifest.state) json["state"][key] = value;
  json["files"] = nlohmann::ordered_json::array();
  for (const CheckpointFile& file : manifest.files) {
    json["files"].push_back({{"name", file.name}, {"size", file.size}, {"xxh3_128", file.hash}});
  }
  std::string text;
  try {
    text = json.dump(2);
  } catch (const nlohmann::json::type_error&) {
    fail(ErrorKind::kValue, "save_checkpoint", "run id, layout, or a key or value of the state is not valid UTF-8");
  }
  text.resize(text.size() - 2);  // without the closing "\n}"
  text += kHashBegin;
  text += hash_bytes(as_bytes(text));
  text += kHashEnd;
  if (text.size() > kLargestManifest) {
    fail(ErrorKind::kValue, "save_checkpoint", "the manifest would have ", text.size(), " bytes; at most ",
         kLargestManifest, " are allowed. Hint: keep large texts in text_files");
  }
  return text;
}

CheckpointManifest parse_manifest(std::string_view text, const std::string& source) {
  return ManifestReader(source).read(text);
}

std::string to_string(const DirectoryName& name) {
  std::string digits = std::to_string(name.step);
  digits.insert(0, 8 - std::min<size_t>(8, digits.size()), '0');
  return "step_" + digits + (name.revision > 1 ? "-" + std::to_string(name.revision) : "");
}

std::optional<DirectoryName> parse_directory_name(std::string_view text) {
  if (!text.starts_with("step_") || text.size() > 40) return std::nullopt;
  DirectoryName name;
  const std::string_view rest = text.substr(5);
  const size_t dash = rest.find('-');
  const auto number = [](std::string_view digits, auto& value) {
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
    return error == std::errc() && end == digits.data() + digits.size();
  };
  if (!number(rest.substr(0, dash), name.step)) return std::nullopt;
  if (dash != std::string_view::npos && !number(rest.substr(dash + 1), name.revision)) return std::nullopt;
  // One spelling each: no sign, no other zeros.
  if (name.step < 0 || name.revision < 1 || to_string(name) != text) return std::nullopt;
  return name;
}

}  // namespace weft::checkpoint
