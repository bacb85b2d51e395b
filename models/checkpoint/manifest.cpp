// manifest.json and directory names of checkpoints: writing, and reading with every check.
#include "models/checkpoint/manifest.h"

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>

#include "core/file.h"
#include "core/safetensors_dtype.h"
#include "models/checkpoint/pieces.h"

namespace weft::checkpoint {
namespace {

using Json = nlohmann::json;

constexpr const char* kFormat = "weft-checkpoint";
/// The newest version that is read.
constexpr int64_t kFormatVersion = 2;
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
    const int64_t version = integer(json, "format_version");
    if (version < 1 || version > kFormatVersion) {
      refuse("has format version ", version, "; this program reads versions 1 to ", kFormatVersion,
             ". Hint: use the version of weft that wrote it");
    }
    check_hash(text, string(json, kHashKey));
    std::vector<std::string_view> keys = {"format", "format_version", "run_id", "step",  "data_cursor",
                                          "seed",   "layout",         "state",  "files", kHashKey};
    if (version == 2) keys.insert(keys.end(), {"model", "optimizer"});
    check_keys(json, keys, "");

    CheckpointManifest manifest;
    manifest.version = static_cast<int>(version);
    manifest.run_id = string(json, "run_id");
    manifest.step = integer(json, "step");
    manifest.data_cursor = integer(json, "data_cursor");
    manifest.seed = unsigned_integer(member(json, "seed"), "seed", "");
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
    if (version == 2) {
      manifest.model = read_tensors(json, "model");
      manifest.optimizer = read_tensors(json, "optimizer");
    }
    check_files(manifest);
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
      if (depth > 7) refuse("is nested too deeply");
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

  void check_keys(const Json& object, const std::vector<std::string_view>& wanted, const std::string& where) const {
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

  uint64_t unsigned_integer(const Json& value, std::string_view key, const std::string& where) const {
    if (!value.is_number_unsigned()) {
      refuse("has \"", key, "\" = ", shown(value), where, "; it must be an integer of at least 0");
    }
    return value.get<uint64_t>();
  }

  int64_t integer(const Json& json, std::string_view key, const std::string& where) const {
    const uint64_t value = unsigned_integer(json, key, where);
    if (value > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
      refuse("has \"", key, "\" = ", value, where, "; it must be below 2^63");
    }
    return static_cast<int64_t>(value);
  }

  int64_t integer(const Json& object, std::string_view key) const { return integer(member(object, key), key, ""); }

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

  std::vector<CheckpointTensor> read_tensors(const Json& json, const char* kind) const {
    const Json& list = json[kind];
    if (!list.is_array()) refuse("has \"", kind, "\" = ", shown(list), "; it must be an array of objects");
    std::vector<CheckpointTensor> tensors;
    std::set<std::string> names;
    for (const Json& each : list) {
      tensors.push_back(read_tensor(each, kind));
      if (!names.insert(tensors.back().name).second)
        refuse("has the tensor ", weft::quoted(tensors.back().name), " twice in \"", kind, '"');
      if (const std::string problem = cover_problem(tensors.back()); !problem.empty())
        refuse("does not make whole tensors in \"", kind, "\": ", problem);
    }
    return tensors;
  }

  CheckpointTensor read_tensor(const Json& json, const char* kind) const {
    if (!json.is_object()) refuse("has ", shown(json), " in \"", kind, "\"; each must be an object");
    const std::string where = weft::concat(" in a tensor of \"", kind, '"');
    check_keys(json, {"name", "dtype", "shape", "pieces"}, where);
    CheckpointTensor tensor;
    tensor.name = string(json, "name");
    const std::string dtype = string(json, "dtype");
    const std::optional<DType> known = safetensors_dtype(dtype);
    if (!known) refuse("has the dtype ", weft::quoted(dtype), where, "; expected one of ", safetensors_dtypes());
    tensor.dtype = *known;
    const std::vector<int64_t> shape = integers(json, "shape");
    if (shape.size() > kMaxRank) refuse("has a shape of ", shape.size(), " sizes", where, "; at most ", kMaxRank);
    tensor.shape = Shape(shape);
    int64_t bytes = size_of(tensor.dtype);
    for (const int64_t size : shape) {
      if (size != 0 && __builtin_mul_overflow(bytes, size, &bytes))
        refuse("has the shape ", tensor.shape, where, ": more bytes than 63 bits can count");
    }
    const Json& pieces = json["pieces"];
    if (!pieces.is_array()) refuse("has \"pieces\" = ", shown(pieces), where, "; it must be an array of objects");
    for (const Json& piece : pieces) tensor.pieces.push_back(read_piece(piece, tensor));
    return tensor;
  }

  CheckpointPiece read_piece(const Json& json, const CheckpointTensor& tensor) const {
    const std::string where = " in a piece of the tensor " + weft::quoted(tensor.name);
    if (!json.is_object()) refuse("has ", shown(json), where, "; each must be an object");
    check_keys(json, {"file", "dim", "ranges", "elements"}, where);
    CheckpointPiece piece{.file = string(json, "file"), .part = TensorPart::all(tensor.shape)};
    if (!is_file_name(piece.file)) refuse("has the file name ", weft::quoted(piece.file), where);
    const int64_t dim = integer(json, "dim");
    const Json& list = json["ranges"];
    if (!list.is_array()) refuse("has \"ranges\" = ", shown(list), where, "; it must be an array of pairs");
    std::vector<IndexRange> ranges;
    for (const Json& each : list) ranges.push_back(pair(each, where));
    const IndexRange elements = pair(json["elements"], where);
    if (tensor.shape.rank() == 0) {
      if (dim != 0 || !ranges.empty()) refuse("cuts a tensor without dimensions", where);
    } else {
      if (dim >= tensor.shape.rank()) refuse("has dim ", dim, where, " of the shape ", tensor.shape);
      const int64_t size = tensor.shape[static_cast<int>(dim)];
      int64_t before = 0;
      for (const IndexRange& range : ranges) {
        // Empty ranges would cost time and say nothing; those of a tensor without elements are all of it.
        if (range.begin < before || range.end > size || (range.count() == 0 && size > 0)) {
          refuse("has the range ", range.begin, " to ", range.end, where, "; ranges increase, are not empty, and lie ",
                 "within 0 to ", size);
        }
        before = range.end;
      }
      piece.part = TensorPart::along(tensor.shape, dim, std::move(ranges));
    }
    if (elements.end > piece.part.end || (elements.count() == 0 && numel(tensor.shape) > 0)) {
      refuse("has elements ", elements.begin, " to ", elements.end, where, "; they must be some of the ",
             grouped(piece.part.end), " of ", describe(piece.part));
    }
    piece.part.begin = elements.begin, piece.part.end = elements.end;
    return piece;
  }

  IndexRange pair(const Json& json, const std::string& where) const {
    if (!json.is_array() || json.size() != 2) refuse("has ", shown(json), where, "; it must be a pair [begin, end]");
    const IndexRange range{.begin = integer(json[0], "begin", where), .end = integer(json[1], "end", where)};
    if (range.begin > range.end) refuse("has a pair ", range.begin, " to ", range.end, where, "; begin comes first");
    return range;
  }

  std::vector<int64_t> integers(const Json& object, std::string_view key) const {
    const Json& list = member(object, key);
    if (!list.is_array()) refuse("has \"", key, "\" = ", shown(list), "; it must be an array of integers");
    std::vector<int64_t> values;
    for (const Json& each : list) values.push_back(integer(each, key, ""));
    return values;
  }

  void check_files(const CheckpointManifest& manifest) const {
    std::set<std::string> names;
    for (const CheckpointFile& file : manifest.files) {
      if (!names.insert(file.name).second) refuse("lists ", file.name, " twice");
    }
    const TensorFiles tensors = tensor_files(manifest);
    for (const std::set<std::string>* needed : {&tensors.model, &tensors.optimizer}) {
      for (const std::string& name : *needed) {
        if (!names.contains(name)) refuse("does not list ", name);
      }
    }
    for (const std::string& name : tensors.model) {
      if (tensors.optimizer.contains(name))
        refuse("has tensors of the model and of the optimizer in ", name, "; a file is of one of them");
    }
    for (const auto& [kind, list] :
         {std::pair("model", &manifest.model), std::pair("optimizer", &manifest.optimizer)}) {
      for (const CheckpointTensor& tensor : *list) {
        std::set<std::string> used;
        for (const CheckpointPiece& piece : tensor.pieces) {
          if (!used.insert(piece.file).second)
            refuse("has two pieces of the tensor ", weft::quoted(tensor.name), " of \"", kind, "\" in ", piece.file);
        }
      }
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

namespace {

/// One line for a tensor and one for each piece: indented as the rest, they would be a line for each number.
std::string tensors_text(const std::vector<CheckpointTensor>& tensors) {
  using Ordered = nlohmann::ordered_json;
  std::string text = "[";
  for (const CheckpointTensor& tensor : tensors) {
    const Ordered head = {{"name", tensor.name},
                          {"dtype", safetensors_name(tensor.dtype)},
                          {"shape", std::vector<int64_t>(tensor.shape.begin(), tensor.shape.end())}};
    text += text.size() > 1 ? ",\n    " : "\n    ";
    text += head.dump();
    text.back() = ',';  // the object goes on
    text += "\"pieces\":[";
    for (const CheckpointPiece& piece : tensor.pieces) {
      Ordered ranges = Ordered::array();
      for (const IndexRange& range : piece.part.ranges) ranges.push_back(Ordered::array({range.begin, range.end}));
      const Ordered line = {{"file", piece.file},
                            {"dim", piece.part.dim},
                            {"ranges", ranges},
                            {"elements", Ordered::array({piece.part.begin, piece.part.end})}};
      text += text.back() == '[' ? "\n      " : ",\n      ";
      text += line.dump();
    }
    text += "]}";
  }
  return text + (text.size() > 1 ? "\n  ]" : "]");
}

}  // namespace

TensorFiles tensor_files(const CheckpointManifest& manifest) {
  if (manifest.version == 1) return {{kModelFile}, {kOptimizerFile}};
  TensorFiles files;
  for (const CheckpointTensor& tensor : manifest.model) {
    for (const CheckpointPiece& piece : tensor.pieces) files.model.insert(piece.file);
  }
  for (const CheckpointTensor& tensor : manifest.optimizer) {
    for (const CheckpointPiece& piece : tensor.pieces) files.optimizer.insert(piece.file);
  }
  return files;
}

std::string file_name(const std::string& kind, int number, int of) {
  char text[64];
  std::snprintf(text, sizeof text, "-%05d-of-%05d.safetensors", number, of);
  return kind + text;
}

bool is_tensor_file_name(std::string_view name) {
  if (name == kModelFile || name == kOptimizerFile) return true;
  return name.ends_with(".safetensors") && (name.starts_with("model-") || name.starts_with("optimizer-"));
}

std::string manifest_text(const CheckpointManifest& manifest) {
  nlohmann::ordered_json json;
  json["format"] = kFormat;
  json["format_version"] = manifest.version;
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
    text.resize(text.size() - 2);  // without the closing "\n}"
    if (manifest.version == 2) {
      text += concat(",\n  \"model\": ", tensors_text(manifest.model));
      text += concat(",\n  \"optimizer\": ", tensors_text(manifest.optimizer));
    }
  } catch (const nlohmann::json::type_error&) {
    fail(ErrorKind::kValue, "save_checkpoint",
         "run id, layout, a key or value of the state, or the name of a tensor is not valid UTF-8");
  }
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
