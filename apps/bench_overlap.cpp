// weft bench overlap: how long ranks wait, in steps whose computation is sleep and whose links are as slow as is asked
// for. So it measures schedules and overlap alone, on a machine that may be busy with other things.
#include <sched.h>
#include <sys/prctl.h>
#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <iostream>
#include <thread>

#include "apps/bench.h"
#include "apps/bench_ratios.h"
#include "apps/files.h"
#include "core/autograd.h"
#include "core/thread_pool.h"
#include "dist/data_parallel.h"
#include "dist/engine.h"
#include "dist/pipeline/executor.h"
#include "dist/pipeline/simulation.h"
#include "dist/threads.h"

namespace weft::apps {
namespace {

constexpr double kBubblePoints = 0.03, kExposed = 0.1;
/// Transfers take this share of the time in which a rank computes.
constexpr double kTransferShare = 0.5;

void sleep_for(double seconds) { std::this_thread::sleep_for(std::chrono::duration<double>(seconds)); }

/// Lets the threads that are made from here on wake up when their sleep is over, whatever else the machine does.
void wake_in_time() {
  prctl(PR_SET_TIMERSLACK, 1UL, 0UL, 0UL, 0UL);  // nanoseconds that Linux may be late, of 50,000
  const sched_param lowest{.sched_priority = sched_get_priority_min(SCHED_FIFO)};
  if (sched_setscheduler(0, SCHED_FIFO, &lowest) == 0) return;
  std::cout << "no real-time priority (" << std::strerror(errno)
            << "): where other programs run, ranks that wake up late for them count as idle" << std::endl;
}

/// An engine whose transfers take as long as on a link of so many bytes per second, full duplex, of its own for each
/// lane.
class SlowLink final : public dist::Engine {
 public:
  SlowLink(std::shared_ptr<dist::Engine> over, double bytes_per_second)
      : Engine(std::shared_ptr<dist::Board>(over, &over->board()), over->rank()),
        over_(std::move(over)),
        bytes_per_second_(bytes_per_second) {}
  const char* name() const override { return over_->name(); }

  int64_t run(const dist::Operation& op) override {
    const double begin = steady_seconds();
    const int64_t sent = over_->run(op);
    const bool receives = op.stamp.op == dist::Collective::recv;
    const int64_t bytes = receives ? op.output.numel() * size_of(op.stamp.dtype) : sent;
    sleep_for(begin + static_cast<double>(bytes) / bytes_per_second_ - steady_seconds());
    return sent;
  }

 private:
  std::shared_ptr<dist::Engine> over_;
  double bytes_per_second_;
};

dist::ThreadsOptions slow(double bytes_per_second) {
  dist::ThreadsOptions options;
  options.engine = [=](std::shared_ptr<dist::Engine> over) {
    return std::make_shared<SlowLink>(std::move(over), bytes_per_second);
  };
  return options;
}

/// Time in which a rank has computed.
struct Busy {
  double seconds = 0;
  void work(double time) {
    const double begin = steady_seconds();
    sleep_for(time);
    seconds += steady_seconds() - begin;
  }
};

/// Times of a layer: forward, and backward to its input and to its weights.
struct LayerTimes {
  double forward, input, weight;
  double total() const { return forward + input + weight; }
};

/// A layer: the shape of its input, and nothing but its times. `busy` must outlive the backward pass.
Tensor layer(const Tensor& x, const Tensor& weight, const LayerTimes& times, Busy& busy) {
  (void)weight.raw();  // waits for it
  busy.work(times.forward);
  const Tensor out = Tensor::ones(x.shape());
  autograd::record("sleep", {x, weight}, {out}, {}, [times, &busy, shape = weight.shape()](auto& context) {
    busy.work(times.input);
    if (context.needs(0)) context.set(0, context.grad());
    context.compute(1, [times, &busy, shape](const std::optional<autograd::BackwardContext::Sink>& sink) {
      busy.work(times.weight);
      if (!sink) return Tensor::ones(shape);
      Tensor gradient = sink->tensor;
      if (!sink->accumulate) gradient.fill_(1);
      return Tensor();
    });
  });
  return out;
}

Tensor weights(int64_t elements) {
  Tensor weight = Tensor::ones({elements});
  weight.requires_grad_();
  return weight;
}

/// Of each step() the share of the ranks' time in which they did not compute, sorted. The first step, in which threads
/// start, is not counted, nor is what comes `between` steps.
std::vector<double> idle_shares(dist::Group& world, int64_t rounds, Busy& busy, const std::function<void()>& step,
                                const std::function<void()>& between) {
  std::vector<double> computed, taken;
  step();
  for (int64_t i = 0; i < rounds; ++i) {
    between();
    busy.seconds = 0;
    const double begin = steady_seconds();
    step();
    computed.push_back(busy.seconds);
    taken.push_back(steady_seconds() - begin);
  }
  const Tensor sums = Tensor::from(computed, {rounds}), most = Tensor::from(taken, {rounds});
  world.all_reduce_(sums);
  world.all_reduce_(most, dist::Reduction::max);
  std::vector<double> shares;
  for (int64_t i = 0; i < rounds; ++i)
    shares.push_back(1 - sums.select(0, i).item() / (world.size() * most.select(0, i).item()));
  std::sort(shares.begin(), shares.end());
  return shares;
}

std::string percent(double share) { return fixed(100 * share, 1) + "%"; }

// ---- pipelines ----

/// Idle shares of a pipeline of equal stages of one layer each, whose transfers take `transfer` seconds.
std::vector<double> pipeline_idle(dist::PipelineKind kind, const dist::PipelineShape& shape, const LayerTimes& times,
                                  double transfer, int64_t rounds) {
  constexpr int64_t kBoundary = 1000;  // elements
  std::vector<double> shares;
  const dist::ThreadsOptions options =
      transfer > 0 ? slow(static_cast<double>(kBoundary) * 4 / transfer) : dist::ThreadsOptions();
  dist::run_threads(
      shape.ranks,
      [&](dist::Group& world) {
        const dist::PipelineSchedule schedule = dist::make_pipeline_schedule(kind, shape);
        Busy busy;
        std::vector<dist::PipelineStage> stages;
        for (int stage = world.rank(); stage < schedule.stages(); stage += shape.ranks) {
          const bool last = stage == schedule.stages() - 1;
          stages.push_back([&, last, weight = weights(1)](int, const std::vector<Tensor>& inputs) {
            const Tensor x = inputs.empty() ? Tensor::ones({kBoundary}) : inputs[0];
            const Tensor out = layer(x, weight, times, busy);
            return std::vector<Tensor>{last ? out.narrow(0, 0, 1) : out};
          });
        }
        dist::PipelineExecutor executor(world, schedule, stages, {{{kBoundary}}});
        const std::vector<double> own =
            idle_shares(world, rounds, busy, [&] { executor.run(); }, [&] { world.barrier(); });
        if (world.rank() == 0) shares = own;
      },
      options);
  return shares;
}

/// Every schedule, with links that cost nothing, against its formula.
void bubbles(const RatioOptions& o, double unit, RatioTable& table) {
  for (const dist::PipelineKind kind : dist::kPipelineKinds) {
    for (int ranks = 2; ranks <= 4; ++ranks) {
      for (const int micro_batches : {4, 8, 16}) {
        dist::PipelineShape shape{ranks, micro_batches, 1};
        if (kind == dist::PipelineKind::kInterleaved) {
          shape.chunks = 2;
          shape.micro_batches = micro_batches / ranks * ranks;
        }
        const LayerTimes times{unit / shape.chunks, unit / shape.chunks, unit / shape.chunks};
        const double bubble = *dist::pipeline_bubble(kind, shape, times.forward, times.input, times.weight);
        const double work = shape.micro_batches * shape.chunks * times.total(), expected = bubble / (bubble + work);
        std::vector<double> shares = pipeline_idle(kind, shape, times, 0, o.count());
        const double measured = shares[shares.size() / 2];
        table.add({concat(kind, ", ", ranks, " ranks, ", shape.micro_batches, " micro-batches"),
                   percent(measured) + " idle", "formula " + percent(expected), std::move(shares), std::nullopt,
                   expected + kBubblePoints});
      }
    }
  }
}

/// Pipelines whose ranks send for half as long as they compute: what that adds to the idle time.
void slow_pipelines(const RatioOptions& o, double unit, RatioTable& table) {
  for (const dist::PipelineKind kind : dist::kPipelineKinds) {
    const dist::PipelineShape shape{4, 16, kind == dist::PipelineKind::kInterleaved ? 2 : 1};
    const double each = unit / shape.chunks;
    const LayerTimes times{each, each, each};
    // A micro-batch's activation and gradient.
    const double transfer = kTransferShare * times.total() / 2;
    const auto simulated = [&](double seconds) {
      return dist::simulate_pipeline(
                 dist::make_pipeline_schedule(kind, shape),
                 dist::PipelineCosts::uniform(shape.ranks * shape.chunks, each, each, each, seconds))
          .bubble_fraction();
    };
    const double bubble = simulated(0), expected = simulated(transfer) - bubble;
    std::vector<double> shares = pipeline_idle(kind, shape, times, transfer, o.count());
    for (double& share : shares) share = std::max(0.0, share - bubble);
    const double measured = shares[shares.size() / 2];
    table.add({concat(kind, ", 4 ranks, 16 micro-batches, slow links"), percent(measured) + " exposed",
               "simulation " + percent(expected), std::move(shares), std::nullopt, kExposed});
  }
}

// ---- data parallel ----

/// A model of equal layers, of which as many are a unit and a bucket.
constexpr int kLayers = 24, kLayersOfUnit = 2, kUnits = kLayers / kLayersOfUnit;

/// Idle shares of steps of two ranks with a micro-batch each, whose transfers take kTransferShare of the time in which
/// they compute. One step follows the other: what is still on its way at the end of one is waited for in the next.
std::vector<double> data_parallel_idle(dist::Zero zero, int64_t elements, const LayerTimes& times, int64_t rounds) {
  const bool spread = zero == dist::Zero::kParameters;
  // Of P bytes two ranks send P each, with ZeRO-3 3/2 P but for the half of a unit.
  const double layers = spread ? 1.5 * kLayers - 0.5 * kLayersOfUnit : kLayers;
  const double seconds = kTransferShare * kLayers * times.total();
  std::vector<double> shares;
  dist::run_threads(
      2,
      [&](dist::Group& world) {
        Parameters parameters;
        std::vector<std::vector<std::string>> units(kUnits);
        std::vector<dist::PipelineStage> stages;
        Busy busy;
        for (auto& unit : units) {
          for (int i = 0; i < kLayersOfUnit; ++i) {
            parameters.push_back({concat("h.", parameters.size()), weights(elements)});
            unit.push_back(parameters.back().name);
          }
          stages.push_back([&, first = parameters.size() - kLayersOfUnit](int, const std::vector<Tensor>& inputs) {
            Tensor x = inputs.empty() ? Tensor::ones({1}) : inputs[0];
            for (size_t i = first; i < first + kLayersOfUnit; ++i) x = layer(x, parameters[i].tensor, times, busy);
            return std::vector<Tensor>{x};
          });
        }
        if (!spread) units.clear();
        dist::DataParallel parallel(
            world, parameters, {.zero = zero, .bucket_bytes = kLayersOfUnit * elements * 4, .units = std::move(units)});
        dist::Group alone = world.subgroup(std::array{world.rank()}, concat("rank ", world.rank()));
        dist::PipelineExecutor executor(alone, make_pipeline_schedule(dist::PipelineKind::kGPipe, {1, 1, kUnits}),
                                        std::move(stages), {{{1}}});
        executor.set_hooks(
            {.begin = [&](int unit, dist::Pass pass) { parallel.begin_unit(static_cast<size_t>(unit), pass); },
             .end = [&](int unit, dist::Pass pass) { parallel.end_unit(static_cast<size_t>(unit), pass); }});
        const std::vector<int64_t> micro_batches = {1, 1};
        const auto step = [&] {
          parallel.begin_step(micro_batches);
          executor.run();
          parallel.reduce();
          parallel.gather();
          for (const Parameter& parameter : parallel.parameters()) parameter.tensor.clear_grad();
        };
        const std::vector<double> own = idle_shares(world, rounds, busy, step, [] {});
        if (world.rank() == 0) shares = own;
      },
      slow(layers * static_cast<double>(elements) * 4 / seconds));
  return shares;
}

/// What cannot be hidden is what the first unit waits for before a step and the last one after it: a unit's gradients,
/// and its weights, or with DDP its gradients there and back.
void slow_data_parallel(const RatioOptions& o, double unit, RatioTable& table) {
  const int64_t elements = o.quick ? 4096 : 65536;
  const LayerTimes times{unit / 3, unit / 3, unit / 3};
  const std::pair<const char*, dist::Zero> layouts[] = {{"DDP", dist::Zero::kNone},
                                                        {"ZeRO-1", dist::Zero::kOptimizer},
                                                        {"ZeRO-2", dist::Zero::kGradients},
                                                        {"ZeRO-3", dist::Zero::kParameters}};
  for (const auto& [name, zero] : layouts) {
    std::vector<double> shares = data_parallel_idle(zero, elements, times, o.count());
    const double measured = shares[shares.size() / 2];
    const double transfers = zero == dist::Zero::kParameters ? 1.5 * kUnits - 0.5 : kUnits;
    const double exposed = kTransferShare / transfers;
    table.add({concat(name, ", 2 ranks, ", kUnits, " buckets, slow links"), percent(measured) + " exposed",
               "a bucket " + percent(exposed / (1 + exposed)), std::move(shares), std::nullopt, kExposed});
  }
}

}  // namespace

int bench_overlap(std::span<const std::string> args) {
  RatioOptions o;
  o.rounds = 5;
  double milliseconds = 20;
  Options options("bench overlap",
                  "Measures how long ranks wait for each other in pipelines and data parallelism, with sleep for "
                  "computation and links that are free or slow.");
  o.declare(options);
  options.add("milliseconds", &milliseconds, {.min = 0.1, .max = 1000, .unit = "ms"},
              "of a stage's forward pass, which is a third of all that it does");
  if (!options.parse(args)) return 0;
  wake_in_time();
  set_num_threads(1);  // nothing is computed; a rank shall not wait for workers without its priority
  const double unit = o.quick ? 1e-3 : milliseconds * 1e-3;
  RatioTable table("bench overlap", o);
  bubbles(o, unit, table);
  slow_pipelines(o, unit, table);
  slow_data_parallel(o, unit, table);
  table.finish();
  return 0;
}

}  // namespace weft::apps
