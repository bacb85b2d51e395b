// weft plan: what a distributed run would do, before it runs.
#include <algorithm>
#include <cmath>
#include <iostream>

#include "apps/command.h"
#include "apps/commands.h"
#include "apps/files.h"
#include "apps/train_options.h"
#include "core/file.h"
#include "dist/pipeline/drawing.h"

namespace weft::apps {
namespace {

using dist::PipelineKind;

struct ScheduleOptions {
  PipelineKind kind = PipelineKind::k1F1B;
  int64_t ranks = 4, micro_batches = 8, chunks = 1;
  double forward = 1, backward_input = 1, backward_weight = 1, transfer = 0;
  std::vector<double> stage_costs, layer_costs;
  int64_t width = 1000;
  std::filesystem::path trace;

  void declare(Options& o) {
    o.section("schedule", "The schedule");
    o.add("schedule", &kind, pipeline_kinds(), "the order in which ranks compute");
    o.add("ranks", &ranks, {.min = 1, .max = 4096}, "ranks of the pipeline");
    o.add("micro_batches", &micro_batches, {.min = 1, .max = 65536}, "micro-batches of one step");
    o.add("chunks", &chunks, {.min = 1, .max = 4096}, "stages of each rank, for the interleaved schedule");
    o.section("time", "The time of a stage, in any unit");
    o.add("forward", &forward, {.min = 0}, "of a forward");
    o.add("backward_input", &backward_input, {.min = 0}, "of the gradient of a stage's input");
    o.add("backward_weight", &backward_weight, {.min = 0}, "of the gradients of its weights");
    o.add("transfer", &transfer, {.min = 0}, "from a send to its arrival");
    o.add("stage_costs", &stage_costs, {.min = 0}, {},
          "a factor for each stage, by which its three times are multiplied");
    o.add(
        "layer_costs", &layer_costs, {.min = 0}, {},
        "a cost for each layer instead: they are split into stages whose dearest is as cheap as can be, and times are "
        "those of a layer of cost 1");
    o.section("output", "What is written");
    o.add("width", &width, {.min = 20, .max = 100000, .unit = "characters"}, "of the picture at most");
    o.add("trace", &trace, {.placeholder = "FILE"}, "also write the timeline for Perfetto or chrome://tracing");
  }
};

/// The factor of each stage, and where the layers were split if they were given.
std::vector<double> factors(const ScheduleOptions& o, const Options& options, int stages) {
  if (!o.stage_costs.empty() && !o.layer_costs.empty())
    options.reject("stage_costs", "and --layer-costs say the same thing: give one of them");
  if (!o.layer_costs.empty()) {
    if (o.layer_costs.size() < static_cast<size_t>(stages))
      options.reject("layer_costs", "must be at least as many as the ", stages, " stages, got ", o.layer_costs.size());
    const std::vector<int> split = dist::split_into_stages(o.layer_costs, stages);
    std::vector<double> costs;
    std::cout << "layers of each stage:";
    for (size_t stage = 0; stage + 1 < split.size(); ++stage) {
      double cost = 0;
      for (int layer = split[stage]; layer < split[stage + 1]; ++layer)
        cost += o.layer_costs[static_cast<size_t>(layer)];
      costs.push_back(cost);
      std::cout << "  " << split[stage] << "-" << split[stage + 1] - 1 << " (" << shortest(cost) << ")";
    }
    std::cout << "\n";
    return costs;
  }
  if (o.stage_costs.empty()) return std::vector<double>(static_cast<size_t>(stages), 1.0);
  if (o.stage_costs.size() != static_cast<size_t>(stages))
    options.reject("stage_costs", "must be one for each of the ", stages, " stages, got ", o.stage_costs.size());
  return o.stage_costs;
}

int plan_schedule(std::span<const std::string> args) {
  ScheduleOptions o;
  Options options("plan schedule", "Checks, times and draws a pipeline schedule.");
  o.declare(options);
  if (!options.parse(args)) return 0;
  if (o.chunks > 1 && o.kind != PipelineKind::kInterleaved)
    options.reject("chunks", "several stages a rank are for --schedule interleaved: ", o.kind, " has one on each, got ",
                   o.chunks, ". Hint: --schedule interleaved, or no --chunks");
  constexpr int64_t kMostForwards = 1 << 20;
  if (const int64_t forwards = o.ranks * o.chunks * o.micro_batches; forwards > kMostForwards)
    options.reject("micro_batches", "with this many ranks and chunks make ", grouped(forwards), " forwards; at most ",
                   grouped(kMostForwards), " are checked and drawn");
  if (o.kind == PipelineKind::kInterleaved && o.micro_batches % o.ranks != 0)
    options.reject("micro_batches", "must be a multiple of the ", o.ranks, " ranks in the interleaved schedule, got ",
                   o.micro_batches);
  const dist::PipelineSchedule schedule = dist::make_pipeline_schedule(
      o.kind, {static_cast<int>(o.ranks), static_cast<int>(o.micro_batches), static_cast<int>(o.chunks)});
  const std::vector<double> factor = factors(o, options, schedule.stages());
  dist::PipelineCosts costs =
      dist::PipelineCosts::uniform(schedule.stages(), o.forward, o.backward_input, o.backward_weight, o.transfer);
  for (size_t stage = 0; stage < factor.size(); ++stage) {
    costs.forward[stage] *= factor[stage];
    costs.backward_input[stage] *= factor[stage];
    costs.backward_weight[stage] *= factor[stage];
  }
  const dist::PipelineTimeline timeline = dist::simulate_pipeline(schedule, costs);
  if (!(timeline.makespan > 0)) {
    options.reject("forward", "makes a step of no length with the other times and costs: one of each must be above 0");
  }
  if (!std::isfinite(timeline.makespan))
    options.reject("forward", "makes a step of no finite length with the other times: give them in a larger unit");

  std::cout << dist::draw_pipeline(schedule, timeline, static_cast<int>(o.width)) << "\n"
            << o.kind << ": " << o.ranks << " ranks, " << schedule.stages() << " stages, " << o.micro_batches
            << " micro-batches; checked: order, transfers, no deadlock, memory\n"
            << "step " << shortest(timeline.makespan) << ", of which ranks wait "
            << fixed(100 * timeline.bubble_fraction(), 1) << "% on average";
  const bool uniform = std::all_of(factor.begin(), factor.end(), [&](double f) { return f == factor.front(); });
  if (const auto bubble = dist::pipeline_bubble(o.kind, schedule.shape, o.forward * factor.front(),
                                                o.backward_input * factor.front(), o.backward_weight * factor.front());
      bubble && uniform && o.transfer == 0) {
    std::cout << " (by the formula " << fixed(100 * *bubble / timeline.makespan, 1) << "%)";
  }
  std::cout << "\nactivations held at most, by rank, in micro-batches of a stage:";
  for (const int held : timeline.held) std::cout << " " << held;
  std::cout << "\n";
  if (!o.trace.empty()) {
    write_file_atomic(o.trace.string(), dist::trace_pipeline(schedule, timeline, 1000));
    std::cout << "trace: " << o.trace.string() << " (a unit of time is shown as 1 ms)\n";
  }
  return 0;
}

}  // namespace

int run_plan(std::span<const std::string> args) {
  static constexpr Command kCommands[] = {
      {"schedule", "checks, times and draws a pipeline schedule", plan_schedule},
  };
  return dispatch("weft plan", "Tells what a distributed run would do, before it runs.", kCommands, args,
                  process_environment(), std::cout);
}

}  // namespace weft::apps
