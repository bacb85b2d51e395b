#pragma once
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "dist/group.h"
#include "dist/pass.h"
#include "dist/shard_layout.h"
#include "optim/parameter.h"

namespace weft::dist {

/// Parameters of which every rank keeps a range, and which are whole only while their unit of the model runs. Units run
/// one after the other; while one does, the next is gathered. A tensor that is in several units is gathered once for
/// all that need it at a time.
class ParameterUnits {
 public:
  /// @param whole    the model's parameters; their memory is given back (Storage::release)
  /// @param shards   this rank's ranges of them, in memory of their own
  /// @param layouts  which of them travel together and who has what; tensors begin where memory is aligned
  /// @param units    [unit], numbers of layouts
  ParameterUnits(Group& group, Parameters whole, Parameters shards, std::vector<ShardBucket> layouts,
                 std::vector<std::vector<size_t>> units);

  size_t size() const { return units_.size(); }

  /// The unit's parameters are whole when this returns, and those of the next in the direction on their way.
  /// @throws Error kIndex for a unit that is none, kState for one that has begun.
  void begin(size_t unit, Pass pass);
  /// Gives the memory back, or with `keep` leaves that to the unit's next begin() and end(). @throws Error kState for
  /// one that has not begun.
  void end(size_t unit, bool keep);
  /// The first unit that is whole or on its way, or nothing.
  std::optional<size_t> first_held() const;

 private:
  enum class Place : uint8_t { kShards, kComing, kWhole, kKept };
  struct Bucket {
    ShardBucket layout;
    int users = 0;  ///< units that hold it
    Tensor flat = {};
    std::optional<Work> work = {};
  };
  struct Unit {
    std::vector<size_t> buckets;
    Place place = Place::kShards;
  };

  Unit& at(size_t unit);
  void fetch(Unit& unit);
  void gather(Bucket& bucket);
  void lend(Bucket& bucket);
  void release(Bucket& bucket);

  Group& group_;
  Parameters whole_, shards_;
  std::vector<Bucket> buckets_;
  std::vector<Unit> units_;
};

/// Bytes that a rank of n holds at most in a step of one micro-batch with ZeRO-3 and AdamW, in one dtype, buckets on
/// their way apart. Units u_1 ... u_m in the order of the forward pass, of P bytes without tensors that are in several:
///
///   parameters   P / n + max_k (u_k + u_k+1)           (a unit and its neighbour are whole)
///   gradients    max_k (u_k + sum_{j > k} u_j / n)     (all of one unit, the shards of those after it)
///   optimizer    2 P / n
///
/// A parameter of the first unit that the last one has too brings its gradient there by itself: u_1 is without it in
/// the first term of gradients.
struct SpreadBytes {
  double parameters = 0, gradients = 0, optimizer = 0;
};
/// @param units   bytes of each
/// @param shared  bytes of the parameter that the first and the last unit have
SpreadBytes spread_bytes(double parameters, const std::vector<double>& units, double shared, int ranks);

}  // namespace weft::dist
