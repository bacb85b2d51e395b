#include "apps/memory_plan.h"

#include <algorithm>
#include <cstdio>
#include <optional>
#include <vector>

#include "apps/columns.h"
#include "core/backend.h"
#include "core/error.h"
#include "models/trainer.h"

namespace weft::apps {
namespace {

/// Memory does not depend on micro-batches beyond the second, whose gradients are added to those of the first.
TrainOptions shortened(TrainOptions o) {
  o.accumulate = std::min<int64_t>(o.accumulate, 2);
  return o;
}

double tokens_per_step(const TrainOptions& o) { return static_cast<double>(o.batch * o.accumulate * o.context); }

std::string percent(double part, double whole) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f%%", whole > 0 ? 100 * part / whole : 0.0);
  return text;
}

std::string flops(double count, const TrainOptions& o, int64_t vocab) {
  static constexpr const char* kUnits[] = {"FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"};
  double value = count;
  int unit = 0;
  while (value >= 1000 && unit < 6) value /= 1000, ++unit;
  char text[64];
  std::snprintf(text, sizeof text, "%.1f %s", value, kUnits[unit]);
  return concat(text, " (", percent(count, o.model(vocab).flops_per_token() * tokens_per_step(o)), " of a step's)");
}

/// A way of saving memory: the option as one would type it, the options with it, and what it costs a step.
struct Saver {
  std::string option;
  TrainOptions with;
  std::function<std::string(const MemoryPlan&)> cost;
};

std::string names(const models::Recompute& r) {
  std::string all;
  for (const auto& [on, name] :
       {std::pair(r.block, "block"), {r.norm, "norm"}, {r.activation, "activation"}, {r.attention, "attention"}}) {
    if (on) all += (all.empty() ? "" : ",") + std::string(name);
  }
  return all;
}

std::string offload_names(const TrainOptions& o) {
  return std::string(o.offload_optimizer ? "optimizer" : "") +
         (o.offload_optimizer && o.offload_activations ? "," : "") + (o.offload_activations ? "activations" : "");
}

/// Bytes over the bus in a step.
int64_t copied(const TrainOptions& o, const MemoryPlan& plan) {
  const auto held = [&](MemoryCategory category) { return plan.host.categories[static_cast<size_t>(category)].peak; };
  // Activations and, with AdamW, the state go out and come back once. The trust ratio has the state come twice, and
  // masters go twice.
  const int64_t state = held(MemoryCategory::optimizer), masters = o.dtype() == DType::f32 ? 0 : state / 3;
  return 2 * held(MemoryCategory::activations) * o.accumulate +
         (o.optimizer == OptimizerKind::lamb ? 3 * state + masters : 2 * state);
}

Saver recompute_saver(const TrainOptions& o, models::Recompute more, const std::string& cost = {}) {
  Saver saver{"", o, [cost](const MemoryPlan&) { return cost; }};
  models::Recompute& r = saver.with.recompute;
  r.block |= more.block, r.norm |= more.norm, r.activation |= more.activation, r.attention |= more.attention;
  saver.option = "--recompute " + names(r);
  return saver;
}

Saver offload_saver(const TrainOptions& o, bool optimizer, bool activations) {
  Saver saver{"", o, {}};
  saver.with.offload_optimizer |= optimizer, saver.with.offload_activations |= activations;
  saver.option = "--offload " + offload_names(saver.with);
  saver.cost = [with = saver.with](const MemoryPlan& plan) {
    return concat(human_bytes(copied(with, plan)), " copied between host and device");
  };
  return saver;
}

/// Each that is not in use, alone.
std::vector<Saver> single_savers(const TrainOptions& o, Device device, int64_t vocab) {
  const double n = tokens_per_step(o), l = static_cast<double>(o.layers), c = static_cast<double>(o.width);
  const double bytes = static_cast<double>(size_of(o.dtype())), attention = 2 * l * c * static_cast<double>(o.context);
  const auto moved = [](double count) {
    return concat(human_bytes(static_cast<int64_t>(count)), " read and written once more");
  };
  std::vector<Saver> all;
  const auto add = [&](bool in_use, models::Recompute more, const std::string& cost) {
    if (!in_use) all.push_back(recompute_saver(o, more, cost));
  };
  add(o.recompute.norm, {.norm = true}, moved(2 * (2 * l + 1) * n * c * bytes));
  add(o.recompute.activation, {.activation = true}, moved(2 * 4 * l * n * c * bytes));
  add(o.recompute.attention, {.attention = true}, flops(attention * n, o, vocab));
  add(o.recompute.block, {.block = true}, flops((24 * l * c * c + attention) * n, o, vocab));
  if (device.kind == DeviceKind::cuda) {
    if (!o.offload_optimizer) all.push_back(offload_saver(o, true, false));
    if (!o.offload_activations) all.push_back(offload_saver(o, false, true));
  }
  if (o.dtype() == DType::f32) {
    Saver half{"--precision bf16", o, [](const MemoryPlan&) { return "other numbers: 8 bits instead of 24"; }};
    half.with.precision = Precision::bf16;
    all.push_back(half);
  }
  return all;
}

/// What a run that does not fit is told of: ways that leave its numbers alone, then those in half the bytes.
std::vector<Saver> joined_savers(const TrainOptions& o, Device device) {
  const models::Recompute parts{.norm = true, .activation = true, .attention = true}, block{.block = true};
  std::vector<Saver> all = {recompute_saver(o, parts), recompute_saver(o, block)};
  Saver most = all.back();
  if (device.kind == DeviceKind::cuda) {
    for (const auto& [optimizer, activations] : {std::pair(true, false), {false, true}, {true, true}})
      all.push_back(offload_saver(o, optimizer, activations));
    most.option += " " + all.back().option;
    most.with = offload_saver(most.with, true, true).with;
    all.push_back(most);
  }
  if (o.dtype() == DType::f32) {
    for (Saver half : {Saver{"", o, {}}, most}) {
      half.with.precision = Precision::bf16;
      half.option += half.option.empty() ? "--precision bf16" : " --precision bf16";
      all.push_back(half);
    }
  }
  const auto in_use = [&](const Saver& saver) {
    const TrainOptions& with = saver.with;
    return with.recompute == o.recompute && with.offload_optimizer == o.offload_optimizer &&
           with.offload_activations == o.offload_activations && with.precision == o.precision;
  };
  std::erase_if(all, in_use);
  return all;
}

std::string padded(std::string text, size_t width) {
  text.resize(std::max(text.size() + 1, width), ' ');
  return text;
}

/// The largest micro-batch below the one that was asked for, of which a step of as many rows can be made, that needs at
/// most `limit`.
std::optional<std::pair<TrainOptions, int64_t>> largest_micro_batch(const TrainOptions& o, Device device,
                                                                    const PlannedData& data, int64_t limit) {
  const int64_t rows = o.batch * o.accumulate;
  std::vector<int64_t> sizes;
  for (int64_t d = 1; d < o.batch; ++d) {
    if (rows % d == 0) sizes.push_back(d);
  }
  std::optional<std::pair<TrainOptions, int64_t>> best;
  // More rows never need less.
  for (size_t low = 0, high = sizes.size(); low < high;) {
    const size_t middle = low + (high - low) / 2;
    TrainOptions with = o;
    with.batch = sizes[middle], with.accumulate = rows / with.batch;
    const int64_t needs = plan_memory(shortened(with), device, data).needs();
    if (needs <= limit) {
      best = {with, needs};
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return best;
}

}  // namespace

MemoryPlan plan_memory(const TrainOptions& o, Device device, const PlannedData& data) {
  const DryRun dry;
  Allocator &memory = allocator(device), &host = pinned_allocator(device);
  MemoryPlan plan;
  try {
    models::Gpt gpt(o.model(data.vocab), device, 0, o.dtype());
    optim::Adam optimizer(gpt.parameters(), o.adam());
    text::Loader loader(data.tokens, {.batch = o.batch, .context = o.context, .prefetch = 0});
    models::Trainer trainer(gpt, optimizer, loader, o.schedule(), o.accumulate);
    if (o.precision == Precision::fp8) trainer.scale_fp8(gpt.use_fp8());
    trainer.step();
    trainer.step();
    plan = {memory.statistics(), host.statistics()};
  } catch (const Error& error) {
    if (error.kind() != ErrorKind::kMemory) throw;
    plan = {memory.statistics(), host.statistics()};  // more than there are addresses: as far as it came
  }
  for (Allocator* each : {&memory, &host}) {
    each->release_cached();
    each->reset_peak();
  }
  return plan;
}

std::string savers_table(const TrainOptions& o, Device device, const PlannedData& data) {
  const int64_t now = plan_memory(shortened(o), device, data).device.total.peak;
  constexpr size_t kOption = 42, kBytes = 11;
  std::string out =
      padded("  with", kOption) + right("peak", kBytes) + right("saves", kBytes + 9) + "   cost per step\n";
  for (const Saver& saver : single_savers(o, device, data.vocab)) {
    const MemoryPlan plan = plan_memory(shortened(saver.with), device, data);
    const int64_t peak = plan.device.total.peak;
    out += padded("  " + saver.option, kOption) + right(human_bytes(peak), kBytes) +
           right(concat(human_bytes(now - peak), " ",
                        right(percent(static_cast<double>(now - peak), static_cast<double>(now)), 6)),
                 kBytes + 9) +
           "   " + saver.cost(plan) + "\n";
  }
  return out;
}

std::string what_would_fit(const TrainOptions& o, Device device, const PlannedData& data, int64_t limit) {
  constexpr size_t kOption = 54;
  std::string out = concat("What would fit into ", human_bytes(limit), " (two steps replayed without memory):\n");
  const auto line = [&](const std::string& option, const std::string& rest) {
    out += padded("  " + option, kOption) + rest + "\n";
  };
  if (const auto found = largest_micro_batch(o, device, data, limit)) {
    const auto& [with, needs] = *found;
    line(concat("--batch ", with.batch, " --accumulate ", with.accumulate),
         concat(right(human_bytes(needs), 10), "  fits, with the same ",
                grouped(static_cast<int64_t>(tokens_per_step(o))), " tokens a step"));
  } else {
    line("--batch", "no smaller micro-batch with as many tokens a step does");
  }
  for (const Saver& saver : joined_savers(o, device)) {
    const int64_t needs = plan_memory(shortened(saver.with), device, data).needs();
    line(saver.option, right(human_bytes(needs), 10) + (needs <= limit ? "  fits" : "  does not fit"));
  }
  return out;
}

RankBytes rank_bytes(const TrainOptions& o, const dist::Mesh& mesh, int64_t vocab) {
  const models::GptConfig config = o.model(vocab);
  const int64_t c = config.width, layer = 12 * c * c + 13 * c, table = vocab * c;
  const std::vector<int64_t> stages = models::pipeline_stages(o.parallel(mesh), config);
  const int ranks = mesh.size(dist::Axis::pp);
  int64_t most = 0;
  for (int rank = 0; rank < ranks; ++rank) {
    int64_t count = 0;
    for (size_t stage = static_cast<size_t>(rank); stage + 1 < stages.size(); stage += static_cast<size_t>(ranks)) {
      count += (stages[stage + 1] - stages[stage]) * layer;
      if (stage == 0) count += table + config.context * c;
      if (stage + 2 == stages.size()) count += 2 * c + (stages.size() > 2 && ranks > 1 ? table : 0);
    }
    most = std::max(most, count);
  }
  const int64_t p = most / mesh.size(dist::Axis::tp), w = size_of(o.dtype());
  const int64_t copies = mesh.size(dist::Axis::dp) * mesh.size(dist::Axis::cp);
  const int64_t n = o.zero_ranks > 0 ? o.zero_ranks : copies;
  const auto share = [&](dist::Zero from, int64_t bytes) { return o.zero >= from ? bytes / n : bytes; };
  return {.weights = share(dist::Zero::kParameters, w * p),
          .gradients = share(dist::Zero::kGradients, w * p),
          .optimizer = share(dist::Zero::kOptimizer, (w == 2 ? 12 : 8) * p)};
}

std::string ranks_table(const TrainOptions& o, const dist::Mesh& mesh, int64_t vocab) {
  TrainOptions plain = o;
  plain.zero = dist::Zero::kNone, plain.pipeline_chunks = 1, plain.pipeline_split.clear();
  const RankBytes one = rank_bytes(plain, {}, vocab), each = rank_bytes(o, mesh, vocab);
  std::string out = padded("  bytes held between steps", 30) + right("one process", 13) + right("a rank", 12) + "\n";
  const auto line = [&](const char* name, int64_t alone, int64_t here) {
    out += padded(concat("  ", name), 30) + right(human_bytes(alone), 13) + right(human_bytes(here), 12) +
           right(percent(static_cast<double>(here), static_cast<double>(alone)), 9) + "\n";
  };
  line("weights", one.weights, each.weights);
  line("gradients", one.gradients, each.gradients);
  line("optimizer", one.optimizer, each.optimizer);
  line("total", one.total(), each.total());
  return out;
}

void refuse_if_it_cannot_fit(const TrainOptions& o, Device device, const PlannedData& data) {
  const MemorySize size = backend(device).memory();
  const int64_t limit = device.kind == DeviceKind::cpu ? size.total : size.free;
  const MemoryPlan plan = plan_memory(shortened(o), device, data);
  if (limit <= 0 || plan.needs() <= limit) return;
  fail(ErrorKind::kMemory, "train", "a step takes ", human_bytes(plan.needs()), " on ", device, ", which has ",
       human_bytes(limit),
       device.kind == DeviceKind::cpu ? " for this process" : concat(" free of ", human_bytes(size.total)), ":\n",
       memory_table(plan.device), what_would_fit(o, device, data, limit));
}

void advise_if_memory_ends(const TrainOptions& o, Device device, const PlannedData& data,
                           const std::function<void()>& run) {
  try {
    run();
  } catch (const Error& error) {
    if (error.kind() != ErrorKind::kMemory) throw;
    const MemorySize size = backend(device).memory();
    const int64_t limit =
        device.kind == DeviceKind::cpu ? size.total : size.free + allocator(device).statistics().reserved;
    throw Error(error.kind(), concat(error.what(), '\n', what_would_fit(o, device, data, limit)));
  }
}

}  // namespace weft::apps
