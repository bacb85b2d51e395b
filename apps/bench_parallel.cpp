// weft bench parallel: training steps on two processes against the same steps on one, their traffic and memory against
// the formulas, and what adding up in the canonical order costs.
#include <algorithm>
#include <cmath>
#include <iostream>
#include <map>

#include "apps/bench.h"
#include "apps/bench_processes.h"
#include "apps/bench_ratios.h"
#include "apps/files.h"
#include "apps/step_shapes.h"
#include "core/error.h"
#include "core/memory.h"
#include "core/thread_pool.h"
#include "dist/parameter_units.h"
#include "dist/processes.h"
#include "dist/threads.h"
#include "models/trainer.h"
#include "optim/adam.h"

namespace weft::apps {
namespace {

constexpr int kRanks = 2;
constexpr optim::AdamOptions kAdam{.beta2 = 0.95, .weight_decay = 0.1, .clip_norm = 1.0};
constexpr optim::CosineSchedule kSchedule{.peak = 3e-4, .floor = 3e-5, .warmup = 10, .total = 1000000};

struct Layout {
  const char* name;
  dist::Zero zero;
  double at_least;  ///< of the tokens per second of one process
  /// What a rank keeps at most, in shares of the parameters.
  double parameters, gradients, state;
};
constexpr double kHalf = 1.0 / kRanks;
constexpr Layout kLayouts[] = {
    {"DDP", dist::Zero::kNone, 0.9, 1, 1, 2},
    {"ZeRO-1", dist::Zero::kOptimizer, 0.9, 1, 1, 2 * kHalf},
    {"ZeRO-2", dist::Zero::kGradients, 0.9, 1, kHalf, 2 * kHalf},
    {"ZeRO-3", dist::Zero::kParameters, 0.8, kHalf, kHalf, 2 * kHalf},
};

/// Steps of one process.
class Alone {
 public:
  Alone(const StepShape& shape, int64_t accumulate)
      : gpt_(shape.config, Device::cpu(), 1),
        adam_(gpt_.parameters(), kAdam),
        loader_(random_tokens(shape),
                {.batch = shape.batch / accumulate, .context = shape.config.context, .prefetch = 0}),
        trainer_(gpt_, adam_, loader_, kSchedule, accumulate) {}
  void step() { trainer_.step(); }

 private:
  models::Gpt gpt_;
  optim::Adam adam_;
  text::Loader loader_;
  models::Trainer trainer_;
};

/// Steps of `micro_batches` shared out among the ranks of a group.
class Together {
 public:
  Together(dist::Group& world, const StepShape& shape, dist::Zero zero, int64_t micro_batches)
      : parallel_(world, {.mesh = dist::Mesh::parse(concat("dp=", world.size()), world.size()), .zero = zero},
                  shape.config, Device::cpu(), 1),
        adam_(parallel_.parameters(), kAdam, parallel_.norms()),
        loader_(random_tokens(shape),
                {.batch = shape.batch / micro_batches,
                 .context = shape.config.context,
                 .rank = parallel_.data_rank(),
                 .world_size = parallel_.data_ranks(),
                 .prefetch = 0,
                 .shares = parallel_.consecutive() ? parallel_.shares(micro_batches) : std::vector<int64_t>()}),
        trainer_(parallel_.gpt(), adam_, loader_, kSchedule, micro_batches / world.size()) {
    trainer_.parallelize(parallel_, micro_batches);
  }
  /// A step, until all of the updated weights are there, which the next one would else wait for.
  void step() {
    trainer_.step();
    for (const Parameter& parameter : parallel_.gpt().parameters()) {
      if (const Storage& storage = *parameter.tensor.storage(); !storage.is_released()) storage.data();
    }
  }
  models::ParallelGpt& parallel() { return parallel_; }

  /// Bytes of gradients and parameters that this rank has sent, without the sums of norms.
  double sent() const {
    using enum dist::Collective;
    double bytes = 0;
    for (const dist::Collective op : {reduce_scatter, all_gather, all_to_all})
      bytes += static_cast<double>(parallel_.gradient_group().traffic(op).bytes_sent);
    if (parallel_.options().zero == dist::Zero::kNone)
      bytes += static_cast<double>(parallel_.gradient_group().traffic(all_reduce).bytes_sent);
    return bytes;
  }
  /// Seconds in which it stood still for others.
  double waited() const {
    double seconds = 0;
    for (const dist::Group::Traffic& traffic : parallel_.gradient_group().traffic()) seconds += traffic.waited;
    return seconds;
  }

 private:
  models::ParallelGpt parallel_;
  optim::Adam adam_;
  text::Loader loader_;
  models::Trainer trainer_;
};

double mean_over(dist::Group& world, double value) {
  const Tensor sum = Tensor::from(std::vector<double>{value}, {1});
  world.all_reduce_(sum);
  return sum.item() / world.size();
}

std::string megabytes(double bytes) { return fixed(bytes * 1e-6, bytes < 1e7 ? 3 : 1) + " MB"; }

/// A row whose figure must be what a formula says.
RatioRow against_formula(const Layout& layout, const std::string& what, double measured, const std::string& formula,
                         double expected) {
  RatioRow row{concat(layout.name, ", ", what),
               megabytes(measured),
               concat(formula, " = ", megabytes(expected)),
               {measured / expected}};
  return row;
}

/// Most bytes that this process has held in some categories since it was reset.
double peak_of(std::initializer_list<MemoryCategory> categories) {
  const MemoryStatistics memory = allocator(Device::cpu()).statistics();
  double bytes = 0;
  for (const MemoryCategory category : categories)
    bytes += static_cast<double>(memory.categories[static_cast<size_t>(category)].peak);
  return bytes;
}

/// Bytes of traffic and memory of a step, means over the ranks. @param table  rank 0's
void count(dist::Group& world, const StepShape& shape, const Layout& layout, RatioTable* table) {
  Together training(world, shape, layout.zero, kRanks);
  double parameters = 0, table_bytes = 0;
  std::map<std::string, double> bytes_of;
  for (const Parameter& parameter : training.parallel().gpt().parameters()) {
    const auto bytes = static_cast<double>(parameter.tensor.numel() * size_of(parameter.tensor.dtype()));
    parameters += bytes;
    if (parameter.name == "wte.weight") table_bytes = bytes;
    bytes_of[parameter.name] = bytes;
  }
  std::vector<double> units;
  for (const std::vector<std::string>& unit : training.parallel().gpt().units()) {
    units.push_back(0);
    for (const std::string& name : unit) units.back() += bytes_of.at(name);
  }
  training.step();
  const double before = training.sent();
  allocator(Device::cpu()).reset_peak();
  training.step();
  using Memory = MemoryCategory;
  const double sent = mean_over(world, training.sent() - before),
               held = mean_over(world, peak_of({Memory::parameters, Memory::optimizer})),
               gradients = mean_over(world, peak_of({Memory::gradients})),
               moving = mean_over(world, peak_of({Memory::communication}));
  if (table == nullptr) return;
  // The token table is in two places, whose gradients are summed apart. With one micro-batch a rank, ZeRO-2 sends as
  // much as those before it.
  const bool spread = layout.zero == dist::Zero::kParameters;
  const double everywhere = parameters + table_bytes;
  table->add(
      against_formula(layout, "sent by a rank in a step", sent, spread ? "(3 P - U) (n-1)/n" : "2 P (n-1)/n",
                      (spread ? 3 * everywhere - units.back() : everywhere + parameters) * (kRanks - 1) / kRanks));
  const dist::SpreadBytes in_units = dist::spread_bytes(parameters, units, table_bytes, kRanks);
  const double shares = layout.parameters + layout.state;
  RatioRow memory = spread ? against_formula(layout, "parameters and state", held, "3 P/n, 2 units",
                                             in_units.parameters + in_units.optimizer)
                           : against_formula(layout, "parameters and state", held, concat(fixed(shares, 1), " P"),
                                             parameters * shares);
  memory.at_most = 1.02;
  table->add(std::move(memory));
  // One more unit's gradients than ZeRO-3's formula has may be on their way when those of the next are there.
  table->add(spread ? against_formula(layout, "gradients", gradients, "P/n, a unit", in_units.gradients)
                    : against_formula(layout, "gradients", gradients, concat(fixed(layout.gradients, 1), " P"),
                                      parameters * layout.gradients));
  table->add(against_formula(layout, "buffers of transfers", moving, "P", parameters));
}

/// Tokens per second against one process that has all threads.
void time(dist::Group& world, const StepShape& shape, const RatioOptions& o, int threads, RatioTable* table) {
  std::optional<Alone> alone;
  if (world.rank() == 0) alone.emplace(shape, 1);
  const auto tokens = static_cast<double>(shape.batch * shape.config.context);
  for (const Layout& layout : kLayouts) {
    Together together(world, shape, layout.zero, kRanks);
    double waited = 0;
    int64_t steps = 0;
    const Rounds rounds = take_turns(
        world, o.count(),
        [&] {
          const double before = together.waited();
          together.step();
          waited += together.waited() - before, ++steps;
        },
        [&] {
          if (!alone) return;
          set_num_threads(threads);
          alone->step();
          set_num_threads(std::max(1, threads / kRanks));
        });
    const double exposed = mean_over(world, waited / static_cast<double>(steps));
    if (table == nullptr) continue;
    const auto rate = [&](double seconds) {
      return grouped(static_cast<int64_t>(std::lround(tokens / seconds))) + " tok/s";
    };
    table->add({concat(layout.name, ", 2 ranks"), rate(rounds.ours_median()),
                concat("1 rank, ", threads, " threads ", rate(rounds.other_median())), rounds.ratios(),
                layout.at_least});
    table->add({concat(layout.name, ", exposed communication"),
                fixed(exposed * 1e3, 1) + " ms",
                concat("a step's ", fixed(rounds.ours_median() * 1e3, 1), " ms"),
                {exposed / rounds.ours_median()}});
  }
}

/// What the canonical order costs one process.
void deterministic(const StepShape& shape, const RatioOptions& o, RatioTable& table) {
  constexpr int64_t kAccumulate = 4;
  dist::Group self = dist::self_group();
  Together canonical(self, shape, dist::Zero::kNone, kAccumulate);
  Alone plain(shape, kAccumulate);
  const Rounds rounds = take_turns(o.count(), [&] { canonical.step(); }, [&] { plain.step(); });
  table.add({"--deterministic, 1 rank, 4 micro-batches", fixed(rounds.ours_median() * 1e3, 1) + " ms a step",
             concat("sums as they come, ", fixed(rounds.other_median() * 1e3, 1), " ms"), rounds.ratios(), 0.97});
}

}  // namespace

int bench_parallel(std::span<const std::string> args) {
  RatioOptions o;
  std::string shape = "b";
  Options options("bench parallel",
                  "Times training steps (forward, backward, clipping, AdamW) on two processes against the same steps "
                  "on one, in turns, and counts what the two send and keep.");
  o.declare(options);
  options.add("shape", &shape, {.choices = step_shape_names()}, kStepShapesHelp);
  if (!options.parse(args)) return 0;
  if (*dist::why_no_gloo() != '\0') fail(ErrorKind::kUsage, "bench parallel", dist::why_no_gloo());
  const StepShape chosen =
      o.quick ? StepShape{"quick", {.layers = 2, .heads = 2, .width = 64, .context = 16, .vocab = 17}, 4}
              : step_shape(shape);
  RatioTable table("bench parallel", o);
  const int threads = num_threads();
  run_processes(kRanks, [&](dist::Group& world, const std::filesystem::path&) {
    RatioTable* const mine = world.rank() == 0 ? &table : nullptr;
    for (const Layout& layout : kLayouts) count(world, chosen, layout, mine);
    time(world, chosen, o, threads, mine);
  });
  deterministic(chosen, o, table);
  table.finish();
  return 0;
}

}  // namespace weft::apps
