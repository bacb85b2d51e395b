// weft bench step: whole training steps of reference shapes, by themselves or one at a time on command, so that another
// program can be measured in turns with this one.
#include <algorithm>
#include <cstdio>
#include <iostream>
#include <nlohmann/json.hpp>

#include "apps/bench.h"
#include "apps/device_option.h"
#include "apps/files.h"
#include "apps/options.h"
#include "apps/step_prediction.h"
#include "apps/step_shapes.h"
#include "apps/train_options.h"
#include "core/log.h"
#include "core/thread_pool.h"
#include "dist/threads.h"
#include "models/parallel_gpt.h"
#include "models/speed_of_light.h"
#include "models/trainer.h"
#include "optim/adam.h"

namespace weft::apps {
namespace {

/// Forward, backward, clipping and AdamW over random tokens.
class StepBench {
 public:
  StepBench(const StepShape& shape, int64_t accumulate, Device device, DType dtype, bool fp8, bool deterministic,
            models::GraphUse graph)
      : shape_(shape),
        accumulate_(accumulate),
        device_(device),
        dtype_(dtype),
        bound_(models::step_bound(shape.config, tokens(), models::machine_speed(device, dtype))),
        world_(dist::self_group(device)),
        parallel_(deterministic ? std::make_unique<models::ParallelGpt>(
                                      world_, models::ParallelOptions{.mesh = dist::Mesh::parse("dp=1", 1)},
                                      shape.config, device, 1, dtype)
                                : nullptr),
        alone_(deterministic ? nullptr : std::make_unique<models::Gpt>(shape.config, device, 1, dtype)),
        gpt_(parallel_ ? parallel_->gpt() : *alone_),
        optimizer_(parallel_ ? parallel_->parameters() : gpt_.parameters(),
                   {.beta2 = 0.95, .weight_decay = 0.1, .clip_norm = 1.0},
                   parallel_ ? parallel_->norms() : std::make_shared<optim::LocalNorms>()),
        loader_(random_tokens(shape), {.batch = shape.batch, .context = shape.config.context, .prefetch = 0}),
        trainer_(gpt_, optimizer_, loader_, {.peak = 3e-4, .floor = 3e-5, .warmup = 10, .total = 1000000}, accumulate) {
    if (parallel_) trainer_.parallelize(*parallel_, accumulate);
    if (fp8) trainer_.scale_fp8(gpt_.use_fp8());
    graph_reason_ = trainer_.use_graph(graph);
  }

  models::StepMetrics step() { return trainer_.step(); }
  int64_t tokens() const { return shape_.batch * shape_.config.context * accumulate_; }
  MemoryStatistics memory() const { return allocator(device_).statistics(); }
  /// Peak bytes of the process on a CPU, of the device's memory on a GPU.
  int64_t peak_bytes() const { return device_.kind == DeviceKind::cpu ? peak_resident_bytes() : memory().reserved; }
  const models::StepBound& bound() const { return bound_; }
  std::string graph() const {
    return graph_reason_.empty() ? trainer_.graph().summary() : describe_cuda_graph(graph_reason_);
  }
  /// The bound after one more measurement of the machine, which takes a second and memory of its own.
  models::StepBound measured_bound() const {
    return models::step_bound(shape_.config, tokens(), models::measure_machine(device_, dtype_));
  }

 private:
  StepShape shape_;
  int64_t accumulate_;
  Device device_;
  DType dtype_;
  models::StepBound bound_;  // first: it may measure the machine, in memory that is then free
  dist::Group world_;
  std::unique_ptr<models::ParallelGpt> parallel_;  // where gradients are added up in the order of several ranks
  std::unique_ptr<models::Gpt> alone_;             // else
  models::Gpt& gpt_;
  optim::Adam optimizer_;
  text::Loader loader_;
  models::Trainer trainer_;
  std::string graph_reason_;
};

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

/// One JSON line for each command line: "step N", "rss", "sol", "quit".
void serve(StepBench& bench) {
  for (std::string line; std::getline(std::cin, line);) {
    nlohmann::json reply;
    if (line == "quit") return;
    if (line == "rss") {
      reply["rss"] = bench.peak_bytes();
    } else if (line == "sol") {
      reply["sol"] = bench.measured_bound().total();
    } else if (int count = 0; std::sscanf(line.c_str(), "step %d", &count) == 1 && count >= 1) {
      std::vector<double> seconds;
      double loss = 0;
      for (int i = 0; i < count; ++i) {
        const models::StepMetrics m = bench.step();
        seconds.push_back(m.times.total());
        loss = m.loss;
      }
      reply["seconds"] = seconds;
      reply["loss"] = loss;
    } else {
      reply["error"] = "unknown command " + weft::quoted(line) + "; expected step N, rss, sol or quit";
    }
    std::cout << reply.dump() << std::endl;
  }
}

}  // namespace

int bench_step(std::span<const std::string> args) {
  std::string shape = "a";
  Precision precision = Precision::f32;
  int64_t threads = 0, steps = 20, batch = 0, accumulate = 1;
  bool serving = false, deterministic = false, predicting = false;
  DeviceOption device;
  Options options("bench step", "Times whole training steps (forward, backward, clipping, AdamW) on random tokens.");
  options.add("shape", &shape, {.choices = step_shape_names()}, kStepShapesHelp);
  options.add("batch", &batch, {.min = 0, .max = 1 << 20, .unit = "sequences"},
              "rows of a micro-batch; 0: the shape's");
  options.add("accumulate", &accumulate, {.min = 1, .max = 1 << 20, .unit = "micro-batches"},
              "micro-batches of one step");
  options.add("precision", &precision, {{"f32", Precision::f32}, {"bf16", Precision::bf16}, {"fp8", Precision::fp8}},
              "of weights and activations, the optimizer keeps f32; fp8: bf16 whose blocks multiply in 8 bits");
  device.declare(options);
  models::GraphUse graph = models::GraphUse::automatic;
  declare_cuda_graph(options, &graph);
  options.add("threads", &threads, {.min = 0, .max = 1024}, "threads; 0: as many as the process may use");
  options.add("steps", &steps, {.min = 1, .max = 1000000}, "steps that are timed, after 3 that are not");
  options.add(
      "deterministic", &deterministic,
      "add up the gradients of micro-batches in the order that several ranks add them up in, as weft train does");
  options.action("predict", &predicting,
                 "print what a step of GPT-2's sizes moves and computes by formula, and what that takes on an H200; "
                 "nothing is measured");
  options.action("serve", &serving,
                 "answer commands on standard input (step N, rss, sol, quit) with JSON lines instead");
  if (!options.parse(args)) return 0;
  if (predicting) return print_prediction(std::cout), 0;
  if (threads > 0) set_num_threads(static_cast<int>(threads));
  StepShape chosen = step_shape(shape);
  if (batch > 0) chosen.batch = batch;
  const Device where = device.device(options);
  const bool fp8 = precision == Precision::fp8;
  const DType dtype = precision == Precision::f32 ? DType::f32 : DType::bf16;
  StepBench bench(chosen, accumulate, where, dtype, fp8, deterministic, graph);
  if (serving) return serve(bench), 0;

  for (int i = 0; i < 3; ++i) bench.step();
  const int64_t allocations = bench.memory().system_allocations;
  std::vector<double> total, forward, backward, optimizer;
  for (int64_t i = 0; i < steps; ++i) {
    const models::StepTimes t = bench.step().times;
    total.push_back(t.total());
    forward.push_back(t.forward);
    backward.push_back(t.backward);
    optimizer.push_back(t.optimizer);
  }
  const double seconds = median(total);
  const models::StepBound& bound = bench.bound();
  const auto ms = [](const std::vector<double>& values) { return fixed(median(values) * 1e3, 2); };
  const std::string parts = where.kind == DeviceKind::cpu ? concat("forward ", ms(forward), ", backward ", ms(backward),
                                                                   ", optimizer ", ms(optimizer))
                                                          : "forward, backward and optimizer as one";
  std::printf("shape %s on %s (%d threads), %s, median of %lld steps: %.2f ms (%s), best %.2f ms\n", shape.c_str(),
              to_string(where).c_str(), num_threads(), fp8 ? "fp8" : name(dtype), static_cast<long long>(steps),
              seconds * 1e3, parts.c_str(), *std::min_element(total.begin(), total.end()) * 1e3);
  std::printf("cuda graph: %s\n", bench.graph().c_str());
  std::printf(
      "%s tokens/s; speed of light %.2f ms (products %.2f, attention %.2f, passes %.2f, optimizer %.2f): %.1f%%\n",
      grouped(static_cast<int64_t>(static_cast<double>(bench.tokens()) / seconds)).c_str(), bound.total() * 1e3,
      bound.products * 1e3, bound.attention * 1e3, bound.passes * 1e3, bound.optimizer * 1e3,
      100 * bound.total() / seconds);
  std::printf("peak memory %s; system allocations in the timed steps: %lld\n", human_bytes(bench.peak_bytes()).c_str(),
              static_cast<long long>(bench.memory().system_allocations - allocations));
  std::printf("memory:\n%s", memory_table(bench.memory()).c_str());
  device.report(where);
  return 0;
}

}  // namespace weft::apps
