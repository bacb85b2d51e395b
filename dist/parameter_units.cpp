#include "dist/parameter_units.h"

#include <algorithm>

#include "core/autograd.h"
#include "core/memory.h"

namespace weft::dist {
namespace {

constexpr const char* kWhere = "data parallel";

}  // namespace

ParameterUnits::ParameterUnits(Group& group, Parameters whole, Parameters shards, std::vector<ShardBucket> layouts,
                               std::vector<std::vector<size_t>> units)
    : group_(group), whole_(std::move(whole)), shards_(std::move(shards)) {
  for (ShardBucket& layout : layouts) buckets_.push_back({std::move(layout)});
  for (std::vector<size_t>& unit : units) units_.push_back({std::move(unit)});
  for (Bucket& bucket : buckets_) release(bucket);
}

ParameterUnits::Unit& ParameterUnits::at(size_t unit) {
  if (unit >= units_.size())
    fail(ErrorKind::kIndex, kWhere, "there are ", units_.size(), " units, and ", unit, " is not one of them");
  return units_[unit];
}

void ParameterUnits::begin(size_t number, Pass pass) {
  Unit& unit = at(number);
  if (unit.place == Place::kWhole) fail(ErrorKind::kState, kWhere, "unit ", number, " has begun, and has not ended");
  fetch(unit);
  for (const size_t bucket : unit.buckets) lend(buckets_[bucket]);
  unit.place = Place::kWhole;
  if (pass == Pass::kForward && number + 1 < units_.size()) fetch(units_[number + 1]);
  if (pass == Pass::kBackward && number > 0) fetch(units_[number - 1]);
}

void ParameterUnits::end(size_t number, bool keep) {
  Unit& unit = at(number);
  if (unit.place != Place::kWhole) fail(ErrorKind::kState, kWhere, "unit ", number, " has not begun");
  unit.place = keep ? Place::kKept : Place::kShards;
  if (keep) return;
  for (const size_t bucket : unit.buckets) {
    if (--buckets_[bucket].users == 0) release(buckets_[bucket]);
  }
}

std::optional<size_t> ParameterUnits::first_held() const {
  for (size_t unit = 0; unit < units_.size(); ++unit) {
    if (units_[unit].place != Place::kShards) return unit;
  }
  return std::nullopt;
}

void ParameterUnits::fetch(Unit& unit) {
  if (unit.place != Place::kShards) return;
  unit.place = Place::kComing;
  for (const size_t bucket : unit.buckets) {
    if (buckets_[bucket].users++ == 0) gather(buckets_[bucket]);
  }
}

void ParameterUnits::gather(Bucket& bucket) {
  const MemoryScope scope(MemoryCategory::parameters);
  const autograd::NoGrad no_grad;
  const Tensor& first = whole_[bucket.layout.tensors().front()].tensor;
  bucket.flat = Tensor::empty({bucket.layout.elements()}, first.dtype(), first.device());
  const int64_t cut = bucket.layout.cut(group_.rank());
  bucket.layout.for_each_piece(group_.rank(), [&](const ShardPiece& piece, int64_t at) {
    bucket.flat.narrow(0, cut + at, piece.count()).copy_(shards_[piece.tensor].tensor);
  });
  bucket.work = group_.all_gather_async_(bucket.flat, bucket.layout.counts());
}

void ParameterUnits::lend(Bucket& bucket) {
  if (!bucket.work) return;  // for another unit, before
  bucket.work->wait();
  bucket.work.reset();
  const std::vector<size_t>& tensors = bucket.layout.tensors();
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& tensor = whole_[tensors[i]].tensor;
    tensor.storage()->lend(bucket.flat.storage(), bucket.layout.start(i) * size_of(tensor.dtype()));
  }
}

void ParameterUnits::release(Bucket& bucket) {
  for (const size_t p : bucket.layout.tensors())
    whole_[p].tensor.storage()->release(concat("parameter ", quoted(whole_[p].name), ", which is spread over ranks,"));
  bucket.flat = Tensor();
}

SpreadBytes spread_bytes(double parameters, const std::vector<double>& units, double shared, int ranks) {
  double neighbours = 0, gradients = 0, after = 0;
  for (size_t k = units.size(); k-- > 0;) {
    neighbours = std::max(neighbours, units[k] + (k + 1 < units.size() ? units[k + 1] : 0));
    gradients = std::max(gradients, units[k] - (k == 0 ? shared : 0) + after / ranks);
    after += units[k];
  }
  return {.parameters = parameters / ranks + neighbours,
          .gradients = std::max(gradients, after / ranks),
          .optimizer = 2 * parameters / ranks};
}

}  // namespace weft::dist
