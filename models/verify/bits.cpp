#include "models/verify/bits.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <utility>

namespace weft::models {

std::vector<HeldPart> RankStep::* parts_of(Compared what) {
  if (what == Compared::kGradient) return &RankStep::gradients;
  if (what == Compared::kParameter) return &RankStep::parameters;
  if (what == Compared::kState) return &RankStep::state;
  fail(ErrorKind::kValue, "verify", "a ", name(what), " is no tensor that ranks have parts of");
}

bool same_bits(double a, double b) {
  return std::bit_cast<uint64_t>(a) == std::bit_cast<uint64_t>(b) || (std::isnan(a) && std::isnan(b));
}

void BitComparison::count(Compared what, int64_t tensors, int64_t elements, int64_t different) {
  tally(what).tensors += tensors, tally(what).elements += elements, tally(what).different += different;
}

Difference BitComparison::difference(Compared what, const std::string& tensor) const {
  Difference difference;
  difference.layout = layout_, difference.step = step_, difference.what = what, difference.tensor = tensor;
  return difference;
}

bool BitComparison::finish(std::optional<Difference> first, int64_t compared, int64_t different) {
  if (!first) return true;
  first->compared = compared, first->different = different;
  report_.first = std::move(first);
  return false;
}

bool BitComparison::losses(const RankStep& one, const std::vector<RankStep>& ranks) {
  VerifyReport::Tally& count = tally(Compared::kLoss);
  int64_t different = 0;
  std::optional<Difference> first;
  for (size_t j = 0; j < one.losses.size(); ++j) {
    std::vector<int> wrong, own;
    for (size_t r = 0; r < ranks.size(); ++r) {
      const std::vector<double>& losses = ranks[r].losses;
      const bool equal = j < losses.size() && same_bits(losses[j], one.losses[j]);
      ++count.tensors, ++count.elements;
      if (!equal) wrong.push_back(static_cast<int>(r)), ++count.different;
      const auto& mine = ranks[r].micro_batches;
      if (std::find(mine.begin(), mine.end(), static_cast<int64_t>(j)) != mine.end())
        own.push_back(static_cast<int>(r));
    }
    if (wrong.empty()) continue;
    ++different;
    if (first) continue;
    first = difference(Compared::kLoss, concat("micro-batch ", j));
    const std::vector<double>& got = ranks[static_cast<size_t>(wrong.front())].losses;
    first->element = static_cast<int64_t>(j), first->expected = one.losses[j];
    first->missing = j >= got.size();
    if (!first->missing) first->got = got[j];
    // Where all are told the same wrong loss, it is of those who computed it.
    first->ranks = wrong.size() == ranks.size() && !own.empty() ? own : wrong;
  }
  return finish(std::move(first), static_cast<int64_t>(one.losses.size()), different);
}

bool BitComparison::norms(const RankStep& one, const std::vector<RankStep>& ranks) {
  std::optional<Difference> first;
  int64_t different = 0;
  for (const auto& [name, expected] : one.norms) {
    std::vector<int> wrong;
    for (size_t r = 0; r < ranks.size(); ++r) {
      const auto found = std::find_if(ranks[r].norms.begin(), ranks[r].norms.end(),
                                      [&, &name = name](const auto& entry) { return entry.first == name; });
      if (found == ranks[r].norms.end()) continue;  // of a layer that this rank does not have
      ++tally(Compared::kNorm).tensors, ++tally(Compared::kNorm).elements;
      if (same_bits(found->second, expected)) continue;
      ++tally(Compared::kNorm).different;
      if (wrong.empty() && !first) {
        first = difference(Compared::kNorm, name);
        first->expected = expected, first->got = found->second;
      }
      wrong.push_back(static_cast<int>(r));
    }
    if (wrong.empty()) continue;
    ++different;
    if (first && first->tensor == name) first->ranks = wrong;
  }
  return finish(std::move(first), static_cast<int64_t>(one.norms.size()), different);
}

std::optional<Difference> BitComparison::tensor(Compared what, const HeldPart& whole,
                                                const std::vector<RankStep>& ranks, bool values) {
  const std::vector<double> expected = whole.values.to_vector<double>();
  std::vector<bool> held(expected.size());
  std::optional<Difference> first;
  const auto note = [&](int64_t element, int rank, double got) {
    if (!first) {
      first = difference(what, whole.name);
      first->shape = whole.part.whole, first->element = element;
      first->expected = expected[static_cast<size_t>(element)], first->got = got;
    }
    if (rank >= 0 && (first->ranks.empty() || first->ranks.back() != rank)) first->ranks.push_back(rank);
  };
  for (size_t r = 0; r < ranks.size(); ++r) {
    for (const HeldPart& part : ranks[r].*parts_of(what)) {
      if (part.name != whole.name) continue;
      if (!(part.part.whole == whole.part.whole)) {
        note(0, static_cast<int>(r), 0);
        first->note = concat("it is a part of ", part.part.whole, " there");
        continue;
      }
      const std::vector<double> got = part.values.to_vector<double>();
      bool equal = true;
      part.part.for_each_run([&](int64_t at, int64_t from, int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
          const auto to = static_cast<size_t>(at + i);
          held[to] = true;
          const double value = got[static_cast<size_t>(from + i)];
          if (!values || same_bits(value, expected[to])) continue;
          equal = false;
          note(at + i, static_cast<int>(r), value);
        }
      });
      if (values) ++tally(what).tensors, tally(what).elements += part.part.count();
      if (!equal) ++tally(what).different;
    }
  }
  if (first) return first;
  if (const auto nobody = std::find(held.begin(), held.end(), false); nobody != held.end()) {
    note(nobody - held.begin(), -1, 0);
    first->missing = true;
    ++tally(what).different;
  }
  return first;
}

template <class Compare>
bool BitComparison::each(Compared what, const RankStep& one, const Compare& compare) {
  std::vector<const HeldPart*> wholes;
  for (const HeldPart& held : one.*parts_of(what)) wholes.push_back(&held);
  // A wrong gradient spoils those of the layers before it.
  if (what == Compared::kGradient) std::reverse(wholes.begin(), wholes.end());
  std::optional<Difference> first;
  int64_t different = 0;
  for (const HeldPart* whole : wholes) {
    std::optional<Difference> found = compare(*whole);
    if (!found) continue;
    ++different;
    if (!first) first = std::move(found);
  }
  return finish(std::move(first), static_cast<int64_t>(wholes.size()), different);
}

bool BitComparison::tensors(Compared what, const RankStep& one, const std::vector<RankStep>& ranks) {
  return each(what, one, [&](const HeldPart& whole) { return tensor(what, whole, ranks, true); });
}

bool BitComparison::complete(Compared what, const RankStep& one, const std::vector<RankStep>& ranks) {
  return each(what, one, [&](const HeldPart& whole) { return tensor(what, whole, ranks, false); });
}

}  // namespace weft::models
