#include "dist/canonical_sum.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "core/autograd.h"
#include "core/backend.h"
#include "core/memory.h"

namespace weft::dist {
namespace {

/// Whether two neighbours are the children of one node.
bool are_siblings(const MicroBatchRange& left, const MicroBatchRange& right, int64_t total) {
  const int64_t size = left.end - left.begin;
  return std::has_single_bit(static_cast<uint64_t>(size)) && left.begin % (2 * size) == 0 && right.begin == left.end &&
         right.end == std::min(total, left.begin + 2 * size);
}

bool is_node(const MicroBatchRange& range, int64_t total) {
  const auto whole = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(range.end - range.begin)));
  return range.begin % whole == 0 && range.end == std::min(total, range.begin + whole);
}

}  // namespace

CanonicalSum::CanonicalSum(int64_t total) : total_(total) {
  if (total < 1) fail(ErrorKind::kValue, "canonical sum", "a step has at least one micro-batch, got ", total);
}

void CanonicalSum::add(MicroBatchRange range, Tensor tensor) {
  const int64_t least = parts_.empty() ? 0 : parts_.back().range.end;
  if (range.begin < least || range.end <= range.begin || range.end > total_) {
    fail(ErrorKind::kValue, "canonical sum", "expected micro-batches from ", least, " on and below ", total_, ", got [",
         range.begin, ", ", range.end, ")");
  }
  if (!is_node(range, total_)) {
    fail(ErrorKind::kValue, "canonical sum", "[", range.begin, ", ", range.end, ") is no node of the tree over ",
         total_, " micro-batches");
  }
  parts_.push_back({range, std::move(tensor)});
  while (parts_.size() > 1) {
    Part& left = parts_[parts_.size() - 2];
    const Part& right = parts_.back();
    if (!are_siblings(left.range, right.range, total_)) break;
    if (left.tensor.defined() && !DryRun::active()) {
      backend(left.tensor.device()).add(left.tensor.view(), right.tensor.view());
      left.tensor.storage()->bump("canonical sum");
    }
    left.range.end = right.range.end;
    parts_.pop_back();
  }
}

Tensor CanonicalSum::take() {
  if (parts_.size() != 1 || !(parts_.front().range == MicroBatchRange{0, total_})) {
    fail(ErrorKind::kState, "canonical sum", "not all of the ", total_, " micro-batches were added");
  }
  Tensor sum = std::move(parts_.front().tensor);
  parts_.clear();
  return sum;
}

std::vector<MicroBatchRange> CanonicalSum::nodes(MicroBatchRange range, int64_t total) {
  CanonicalSum sum(total);
  for (int64_t i = range.begin; i < range.end; ++i) sum.add({i, i + 1}, {});
  std::vector<MicroBatchRange> nodes;
  for (const Part& part : sum.parts()) nodes.push_back(part.range);
  return nodes;
}

}  // namespace weft::dist
