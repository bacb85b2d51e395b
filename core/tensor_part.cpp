#include "core/tensor_part.h"

#include <algorithm>

#include "core/autograd.h"
#include "core/backend.h"

namespace weft {
namespace {

constexpr const char* kWhere = "part of a tensor";

/// Elements that one index of a dimension stands for.
int64_t inner(const Shape& shape, int64_t dim) {
  int64_t count = 1;
  for (int i = static_cast<int>(dim) + 1; i < shape.rank(); ++i) count *= shape[i];
  return count;
}

}  // namespace

TensorPart TensorPart::all(const Shape& whole) {
  TensorPart part;
  part.whole = whole;
  if (whole.rank() > 0) part.ranges = {{0, whole[0]}};
  part.end = numel(whole, kWhere);
  return part;
}

TensorPart TensorPart::along(const Shape& whole, int64_t dim, std::vector<IndexRange> ranges) {
  TensorPart part;
  part.whole = whole;
  part.dim = normalize_dim(dim, whole.rank(), kWhere);
  const int64_t size = whole[static_cast<int>(part.dim)];
  int64_t before = 0;
  for (const IndexRange& range : ranges) {
    if (range.begin < 0 || range.end > size || range.begin > range.end) {
      fail(ErrorKind::kIndex, kWhere, "indices ", range.begin, " to ", range.end, " are not within dimension ",
           part.dim, " of ", whole);
    }
    if (range.begin < before)
      fail(ErrorKind::kValue, kWhere, "ranges must increase, got one from ", range.begin, " after ", before);
    before = range.end;
  }
  part.ranges = std::move(ranges);
  part.end = numel(part.sliced(), kWhere);
  return part;
}

TensorPart TensorPart::elements(int64_t from, int64_t to) const {
  if (from < 0 || to < from || to > count()) {
    fail(ErrorKind::kIndex, kWhere, "elements ", from, " to ", to, " are not among the ", grouped(count()), " of ",
         describe(*this));
  }
  TensorPart part = *this;
  part.begin = begin + from, part.end = begin + to;
  return part;
}

Shape TensorPart::sliced() const {
  Shape shape = whole;
  if (whole.rank() == 0) return shape;
  int64_t size = 0;
  for (const IndexRange& range : ranges) size += range.count();
  shape[static_cast<int>(dim)] = size;
  return shape;
}

Shape TensorPart::shape() const {
  const Shape shape = sliced();
  return begin == 0 && end == numel(shape) ? shape : Shape{count()};
}

bool TensorPart::is_whole() const { return begin == 0 && end == numel(whole, kWhere); }

void TensorPart::for_each_run(const std::function<void(int64_t, int64_t, int64_t)>& run) const {
  if (count() == 0) return;
  if (is_whole()) return run(0, 0, count());
  const int64_t one = inner(whole, dim), size = whole[static_cast<int>(dim)];
  const int64_t outer = numel(whole) / (one * size);
  // What is next to each other in both is one run.
  int64_t run_at = 0, run_from = 0, run_count = 0, position = 0;
  for (int64_t o = 0; o < outer && position < end; ++o) {
    for (const IndexRange& range : ranges) {
      const int64_t first = std::max(position, begin), last = std::min(position + range.count() * one, end);
      if (first < last) {
        const int64_t at = (o * size + range.begin) * one + first - position;
        if (run_count > 0 && run_at + run_count == at) {
          run_count += last - first;
        } else {
          if (run_count > 0) run(run_at, run_from, run_count);
          run_at = at, run_from = first - begin, run_count = last - first;
        }
      }
      position += range.count() * one;
    }
  }
  if (run_count > 0) run(run_at, run_from, run_count);
}

Tensor TensorPart::of(const Tensor& whole_tensor) const {
  if (!(whole_tensor.shape() == whole))
    fail(ErrorKind::kShape, kWhere, "expected a tensor ", whole, ", got ", whole_tensor.describe());
  const autograd::NoGrad no_grad;
  const Tensor flat = whole_tensor.reshape({-1}), part = Tensor::empty({count()}, flat.dtype(), flat.device());
  for_each_run([&](int64_t at, int64_t from, int64_t n) { part.narrow(0, from, n).copy_(flat.narrow(0, at, n)); });
  return part.reshape(shape());
}

std::string describe(const TensorPart& part) {
  if (part.is_whole()) return concat(part.whole);
  std::string text = concat(part.whole, ", dimension ", part.dim, " from");
  for (const IndexRange& range : part.ranges) text += concat(' ', range.begin, " to ", range.end);
  if (!(part.shape() == part.sliced()) || part.count() == 0)
    text += concat(", of that elements ", part.begin, " to ", part.end);
  return text;
}

}  // namespace weft
