#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/file.h"
#include "core/tensor.h"

/// The safetensors format (https://github.com/huggingface/safetensors, "Format"):
///
///   bytes 0..7     N, the length of the header, little-endian unsigned
///   bytes 8..8+N   the header: a JSON object in UTF-8 that begins with '{' and may be padded with spaces
///   the rest       the data: tensors in row-major order, little-endian, without gaps
///
/// The header maps each name to {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, counted from the start
/// of the data; "__metadata__" may map strings to strings.
namespace weft {

/// The longest header that readers of this format accept.
inline constexpr int64_t kSafetensorsMaxHeader = 100'000'000;

/// A tensor of a file. Its bytes have been checked to lie in the file and to be as many as dtype and shape say.
struct SafetensorsEntry {
  std::string name;
  DType dtype = DType::f32;
  Shape shape;
  int64_t begin = 0;  ///< first byte, counted from the start of the data
  int64_t end = 0;    ///< one past the last byte
};

/// What the header of a file says.
struct SafetensorsHeader {
  std::vector<SafetensorsEntry> tensors;  ///< in the order of their bytes
  std::map<std::string, std::string> metadata;
  int64_t data_begin = 0;  ///< offset of the data in the file: 8 + N
};

/// Reads and checks the header of a whole file held in memory. Refused are: a file shorter than 8 bytes or than its
/// header; a header longer than kSafetensorsMaxHeader, not beginning with '{', not JSON, not UTF-8, or followed by
/// anything but spaces; duplicate keys at any level; metadata other than strings; a tensor without exactly dtype, shape
/// and data_offsets; a dtype or a rank that Weft does not have; sizes and offsets that are negative, fractional, beyond
/// int64 or whose product is; a range of bytes that is not as long as dtype and shape need; ranges that overlap, leave
/// a gap, end beyond the file or leave bytes at its end. Memory use is bounded by the length of the header as found.
/// @param source  name of the file, for messages
/// @throws Error  kData naming source, tensor and both numbers.
SafetensorsHeader parse_safetensors(std::span<const std::byte> file, std::string_view source);

/// A safetensors file open for reading: mapped, so that only the tensors that are loaded are read.
class SafetensorsFile {
 public:
  /// @throws Error  kIo if the file cannot be mapped, kData as parse_safetensors.
  explicit SafetensorsFile(const std::string& path) : SafetensorsFile(MappedFile(path)) {}
  /// The same for a file that is mapped already. @throws Error  kData.
  explicit SafetensorsFile(MappedFile file);
  /// A file held in memory that outlives this object; `source` names it in messages. @throws Error  kData.
  SafetensorsFile(std::span<const std::byte> file, std::string source);

  /// The tensors in the order of their bytes.
  const std::vector<SafetensorsEntry>& tensors() const { return header_.tensors; }
  const std::map<std::string, std::string>& metadata() const { return header_.metadata; }
  const std::string& source() const { return source_; }
  /// The whole file, header included.
  std::span<const std::byte> bytes() const { return bytes_; }

  bool contains(std::string_view name) const { return find(name) != nullptr; }
  /// @throws Error  kData if there is none, with the closest name.
  const SafetensorsEntry& entry(std::string_view name) const;

  /// A copy of the tensor, counted under the MemoryScope of the caller.
  /// @throws Error  kData if there is none of that name, or if it is BOOL and holds a byte other than 0 and 1.
  Tensor load(std::string_view name, Device device = Device::cpu()) const;

  /// Copies the values into `target`, of any strides and on any device; counts as an in-place change, and is allowed on
  /// a parameter as under NoGrad. @throws Error  kData as load(), and if shape or dtype of the target are others.
  void load_into(std::string_view name, const Tensor& target) const;

  /// Every tensor with its name, in the order of the file.
  std::vector<std::pair<std::string, Tensor>> load_all(Device device = Device::cpu()) const;

  /// The bytes of a tensor of this file, row-major, as they lie there; what is not read is not touched.
  std::span<const std::byte> bytes(const SafetensorsEntry& entry) const;

  /// Checks what load() would refuse in the bytes of the tensors: BOOL values other than 0 and 1. @throws Error  kData.
  void check_values() const;

 private:
  const SafetensorsEntry* find(std::string_view name) const;
  std::span<const std::byte> checked_bytes(const SafetensorsEntry& entry) const;
  void build_index();

  std::optional<MappedFile> mapping_;
  std::string source_;
  std::span<const std::byte> bytes_;
  SafetensorsHeader header_;
  std::vector<uint32_t> by_name_;  ///< positions in tensors(), sorted by name: entries may move with the object
};

/// Writes tensors to a file that appears whole or not at all (AtomicFile). The same names and values give the same
/// bytes, in whatever order they are passed: tensors are stored by element size, largest first, then by name
/// (bytewise), so that every one is aligned to its element; the header is in the same order, metadata first and sorted,
/// no space between its tokens, and padded with spaces so that the data begins at a multiple of 64. Tensors are
/// streamed, hashed and written in one pass; only one that is not contiguous or not on the CPU is copied, one at a
/// time.
/// @return        the XXH3-128 hash of the file, as hash_file would give it
/// @throws Error  kValue for a duplicate name, the name "__metadata__", a name or metadata that is not UTF-8, or a
///                header above kSafetensorsMaxHeader; kState in a dry run; kIo if the file cannot be written.
std::string save_safetensors(const std::string& path, std::span<const std::pair<std::string, Tensor>> tensors,
                             const std::map<std::string, std::string>& metadata = {});

/// save_safetensors() in pieces, by which a program does other things between them. The tensors must not change until
/// commit(). Any thread may call it, one at a time.
class SafetensorsWriter {
 public:
  /// Begins the file. @throws Error  as save_safetensors().
  SafetensorsWriter(const std::string& path, std::vector<std::pair<std::string, Tensor>> tensors,
                    const std::map<std::string, std::string>& metadata = {});
  ~SafetensorsWriter();  ///< without commit(): nothing is left of the file

  /// Writes the next `bytes`. Returns false if no more than that was left.
  bool write(size_t bytes);
  /// AtomicFile::write_back() of what write() has written.
  void write_back();
  /// Makes the file durable and gives it its name, when write() has returned false. Returns its hash.
  /// @throws Error  kState if something is left to write.
  std::string commit();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace weft
