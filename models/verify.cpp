#include "models/verify.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <map>
#include <ostream>
#include <utility>

namespace weft::models {
namespace {

using Parts = std::vector<HeldPart> RankStep::*;
constexpr std::array<std::pair<Compared, Parts>, 3> kTensors = {{{Compared::kGradient, &RankStep::gradients},
                                                                 {Compared::kParameter, &RankStep::parameters},
                                                                 {Compared::kState, &RankStep::state}}};

Parts parts_of(Compared what) {
  for (const auto& [kind, parts] : kTensors) {
    if (kind == what) return parts;
  }
  return nullptr;
}

/// Equal in every bit but that all NaN are one.
bool same(double a, double b) {
  return std::bit_cast<uint64_t>(a) == std::bit_cast<uint64_t>(b) || (std::isnan(a) && std::isnan(b));
}

/// Compares the steps of a layout with those of one rank, bit for bit.
class BitComparison {
 public:
  BitComparison(VerifyReport& report, size_t layout) : report_(report), layout_(layout) {}

  /// One step; false if something differed, which is then in the report.
  bool compare(int64_t step, const RankStep& one, const std::vector<RankStep>& ranks) {
    step_ = step;
    return losses(one, ranks) && tensors(Compared::kGradient, one, ranks) && norms(one, ranks) &&
           tensors(Compared::kParameter, one, ranks) && tensors(Compared::kState, one, ranks);
  }

 private:
  VerifyReport::Tally& tally(Compared what) { return report_.tallies[static_cast<size_t>(what)]; }

  Difference difference(Compared what, const std::string& tensor) const {
    Difference difference;
    difference.layout = layout_, difference.step = step_, difference.what = what, difference.tensor = tensor;
    return difference;
  }

  bool losses(const RankStep& one, const std::vector<RankStep>& ranks) {
    VerifyReport::Tally& count = tally(Compared::kLoss);
    int64_t different = 0;
    std::optional<Difference> first;
    for (size_t j = 0; j < one.losses.size(); ++j) {
      std::vector<int> wrong, own;
      for (size_t r = 0; r < ranks.size(); ++r) {
        const std::vector<double>& losses = ranks[r].losses;
        const bool equal = j < losses.size() && same(losses[j], one.losses[j]);
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

  bool norms(const RankStep& one, const std::vector<RankStep>& ranks) {
    std::optional<Difference> first;
    int64_t different = 0;
    for (const auto& [name, expected] : one.norms) {
      std::vector<int> wrong;
      for (size_t r = 0; r < ranks.size(); ++r) {
        const auto found = std::find_if(ranks[r].norms.begin(), ranks[r].norms.end(),
                                        [&, &name = name](const auto& entry) { return entry.first == name; });
        if (found == ranks[r].norms.end()) continue;  // of a layer that this rank does not have
        ++tally(Compared::kNorm).tensors, ++tally(Compared::kNorm).elements;
        if (same(found->second, expected)) continue;
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

  bool tensors(Compared what, const RankStep& one, const std::vector<RankStep>& ranks) {
    std::vector<const HeldPart*> wholes;
    for (const HeldPart& held : one.*parts_of(what)) wholes.push_back(&held);
    // A wrong gradient spoils those of the layers before it.
    if (what == Compared::kGradient) std::reverse(wholes.begin(), wholes.end());
    std::optional<Difference> first;
    int64_t different = 0;
    for (const HeldPart* whole : wholes) {
      std::optional<Difference> found = tensor(what, *whole, ranks);
      if (!found) continue;
      ++different;
      if (!first) first = std::move(found);
    }
    return finish(std::move(first), static_cast<int64_t>(wholes.size()), different);
  }

  std::optional<Difference> tensor(Compared what, const HeldPart& whole, const std::vector<RankStep>& ranks) {
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
        const std::vector<double> values = part.values.to_vector<double>();
        bool equal = true;
        part.part.for_each_run([&](int64_t at, int64_t from, int64_t count) {
          for (int64_t i = 0; i < count; ++i) {
            const auto to = static_cast<size_t>(at + i);
            const double got = values[static_cast<size_t>(from + i)];
            if (to < held.size()) held[to] = true;
            if (to < held.size() && same(got, expected[to])) continue;
            equal = false;
            note(std::min(at + i, static_cast<int64_t>(held.size()) - 1), static_cast<int>(r), got);
          }
        });
        ++tally(what).tensors, tally(what).elements += part.part.count();
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

  bool finish(std::optional<Difference> first, int64_t compared, int64_t different) {
    if (!first) return true;
    first->compared = compared, first->different = different;
    report_.first = std::move(first);
    return false;
  }

  VerifyReport& report_;
  size_t layout_;
  int64_t step_ = 0;
};

}  // namespace

const char* name(Compared what) {
  switch (what) {
    case Compared::kLoss:
      return "loss";
    case Compared::kGradient:
      return "gradient";
    case Compared::kNorm:
      return "norm";
    case Compared::kParameter:
      return "parameter";
    case Compared::kState:
      break;
  }
  return "state";
}

namespace {

/// The plainest run of the problem: one rank, nothing recomputed.
TrainingRecord record_alone(TrainingProblem problem, const RecordOptions& options) {
  problem.config.recompute = {};
  RecordOptions alone = options;
  alone.hooks = nullptr;
  return record_training(problem, {}, alone);
}

/// Looks at the forward passes of the step once more, function by function.
void find_origin(const Verification& verification, const TrainingState* start, const TrainingHooks* hooks,
                 Difference& difference) {
  const RecordOptions options{.first_step = difference.step, .steps = 1, .start = start, .watch = true, .hooks = hooks};
  const TrainingRecord one = record_alone(verification.problem, options);
  const TrainingRecord many = record_training(verification.problem, verification.layouts[difference.layout], options);
  struct Seen {
    int rank;
    const SeenOutput* output;
  };
  std::map<std::pair<int64_t, std::string>, std::vector<Seen>> seen;
  const std::vector<RankStep>& ranks = many.steps.front();
  for (size_t r = 0; r < ranks.size(); ++r) {
    for (const SeenOutput& output : ranks[r].outputs)
      seen[{output.micro_batch, output.place}].push_back({static_cast<int>(r), &output});
  }
  for (const SeenOutput& wanted : one.steps.front().front().outputs) {
    const auto found = seen.find({wanted.micro_batch, wanted.place});
    if (found == seen.end()) {
      difference.note = concat("no rank computes ", wanted.place, " of micro-batch ", wanted.micro_batch);
      return;
    }
    for (const auto& [rank, output] : found->second) {
      if (!(output->values.shape() == wanted.values.shape())) continue;
      const std::vector<double> expected = wanted.values.to_vector<double>(), got = output->values.to_vector<double>();
      for (size_t i = 0; i < got.size(); ++i) {
        if (same(got[i], expected[i])) continue;
        difference.origin = {rank, wanted.micro_batch, wanted.place, static_cast<int64_t>(i), expected[i], got[i]};
        return;
      }
    }
  }
  difference.note = difference.what == Compared::kLoss
                        ? "run once more, without recomputation, every function of the forward passes is equal"
                        : "every function of the forward passes is equal";
}

void verify_bits(const Verification& verification, const TrainingHooks* hooks, VerifyReport& report) {
  const int64_t steps = verification.steps;
  const TrainingRecord one =
      record_alone(verification.problem, {.steps = static_cast<int64_t>(verification.layouts.size()) * steps});
  std::optional<TrainingState> moved;  // from one layout to the next
  for (size_t layout = 0; layout < verification.layouts.size(); ++layout) {
    const int64_t begin = static_cast<int64_t>(layout) * steps;
    const TrainingRecord many =
        record_training(verification.problem, verification.layouts[layout],
                        {.first_step = begin, .steps = steps, .start = moved ? &*moved : nullptr, .hooks = hooks});
    BitComparison comparison(report, layout);
    for (int64_t i = 0; i < steps; ++i) {
      const int64_t step = begin + i;
      const RankStep& alone = one.steps[static_cast<size_t>(step)].front();
      if (comparison.compare(step, alone, many.steps[static_cast<size_t>(i)])) continue;
      Difference& first = *report.first;
      if (first.what != Compared::kLoss && first.what != Compared::kGradient) return;
      std::optional<TrainingState> before;
      if (step > 0) before = state_after(one.steps[static_cast<size_t>(step - 1)]);
      find_origin(verification, before ? &*before : nullptr, hooks, first);
      return;
    }
    moved = state_after(many.steps.back());
  }
}

}  // namespace

VerifyReport verify(const Verification& verification, const TrainingHooks* hooks) {
  VerifyReport report;
  verify_bits(verification, hooks, report);
  return report;
}

}  // namespace weft::models
