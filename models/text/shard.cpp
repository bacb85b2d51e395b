#include "models/text/shard.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>

#include "core/error.h"
#include "core/file.h"
#include "core/thread_pool.h"

namespace weft::text {

// Numbers are copied as they lie in memory.
static_assert(std::endian::native == std::endian::little, "token files are little-endian");

namespace {

struct Header {
  std::array<char, 8> magic = {'W', 'E', 'F', 'T', 'T', 'O', 'K', '\0'};
  uint32_t version = 1;
  uint32_t token_bytes = 0;
  uint64_t count = 0;
  uint64_t vocab_size = 0;
  uint64_t largest = 0;
  std::array<std::byte, 16> hash{};
  uint64_t zero = 0;
};
static_assert(sizeof(Header) == Shard::kHeaderSize);

constexpr int64_t kLargestVocabulary = std::numeric_limits<int32_t>::max();

void check_range(const char* where, int64_t begin, size_t count, int64_t size) {
  if (begin < 0 || begin > size || static_cast<int64_t>(count) > size - begin) {
    fail(ErrorKind::kIndex, where, count, " tokens from position ", begin, " on are not all among the ", size,
         " tokens that there are");
  }
}

void check_vocabulary(const char* where, const std::string& path, int64_t vocab_size) {
  if (vocab_size < 1 || vocab_size > kLargestVocabulary) {
    fail(ErrorKind::kValue, where, path, ": vocab_size must be from 1 to ", kLargestVocabulary, ", got ", vocab_size);
  }
}

template <class T>
uint64_t largest_of(const std::byte* data, int64_t count) {
  T largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    T value;
    std::memcpy(&value, data + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
    largest = std::max(largest, value);
  }
  return largest;
}

uint64_t token_at(const std::byte* data, TokenType type, int64_t i) {
  uint16_t narrow;
  uint32_t wide;
  if (type == TokenType::kU16) return std::memcpy(&narrow, data + i * 2, 2), narrow;
  return std::memcpy(&wide, data + i * 4, 4), wide;
}

constexpr int64_t kGrain = 1 << 20;

uint64_t largest_token(const std::byte* data, TokenType type, int64_t count) {
  const auto width = static_cast<int64_t>(type);
  std::vector<uint64_t> largest(static_cast<size_t>((count + kGrain - 1) / kGrain));
  parallel_for(count, kGrain, [&](int64_t begin, int64_t end) {
    const std::byte* from = data + begin * width;
    largest[static_cast<size_t>(begin / kGrain)] =
        type == TokenType::kU16 ? largest_of<uint16_t>(from, end - begin) : largest_of<uint32_t>(from, end - begin);
  });
  return largest.empty() ? 0 : *std::max_element(largest.begin(), largest.end());
}

}  // namespace

TokenVector::TokenVector(std::vector<int32_t> tokens, int64_t vocab_size)
    : tokens_(std::move(tokens)), vocab_size_(vocab_size) {
  for (size_t i = 0; i < tokens_.size(); ++i) {
    if (tokens_[i] < 0 || tokens_[i] >= vocab_size) {
      fail(ErrorKind::kIndex, "TokenVector", "token ", tokens_[i], " at position ", i, " is not in the vocabulary of ",
           vocab_size);
    }
  }
}

void TokenVector::read(int64_t begin, std::span<int32_t> out) const {
  check_range("TokenVector::read", begin, out.size(), size());
  std::copy_n(tokens_.begin() + begin, out.size(), out.begin());
}

void Shard::check_ids(const char* where) const {
  if (largest_token(payload_, type_, count_) < static_cast<uint64_t>(vocab_size_)) return;
  for (int64_t i = 0; i < count_; ++i) {
    if (const uint64_t token = token_at(payload_, type_, i); token >= static_cast<uint64_t>(vocab_size_)) {
      fail(ErrorKind::kData, where, path(), ": token ", token, " at position ", i, " is not in the vocabulary of ",
           vocab_size_);
    }
  }
}

Shard Shard::open(const std::string& path) {
  constexpr const char* kWhere = "Shard::open";
  Shard shard(path);
  const std::span<const std::byte> bytes = shard.file_->bytes();
  const Header expected;
  Header header;
  if (bytes.size() < sizeof header ||
      (std::memcpy(&header, bytes.data(), sizeof header), header.magic != expected.magic)) {
    fail(ErrorKind::kData, kWhere, path, ": is no token shard: ",
         bytes.size() < sizeof header ? "it is shorter than the header of 64 bytes" : "it does not begin with WEFTTOK");
  }
  if (header.version != expected.version) {
    fail(ErrorKind::kData, kWhere, path, ": has version ", header.version, "; this program reads version ",
         expected.version);
  }
  if (header.token_bytes != 2 && header.token_bytes != 4) {
    fail(ErrorKind::kData, kWhere, path, ": stores a token in ", header.token_bytes, " bytes; must be 2 or 4");
  }
  const uint64_t limit = header.token_bytes == 2 ? 65'536 : static_cast<uint64_t>(kLargestVocabulary);
  if (header.vocab_size < 1 || header.vocab_size > limit) {
    fail(ErrorKind::kData, kWhere, path, ": has a vocabulary of ", header.vocab_size, "; must be from 1 to ", limit,
         " for tokens of ", header.token_bytes, " bytes");
  }
  if (header.zero != 0) fail(ErrorKind::kData, kWhere, path, ": the last 8 bytes of the header must be zero");
  const std::span<const std::byte> payload = bytes.subspan(sizeof header);
  // Divided, not multiplied: a count from a file may overflow.
  if (header.count != payload.size() / header.token_bytes || payload.size() % header.token_bytes != 0) {
    const bool truncated = header.count > payload.size() / header.token_bytes;
    fail(ErrorKind::kData, kWhere, path, ": announces ", header.count, " tokens of ", header.token_bytes,
         " bytes but has ", payload.size(), " bytes after its header: it ",
         truncated ? "is truncated" : "has trailing bytes");
  }
  if (Hasher().update(payload).digest() != header.hash) {
    fail(ErrorKind::kData, kWhere, path, ": the hash of its tokens is not the one in its header: the file is damaged");
  }
  shard.payload_ = payload.data();
  shard.type_ = static_cast<TokenType>(header.token_bytes);
  shard.count_ = static_cast<int64_t>(header.count);
  shard.vocab_size_ = static_cast<int64_t>(header.vocab_size);
  shard.check_ids(kWhere);
  if (largest_token(shard.payload_, shard.type_, shard.count_) != header.largest) {
    fail(ErrorKind::kData, kWhere, path, ": the header says that the largest id is ", header.largest,
         ", which it is not");
  }
  return shard;
}

Shard Shard::open_llmc(const std::string& path, int64_t vocab_size) {
  constexpr const char* kWhere = "Shard::open_llmc";
  check_vocabulary(kWhere, path, vocab_size);
  Shard shard(path);
  const std::span<const std::byte> bytes = shard.file_->bytes();
  constexpr size_t kHeader = 256 * 4;
  std::array<int32_t, 3> header{};
  if (bytes.size() >= kHeader) std::memcpy(header.data(), bytes.data(), sizeof header);
  const auto [magic, version, count] = header;
  const bool narrow = magic == 20240520 && version == 1, wide = magic == 20240801 && version == 7;
  if (!narrow && !wide) {
    fail(ErrorKind::kData, kWhere, path, ": is no llm.c token file: magic ", magic, ", version ", version,
         "; expected 20240520, 1 or 20240801, 7");
  }
  const size_t width = narrow ? 2 : 4, payload = bytes.size() - kHeader;
  if (count < 0 || payload % width != 0 || static_cast<size_t>(count) != payload / width) {
    fail(ErrorKind::kData, kWhere, path, ": announces ", count, " tokens of ", width, " bytes but has ", payload,
         " bytes after its header");
  }
  shard.payload_ = bytes.data() + kHeader;
  shard.type_ = narrow ? TokenType::kU16 : TokenType::kU32;
  shard.count_ = count;
  shard.vocab_size_ = vocab_size;
  shard.check_ids(kWhere);
  return shard;
}

Shard Shard::open_raw(const std::string& path, TokenType type, int64_t vocab_size) {
  constexpr const char* kWhere = "Shard::open_raw";
  check_vocabulary(kWhere, path, vocab_size);
  Shard shard(path);
  const auto width = static_cast<size_t>(type);
  if (shard.file_->size() % width != 0) {
    fail(ErrorKind::kData, kWhere, path, ": its ", shard.file_->size(), " bytes are no whole number of tokens of ",
         width, " bytes");
  }
  shard.payload_ = shard.file_->bytes().data();
  shard.type_ = type;
  shard.count_ = static_cast<int64_t>(shard.file_->size() / width);
  shard.vocab_size_ = vocab_size;
  shard.check_ids(kWhere);
  return shard;
}

void Shard::read(int64_t begin, std::span<int32_t> out) const {
  check_range("Shard::read", begin, out.size(), count_);
  if (out.empty()) return;
  if (type_ == TokenType::kU32) {  // ids are below 2^31: the same bits
    std::memcpy(out.data(), payload_ + begin * 4, out.size_bytes());
    return;
  }
  for (size_t i = 0; i < out.size(); ++i) {
    out[i] = static_cast<int32_t>(token_at(payload_, TokenType::kU16, begin + static_cast<int64_t>(i)));
  }
}

std::vector<int32_t> Shard::tokens() const {
  std::vector<int32_t> all(static_cast<size_t>(count_));
  read(0, all);
  return all;
}

struct ShardWriter::State {
  State(const std::string& path, int64_t vocab_size) : path(path), vocab_size(vocab_size), file(path) {
    header.token_bytes = vocab_size <= 65'536 ? 2 : 4;
    header.vocab_size = static_cast<uint64_t>(vocab_size);
  }
  std::string path;
  int64_t vocab_size;
  Header header;
  AtomicFile file;
  Hasher hasher;
};

ShardWriter::ShardWriter(const std::string& path, int64_t vocab_size) {
  check_vocabulary("ShardWriter", path, vocab_size);
  state_ = std::make_unique<State>(path, vocab_size);
  state_->file.write(std::as_bytes(std::span(&state_->header, 1)));  // finish() fills in the rest
}

ShardWriter::~ShardWriter() = default;

void ShardWriter::append(std::span<const int32_t> tokens) {
  State& s = *state_;
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] < 0 || tokens[i] >= s.vocab_size) {
      fail(ErrorKind::kIndex, "ShardWriter", s.path, ": token ", tokens[i], " at position ", s.header.count + i,
           " is not in the vocabulary of ", s.vocab_size);
    }
  }
  std::vector<uint16_t> narrow;
  constexpr size_t kPiece = size_t{1} << 18;  // tokens converted and written at a time
  for (size_t begin = 0; begin < tokens.size(); begin += kPiece) {
    const std::span<const int32_t> piece = tokens.subspan(begin, std::min(kPiece, tokens.size() - begin));
    std::span<const std::byte> bytes = std::as_bytes(piece);
    if (s.header.token_bytes == 2) {
      narrow.assign(piece.begin(), piece.end());
      bytes = std::as_bytes(std::span(narrow));
    }
    s.file.write(bytes);
    s.hasher.update(bytes);
    s.header.count += piece.size();
    s.header.largest = std::max(s.header.largest, static_cast<uint64_t>(*std::max_element(piece.begin(), piece.end())));
  }
}

void ShardWriter::finish() {
  state_->header.hash = state_->hasher.digest();
  state_->file.write_at(0, std::as_bytes(std::span(&state_->header, 1)));
  state_->file.commit();
}

void write_shard(const std::string& path, std::span<const int32_t> tokens, int64_t vocab_size) {
  ShardWriter writer(path, vocab_size);
  writer.append(tokens);
  writer.finish();
}

}  // namespace weft::text
