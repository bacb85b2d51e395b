// weft bench checkpoint: what a checkpoint costs a run: at once, and in the background.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <numeric>

#include "apps/bench.h"
#include "apps/device_option.h"
#include "apps/files.h"
#include "apps/options.h"
#include "apps/step_shapes.h"
#include "core/file.h"
#include "core/thread_pool.h"
#include "models/checkpoint/saver.h"
#include "models/trainer.h"
#include "optim/adam.h"

namespace weft::apps {
namespace {

double seconds_of(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

struct Spread {
  double lower = 0, median = 0, upper = 0;  ///< quartiles
};

Spread spread(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const auto at = [&](size_t quarter) { return values[(values.size() - 1) * quarter / 4]; };
  return {at(1), at(2), at(3)};
}

double sum(const std::vector<double>& values) { return std::accumulate(values.begin(), values.end(), 0.0); }

/// Seconds of everything that is measured, in the order in which it was.
struct Measured {
  std::vector<double> plain;    ///< writing as many bytes as a checkpoint has, and syncing them
  std::vector<double> at_once;  ///< a save
  std::vector<double> copies;   ///< the begin of a save in the background
  std::vector<double> first;    ///< the step of that, with it
  std::vector<double> behind;   ///< until the checkpoint is there
  std::vector<double> beside;   ///< every step until then
  std::vector<double> alone;    ///< as many steps without a save
  std::vector<double> extra;    ///< what a save, its steps included, takes longer than these
  std::vector<double> steps;    ///< of a save, not seconds
};

/// A directory for the checkpoints of this measurement; it goes with everything in it.
struct Scratch {
  explicit Scratch(const std::filesystem::path& where) : path(where / concat(".weft-bench-checkpoint-", ::getpid())) {
    make_directories(path);
  }
  ~Scratch() {
    std::error_code ignored;
    std::filesystem::remove_all(path, ignored);
  }
  std::filesystem::path path;
};

void print(const Measured& m, size_t bytes, const std::string& shape, const std::filesystem::path& directory,
           Device device) {
  const auto ms = [](const std::vector<double>& seconds) {
    const Spread s = spread(seconds);
    return fixed(s.median * 1e3, 2) + " ms [" + fixed(s.lower * 1e3, 2) + ", " + fixed(s.upper * 1e3, 2) + "]";
  };
  const double plain = spread(m.plain).median;
  const auto rate = [&](const std::vector<double>& seconds) {
    const double median = spread(seconds).median;
    return fixed(static_cast<double>(bytes) / median * 1e-9, 3) + " GB/s, " + fixed(100 * plain / median, 1) + "%";
  };
  const auto more = [](double time, double than) {
    return (time < than ? "" : "+") + fixed(100 * (time / than - 1), 2) + "%";
  };
  const Spread alone = spread(m.alone), beside = spread(m.beside);
  const double extra = spread(m.extra).median, steps = spread(m.steps).median;
  std::printf("checkpoints of shape %s, %s, in %s, on %s (%d threads), %zu rounds; medians [quartiles]\n",
              shape.c_str(), human_bytes(static_cast<int64_t>(bytes)).c_str(), directory.c_str(),
              to_string(device).c_str(), num_threads(), m.steps.size());
  std::printf("a plain write:      %s, %s: written and synced, not hashed\n", ms(m.plain).c_str(),
              rate(m.plain).c_str());
  std::printf("at once:            %s, %s of the plain write's\n", ms(m.at_once).c_str(), rate(m.at_once).c_str());
  std::printf("in the background:  %s, %s of it: there after %s steps\n", ms(m.behind).c_str(), rate(m.behind).c_str(),
              fixed(steps, 0).c_str());
  std::printf("a step alone:       %s, the denominator of what follows\n", ms(m.alone).c_str());
  std::printf("a step beside:      %s: %s, upper quartile against upper quartile %s\n", ms(m.beside).c_str(),
              more(beside.median, alone.median).c_str(), more(beside.upper, alone.upper).c_str());
  std::printf("the copy:           %s, %s%% of a step; the step with it %s\n", ms(m.copies).c_str(),
              fixed(100 * spread(m.copies).median / alone.median, 2).c_str(),
              more(spread(m.first).median, alone.median).c_str());
  std::printf("a save in all:      %s longer than its steps alone: %s%% of one step, %s%% of the %s steps\n",
              ms(m.extra).c_str(), fixed(100 * extra / alone.median, 1).c_str(),
              fixed(100 * sum(m.extra) / sum(m.alone), 2).c_str(), fixed(steps, 0).c_str());
  std::printf("the writer:         %s\n", background_writing().c_str());
}

void write_json(const std::filesystem::path& path, const Measured& m, size_t bytes, const std::string& shape) {
  const nlohmann::ordered_json all = {{"command", "bench checkpoint"},
                                      {"shape", shape},
                                      {"threads", num_threads()},
                                      {"bytes", bytes},
                                      {"plain", m.plain},
                                      {"at_once", m.at_once},
                                      {"copies", m.copies},
                                      {"first", m.first},
                                      {"behind", m.behind},
                                      {"beside", m.beside},
                                      {"alone", m.alone},
                                      {"extra", m.extra},
                                      {"steps", m.steps}};
  write_file_atomic(path.string(), all.dump(2) + "\n");
}

}  // namespace

int bench_checkpoint(std::span<const std::string> args) {
  std::string shape = "a";
  std::filesystem::path directory = ".";
  std::filesystem::path json;
  int64_t threads = 0, rounds = 5;
  DeviceOption device;
  Options options("bench checkpoint",
                  "Times checkpoints of a model and its optimizer, at once and in the background, and training steps "
                  "beside and without them, in turns.");
  options.add("shape", &shape, {.choices = step_shape_names()}, kStepShapesHelp);
  options.add("dir", &directory, {.placeholder = "DIR"}, "where they are written, and removed again");
  options.add("rounds", &rounds, {.min = 1, .max = 1000}, "checkpoints of each sort");
  options.add("threads", &threads, {.min = 0, .max = 1024}, "threads; 0: as many as the process may use");
  options.add("json", &json, {.placeholder = "FILE"}, "where all that was measured goes, in seconds");
  device.declare(options);
  if (!options.parse(args)) return 0;
  if (threads > 0) set_num_threads(static_cast<int>(threads));
  const StepShape& chosen = step_shape(shape);
  const Device where = device.device(options);
  const Scratch scratch(directory);

  models::Gpt gpt(chosen.config, where, 1, DType::f32);
  optim::Adam optimizer(gpt.parameters(), {.beta2 = 0.95, .weight_decay = 0.1, .clip_norm = 1.0});
  std::vector<int32_t> tokens(static_cast<size_t>(64 * chosen.batch * chosen.config.context + 1));
  for (size_t i = 0; i < tokens.size(); ++i)
    tokens[i] = static_cast<int32_t>(i * 7919 % static_cast<size_t>(chosen.config.vocab));
  text::Loader loader(std::make_shared<text::TokenVector>(std::move(tokens), chosen.config.vocab),
                      {.batch = chosen.batch, .context = chosen.config.context, .prefetch = 0});
  models::Trainer trainer(gpt, optimizer, loader, {.peak = 3e-4, .floor = 3e-5, .warmup = 10, .total = 1000000}, 1);
  const auto content = [&] {
    ShardedContent all;
    all.step = trainer.steps();
    all.model = stored_parameters(gpt.parameters());
    all.optimizer = stored_state(optimizer.state(), optimizer.parameters());
    return all;
  };
  CheckpointSaver saver(scratch.path.string(), nullptr, {.keep_n = 1});
  for (int i = 0; i < 12; ++i) trainer.step();
  saver.begin(content());  // the first copy takes memory from the system
  saver.finish();

  Measured m;
  std::vector<std::byte> bytes;
  for (int64_t round = 0; round < rounds; ++round) {
    std::string path;
    m.at_once.push_back(seconds_of([&] { path = saver.save(content()); }));
    if (bytes.empty()) {
      size_t size = 0;
      for (const CheckpointFile& file : read_checkpoint_manifest(path).files) size += static_cast<size_t>(file.size);
      bytes.assign(size, std::byte{1});
    }
    m.plain.push_back(seconds_of([&] { write_file_atomic((scratch.path / "plain").string(), bytes); }));
    std::filesystem::remove(scratch.path / "plain");
    // As in a run, where steps come before: threads awake, caches theirs, the disk done with what was removed.
    for (int i = 0; i < 12; ++i) trainer.step();

    double until = seconds_of([&] { saver.begin(content()); });
    m.copies.push_back(until);
    size_t steps = 0;
    for (bool there = false; !there; ++steps) {
      m.beside.push_back(seconds_of([&] {
        trainer.step();
        there = saver.poll(saver.writing()).has_value();
      }));
      until += m.beside.back();
      if (steps == 0) m.first.push_back(until);
    }
    m.behind.push_back(until);
    m.steps.push_back(static_cast<double>(steps));
    double without = 0;
    for (size_t i = 0; i < steps; ++i) {
      m.alone.push_back(seconds_of([&] { trainer.step(); }));
      without += m.alone.back();
    }
    m.extra.push_back(until - without);
  }
  print(m, bytes.size(), shape, scratch.path.parent_path(), where);
  if (!json.empty()) write_json(json, m, bytes.size(), shape);
  device.report(where);
  return 0;
}

}  // namespace weft::apps
