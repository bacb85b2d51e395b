#include "models/verify/verify.h"

#include <utility>

#include "core/autograd.h"
#include "models/verify/bits.h"
#include "models/verify/bounds.h"
#include "models/verify/origin.h"

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
          find_origin(verification, before, hooks, first);
        return report;
      }
      before = state_after(ranks);
    }
  }
  return report;
}

}  // namespace weft::models
