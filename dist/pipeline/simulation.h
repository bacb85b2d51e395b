#pragma once
#include <optional>
#include <vector>

#include "dist/pipeline/schedule.h"

namespace weft::dist {

/// Seconds (or any unit of time) of what stages do; a whole backward takes the sum of its two parts.
struct PipelineCosts {
  std::vector<double> forward, backward_input, backward_weight;  ///< [stage]
  double transfer = 0;  ///< from the end of a send to the moment when its receiver has it; costs neither rank time

  /// The same for every stage.
  static PipelineCosts uniform(int stages, double forward, double backward_input, double backward_weight,
                               double transfer = 0);
  double of(const PipelineAction& action) const;
};

struct PipelineSpan {
  PipelineAction action;
  double begin = 0, end = 0;
};

/// When every rank does what if each action begins as soon as its rank is free and its input is there.
struct PipelineTimeline {
  std::vector<std::vector<PipelineSpan>> ranks;  ///< the computing actions, in order
  double makespan = 0;                           ///< from the first beginning to the last end
  std::vector<double> busy;                      ///< [rank]
  std::vector<int> held;                         ///< [rank]: the most micro-batches whose activations were kept at once
  double idle(int rank) const { return makespan - busy[static_cast<size_t>(rank)]; }
  /// The part of all ranks' time in which they wait.
  double bubble_fraction() const;
};

/// @throws Error kValue: what check_pipeline_schedule() finds, or costs that are negative or not one per stage.
PipelineTimeline simulate_pipeline(const PipelineSchedule& schedule, const PipelineCosts& costs);

/// Time in which each rank waits in a step if all stages cost the same (f, b, w: the three parts of one stage) and
/// transfers nothing:
///   GPipe, 1F1B    (p - 1) (f + b + w)
///   interleaved    (p - 1) (f + b + w) too, but of stages that are v times smaller
///   zero bubble    (p - 1) (f + max(0, b - w)); for w <= b that is (p - 1) (f + b - w) (Qi et al. 2023, ZB-H1)
/// None for a zero-bubble schedule, or GPipe with several stages a rank, of fewer micro-batches than ranks, which has
/// no such formula.
std::optional<double> pipeline_bubble(PipelineKind kind, const PipelineShape& shape, double f, double b, double w);

}  // namespace weft::dist
