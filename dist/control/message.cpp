#include "dist/control/message.h"

namespace weft::dist {
namespace {

constexpr uint32_t kMagic = 0x54464557;  // "WEFT"
constexpr uint16_t kVersion = 1;

void put(std::string& bytes, uint64_t value, size_t size) {
  for (size_t i = 0; i < size; ++i) bytes += static_cast<char>(value >> (8 * i));
}

uint64_t get(std::string_view bytes) {
  uint64_t value = 0;
  for (size_t i = bytes.size(); i-- > 0;) value = value << 8 | static_cast<uint8_t>(bytes[i]);
  return value;
}

uint64_t digit(char c) { return static_cast<uint64_t>(c <= '9' ? c - '0' : c - 'a' + 10); }

[[noreturn]] void broken() { fail(ErrorKind::kData, "control plane", "a message breaks its format"); }

}  // namespace

std::string encode(const Message& message) {
  std::string frame;
  frame.reserve(kHeaderBytes + message.payload.size());
  put(frame, kMagic, 4);
  put(frame, kVersion, 2);
  put(frame, static_cast<uint64_t>(message.kind), 2);
  put(frame, message.request, 4);
  put(frame, message.payload.size(), 4);
  for (size_t i = 0; i + 1 < message.run_id.size(); i += 2) {
    put(frame, digit(message.run_id[i]) << 4 | digit(message.run_id[i + 1]), 1);
  }
  return frame + message.payload;
}

std::optional<Message> decode(std::string_view frame) {
  if (frame.size() < kHeaderBytes || frame.size() > kMaxFrame) return std::nullopt;
  const auto field = [&](size_t at, size_t size) { return get(frame.substr(at, size)); };
  const uint64_t kind = field(6, 2);
  if (field(0, 4) != kMagic || field(4, 2) != kVersion || field(12, 4) != frame.size() - kHeaderBytes || kind < 1 ||
      kind > static_cast<uint64_t>(MessageKind::member)) {
    return std::nullopt;
  }
  Message message;
  message.kind = static_cast<MessageKind>(kind);
  message.request = static_cast<uint32_t>(field(8, 4));
  for (size_t i = 16; i < kHeaderBytes; ++i) {
    const auto byte = static_cast<uint8_t>(frame[i]);
    message.run_id += "0123456789abcdef"[byte >> 4];
    message.run_id += "0123456789abcdef"[byte & 15];
  }
  message.payload = frame.substr(kHeaderBytes);
  return message;
}

FieldWriter& FieldWriter::number(int64_t value) {
  put(bytes_, static_cast<uint64_t>(value), 8);
  return *this;
}

FieldWriter& FieldWriter::text(std::string_view value) {
  put(bytes_, value.size(), 4);
  bytes_ += value;
  return *this;
}

std::string_view FieldReader::take(size_t bytes) {
  if (bytes > rest_.size()) broken();
  const std::string_view taken = rest_.substr(0, bytes);
  rest_.remove_prefix(bytes);
  return taken;
}

int64_t FieldReader::number(int64_t min, int64_t max) {
  const auto value = static_cast<int64_t>(get(take(8)));
  if (value < min || value > max) broken();
  return value;
}

std::string FieldReader::text(size_t limit) {
  const uint64_t size = get(take(4));
  if (size > limit) broken();
  return std::string(take(size));
}

void FieldReader::end() const {
  if (!rest_.empty()) broken();
}

}  // namespace weft::dist
