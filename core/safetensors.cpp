// Loading tensors from safetensors files, and writing them. The header is read in safetensors_parse.cpp.
#include "core/safetensors.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <nlohmann/json.hpp>
#include <numeric>

#include "core/autograd.h"
#include "core/safetensors_dtype.h"

namespace weft {
namespace {

static_assert(std::endian::native == std::endian::little, "safetensors data is little-endian and copied as it is");

/// Data begins at a multiple of this, so that a mapped tensor is aligned as an allocated one.
constexpr size_t kDataAlignment = 64;

/// What is hashed and then written from the cache; small tensors are gathered up to it.
constexpr size_t kPiece = size_t{256} << 10;
/// Device tensors pass through host memory in pieces of this size.
constexpr size_t kTransfer = size_t{4} << 20;

/// Sends bytes to a file and to a hash, without small system calls.
class HashedFile {
 public:
  explicit HashedFile(const std::string& path) : file_(path) {}

  /// At most kPiece bytes.
  void write(std::span<const std::byte> bytes) {
    hasher_.update(bytes);
    if (waiting_.size() + bytes.size() > kPiece) flush();
    if (bytes.size() > kPiece / 8) {
      flush();
      file_.write(bytes);
    } else {
      waiting_.insert(waiting_.end(), bytes.begin(), bytes.end());
    }
  }

  void write_back() {
    flush();
    file_.write_back();
  }

  std::string commit() {
    flush();
    file_.commit();
    return hasher_.hex();
  }

 private:
  void flush() {
    if (!waiting_.empty()) file_.write(waiting_);
    waiting_.clear();
  }

  AtomicFile file_;
  Hasher hasher_;
  std::vector<std::byte> waiting_;
};

/// `text` as a JSON string.
std::string json_string(const std::string& path, const char* what, const std::string& text) {
  try {
    return nlohmann::json(text).dump();
  } catch (const nlohmann::json::type_error&) {
    fail(ErrorKind::kValue, "save_safetensors", path, ": ", what, ' ', weft::quoted(text), " is not valid UTF-8");
  }
}

using Item = std::pair<std::string, Tensor>;

std::string header_of(const std::string& path, const std::vector<Item>& order,
                      const std::map<std::string, std::string>& metadata) {
  std::string header = "{";
  if (!metadata.empty()) {
    header += "\"__metadata__\":{";
    for (const auto& [key, value] : metadata) {
      if (header.back() != '{') header += ',';
      header += json_string(path, "the metadata key", key) + ':' + json_string(path, "the metadata value", value);
    }
    header += '}';
  }
  int64_t at = 0;
  for (const auto& [name, tensor] : order) {
    const int64_t bytes = tensor.numel() * size_of(tensor.dtype());
    int64_t end = 0;
    if (__builtin_add_overflow(at, bytes, &end)) {
      fail(ErrorKind::kValue, "save_safetensors", path, ": the tensors have more bytes than 64 bits can count");
    }
    if (header.back() != '{') header += ',';
    header += json_string(path, "the tensor name", name) + ":{\"dtype\":\"";
    header += safetensors_name(tensor.dtype());
    header += "\",\"shape\":[";
    for (const int64_t size : tensor.shape()) {
      if (header.back() != '[') header += ',';
      header += std::to_string(size);
    }
    header += "],\"data_offsets\":[" + std::to_string(at) + ',' + std::to_string(end) + "]}";
    at = end;
  }
  header += '}';
  header.resize((header.size() + 8 + kDataAlignment - 1) / kDataAlignment * kDataAlignment - 8, ' ');
  if (static_cast<int64_t>(header.size()) > kSafetensorsMaxHeader) {
    fail(ErrorKind::kValue, "save_safetensors", path, ": the header would have ",
         grouped(static_cast<int64_t>(header.size())), " bytes; the format allows ", grouped(kSafetensorsMaxHeader),
         ". Hint: use fewer tensors or less metadata");
  }
  return header;
}

/// Checks tensors and puts them in the order of the file.
std::vector<Item> in_order(const std::string& path, std::vector<Item> tensors) {
  if (DryRun::active())
    fail(ErrorKind::kState, "save_safetensors", path, ": there are no values to write in a dry run");
  std::vector<std::string_view> names;
  for (const auto& [name, tensor] : tensors) {
    if (name == "__metadata__") {
      fail(ErrorKind::kValue, "save_safetensors", path,
           ": a tensor may not be named \"__metadata__\"; the format uses it");
    }
    if (!tensor.defined()) {
      fail(ErrorKind::kValue, "save_safetensors", path, ": tensor ", weft::quoted(name), " is undefined");
    }
    names.push_back(name);
  }
  std::sort(names.begin(), names.end());
  if (const auto twice = std::adjacent_find(names.begin(), names.end()); twice != names.end()) {
    fail(ErrorKind::kValue, "save_safetensors", path, ": two tensors are named ", weft::quoted(*twice));
  }
  std::sort(tensors.begin(), tensors.end(), [](const Item& a, const Item& b) {
    const int64_t left = size_of(a.second.dtype()), right = size_of(b.second.dtype());
    return left != right ? left > right : a.first < b.first;
  });
  return tensors;
}

}  // namespace

struct SafetensorsWriter::Impl {
  Impl(std::string name, std::vector<Item> tensors, const std::map<std::string, std::string>& metadata)
      : path(std::move(name)),
        order(in_order(path, std::move(tensors))),
        header(header_of(path, order, metadata)),
        file(path) {
    const uint64_t length = header.size();
    header.insert(0, reinterpret_cast<const char*>(&length), sizeof length);
    current = as_bytes(header);
  }

  bool left() {
    while (current.empty() && (next < order.size() || !on_device.empty())) advance();
    return !current.empty();
  }

  /// The next bytes of the file, at most `most`; none at its end.
  std::span<const std::byte> take(size_t most) {
    left();
    const auto taken = current.first(std::min(most, current.size()));
    current = current.subspan(taken.size());
    return taken;
  }

  void advance() {
    if (on_device.empty()) {
      row_major = order[next++].second.contiguous();
      const std::span all(static_cast<const std::byte*>(row_major.raw()),
                          static_cast<size_t>(row_major.numel() * size_of(row_major.dtype())));
      (row_major.device().kind == DeviceKind::cpu ? current : on_device) = all;
      return;
    }
    host.resize(std::min(on_device.size(), kTransfer));
    backend(row_major.device()).to_host(host.data(), on_device.data(), host.size());
    on_device = on_device.subspan(host.size());
    current = host;
  }

  const std::string path;
  std::vector<Item> order;
  std::string header;  ///< with its length
  HashedFile file;
  size_t next = 0;                       ///< of `order`: the tensor after row_major
  Tensor row_major;                      ///< that is being written
  std::vector<std::byte> host;           ///< of a device's tensor, what is being written
  std::span<const std::byte> on_device;  ///< of it, what comes after that
  std::span<const std::byte> current;    ///< in host memory, what comes next
};

SafetensorsWriter::SafetensorsWriter(const std::string& path, std::vector<std::pair<std::string, Tensor>> tensors,
                                     const std::map<std::string, std::string>& metadata)
    : impl_(std::make_unique<Impl>(path, std::move(tensors), metadata)) {}

SafetensorsWriter::~SafetensorsWriter() = default;

bool SafetensorsWriter::write(size_t bytes) {
  const autograd::NoGrad no_grad;
  while (bytes > 0) {
    const auto piece = impl_->take(std::min(bytes, kPiece));
    if (piece.empty()) return false;
    impl_->file.write(piece);
    bytes -= piece.size();
  }
  return impl_->left();
}

void SafetensorsWriter::write_back() { impl_->file.write_back(); }

std::string SafetensorsWriter::commit() {
  if (impl_->left())
    fail(ErrorKind::kState, "save_safetensors", impl_->path, ": commit() before everything is written");
  return impl_->file.commit();
}

std::string save_safetensors(const std::string& path, std::span<const std::pair<std::string, Tensor>> tensors,
                             const std::map<std::string, std::string>& metadata) {
  SafetensorsWriter writer(path, {tensors.begin(), tensors.end()}, metadata);
  while (writer.write(kTransfer)) {
  }
  return writer.commit();
}

SafetensorsFile::SafetensorsFile(MappedFile file)
    : mapping_(std::move(file)),
      source_(mapping_->path()),
      bytes_(mapping_->bytes()),
      header_(parse_safetensors(bytes_, source_)) {
  build_index();
}

SafetensorsFile::SafetensorsFile(std::span<const std::byte> file, std::string source)
    : source_(std::move(source)), bytes_(file), header_(parse_safetensors(bytes_, source_)) {
  build_index();
}

void SafetensorsFile::build_index() {
  by_name_.resize(header_.tensors.size());
  std::iota(by_name_.begin(), by_name_.end(), 0u);
  std::sort(by_name_.begin(), by_name_.end(),
            [&](uint32_t a, uint32_t b) { return header_.tensors[a].name < header_.tensors[b].name; });
}

const SafetensorsEntry* SafetensorsFile::find(std::string_view name) const {
  const auto at = std::lower_bound(by_name_.begin(), by_name_.end(), name, [&](uint32_t i, std::string_view wanted) {
    return header_.tensors[i].name < wanted;
  });
  return at != by_name_.end() && header_.tensors[*at].name == name ? &header_.tensors[*at] : nullptr;
}

const SafetensorsEntry& SafetensorsFile::entry(std::string_view name) const {
  if (const SafetensorsEntry* found = find(name)) return *found;
  std::vector<std::string> names;
  for (const SafetensorsEntry& each : tensors()) names.push_back(each.name);
  fail(ErrorKind::kData, "load_safetensors", source_, ": there is no tensor ", weft::quoted(name), " among its ",
       names.size(), did_you_mean(name, names));
}

std::span<const std::byte> SafetensorsFile::bytes(const SafetensorsEntry& entry) const {
  return bytes_.subspan(static_cast<size_t>(header_.data_begin + entry.begin),
                        static_cast<size_t>(entry.end - entry.begin));
}

std::span<const std::byte> SafetensorsFile::checked_bytes(const SafetensorsEntry& entry) const {
  const auto bytes = this->bytes(entry);
  if (entry.dtype != DType::boolean) return bytes;
  // Reading a C++ bool from any other byte is undefined behaviour.
  const auto bad = std::find_if(bytes.begin(), bytes.end(), [](std::byte byte) { return byte > std::byte{1}; });
  if (bad != bytes.end()) {
    fail(ErrorKind::kData, "load_safetensors", source_, ": tensor ", weft::quoted(entry.name),
         " is BOOL but its element ", bad - bytes.begin(), " is the byte ", std::to_integer<int>(*bad),
         "; only 0 and 1 are allowed");
  }
  return bytes;
}

Tensor SafetensorsFile::load(std::string_view name, Device device) const {
  const SafetensorsEntry& wanted = entry(name);
  const auto bytes = checked_bytes(wanted);
  Tensor tensor = Tensor::empty(wanted.shape, wanted.dtype, device);
  if (!bytes.empty() && !DryRun::active()) backend(device).to_device(tensor.raw(), bytes.data(), bytes.size());
  return tensor;
}

void SafetensorsFile::load_into(std::string_view name, const Tensor& target) const {
  const SafetensorsEntry& wanted = entry(name);
  if (!(wanted.shape == target.shape()) || wanted.dtype != target.dtype()) {
    fail(ErrorKind::kData, "load_safetensors", source_, ": tensor ", weft::quoted(name), " is ", wanted.dtype, ' ',
         wanted.shape, "; the program expects ", target.describe());
  }
  const autograd::NoGrad no_grad;
  if (!target.is_contiguous()) {
    Tensor(target).copy_(load(name));
    return;
  }
  const auto bytes = checked_bytes(wanted);
  target.begin_change("load_into");
  if (!bytes.empty() && !DryRun::active()) backend(target.device()).to_device(target.raw(), bytes.data(), bytes.size());
}

std::vector<std::pair<std::string, Tensor>> SafetensorsFile::load_all(Device device) const {
  std::vector<std::pair<std::string, Tensor>> all;
  for (const SafetensorsEntry& each : tensors()) all.emplace_back(each.name, load(each.name, device));
  return all;
}

void SafetensorsFile::check_values() const {
  for (const SafetensorsEntry& each : tensors()) checked_bytes(each);
}

}  // namespace weft
