#include "dist/pipeline/simulation.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <tuple>

#include "core/error.h"

namespace weft::dist {
namespace {

using Op = PipelineOp;
constexpr const char* kWhere = "pipeline simulation";

void check_costs(const std::vector<double>& costs, int stages, const char* name) {
  if (costs.size() != static_cast<size_t>(stages))
    fail(ErrorKind::kValue, kWhere, "there are ", stages, " stages, but ", costs.size(), " costs of the ", name);
  for (const double cost : costs) {
    if (!(cost >= 0) || !std::isfinite(cost))
      fail(ErrorKind::kValue, kWhere, "a cost of the ", name, " must be finite and not negative, got ", cost);
  }
}

}  // namespace

PipelineCosts PipelineCosts::uniform(int stages, double forward, double backward_input, double backward_weight,
                                     double transfer) {
  const auto n = static_cast<size_t>(stages);
  return {std::vector<double>(n, forward), std::vector<double>(n, backward_input),
          std::vector<double>(n, backward_weight), transfer};
}

double PipelineCosts::of(const PipelineAction& action) const {
  const auto stage = static_cast<size_t>(action.stage);
  switch (action.op) {
    case Op::kForward:
      return forward[stage];
    case Op::kBackward:
      return backward_input[stage] + backward_weight[stage];
    case Op::kBackwardInput:
      return backward_input[stage];
    case Op::kBackwardWeight:
      return backward_weight[stage];
    default:
      return 0;
  }
}

double PipelineTimeline::bubble_fraction() const {
  double working = 0;
  for (const double time : busy) working += time;
  return makespan > 0 ? 1 - working / (makespan * static_cast<double>(busy.size())) : 0;
}

PipelineTimeline simulate_pipeline(const PipelineSchedule& schedule, const PipelineCosts& costs) {
  check_pipeline_schedule(schedule);
  check_costs(costs.forward, schedule.stages(), "forward");
  check_costs(costs.backward_input, schedule.stages(), "backward to the input");
  check_costs(costs.backward_weight, schedule.stages(), "backward to the weights");
  check_costs({costs.transfer}, 1, "transfer");

  const size_t ranks = schedule.actions.size();
  PipelineTimeline timeline;
  timeline.ranks.resize(ranks);
  timeline.busy.assign(ranks, 0);
  timeline.held.assign(ranks, 0);
  using Key = std::tuple<bool, int, int>;  // gradient?, stage of the receiver, micro-batch
  std::map<Key, double> arrivals;
  std::vector<size_t> next(ranks, 0);
  std::vector<double> now(ranks, 0);
  std::vector<int> held(ranks, 0);
  // The schedule is checked: whatever is received is sent, and somebody can always go on.
  for (bool moved = true; moved;) {
    moved = false;
    for (size_t rank = 0; rank < ranks; ++rank) {
      for (; next[rank] < schedule.actions[rank].size(); ++next[rank], moved = true) {
        const PipelineAction& action = schedule.actions[rank][next[rank]];
        const bool gradient = action.op == Op::kSendGradient || action.op == Op::kReceiveGradient;
        if (is_compute(action.op)) {
          const double end = now[rank] + costs.of(action);
          timeline.ranks[rank].push_back({action, now[rank], end});
          timeline.busy[rank] += costs.of(action);
          now[rank] = end;
          if (action.op == Op::kForward) timeline.held[rank] = std::max(timeline.held[rank], ++held[rank]);
          if (action.op == Op::kBackward || action.op == Op::kBackwardWeight) --held[rank];
        } else if (is_send(action.op)) {
          arrivals[{gradient, action.stage + (gradient ? -1 : 1), action.micro_batch}] = now[rank] + costs.transfer;
        } else {
          const auto arrival = arrivals.find({gradient, action.stage, action.micro_batch});
          if (arrival == arrivals.end()) break;
          now[rank] = std::max(now[rank], arrival->second);
        }
      }
    }
  }
  for (const auto& spans : timeline.ranks) {
    for (const PipelineSpan& span : spans) timeline.makespan = std::max(timeline.makespan, span.end);
  }
  return timeline;
}

std::optional<double> pipeline_bubble(PipelineKind kind, const PipelineShape& shape, double f, double b, double w) {
  const double others = shape.ranks - 1;
  // With several stages a rank, fewer micro-batches than ranks do not fill the time until the first comes around.
  if (kind == PipelineKind::kGPipe && shape.chunks > 1 && shape.micro_batches < shape.ranks) return std::nullopt;
  if (kind != PipelineKind::kZeroBubble) return others * (f + b + w);
  if (shape.micro_batches < shape.ranks) return std::nullopt;
  return others * (f + std::max(0.0, b - w));
}

}  // namespace weft::dist
