#pragma once
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "core/tensor.h"
#include "dist/board.h"

namespace weft::dist {

/// One operation with its buffers, as an engine runs it.
struct Operation {
  Stamp stamp;
  std::shared_ptr<const std::vector<int>> members;  ///< world ranks; of send and recv: the source, then the target
  int rank = 0;                                     ///< this rank's index among them
  Tensor input, output;  ///< input is output where the operation is in place; undefined for barrier

  int size() const { return static_cast<int>(members->size()); }
  std::byte* in() const { return static_cast<std::byte*>(input.raw()); }
  std::byte* out() const { return static_cast<std::byte*>(output.raw()); }
};

/// The pieces of a buffer, one for each rank: piece r is elements [begin[r], begin[r + 1]).
struct Pieces {
  std::vector<int64_t> begin;
  /// n pieces of sizes as equal as can be.
  static Pieces even(int64_t numel, int n);
  /// counts[r] rows of `row` elements each.
  static Pieces rows(const std::vector<int64_t>& counts, int64_t row);
  int64_t size(int rank) const { return begin[static_cast<size_t>(rank) + 1] - begin[static_cast<size_t>(rank)]; }
  int64_t at(int rank) const { return begin[static_cast<size_t>(rank)]; }
};
/// Elements of one row of dimension 0.
int64_t row_elements(const Shape& shape);

/// Broadcasts up to this size go from the root to everyone; larger ones in pieces through everyone.
inline constexpr int64_t kDirectBroadcastBytes = 64 << 10;

/// Bytes that rank `op.rank` sends to others: what every engine's algorithms come to.
int64_t bytes_sent(const Operation& op);

/// Moves data between ranks: one for each rank of a world. All that is checked, compared, ordered and counted is done
/// by Group and Board before.
class Engine {
 public:
  Engine(std::shared_ptr<Board> board, int rank) : board_(std::move(board)), rank_(rank) {}
  virtual ~Engine() = default;
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  virtual const char* name() const = 0;
  /// Where tensors must be.
  virtual Device device() const { return Device::cpu(); }
  /// Does `op` and returns the bytes that this rank sent. All members are in it, with stamps that agree; operations of
  /// one lane come one after the other, those of different lanes at the same time.
  /// @throws GroupError if the world fails meanwhile.
  virtual int64_t run(const Operation& op) = 0;

  Board& board() const { return *board_; }
  int rank() const { return rank_; }

  /// Group names that are in use on this rank.
  void claim_name(const std::string& name);
  void release_name(const std::string& name);

 private:
  std::shared_ptr<Board> board_;
  const int rank_;
  std::mutex names_mutex_;
  std::set<std::string> names_;
};

}  // namespace weft::dist
