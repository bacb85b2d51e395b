#pragma once
#include <array>
#include <memory>
#include <source_location>
#include <span>
#include <string>
#include <vector>

#include "core/tensor.h"
#include "dist/group_error.h"
#include "dist/stamp.h"

namespace weft::dist {

class Engine;
class Mesh;
enum class Axis : uint8_t;

/// An operation under way. A handle: it may be copied, kept and dropped; the operation goes on and keeps its tensors.
class Work {
 public:
  struct State;
  explicit Work(std::shared_ptr<State> state) : state_(std::move(state)) {}
  /// Returns when the operation is done on this rank: its output may be read, its input written. Any number of times.
  /// @throws Error  what the operation failed with.
  void wait() const;
  /// Whether wait() would return, or throw, at once.
  bool done() const;

 private:
  std::shared_ptr<State> state_;
};

/// Rows of dimension 0 for each rank of a group; empty: the same number for all.
using Counts = std::vector<int64_t>;

/// Ranks that exchange tensors. Every member calls the same operations in the same order; before any data moves, the
/// ranks compare what each asks for (operation, dtype, shape, counts, reduction), and a difference is a GroupError on
/// all of them that names each rank's call. So is a rank that died, stopped, left or threw.
///
/// Tensors are contiguous and on the group's device (the CPU for self, threads and Gloo). What is only moved may have
/// any dtype; what is reduced is f32, f64, bf16, f16, i32, i64 or u8. Sizes may be 0. bf16 and f16 are added up in f32
/// and rounded once. Values are added in one order everywhere: ranks 0 and 1, 2 and 3, ... then those sums in pairs,
/// and so on, a last one without a partner going up as it is; so the result has the same bits on every rank, every
/// implementation (but NCCL's, whose order is its own) and any number of threads.
///
/// Names that end in _ write into their argument. The others leave their input alone and answer with a new tensor;
/// their _async forms take the output, which must not overlap the input. Nothing here is differentiable: a tensor that
/// takes part in a graph is an error, in grad mode. Tensors of an operation under way must not be changed, nor its
/// outputs read.
///
/// Operations of one group run one after the other, in the order of their calls; send and recv are ordered per pair and
/// direction instead, and pass the others. A send is done when the receiver has the data. The calls of one rank's
/// groups come from one thread.
///
/// docs/parallelism/groups.md has the bytes that each operation sends.
class Group {
 public:
  using Place = std::source_location;
  struct Traffic {
    int64_t calls = 0;
    int64_t bytes_sent = 0;  ///< data sent to other ranks by this one; stamps and heartbeats are not counted
    double waited = 0;       ///< seconds in which this rank's program stood still for them
  };

  /// The world of an engine. `ranks`: the group's world ranks in the order of its own.
  Group(std::shared_ptr<Engine> engine, std::string name, std::vector<int> ranks);
  Group(Group&&) noexcept;
  Group& operator=(Group&&) noexcept;
  /// Returns when operations under way are done or have failed.
  ~Group();

  int rank() const;
  int size() const;
  const std::string& name() const;
  /// World rank of each member.
  const std::vector<int>& world_ranks() const;
  /// "self", "threads", "gloo", "nccl".
  const char* implementation() const;
  /// Where its tensors are: the CPU for self, threads and Gloo.
  Device device() const;

  /// A group of some members: `ranks` of this group in the order of the new one. Called by those members only, with
  /// equal arguments. Costs no communication. @throws Error kValue if this rank is not in it, a rank is outside or
  /// named twice; kState if a group of that name is alive on this rank.
  Group subgroup(std::span<const int> ranks, const std::string& name) const;
  /// The group of this rank along axes of a mesh that covers this group: named "dp" or "dp,cp".
  Group subgroup(const Mesh& mesh, std::span<const Axis> axes) const;

  /// t = reduction over ranks of t, on every rank. Sends 2 P (n-1)/n bytes of P.
  void all_reduce_(const Tensor& t, Reduction reduction = Reduction::sum, Place place = Place::current());
  Tensor all_reduce(const Tensor& input, Reduction reduction = Reduction::sum, Place place = Place::current());
  Work all_reduce_async_(const Tensor& t, Reduction reduction = Reduction::sum, Place place = Place::current());
  Work all_reduce_async(const Tensor& input, const Tensor& output, Reduction reduction = Reduction::sum,
                        Place place = Place::current());

  /// Rank r gets its counts[r] rows of the reduction over ranks of `input` [sum of counts, ...]. Sends P (n-1)/n bytes.
  Tensor reduce_scatter(const Tensor& input, Reduction reduction = Reduction::sum, const Counts& counts = {},
                        Place place = Place::current());
  Work reduce_scatter_async(const Tensor& input, const Tensor& output, Reduction reduction = Reduction::sum,
                            const Counts& counts = {}, Place place = Place::current());

  /// The inputs [counts[r], ...] of all ranks one after the other, on every rank. Sends (n-1) times the input.
  Tensor all_gather(const Tensor& input, const Counts& counts = {}, Place place = Place::current());
  Work all_gather_async(const Tensor& input, const Tensor& output, const Counts& counts = {},
                        Place place = Place::current());
  /// The same with this rank's rows in their place in `t` already.
  void all_gather_(const Tensor& t, const Counts& counts = {}, Place place = Place::current());
  Work all_gather_async_(const Tensor& t, const Counts& counts = {}, Place place = Place::current());

  /// t of rank `root`, on every rank. No rank sends more than 2 P (n-1)/n bytes, or up to 64 KiB the root P (n-1).
  void broadcast_(const Tensor& t, int root, Place place = Place::current());
  Work broadcast_async_(const Tensor& t, int root, Place place = Place::current());

  /// Rank r gets send[r] rows of every rank's input, in the order of the ranks: receive[s] rows from rank s.
  Tensor all_to_all(const Tensor& input, const Counts& send = {}, const Counts& receive = {},
                    Place place = Place::current());
  Work all_to_all_async(const Tensor& input, const Tensor& output, const Counts& send = {}, const Counts& receive = {},
                        Place place = Place::current());

  void send(const Tensor& t, int to, Place place = Place::current());
  Work send_async(const Tensor& t, int to, Place place = Place::current());
  void recv_(const Tensor& t, int from, Place place = Place::current());
  Work recv_async_(const Tensor& t, int from, Place place = Place::current());

  /// Returns when all ranks have come.
  void barrier(Place place = Place::current());
  Work barrier_async(Place place = Place::current());

  /// What this rank has done in this group so far; operations count when they are done.
  Traffic traffic(Collective op) const;
  std::array<Traffic, kCollectives> traffic() const;

 private:
  struct Impl;
  Work start(Collective op, const Tensor& input, const Tensor& output, Stamp stamp, int peer, bool asynchronous,
             Place place) const;
  std::unique_ptr<Impl> impl_;
};

}  // namespace weft::dist
