#include "core/shape.h"

#include <algorithm>
#include <ostream>

#include "core/error.h"

namespace weft {

Dims::Dims(std::span<const int64_t> values) {
  if (values.size() > kMaxRank)
    fail(ErrorKind::kShape, "shape", values.size(), " dimensions; at most ", kMaxRank, " are supported");
  std::copy(values.begin(), values.end(), values_.begin());
  rank_ = static_cast<int>(values.size());
}

Dims Dims::filled(int rank, int64_t value) {
  Dims dims;
  for (int i = 0; i < rank; ++i) dims.push_back(value);
  return dims;
}

void Dims::push_back(int64_t value) { insert(rank_, value); }

void Dims::erase(int i) {
  std::copy(values_.begin() + i + 1, values_.begin() + rank_, values_.begin() + i);
  --rank_;
}

void Dims::insert(int i, int64_t value) {
  if (rank_ == kMaxRank) fail(ErrorKind::kShape, "shape", "more than ", kMaxRank, " dimensions");
  std::copy_backward(values_.begin() + i, values_.begin() + rank_, values_.begin() + rank_ + 1);
  values_[static_cast<size_t>(i)] = value;
  ++rank_;
}

bool Dims::operator==(const Dims& other) const { return std::equal(begin(), end(), other.begin(), other.end()); }

std::ostream& operator<<(std::ostream& out, const Dims& dims) {
  out << '[';
  for (int i = 0; i < dims.rank(); ++i) out << (i ? ", " : "") << dims[i];
  return out << ']';
}

int64_t numel(const Shape& shape, std::string_view where) {
  int64_t product = 1;
  bool overflow = false, zero = false;
  for (int64_t size : shape) {
    if (size < 0) fail(ErrorKind::kShape, where, "a size must not be negative, got ", shape);
    zero |= size == 0;
    if (size != 0) overflow |= __builtin_mul_overflow(product, size, &product);
  }
  if (overflow) fail(ErrorKind::kShape, where, "the number of elements of ", shape, " does not fit in 64 bits");
  return zero ? 0 : product;
}

Strides contiguous_strides(const Shape& shape) {
  Strides strides = Dims::filled(shape.rank(), 1);
  for (int i = shape.rank() - 2; i >= 0; --i) strides[i] = strides[i + 1] * std::max<int64_t>(shape[i + 1], 1);
  return strides;
}

bool is_contiguous(const Shape& shape, const Strides& strides) {
  if (std::find(shape.begin(), shape.end(), 0) != shape.end()) return true;
  int64_t expected = 1;
  for (int i = shape.rank() - 1; i >= 0; --i) {
    if (shape[i] != 1 && strides[i] != expected) return false;
    expected *= shape[i];
  }
  return true;
}

int normalize_dim(int64_t dim, int rank, std::string_view where) {
  if (rank == 0) fail(ErrorKind::kIndex, where, "dimension ", dim, " of a tensor with 0 dimensions: a scalar has none");
  if (dim < -rank || dim >= rank) {
    fail(ErrorKind::kIndex, where, "dimension ", dim, " of a tensor with ", rank, " dimensions; expected one from ",
         -rank, " to ", rank - 1);
  }
  return static_cast<int>(dim < 0 ? dim + rank : dim);
}

Shape broadcast_shapes(const Shape& a, const Shape& b, std::string_view where) {
  const int rank = std::max(a.rank(), b.rank());
  Shape out = Dims::filled(rank, 1);
  for (int i = 1; i <= rank; ++i) {
    const int64_t x = i <= a.rank() ? a[a.rank() - i] : 1, y = i <= b.rank() ? b[b.rank() - i] : 1;
    if (x != y && x != 1 && y != 1) {
      fail(ErrorKind::kShape, where, "shapes ", a, " and ", b, " do not broadcast: at dimension -", i, " sizes ", x,
           " and ", y, " differ and neither is 1");
    }
    out[rank - i] = x == 1 ? y : x;
  }
  return out;
}

bool broadcastable_to(const Shape& from, const Shape& to) {
  if (from.rank() > to.rank()) return false;
  for (int i = 1; i <= from.rank(); ++i) {
    const int64_t size = from[from.rank() - i];
    if (size != 1 && size != to[to.rank() - i]) return false;
  }
  return true;
}

Strides broadcast_strides(const Shape& shape, const Strides& strides, const Shape& to, std::string_view where) {
  if (!broadcastable_to(shape, to)) fail(ErrorKind::kShape, where, "shape ", shape, " does not broadcast to ", to);
  Strides out = Dims::filled(to.rank(), 0);
  for (int i = 1; i <= shape.rank(); ++i) {
    const int from = shape.rank() - i, at = to.rank() - i;
    out[at] = shape[from] == 1 && to[at] != 1 ? 0 : strides[from];
  }
  return out;
}

}  // namespace weft
