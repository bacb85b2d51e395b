#include "models/verify/verify.h"

#include <cmath>
#include <map>
#include <utility>

#include "core/autograd.h"
#include "models/verify/bits.h"
#include "models/verify/bounds.h"

namespace weft::models {
namespace {

bool is_exact(const ParallelOptions& layout) {
  return layout.mesh.size(dist::Axis::tp) * layout.mesh.size(dist::Axis::cp) == 1;
}

/// What a run begins with.
TrainingState initial_state(const TrainingProblem& problem) {
  TrainingState state;
  TrainingHooks hooks;
  hooks.at = [&](TrainingMoment moment, const RankView& view) {
    if (moment != TrainingMoment::kMade) return;
    const autograd::NoGrad no_grad;
    for (const Parameter& parameter : view.parallel.gpt().parameters())
      state.parameters.emplace_back(parameter.name, parameter.tensor.detach().clone());
    for (const auto& [name, tensor] : view.optimizer.state()) state.state.emplace_back(name, tensor.clone());
    if (view.fp8 == nullptr) return;
    for (const auto& [name, tensor] : view.fp8->state()) state.state.emplace_back(name, tensor.clone());
  };
  record_alone(problem, {.steps = 0, .hooks = &hooks});
  return state;
}

/// The first function of one rank's forward passes that a rank of the layout has another output of.
class OriginSearch {
 public:
  OriginSearch(const Verification& verification, const TrainingState& before, const TrainingHooks* hooks,
               Difference& difference)
      : verification_(verification), before_(before), hooks_(hooks), difference_(difference) {}

  void run() {
    const TrainingProblem& problem = verification_.problem;
    const ParallelOptions& layout = verification_.layouts[difference_.layout];
    const Yardstick yardstick(problem);
    const bool exact = is_exact(layout);
    const auto alone = [&](DType dtype) { return step_alone(problem, dtype, difference_.step, before_, true).outputs; };
    const std::vector<SeenOutput> one = alone(problem.dtype);
    std::vector<SeenOutput> fine, measured;
    if (!exact) fine = alone(DType::f64), measured = alone(yardstick.measured_in());
    const TrainingRecord many = record_training(
        problem, layout,
        {.first_step = difference_.step, .steps = 1, .start = &before_, .watch = true, .hooks = hooks_});
    const Outputs outputs = outputs_of(many.steps.front());
    for (size_t i = 0; i < one.size(); ++i) {
      if (!exact && !is_whole(one[i].place)) continue;
      const auto found = outputs.find({one[i].micro_batch, one[i].place});
      if (found == outputs.end()) {
        if (!exact) continue;  // outputs are cut
        difference_.note = concat("no rank computes ", one[i].place, " of micro-batch ", one[i].micro_batch);
        return;
      }
      double bound = 0;
      if (!exact) bound = yardstick.bound(measured[i].values.to_vector<double>(), fine[i].values.to_vector<double>());
      for (const auto& [rank, output] : found->second) {
        if (differs(rank, one[i], *output, bound)) return;
      }
    }
    if (!difference_.note.empty()) difference_.note += "; ";
    difference_.note += exact ? "every function of the forward passes has equal outputs, run once more"
                              : "where norms have whole outputs, those are within their bounds";
  }

 private:
  /// With tp, ranks have parts of most outputs, or parts of sums that have the same shape; but norms.
  static bool is_whole(const std::string& place) { return place.find("norm", place.find(": ")) != std::string::npos; }

  struct Seen {
    int rank;
    const SeenOutput* output;
  };
  using Outputs = std::map<std::pair<int64_t, std::string>, std::vector<Seen>>;

  static Outputs outputs_of(const std::vector<RankStep>& ranks) {
    Outputs outputs;
    for (size_t r = 0; r < ranks.size(); ++r) {
      for (const SeenOutput& output : ranks[r].outputs)
        outputs[{output.micro_batch, output.place}].push_back({static_cast<int>(r), &output});
    }
    return outputs;
  }

  bool differs(int rank, const SeenOutput& wanted, const SeenOutput& output, double bound) {
    if (!(output.values.shape() == wanted.values.shape())) return false;  // a part
    const std::vector<double> expected = wanted.values.to_vector<double>(), got = output.values.to_vector<double>();
    for (size_t i = 0; i < got.size(); ++i) {
      if (bound > 0 ? std::abs(got[i] - expected[i]) <= bound : same_bits(got[i], expected[i])) continue;
      difference_.origin = {rank, wanted.micro_batch, wanted.place, static_cast<int64_t>(i), expected[i], got[i]};
      return true;
    }
    return false;
  }

  const Verification& verification_;
  const TrainingState& before_;
  const TrainingHooks* hooks_;
  Difference& difference_;
};

/// A step of a layout against one rank's; false if they differ.
bool compare_bits(size_t layout, int64_t step, const RankStep& one, const std::vector<RankStep>& ranks,
                  VerifyReport& report) {
  BitComparison bits(report, layout, step);
  return bits.losses(one, ranks) && bits.tensors(Compared::kGradient, one, ranks) && bits.norms(one, ranks) &&
         bits.tensors(Compared::kParameter, one, ranks) && bits.tensors(Compared::kState, one, ranks);
}

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

VerifyReport verify(const Verification& verification, const TrainingHooks* hooks) {
  VerifyReport report;
  const int64_t steps = verification.steps;
  for (const ParallelOptions& layout : verification.layouts) report.exact = report.exact && is_exact(layout);
  TrainingRecord one;  // of all steps, where layouts must have its bits
  if (report.exact) {
    one = record_alone(verification.problem, {.steps = static_cast<int64_t>(verification.layouts.size()) * steps});
  }
  TrainingState before = initial_state(verification.problem);
  for (size_t layout = 0; layout < verification.layouts.size(); ++layout) {
    const int64_t begin = static_cast<int64_t>(layout) * steps;
    const TrainingState start = before;
    const TrainingRecord many =
        record_training(verification.problem, verification.layouts[layout],
                        {.first_step = begin, .steps = steps, .start = layout > 0 ? &start : nullptr, .hooks = hooks});
    for (int64_t i = 0; i < steps; ++i) {
      const int64_t step = begin + i;
      const std::vector<RankStep>& ranks = many.steps[static_cast<size_t>(i)];
      bool equal = false;
      if (report.exact) {
        equal = compare_bits(layout, step, one.steps[static_cast<size_t>(step)].front(), ranks, report);
      } else if (is_exact(verification.layouts[layout])) {
        const RankStep alone = step_alone(verification.problem, verification.problem.dtype, step, before);
        equal = compare_bits(layout, step, alone, ranks, report);
      } else {
        equal = compare_within_bounds(verification, layout, step, before, ranks, report);
      }
      if (!equal) {
        Difference& first = *report.first;
        if (first.what == Compared::kLoss || first.what == Compared::kGradient)
          OriginSearch(verification, before, hooks, first).run();
        return report;
      }
      before = state_after(ranks);
    }
  }
  return report;
}

}  // namespace weft::models
