#pragma once
// Internal to control_*.cpp: what travels between the control server and its clients.
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "core/error.h"

namespace weft::dist {

enum class MessageKind : uint16_t {
  // from a client
  hello = 1,  ///< rank, world size, host, pid
  beat,       ///< last stated operation
  leave,      ///< reason
  set,        ///< key, value
  get,        ///< key, milliseconds to wait
  barrier,    ///< name, milliseconds to wait
  log,        ///< level, time, text
  metric,     ///< time, JSON object
  // from the server
  welcome,  ///< milliseconds of silence after which a peer is lost
  refused,  ///< reason; to a hello, and to whoever was declared lost
  alive,    ///< answer to a beat
  done,     ///< answer to set, leave and barrier
  value,    ///< answer to get: 0, or 1 and the value
  failed,   ///< answer to get and barrier: reason
  member,   ///< of a rank that left or was lost: rank, state, host, pid, operation, reason
};

/// One frame: a header of kHeaderBytes, little endian {magic u32, version u16, kind u16, request u32, payload bytes
/// u32, run id 16 bytes}, then the payload.
struct Message {
  MessageKind kind = MessageKind::hello;
  uint32_t request = 0;  ///< chosen by the client; its answer carries the same
  std::string run_id;    ///< 32 hexadecimal digits
  std::string payload;
};

inline constexpr size_t kHeaderBytes = 32;
inline constexpr size_t kMaxFrame = 1 << 20;  ///< header included
inline constexpr size_t kMaxKey = 512;
inline constexpr size_t kMaxValue = kMaxFrame - 4096;
inline constexpr size_t kMaxStore = 64 << 20;  ///< keys and values of a run together
inline constexpr size_t kMaxText = 64 << 10;   ///< a log line, a metric
inline constexpr size_t kMaxName = 1024;       ///< an operation, a host, a reason
inline constexpr int64_t kMaxWaitMilliseconds = 1 << 30;

std::string encode(const Message& message);
/// Nothing if the bytes are no message: wrong magic or version, unknown kind, a length that is not that of the rest.
std::optional<Message> decode(std::string_view frame);

/// A payload's fields, one after the other: numbers as 8 bytes, little endian; texts as length and bytes.
class FieldWriter {
 public:
  FieldWriter& number(int64_t value);
  FieldWriter& text(std::string_view value);
  std::string take() { return std::move(bytes_); }

 private:
  std::string bytes_;
};

/// Reads them back. Every length is checked against its limit and against what is there before it is used.
class FieldReader {
 public:
  explicit FieldReader(std::string_view bytes) : rest_(bytes) {}
  /// @throws Error  kData, here and below, for a payload that breaks its format.
  int64_t number(int64_t min = INT64_MIN, int64_t max = INT64_MAX);
  std::string text(size_t limit);
  void end() const;

 private:
  std::string_view take(size_t bytes);
  std::string_view rest_;
};

/// `text` cut to at most `limit` bytes.
inline std::string_view clipped(std::string_view text, size_t limit) { return text.substr(0, limit); }

}  // namespace weft::dist
