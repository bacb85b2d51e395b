// weft train: from options and data to a run; what it does on its way is in train_run.cpp.
#include <iostream>

#include "apps/commands.h"
#include "apps/data_directory.h"
#include "apps/files.h"
#include "apps/memory_plan.h"
#include "apps/train_options.h"
#include "apps/train_resume.h"
#include "apps/train_run.h"
#include "apps/world.h"
#include "core/backend.h"
#include "core/file.h"
#include "core/log.h"
#include "core/thread_pool.h"
#include "models/stage_costs.h"

namespace weft::apps {
namespace {

namespace fs = std::filesystem;

/// `weft train --dry-run`: two steps without memory or arithmetic.
void print_dry_run(const TrainOptions& o, Device device, const dist::Mesh& mesh, const Options& options,
                   const DataDirectory& data) {
  const models::GptConfig config = o.model(data.tokenizer.vocab_size());
  std::cout << options.toml(true) << "\n# vocabulary " << grouped(config.vocab) << ", " << grouped(data.train->size())
            << " training tokens, " << grouped(data.held_out->size()) << " held out\n";
  const int64_t tokens = o.batch * o.context * o.accumulate;
  std::cout << "parameters:      " << grouped(config.parameter_count()) << "\n"
            << "tokens per step: " << grouped(tokens) << " (" << o.accumulate << " x " << o.batch << " x " << o.context
            << ")\n"
            << "FLOPs per token: " << grouped(static_cast<int64_t>(config.flops_per_token()))
            << " (6 (12 L C^2 + V C) + 7 L C T)\n"
            << "epochs:          "
            << fixed(static_cast<double>(tokens * o.steps) / static_cast<double>(data.train->size()), 2) << "\n";
  if (mesh.size() > 1) {
    std::cout << "mesh:            " << mesh.to_string() << "\n"
              << mesh.picture() << ranks_table(o, mesh, config.vocab)
              << "activations come on top; those of one process, without --mesh, can be counted by replaying a step\n";
    return;
  }
  const MemoryPlan plan = plan_memory(o, device, {data.train, config.vocab});
  std::cout << "memory of a step, by replaying two without memory:\n" << memory_table(plan.device);
  if (plan.host.total.peak > 0)
    std::cout << "and of the host, page-locked for " << device << ":\n" << memory_table(plan.host);
  std::cout << "what saves memory there:\n" << savers_table(o, device, {data.train, config.vocab});
}

/// A model that cannot fit is refused before its first weight is drawn: afterwards, the system would end some process
/// or other. Activations come on top; --dry-run counts them.
void refuse_too_large(const TrainOptions& o, const dist::Mesh& mesh, int64_t vocab) {
  const auto width = static_cast<double>(o.width);
  const double parameters = 12 * width * width * static_cast<double>(o.layers) +
                            width * (static_cast<double>(vocab) + static_cast<double>(o.context));
  constexpr double kCountable = 1e15;
  if (parameters > kCountable) {
    fail(ErrorKind::kMemory, "train", "layers = ", o.layers, " and width = ", o.width, " make a model of about ",
         parameters, " parameters, beyond any machine's memory");
  }
  const int64_t bytes = rank_bytes(o, mesh, vocab).total();
  if (const int64_t limit = backend(Device::cpu()).memory().total; !o.dry_run && limit > 0 && bytes > limit) {
    fail(ErrorKind::kMemory, "train", "weights, gradients and optimizer alone take ", human_bytes(bytes),
         mesh.size() == 1 ? " of memory" : " of memory on every rank", "; this process can have ", human_bytes(limit),
         " at most. Hint: fewer layers or a smaller width; weft train --dry-run tells what a model takes, with --mesh "
         "and --zero on each of several ranks");
  }
}

/// Layers of each stage by what they cost on the first rank.
std::vector<int64_t> measured_split(const TrainOptions& o, const dist::Mesh& mesh, Device device, World& world,
                                    int64_t vocab) {
  const models::GptConfig config = o.model(vocab);
  Tensor costs = Tensor::zeros({config.layers}, DType::f64, device);
  if (world.rank() == 0) {
    const std::vector<double> measured = models::measured_layer_costs(config, {o.batch, o.context}, device, o.dtype());
    costs.copy_(Tensor::from(measured, {config.layers}, device));
  }
  world.group().broadcast_(costs, 0);
  const std::vector<double> seconds = costs.to_vector<double>();
  const auto stages = static_cast<int>(mesh.size(dist::Axis::pp) * o.pipeline_chunks);
  const std::vector<int> cuts = dist::split_into_stages(seconds, stages);
  std::vector<int64_t> layers;
  std::string text;
  for (size_t i = 0; i + 1 < cuts.size(); ++i) {
    layers.push_back(cuts[i + 1] - cuts[i]);
    text += concat(i == 0 ? "" : ", ", layers.back());
  }
  if (world.speaks()) {
    log::info("a layer takes ", fixed(seconds.front() * 1e3, 2), " ms here, the last one with the head ",
              fixed(seconds.back() * 1e3, 2), " ms; layers of stages: ", text);
  }
  return layers;
}

/// The directory that holds `path`.
fs::path directory_above(const fs::path& path) {
  const fs::path directory = (path.has_filename() ? path : path.parent_path()).parent_path();
  return directory.empty() ? fs::path(".") : directory;
}

/// An elastic run that has other ranks than its mesh says.
void say_if_adapted(const TrainOptions& o, const dist::Mesh& mesh) {
  if (o.mesh.empty() || dist::Mesh::parse(o.mesh) == mesh) return;
  const std::string now = mesh.to_string();
  log::info("elastic: mesh = ", o.mesh, " is ", now.empty() ? "one rank" : now,
            " in this start; a step still has accumulate = ", o.accumulate, " micro-batches of batch = ", o.batch);
}

}  // namespace

int run_train(std::span<const std::string> args) {
  TrainOptions o;
  Options first("train", "Trains a GPT on prepared data.");
  o.declare(first);
  first.action("resume", &o.resume, "DIR",
               "go on with the run in DIR (or from that checkpoint) bit for bit; its config.toml is the default");
  if (!first.parse(args)) return 0;
  World world;
  const dist::LaunchInfo& launched = world.launched();
  if (launched.launcher != dist::Launcher::none) log::info(launched.describe());
  const std::optional<ResumePoint> from = find_resume_point(o.resume, o.out, launched.restart > 0 && !o.dry_run, world);
  std::optional<Options> second;
  if (from) {
    // The options again, this time above the file that was saved with the run.
    o = TrainOptions();
    second.emplace("train", "Trains a GPT on prepared data.");
    o.declare(*second);
    second->action("resume", &o.resume, "DIR", "");
    second->load(fs::path(from->path) / "config.toml");
    if (!second->parse(args)) return 0;
    // The run may have been moved since: it goes on where it lies, unless this call says otherwise.
    if (second->origin("out").source == Source::kFile) o.out = directory_above(from->path);
    log::info("resuming from ", from->path, " at step ", from->step);
  }
  const Options& options = second ? *second : first;
  o.check(options);
  // A layout can be looked at before its ranks are there.
  const bool looks = o.dry_run && launched.launcher == dist::Launcher::none && !o.mesh.empty();
  const dist::Mesh mesh = o.check_ranks(options, looks ? 0 : world.size(), launched.elastic);
  const Device device = world.device(o.device.planned(options));
  if (!o.dry_run) o.device.use(options, device);
  DataDirectory data = DataDirectory::open(o.data);
  refuse_too_large(o, mesh, data.tokenizer.vocab_size());
  if (o.dry_run) {
    if (world.speaks()) print_dry_run(o, device, mesh, options, data);
    return 0;
  }

  refuse_later_checkpoints(o, from, options, world);
  const PlannedData planned{data.train, data.tokenizer.vocab_size()};
  if (mesh.size() == 1) refuse_if_it_cannot_fit(o, device, planned);
  const std::string config_text = options.toml(false);
  bool complete = false;
  // All ranks have looked at the options and at what is in the directory before any writes there.
  world.connect(device);
  if (world.speaks()) say_if_adapted(o, mesh);
  if (world.speaks() && o.save_async) log::info("checkpoints are written in the background: ", background_writing());
  if (world.size() > 1) {
    world.group().barrier();
    if (world.speaks()) log::info("mesh ", mesh.to_string(), ", ZeRO ", static_cast<int>(o.zero));
  }
  if (o.pipeline_measure) o.pipeline_split = measured_split(o, mesh, device, world, data.tokenizer.vocab_size());
  const auto train = [&] {
    TrainRun run(o, device, world, mesh, config_text, std::move(data), from);
    if (world.speaks()) {
      // Whatever could be wrong with options and data was found above: a refused call leaves nothing behind.
      make_directories(o.out);
      write_file_atomic((o.out / "config.toml").string(), as_bytes(config_text));
      log::info("device ", device, " (", backend(device).name(), "), ", num_threads(), " threads; writing to ",
                o.out.string());
    }
    complete = run.train();
  };
  if (mesh.size() == 1) {
    advise_if_memory_ends(o, device, planned, train);
  } else {
    train();
  }
  if (!world.speaks()) return 0;
  o.device.report(device);
  if (!complete) std::cout << "to go on: weft train --resume " << o.out.string() << std::endl;
  return 0;
}

}  // namespace weft::apps
