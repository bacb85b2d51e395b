// The header of a safetensors file: reading it and every check on it. Loading and writing are in safetensors.cpp.
#include <algorithm>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <unordered_set>

#include "core/safetensors.h"
#include "core/safetensors_dtype.h"

namespace weft {
namespace {

using Json = nlohmann::json;

// weft::quoted is written with its namespace: the JSON header brings in <iomanip>, whose std::quoted would be found
// first for a std::string.

constexpr int64_t kLargest = std::numeric_limits<int64_t>::max();

std::string_view chars(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

/// Takes the events of the JSON parser and builds the header, so that no document tree is ever held: what it keeps is
/// smaller than the text it comes from. Anything that the format does not allow throws.
class HeaderReader : public nlohmann::json_sax<Json> {
 public:
  explicit HeaderReader(std::string_view source) : source_(source) {}

  std::vector<SafetensorsEntry> tensors;
  std::map<std::string, std::string> metadata;

  bool null() override { return wrong("null"); }
  bool boolean(bool value) override { return wrong(value ? "true" : "false"); }
  bool number_integer(int64_t value) override { return wrong(std::to_string(value)); }
  bool number_float(double, const std::string& text) override {
    return wrong(text.size() <= 40 ? text : text.substr(0, 40) + "...");
  }
  bool binary(Json::binary_t&) override { return wrong("binary data"); }

  bool number_unsigned(uint64_t value) override {
    if ((place_ != Place::kShape && place_ != Place::kOffsets) || value > static_cast<uint64_t>(kLargest)) {
      return wrong(std::to_string(value));
    }
    const auto number = static_cast<int64_t>(value);
    if (place_ == Place::kShape) {
      if (entry_.shape.rank() == kMaxRank) {
        refuse_entry("has more than ", kMaxRank, " dimensions; that many are supported");
      }
      entry_.shape.push_back(number);
    } else {
      if (offsets_ == 2) refuse_entry("data_offsets has more than 2 numbers; they are [begin, end]");
      (offsets_++ == 0 ? entry_.begin : entry_.end) = number;
    }
    return true;
  }

  bool string(std::string& value) override {
    if (place_ == Place::kMetadata) {
      metadata[key_] = std::move(value);
      return true;
    }
    if (place_ != Place::kEntry || key_ != "dtype") return wrong(weft::quoted(value));
    const std::optional<DType> dtype = safetensors_dtype(value);
    if (!dtype && is_foreign_safetensors_dtype(value)) {
      refuse_entry("has dtype ", weft::quoted(value), ", which is not supported; supported are ", safetensors_dtypes(),
                   ". Hint: convert it with the program that wrote it");
    }
    if (!dtype) {
      refuse_entry("has dtype ", weft::quoted(value), ", which the format does not have; supported are ",
                   safetensors_dtypes());
    }
    entry_.dtype = *dtype;
    return true;
  }

  bool start_object(size_t) override {
    switch (place_) {
      case Place::kStart:
        place_ = Place::kTop;
        return true;
      case Place::kTop:
        if (key_ == "__metadata__") {
          place_ = Place::kMetadata;
        } else {
          place_ = Place::kEntry;
          entry_ = {};
          entry_.name = key_;
          offsets_ = 0;
          has_dtype_ = has_shape_ = has_offsets_ = false;
        }
        return true;
      default:
        return wrong("an object");
    }
  }

  bool key(std::string& value) override {
    switch (place_) {
      case Place::kTop:
        if (!names_.insert(value).second) refuse("the name ", weft::quoted(value), " appears twice in the header");
        break;
      case Place::kMetadata:
        if (metadata.contains(value)) refuse("the key ", weft::quoted(value), " appears twice in __metadata__");
        break;
      default: {
        bool* const seen = value == "dtype"          ? &has_dtype_
                           : value == "shape"        ? &has_shape_
                           : value == "data_offsets" ? &has_offsets_
                                                     : nullptr;
        if (seen == nullptr) {
          refuse_entry("has a key ", weft::quoted(value), "; it must have exactly dtype, shape and data_offsets");
        }
        if (*seen) refuse_entry("has the key ", weft::quoted(value), " twice");
        *seen = true;
      }
    }
    key_ = std::move(value);
    return true;
  }

  bool end_object() override {
    if (place_ == Place::kEntry) {
      finish_entry();
      place_ = Place::kTop;
    } else {
      place_ = place_ == Place::kMetadata ? Place::kTop : Place::kEnd;
    }
    return true;
  }

  bool start_array(size_t) override {
    if (place_ != Place::kEntry || key_ == "dtype") return wrong("an array");
    place_ = key_ == "shape" ? Place::kShape : Place::kOffsets;
    return true;
  }

  bool end_array() override {
    if (place_ == Place::kOffsets && offsets_ != 2) {
      refuse_entry("data_offsets has ", offsets_, " numbers; it must have 2: [begin, end]");
    }
    place_ = Place::kEntry;
    return true;
  }

  bool parse_error(size_t position, const std::string&, const Json::exception& error) override {
    // "[json.exception...] parse error at line 1, column 9: <reason>; last read: '...'; expected ...": only the reason,
    // for what was read may be long or no text at all.
    std::string_view reason = error.what();
    if (const size_t start = reason.find(": "); start != std::string_view::npos) reason.remove_prefix(start + 2);
    reason = reason.substr(0, reason.find("; last read"));
    refuse("the header is not valid JSON at its byte ", position, " (", weft::quoted(reason, 160),
           "). Hint: the file is damaged or is no safetensors file");
  }

 private:
  enum class Place { kStart, kTop, kMetadata, kEntry, kShape, kOffsets, kEnd };

  template <class... Parts>
  [[noreturn]] void refuse(const Parts&... parts) {
    fail(ErrorKind::kData, "load_safetensors", source_, ": ", parts...);
  }
  template <class... Parts>
  [[noreturn]] void refuse_entry(const Parts&... parts) {
    refuse("tensor ", weft::quoted(entry_.name), ' ', parts...);
  }

  /// A value where the format wants another kind.
  bool wrong(std::string_view got) {
    switch (place_) {
      case Place::kStart:
      case Place::kEnd:
        refuse("the header is ", got, "; it must be one JSON object");
      case Place::kTop:
        if (key_ == "__metadata__") refuse("__metadata__ is ", got, "; it must be an object of strings");
        refuse("tensor ", weft::quoted(key_), " is ", got, "; it must be an object with dtype, shape and data_offsets");
      case Place::kMetadata:
        refuse("__metadata__ maps ", weft::quoted(key_), " to ", got, "; it may only map strings to strings");
      case Place::kEntry:
        refuse_entry("has ", key_, " = ", got, "; it must be ", key_ == "dtype" ? "a string" : "an array of integers");
      case Place::kShape:
        refuse_entry("has ", got, " in its shape; sizes are integers from 0 to ", grouped(kLargest));
      case Place::kOffsets:
        refuse_entry("has ", got, " in its data_offsets; they are integers from 0 to ", grouped(kLargest));
    }
    return false;
  }

  void finish_entry() {
    if (!has_dtype_ || !has_shape_ || !has_offsets_) {
      refuse_entry("has no ",
                   !has_dtype_   ? "dtype"
                   : !has_shape_ ? "shape"
                                 : "data_offsets",
                   "; it must have exactly dtype, shape and data_offsets");
    }
    // Sizes of 0 are left out of the check, or else [0, 2^40, 2^40] would pass and its strides overflow.
    int64_t product = size_of(entry_.dtype);
    bool empty = false;
    for (const int64_t size : entry_.shape) {
      empty |= size == 0;
      if (size != 0 && __builtin_mul_overflow(product, size, &product)) {
        refuse_entry("is ", entry_.dtype, ' ', entry_.shape, ", which has more bytes than 64 bits can count");
      }
    }
    const int64_t needed = empty ? 0 : product;
    if (entry_.begin > entry_.end) {
      refuse_entry("begins at byte ", grouped(entry_.begin), " of the data and ends at ", grouped(entry_.end),
                   "; the end must not be before the beginning");
    }
    if (entry_.end - entry_.begin != needed) {
      refuse_entry("has ", grouped(entry_.end - entry_.begin), " bytes (", grouped(entry_.begin), " to ",
                   grouped(entry_.end), "), but ", entry_.dtype, ' ', entry_.shape, " needs ", grouped(needed));
    }
    tensors.push_back(std::move(entry_));
  }

  std::string_view source_;
  Place place_ = Place::kStart;
  std::string key_;
  std::unordered_set<std::string> names_;
  SafetensorsEntry entry_;
  int offsets_ = 0;
  bool has_dtype_ = false, has_shape_ = false, has_offsets_ = false;
};

template <class... Parts>
[[noreturn]] void refuse(std::string_view source, const Parts&... parts) {
  fail(ErrorKind::kData, "load_safetensors", source, ": ", parts...);
}

/// The text of the header without its padding.
std::string_view header_text(std::span<const std::byte> file, std::string_view source) {
  const auto size = static_cast<int64_t>(file.size());
  if (size < 8) {
    refuse(source, "the file has ", size, " bytes; it must begin with 8 bytes that hold the length of its header. ",
           "Hint: the file is truncated or is no safetensors file");
  }
  uint64_t length = 0;
  for (size_t i = 0; i < 8; ++i) length |= std::to_integer<uint64_t>(file[i]) << (8 * i);
  if (length > static_cast<uint64_t>(kSafetensorsMaxHeader)) {
    refuse(source, "its first 8 bytes say that the header has ", length, " bytes; at most ",
           grouped(kSafetensorsMaxHeader), " are allowed. Hint: this is no safetensors file");
  }
  if (static_cast<int64_t>(length) > size - 8) {
    refuse(source, "the header ends at byte ", grouped(static_cast<int64_t>(length) + 8), " but the file has ",
           grouped(size), ": the file is truncated");
  }
  std::string_view text = chars(file.subspan(8, length));
  if (text.empty() || text[0] != '{') {
    refuse(source, "the header begins with ", text.empty() ? std::string("nothing") : weft::quoted(text.substr(0, 1)),
           "; it must be a JSON object and begin with \"{\". Hint: this is no safetensors file");
  }
  text = text.substr(0, text.find_last_not_of(' ') + 1);
  // JSON has no NUL outside of escapes, but the parser would take one for the end of its input.
  if (text.back() != '}' || text.find('\0') != std::string_view::npos) {
    refuse(source, "the header ends with ", weft::quoted(text.substr(text.size() - 1)),
           text.back() == '}' ? " but holds a NUL byte" : "",
           "; after the JSON object only spaces may follow. Hint: the file is damaged");
  }
  return text;
}

}  // namespace

SafetensorsHeader parse_safetensors(std::span<const std::byte> file, std::string_view source) {
  const std::string_view text = header_text(file, source);
  uint64_t length = 0;
  std::memcpy(&length, file.data(), 8);  // checked above; x86 and ARM are little-endian
  HeaderReader reader(source);
  Json::sax_parse(text.begin(), text.end(), &reader);

  SafetensorsHeader header;
  header.tensors = std::move(reader.tensors);
  header.metadata = std::move(reader.metadata);
  header.data_begin = 8 + static_cast<int64_t>(length);

  // Without overlap and gap there is one order in which each tensor begins where the one before ends.
  std::stable_sort(header.tensors.begin(), header.tensors.end(),
                   [](const auto& a, const auto& b) { return std::pair(a.begin, a.end) < std::pair(b.begin, b.end); });
  const int64_t available = static_cast<int64_t>(file.size()) - header.data_begin;
  int64_t at = 0;
  const SafetensorsEntry* previous = nullptr;
  for (const SafetensorsEntry& entry : header.tensors) {
    if (entry.begin < at) {
      refuse(source, "tensor ", weft::quoted(entry.name), " begins at byte ", grouped(entry.begin),
             " of the data, but tensor ", weft::quoted(previous->name), " before it ends at ", grouped(at),
             ": they overlap");
    }
    if (entry.begin > at) {
      refuse(source, "tensor ", weft::quoted(entry.name), " begins at byte ", grouped(entry.begin),
             " of the data, but ",
             previous == nullptr ? std::string("the data begins")
                                 : "tensor " + weft::quoted(previous->name) + " before it ends",
             " at ", grouped(at), ": no tensor may leave a gap");
    }
    if (entry.end > available) {
      refuse(source, "tensor ", weft::quoted(entry.name), " ends at byte ",
             grouped(header.data_begin + std::min(entry.end, kLargest - header.data_begin)), " but the file has ",
             grouped(static_cast<int64_t>(file.size())),
             ": the file is truncated. Hint: `weft checkpoint verify` finds the newest complete checkpoint of a run");
    }
    at = entry.end;
    previous = &entry;
  }
  if (at != available) {
    refuse(source, "the tensors end at byte ", grouped(header.data_begin + at), " but the file has ",
           grouped(static_cast<int64_t>(file.size())), ": no bytes may follow the last tensor");
  }
  return header;
}

}  // namespace weft
