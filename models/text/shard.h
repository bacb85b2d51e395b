#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/file.h"

namespace weft::text {

/// A sequence of tokens that can be read anywhere. Reading is safe from several threads at once.
class TokenSource {
 public:
  virtual ~TokenSource() = default;
  virtual int64_t size() const = 0;
  /// Ids are below this.
  virtual int64_t vocab_size() const = 0;
  /// Copies the tokens [begin, begin + out.size()) to `out`. @throws Error  kIndex if they are not all there.
  virtual void read(int64_t begin, std::span<int32_t> out) const = 0;
};

/// Tokens in memory.
class TokenVector : public TokenSource {
 public:
  /// @throws Error  kIndex if an id is not in [0, vocab_size).
  TokenVector(std::vector<int32_t> tokens, int64_t vocab_size);
  int64_t size() const override { return static_cast<int64_t>(tokens_.size()); }
  int64_t vocab_size() const override { return vocab_size_; }
  void read(int64_t begin, std::span<int32_t> out) const override;

 private:
  std::vector<int32_t> tokens_;
  int64_t vocab_size_;
};

/// How a token is stored.
enum class TokenType : uint32_t { kU16 = 2, kU32 = 4 };  // the value is the size in bytes

/// A token file, memory-mapped. Layout of version 1, every number little-endian:
///
///   offset  size  content
///        0     8  magic "WEFTTOK" and a zero byte
///        8     4  version: 1
///       12     4  bytes a token: 2 (u16) or 4 (u32)
///       16     8  number of tokens, n
///       24     8  vocabulary size: ids are below it (at most 65,536 for u16, 2^31 - 1 for u32)
///       32     8  largest id in the payload; 0 if n is 0
///       40    16  XXH3-128 of the payload, canonical (big-endian) form
///       56     8  zero
///       64        payload: n tokens; the file ends with it
///
/// Opening reads the whole payload once, at memory speed: its hash, and that every id is below the vocabulary size.
class Shard : public TokenSource {
 public:
  static constexpr int64_t kHeaderSize = 64;

  /// Opens a file of the layout above.
  /// @throws Error  kIo if it cannot be read; kData, with what is wrong and where, if its content breaks the layout.
  static Shard open(const std::string& path);

  /// llm.c's files: 256 words of 32 bits (magic 20240520 and version 1 for u16 tokens, 20240801 and 7 for u32; number
  /// of tokens), then the tokens. The vocabulary size is not in the file. @throws Error  as open().
  static Shard open_llmc(const std::string& path, int64_t vocab_size);

  /// Bare tokens with no header (nanoGPT's `.bin` is u16). @throws Error  as open().
  static Shard open_raw(const std::string& path, TokenType type, int64_t vocab_size);

  int64_t size() const override { return count_; }
  int64_t vocab_size() const override { return vocab_size_; }
  void read(int64_t begin, std::span<int32_t> out) const override;

  /// All tokens.
  std::vector<int32_t> tokens() const;
  TokenType type() const { return type_; }
  const std::string& path() const { return file_->path(); }

 private:
  explicit Shard(const std::string& path) : file_(std::make_shared<const MappedFile>(path)) {}
  void check_ids(const char* where) const;

  std::shared_ptr<const MappedFile> file_;
  const std::byte* payload_ = nullptr;
  TokenType type_ = TokenType::kU16;
  int64_t count_ = 0;
  int64_t vocab_size_ = 0;
};

/// Writes a shard in pieces; u16 if the vocabulary allows it. Nothing is under the name before finish() (core/file.h,
/// AtomicFile); without it, nothing stays.
class ShardWriter {
 public:
  /// @throws Error  kValue if vocab_size is not in [1, 2^31 - 1]; kIo.
  ShardWriter(const std::string& path, int64_t vocab_size);
  ~ShardWriter();

  /// @throws Error  kIndex if an id is not in [0, vocab_size), with its position in the shard; kIo.
  void append(std::span<const int32_t> tokens);
  /// Completes the header, makes the file durable and gives it its name; at most once.
  void finish();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// ShardWriter in one call.
void write_shard(const std::string& path, std::span<const int32_t> tokens, int64_t vocab_size);

}  // namespace weft::text
