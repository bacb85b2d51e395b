#pragma once
#include <array>
#include <cstdint>
#include <initializer_list>
#include <iosfwd>
#include <span>
#include <string_view>

namespace weft {

inline constexpr int kMaxRank = 6;

/// Up to six int64 values, inline: a shape, strides (in elements) or a list of dimensions.
class Dims {
 public:
  Dims() = default;
  Dims(std::initializer_list<int64_t> values) : Dims(std::span(values.begin(), values.size())) {}
  /// @throws Error kShape for more than six values.
  explicit Dims(std::span<const int64_t> values);
  static Dims filled(int rank, int64_t value);

  int rank() const { return rank_; }
  bool empty() const { return rank_ == 0; }
  int64_t& operator[](int i) { return values_[static_cast<size_t>(i)]; }
  int64_t operator[](int i) const { return values_[static_cast<size_t>(i)]; }
  const int64_t* begin() const { return values_.data(); }
  const int64_t* end() const { return values_.data() + rank_; }
  int64_t back() const { return values_[static_cast<size_t>(rank_ - 1)]; }
  void push_back(int64_t value);
  void erase(int i);
  void insert(int i, int64_t value);
  bool operator==(const Dims& other) const;

 private:
  std::array<int64_t, kMaxRank> values_{};
  int rank_ = 0;
};

using Shape = Dims;
using Strides = Dims;

/// "[8, 1024, 768]".
std::ostream& operator<<(std::ostream& out, const Dims& dims);

/// Number of elements. @throws Error kShape, naming `where`, for a negative size or a product of the non-zero sizes
/// beyond int64 (which a row-major stride would be, even where a size of 0 makes the number 0).
int64_t numel(const Shape& shape, std::string_view where = "shape");

/// Strides of a row-major tensor of this shape.
Strides contiguous_strides(const Shape& shape);

/// Whether elements lie in row-major order without holes (dimensions of size 1 may have any stride, and no elements at
/// all lie in any order).
bool is_contiguous(const Shape& shape, const Strides& strides);

/// A dimension in [-rank, rank) as one in [0, rank). @throws Error kIndex.
int normalize_dim(int64_t dim, int rank, std::string_view where);

/// The one broadcast rule: shapes are aligned at their last dimension, a missing dimension counts as 1, and sizes must
/// be equal or one of them 1. @throws Error kShape naming `where`, both shapes and the dimension.
Shape broadcast_shapes(const Shape& a, const Shape& b, std::string_view where);

/// Whether `from` broadcasts to `to` under that rule.
bool broadcastable_to(const Shape& from, const Shape& to);

/// Strides under which a tensor of `shape` and `strides` reads as `to`: 0 in every dimension that is repeated.
/// @throws Error kShape.
Strides broadcast_strides(const Shape& shape, const Strides& strides, const Shape& to, std::string_view where);

}  // namespace weft
