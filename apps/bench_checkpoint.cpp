// weft bench checkpoint: what a checkpoint costs a run: at once, and in the background.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>

#include "apps/bench.h"
#include "apps/device_option.h"
#include "apps/files.h"
#include "apps/options.h"
#include "apps/step_shapes.h"
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

double median(std::vector<double> values) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

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

}  // namespace

int bench_checkpoint(std::span<const std::string> args) {
  std::string shape = "a";
  std::filesystem::path directory = ".";
  int64_t threads = 0, rounds = 5;
  DeviceOption device;
  Options options("bench checkpoint",
                  "Times checkpoints of a model and its optimizer, at once and in the background, and training steps "
                  "beside and without them, in turns.");
  options.add("shape", &shape, {.choices = step_shape_names()}, kStepShapesHelp);
  options.add("dir", &directory, {.placeholder = "DIR"}, "where they are written, and removed again");
  options.add("rounds", &rounds, {.min = 1, .max = 1000}, "checkpoints of each sort");
  options.add("threads", &threads, {.min = 0, .max = 1024}, "threads; 0: as many as the process may use");
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
  for (int i = 0; i < 3; ++i) trainer.step();
  saver.begin(content());  // the first copy takes memory from the system
  saver.finish();

  std::vector<double> alone, beside, at_once, copies, behind;
  int64_t bytes = 0;
  for (int64_t round = 0; round < rounds; ++round) {
    at_once.push_back(seconds_of([&] { saver.save(content()); }));
    const auto start = std::chrono::steady_clock::now();
    copies.push_back(seconds_of([&] { saver.begin(content()); }));
    size_t steps = 0;
    while (saver.writing()) beside.push_back(seconds_of([&] { trainer.step(); })), ++steps;
    const std::string path = *saver.poll(false);
    behind.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    bytes = 0;
    for (const CheckpointFile& file : read_checkpoint_manifest(path).files) bytes += file.size;
    for (size_t i = 0; i < std::max<size_t>(steps, 3); ++i) alone.push_back(seconds_of([&] { trainer.step(); }));
  }
  const auto ms = [](double seconds) { return fixed(seconds * 1e3, 1) + " ms"; };
  std::printf("checkpoints of shape %s, %s, in %s, on %s (%d threads), medians of %lld\n", shape.c_str(),
              human_bytes(bytes).c_str(), scratch.path.parent_path().c_str(), to_string(where).c_str(), num_threads(),
              static_cast<long long>(rounds));
  std::printf("at once:            %s, %s GB/s written, hashed and synced\n", ms(median(at_once)).c_str(),
              fixed(static_cast<double>(bytes) / median(at_once) * 1e-9, 2).c_str());
  std::printf("in the background:  copy %s, there after %s\n", ms(median(copies)).c_str(), ms(median(behind)).c_str());
  std::printf("a training step:    %s alone, %s beside the writing: %+.1f%% (%zu and %zu steps)\n",
              ms(median(alone)).c_str(), ms(median(beside)).c_str(),
              100 * (median(beside) / std::max(median(alone), 1e-9) - 1), alone.size(), beside.size());
  device.report(where);
  return 0;
}

}  // namespace weft::apps
