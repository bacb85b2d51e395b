#pragma once
#include <cstdint>
#include <optional>
#include <source_location>
#include <span>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "core/shape.h"

namespace weft::dist {

enum class Collective : uint8_t { all_reduce, reduce_scatter, all_gather, broadcast, all_to_all, send, recv, barrier };
inline constexpr int kCollectives = 8;
const char* name(Collective op);

/// How values of several ranks become one.
enum class Reduction : uint8_t {
  sum,  ///< integers wrap around (modulo 2^bits)
  max,  ///< NaN if any value is NaN
  min,  ///< NaN if any value is NaN
  avg,  ///< sum / ranks: float dtypes and numbers of ranks that are powers of two only, where the division is exact
};
const char* name(Reduction reduction);

/// What one rank asks for in one operation. Ranks of a group compare stamps before any data moves.
struct Stamp {
  std::string lane;       ///< the group's name; for send and recv "group 0>1", so that pairs are ordered on their own
  uint64_t sequence = 0;  ///< the how-manieth operation of that lane
  Collective op = Collective::barrier;
  DType dtype = DType::f32;
  Reduction reduction = Reduction::sum;
  int root = -1;         ///< broadcast: the source
  uint64_t members = 0;  ///< hash of the group's world ranks: groups of one name with other members are other groups
  Shape shape;           ///< of the input; of the output for recv
  std::vector<int64_t> send_counts;     ///< rows of dimension 0 for each rank: reduce_scatter, all_gather, all_to_all
  std::vector<int64_t> receive_counts;  ///< all_to_all
  std::string place;                    ///< "train.cpp:55"

  /// "all_reduce #17 of group "dp", f32 [8, 64], sum, at train.cpp:55".
  std::string describe() const;
  std::string encode() const;
  /// @throws Error kData if the bytes are no stamp.
  static Stamp decode(std::string_view bytes);
};

/// Why the stamps of ranks a and b (indices in the group) cannot be of one operation, or nothing if they can.
std::optional<std::string> conflict(const Stamp& a, int rank_a, const Stamp& b, int rank_b);

/// "train.cpp:55".
std::string place_name(const std::source_location& place);

}  // namespace weft::dist
