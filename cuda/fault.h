#pragma once
#include <cstdint>

namespace weft::cuda {

/// What a kernel found wrong with its input. It lies in host memory that the device can write to; the host looks at it
/// whenever it has waited for the device. The first report since the last look stays.
struct Fault {
  enum Kind : unsigned { kNone, kOutside, kNoTarget };
  unsigned kind = kNone;
  const char* op = nullptr;  ///< string literals of the host
  const char* what = nullptr;
  int64_t position = 0, value = 0, limit = 0;
};

}  // namespace weft::cuda
