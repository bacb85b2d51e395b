#pragma once
#include <cstring>
#include <string>
#include <string_view>
#include <type_traits>

#include "core/error.h"

namespace weft::dist {

/// Writes numbers and strings one after the other, in the byte order of this machine. Ranks of one run share it.
class WireWriter {
 public:
  template <class T>
    requires std::is_trivially_copyable_v<T>
  WireWriter& put(const T& value) {
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof(T));
    return *this;
  }
  WireWriter& text(std::string_view value) {
    put(static_cast<uint32_t>(value.size()));
    bytes_.append(value);
    return *this;
  }
  std::string take() { return std::move(bytes_); }

 private:
  std::string bytes_;
};

/// Reads them back; every length is checked before it is used.
class WireReader {
 public:
  explicit WireReader(std::string_view bytes) : rest_(bytes) {}
  template <class T>
    requires std::is_trivially_copyable_v<T>
  T get() {
    T value;
    std::memcpy(&value, take(sizeof(T)).data(), sizeof(T));
    return value;
  }
  /// A count of things of at least `each` bytes that follow.
  uint32_t count(size_t each) {
    const auto n = get<uint32_t>();
    if (n > rest_.size() / each) broken();
    return n;
  }
  std::string text() { return std::string(take(count(1))); }
  void end() const {
    if (!rest_.empty()) broken();
  }

 private:
  std::string_view take(size_t bytes) {
    if (bytes > rest_.size()) broken();
    const std::string_view taken = rest_.substr(0, bytes);
    rest_.remove_prefix(bytes);
    return taken;
  }
  [[noreturn]] static void broken() {
    fail(ErrorKind::kData, "dist", "a message between ranks breaks its format. Hint: do all ranks run the same build?");
  }
  std::string_view rest_;
};

}  // namespace weft::dist
