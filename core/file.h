#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

namespace weft {

/// The bytes of a text, for functions that take spans.
inline std::span<const std::byte> as_bytes(std::string_view text) {
  return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}

/// A whole file mapped read-only. Pages are read on first touch; the mapping lives as long as the object and stays
/// valid when the file is renamed over or unlinked. A file that another process truncates in place meanwhile ends the
/// program with SIGBUS, as every mapping does: files that are mapped here are replaced (AtomicFile), never edited.
class MappedFile {
 public:
  /// @throws Error  kIo with path and system message if `path` cannot be opened or is not a regular file.
  explicit MappedFile(const std::string& path);
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  std::span<const std::byte> bytes() const { return {static_cast<const std::byte*>(data_), size_}; }
  std::string_view text() const { return {static_cast<const char*>(data_), size_}; }
  size_t size() const { return size_; }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  void* data_ = nullptr;
  size_t size_ = 0;
};

/// The content of a file, pipes and /proc included.
/// @throws Error  kIo with path and system message.
std::string read_file(const std::string& path);

/// Writes a file that appears under its name whole or not at all, after any crash: bytes go to a temporary file in the
/// same directory (".weft-tmp-<pid>-<n>"), and commit() does fsync, rename over `path`, fsync of the directory. Until
/// commit() has renamed, an older file of that name is untouched. A new file gets the mode that the umask allows, a
/// replaced one keeps its mode; a symbolic link is followed, so that the link stays and its target is replaced. Every
/// failure is an Error kIo that names `path`, the step and the system message; the temporary file is then removed.
class AtomicFile {
 public:
  /// @throws Error  kIo if the directory is not writable or `path` is there and not a regular file.
  explicit AtomicFile(const std::string& path);
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  ~AtomicFile();  ///< without commit(): removes the temporary file

  /// Appends. Unbuffered: pass large pieces.
  void write(std::span<const std::byte> bytes);
  void write(std::string_view text) { write(as_bytes(text)); }

  /// Overwrites bytes written before (a header that depends on what follows it): [offset, offset + bytes.size()) must
  /// lie within what was written. @throws Error  kValue if it does not.
  void write_at(uint64_t offset, std::span<const std::byte> bytes);

  /// Has the system begin to bring what was written since the last call to the disk, and waits for what the call before
  /// that was about, which then leaves the system's cache: a writer that calls it every so many bytes has at most twice
  /// as many under way, pushes nobody's data out of memory and leaves commit() little to do. @throws Error  kIo if the
  /// disk failed; commit() would not be told of it again.
  void write_back();

  /// Makes the file durable and gives it its name; at most once.
  void commit();

  uint64_t size() const { return size_; }

 private:
  [[noreturn]] void abandon(const char* step, int error);

  std::string path_;       ///< as given: for messages
  std::string target_;     ///< links resolved
  std::string temporary_;  ///< empty once renamed or removed
  int descriptor_ = -1;
  uint64_t size_ = 0;
  uint64_t on_disk_ = 0, under_way_ = 0;  ///< what write_back() has waited for, and begun, up to here
};

/// AtomicFile in one call.
void write_file_atomic(const std::string& path, std::span<const std::byte> bytes);
void write_file_atomic(const std::string& path, std::string_view text);

/// Makes renames and new names in `directory` durable. @throws Error  kIo.
void fsync_directory(const std::string& directory);

/// XXH3-128 (https://xxhash.com): detects damage, is no defence against an adversary. Streaming form.
class Hasher {
 public:
  Hasher();
  Hasher(Hasher&&) noexcept;
  Hasher& operator=(Hasher&&) noexcept;
  ~Hasher();

  Hasher& update(std::span<const std::byte> bytes);
  /// The canonical (big-endian) 16 bytes of the hash of everything so far; more may follow.
  std::array<std::byte, 16> digest() const;
  /// digest() as 32 lower-case hexadecimal digits, as `xxhsum -H2` prints it.
  std::string hex() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// Hasher::hex() of the bytes; of a file's content. @throws Error  kIo with path and system message.
std::string hash_bytes(std::span<const std::byte> bytes);
std::string hash_file(const std::string& path);

}  // namespace weft
