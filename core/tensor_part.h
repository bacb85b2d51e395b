#pragma once
#include <functional>
#include <string>
#include <vector>

#include "core/tensor.h"

namespace weft {

/// Indices [begin, end).
struct IndexRange {
  int64_t begin = 0, end = 0;
  int64_t count() const { return end - begin; }
  bool operator==(const IndexRange&) const = default;
};

/// Which elements of a whole tensor a process holds: along one dimension some ranges of indices, one after the other,
/// and of the row-major tensor that those make the elements [begin, end). A pure value, said in the whole tensor's own
/// indices alone, so that no two layouts need to know of each other: tensor parallelism sets the ranges, ZeRO the
/// elements, and checkpoints store both.
struct TensorPart {
  Shape whole;                     ///< shape of the whole tensor
  int64_t dim = 0;                 ///< the dimension that is cut
  std::vector<IndexRange> ranges;  ///< of that dimension, increasing and apart; of a scalar: none
  int64_t begin = 0, end = 0;      ///< elements of what the ranges make

  /// All of a tensor.
  static TensorPart all(const Shape& whole);
  /// Slices of one dimension. @throws Error kIndex for a dimension or a range outside the tensor, kValue for ranges
  /// that do not increase.
  static TensorPart along(const Shape& whole, int64_t dim, std::vector<IndexRange> ranges);
  /// Elements [from, to) of this part. @throws Error kIndex if it does not have them.
  TensorPart elements(int64_t from, int64_t to) const;

  /// Shape of what the ranges make.
  Shape sliced() const;
  /// Shape in which the part is held: sliced(), or flat if it has some of the elements only.
  Shape shape() const;
  int64_t count() const { return end - begin; }
  bool is_whole() const;

  /// Calls run(at, from, count) for each stretch that lies in one piece in the whole tensor and in the part: elements
  /// [at, at + count) of the flattened whole are [from, from + count) of the flattened part. In increasing order.
  void for_each_run(const std::function<void(int64_t at, int64_t from, int64_t count)>& run) const;

  /// The part of a contiguous whole tensor, as a tensor of its own. @throws Error kShape for one of another shape.
  Tensor of(const Tensor& whole_tensor) const;

  bool operator==(const TensorPart&) const = default;
};

/// "[50257, 768], rows 0 to 25,129", for messages.
std::string describe(const TensorPart& part);

}  // namespace weft
