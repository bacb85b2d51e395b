// weft train: options -> data, model, optimizer -> steps, with checkpoints, evaluations, samples and a progress line.
#include <unistd.h>
#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>

#include "apps/commands.h"
#include "apps/data_directory.h"
#include "apps/files.h"
#include "apps/held_out.h"
#include "apps/memory_plan.h"
#include "apps/progress.h"
#include "apps/stop_signal.h"
#include "apps/train_options.h"
#include "apps/world.h"
#include "core/autograd.h"
#include "core/backend.h"
#include "core/file.h"
#include "core/log.h"
#include "core/thread_pool.h"
#include "models/checkpoint/saver.h"
#include "models/generate.h"
#include "models/gpt_checkpoint.h"
#include "models/speed_of_light.h"
#include "models/stage_costs.h"
#include "models/trainer.h"
#include "ops/matmul.h"

namespace weft::apps {
namespace {

namespace fs = std::filesystem;

/// metrics.jsonl: one object a step, and one for each evaluation. A resumed run goes on behind the last step it keeps.
class MetricsFile {
 public:
  /// @param last  no step follows: the evaluation at the end is made again
  MetricsFile(const fs::path& path, int64_t first_step, bool last) {
    std::string kept;
    if (std::ifstream in(path); first_step > 0 && in) {
      for (std::string line; std::getline(in, line);) {
        const nlohmann::json entry = nlohmann::json::parse(line, nullptr, false);
        if (!entry.is_object() || !entry.contains("step") || !entry["step"].is_number_integer()) continue;
        const auto step = entry["step"].get<int64_t>();
        const bool made_again = last && step + 1 == first_step && entry.contains("held_out_loss");
        if (step < first_step && !made_again) kept += line + "\n";
      }
    }
    write_file_atomic(path.string(), as_bytes(kept));
    out_.open(path, std::ios::app);
    path_ = path.string();
  }
  void write(const nlohmann::json& entry) {
    out_ << entry.dump() << '\n';
    out_.flush();
    if (!out_) fail(ErrorKind::kIo, "train", "could not write to ", path_, ": is the disk full?");
  }

 private:
  std::ofstream out_;
  std::string path_;
};

/// Three digits that count: "4.00e-03".
std::string significant(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2e", value);
  return text;
}

/// Saturated elements over converted ones.
std::string saturation(const optim::DelayedScaling::Counts& counts) {
  return significant(static_cast<double>(counts.saturated) /
                     static_cast<double>(std::max<int64_t>(counts.converted, 1)));
}

/// The three parts of a step where the clock can tell them apart.
nlohmann::json to_json(const models::StepTimes& times) {
  if (times.device > 0) return {{"data", times.data}, {"device", times.device}};
  if (times.passes > 0) return {{"data", times.data}, {"passes", times.passes}, {"optimizer", times.optimizer}};
  return {
      {"data", times.data}, {"forward", times.forward}, {"backward", times.backward}, {"optimizer", times.optimizer}};
}

std::string run_id() {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  char text[64];
  std::snprintf(text, sizeof text, "%llx-%x",
                static_cast<unsigned long long>(std::chrono::duration_cast<std::chrono::microseconds>(now).count()),
                static_cast<unsigned>(getpid()));
  return text;
}

/// Where a checkpoint's state keeps that of the loss scale.
constexpr const char* kLossScale = "loss_scale";

/// A run: everything that lives from the first step to the last.
class Run {
 public:
  /// @param from  the checkpoint to go on from, or ""
  Run(const TrainOptions& options, Device device, World& world, const dist::Mesh& mesh, std::string config_text,
      DataDirectory data, const std::string& from)
      : o_(options),
        device_(device),
        world_(world),
        config_text_(std::move(config_text)),
        data_(std::move(data)),
        parallel_(make_parallel(mesh)),
        alone_(parallel_ ? nullptr : make_gpt()),
        gpt_(parallel_ ? parallel_->gpt() : *alone_),
        optimizer_(parallel_ ? parallel_->parameters() : gpt_.parameters(), options.adam(),
                   parallel_ ? parallel_->norms() : std::make_shared<optim::LocalNorms>()),
        loader_(data_.train, {.batch = options.batch,
                              .context = options.context,
                              .seed = static_cast<uint64_t>(options.seed),
                              .rank = parallel_ ? parallel_->data_rank() : 0,
                              .world_size = parallel_ ? parallel_->data_ranks() : 1,
                              .prefetch = options.prefetch,
                              .shares = loader_shares()}),
        run_id_(run_id()),
        saver_(options.out.string(), others(), {.keep_n = static_cast<int>(options.keep)}) {
    int64_t step = 0;
    Loaded loaded;
    if (!from.empty()) {
      loaded = load(from);
      step = loaded.info.step;
    }
    trainer_.emplace(gpt_, optimizer_, loader_, options.schedule(), micro_batches(), step);
    if (parallel_) trainer_->parallelize(*parallel_, options.accumulate);
    if (options.precision == Precision::f16) {
      optim::LossScale scale;
      if (!from.empty()) {
        const auto found = loaded.info.state.find(kLossScale);
        if (found == loaded.info.state.end()) {
          fail(ErrorKind::kUsage, "train",
               "precision = f16: the checkpoint is of a run that did not scale its loss; a run keeps its precision");
        }
        scale.load_state(found->second);
      }
      trainer_->scale_loss(scale);
    }
    if (options.precision == Precision::fp8) {
      trainer_->scale_fp8(gpt_.use_fp8());
      if (!from.empty()) trainer_->fp8()->load_state(loaded.fp8);
    }
    graph_reason_ = trainer_->use_graph(options.cuda_graph);
  }

  /// Trains to the last step or to the first signal. Returns whether the run is complete.
  bool train() {
    const int64_t first = trainer_->steps();
    std::optional<AllowTf32> tf32;
    if (o_.precision == Precision::tf32) tf32.emplace();
    const StopSignal stop;
    if (!world_.speaks()) return follow(stop);
    MetricsFile metrics_file(o_.out / "metrics.jsonl", first, first == o_.steps);
    const models::MachineSpeed machine = models::machine_speed(device_, o_.dtype());
    // Ranks are alike, and a step can be shared out among them.
    const double bound = models::step_bound(gpt_.config(), o_.batch * o_.context * o_.accumulate, machine).total() /
                         static_cast<double>(world_.size());
    log::info("speed of light of a step: ", fixed(bound * 1e3, 1), " ms (GEMM peak ",
              fixed(machine.gemm_flops * 1e-9, 0), " GFLOP/s, copy ", fixed(machine.copy_bytes * 1e-9, 0), " GB/s, ",
              machine.threads, " threads of ", machine.name,
              world_.size() > 1 ? concat(", ", world_.size(), " ranks") : "", ")");
    log::info("cuda graph: ", describe_cuda_graph(graph_reason_));
    const bool samples = o_.sample_every > 0 && (!parallel_ || parallel_->whole());
    if (o_.sample_every > 0 && !samples)
      log::warn("no samples are printed: no rank has the whole model. weft generate --checkpoint ", o_.out.string(),
                " reads what is saved");
    Progress progress({.title = "train", .total = o_.steps, .start = first, .line_seconds = o_.log_seconds});
    std::string fields;
    while (trainer_->steps() < o_.steps && !agreed(stop.requested())) {
      const models::StepMetrics m = trainer_->step();
      const int64_t done = m.step + 1;
      const double percent = 100 * bound / m.times.total();
      seconds_ += m.times.total();
      tokens_ += m.tokens;
      nlohmann::json entry = {{"step", m.step},
                              {"loss", m.loss},
                              {"grad_norm", m.grad_norm},
                              {"lr", m.lr},
                              {"loss_scale", m.loss_scale},
                              {"skipped", m.skipped},
                              {"tokens", m.tokens},
                              {"tokens_per_second", static_cast<double>(m.tokens) / m.times.total()},
                              {"percent_of_speed_of_light", percent},
                              {"seconds", to_json(m.times)}};
      if (trainer_->fp8()) entry["fp8_converted"] = m.fp8.converted, entry["fp8_saturated"] = m.fp8.saturated;
      metrics_file.write(entry);
      fp8_.converted += m.fp8.converted;
      fp8_.saturated += m.fp8.saturated;
      if (m.skipped)
        log::info("step ", done, " was skipped: gradients overflowed at a loss scale of ", significant(m.loss_scale));
      if (progress.due(done)) {
        fields = concat("loss ", fixed(m.loss, 4), "  |g| ", fixed(m.grad_norm, 3), "  lr ", significant(m.lr), "  ",
                        grouped(static_cast<int64_t>(static_cast<double>(m.tokens) / m.times.total())), " tok/s  ",
                        fixed(percent, 0), "% of SOL");
        if (trainer_->fp8()) fields += concat("  fp8 sat ", saturation(m.fp8));
        progress.update(done, fields);
      }
      const bool last = done == o_.steps;
      if (o_.eval_every > 0 && done % o_.eval_every == 0 && !last) report_held_out(done, &metrics_file);
      if (samples && done % o_.sample_every == 0) print_sample(done);
      if (last || (o_.save_every > 0 && done % o_.save_every == 0)) save();
    }
    const bool complete = trainer_->steps() == o_.steps;
    if (saved_ != trainer_->steps() && !complete) save();
    published(saver_.finish());
    if (!complete) {
      log::info("stopped by ", *stop.name() ? stop.name() : "another rank", " after step ", trainer_->steps(), " of ",
                o_.steps);
      return false;
    }
    progress.finish(fields);
    report_held_out(o_.steps, &metrics_file);
    return true;
  }

  /// The same on a rank that does not speak: it takes part in steps, evaluations and saves.
  bool follow(const StopSignal& stop) {
    while (trainer_->steps() < o_.steps && !agreed(stop.requested())) {
      trainer_->step();
      const int64_t done = trainer_->steps();
      const bool last = done == o_.steps;
      if (o_.eval_every > 0 && done % o_.eval_every == 0 && !last) report_held_out(done, nullptr);
      if (last || (o_.save_every > 0 && done % o_.save_every == 0)) save();
    }
    const bool complete = trainer_->steps() == o_.steps;
    if (!complete && saved_ != trainer_->steps()) save();
    published(saver_.finish());
    if (complete) report_held_out(o_.steps, nullptr);
    return complete;
  }

  void print_summary() const {
    const MemoryStatistics memory = allocator(device_).statistics();
    std::cout << "steps " << trainer_->steps() << ", " << grouped(tokens_) << " tokens in " << fixed(seconds_, 1)
              << " s of training ("
              << grouped(seconds_ > 0 ? static_cast<int64_t>(static_cast<double>(tokens_) / seconds_) : 0)
              << " tokens/s)\n";
    if (trainer_->fp8()) {
      std::cout << "fp8: " << grouped(fp8_.saturated) << " of " << grouped(fp8_.converted)
                << " elements converted were beyond the largest number and saturated (" << saturation(fp8_) << ")\n";
    }
    std::cout << "cuda graph: "
              << (graph_reason_.empty() ? trainer_->graph().summary() : describe_cuda_graph(graph_reason_)) << "\n"
              << "memory:\n"
              << memory_table(memory) << "written: " << last_checkpoint_ << ", " << (o_.out / "metrics.jsonl").string()
              << ", " << (o_.out / "config.toml").string() << "\n";
  }

 private:
  /// Micro-batches of a step that this rank computes.
  int64_t micro_batches() const {
    return parallel_ ? parallel_->shares(o_.accumulate)[static_cast<size_t>(parallel_->data_rank())] : o_.accumulate;
  }
  /// Ranks have ranges of a step; where each micro-batch is reduced by itself, those of all ranks follow each other.
  std::vector<int64_t> loader_shares() const {
    return parallel_ && parallel_->consecutive() ? parallel_->shares(o_.accumulate) : std::vector<int64_t>();
  }

  std::unique_ptr<models::ParallelGpt> make_parallel(const dist::Mesh& mesh) {
    if (world_.size() == 1 && !o_.deterministic && o_.zero == dist::Zero::kNone) return nullptr;
    return std::make_unique<models::ParallelGpt>(world_.group(), o_.parallel(mesh),
                                                 o_.model(data_.tokenizer.vocab_size()), device_,
                                                 static_cast<uint64_t>(o_.seed), o_.dtype());
  }
  std::unique_ptr<models::Gpt> make_gpt() {
    return std::make_unique<models::Gpt>(o_.model(data_.tokenizer.vocab_size()), device_,
                                         static_cast<uint64_t>(o_.seed), o_.dtype());
  }

  /// Whether any rank wants to stop: all do so after the same step. In passing the ranks learn whether all have written
  /// what they have of a checkpoint, which then appears.
  bool agreed(bool stop) {
    bool writing = saver_.writing();
    if (world_.size() > 1) {
      const Tensor wishes = Tensor::from(std::vector<int64_t>{stop ? 1 : 0, writing ? 1 : 0}, {2}, device_);
      world_.group().all_reduce_(wishes, dist::Reduction::max);
      const std::vector<int64_t> any = wishes.to_vector<int64_t>();
      stop = any[0] > 0, writing = any[1] > 0;
    }
    published(saver_.poll(writing));
    return stop;
  }

  /// The other ranks, for checkpoints; null: there are none.
  dist::Group* others() { return world_.size() > 1 ? &world_.group() : nullptr; }

  void save() {
    published(saver_.finish());
    ShardedContent content;
    content.model = stored_parameters(held_parameters());
    content.optimizer = stored_state(optimizer_.state(), own_parameters());
    content.step = trainer_->steps();
    content.run_id = run_id_;
    content.data_cursor = loader_.position();
    content.seed = static_cast<uint64_t>(o_.seed);
    content.state = models::to_state(gpt_.config());
    if (trainer_->fp8()) {
      for (StoredTensor& scales : stored_whole(trainer_->fp8()->state()))
        content.optimizer.push_back(std::move(scales));
    }
    if (trainer_->loss_scale()) content.state[kLossScale] = trainer_->loss_scale()->state();
    content.text_files = {{"config.toml", config_text_}, {"tokenizer.json", data_.tokenizer_json}};
    saved_ = trainer_->steps();
    if (o_.save_async) {
      saver_.begin(content);
    } else {
      published(saver_.save(content));
    }
  }

  /// What the optimizer updates, with what it is of whole tensors.
  Parameters own_parameters() const {
    Parameters own = optimizer_.parameters();
    if (!parallel_) return own;
    const std::vector<TensorPart> parts = parallel_->parts();
    for (size_t i = 0; i < own.size(); ++i) own[i].part = parts[i];
    return own;
  }

  /// What this rank holds of the model.
  Parameters held_parameters() const {
    return parallel_ && parallel_->sharded() ? own_parameters() : gpt_.parameters();
  }

  void published(const std::optional<std::string>& checkpoint) {
    if (!checkpoint) return;
    last_checkpoint_ = *checkpoint;
    if (world_.speaks()) log::info("saved ", last_checkpoint_);
  }

  struct Loaded {
    CheckpointInfo info;
    NamedTensors fp8;  ///< scales, which the optimizer does not know
  };

  /// Takes over what a checkpoint has of the model, the optimizer and the data; of tensors each rank reads what it
  /// holds.
  Loaded load(const std::string& path) {
    const OpenCheckpoint from = world_.size() > 1 ? open_checkpoint(path, world_.group()) : open_checkpoint(path);
    Loaded loaded{from.manifest, {}};
    const int64_t step = loaded.info.step;
    if (step > o_.steps) {
      fail(ErrorKind::kUsage, "train", "steps = ", o_.steps, ": the run has taken ", step,
           " steps already; steps counts those of the whole run");
    }
    const MemoryScope scope(MemoryCategory::workspace);
    loaded.fp8 = fp8_state(from.optimizer);
    const Parameters held = held_parameters();
    const NamedTensors weights = load_stored(from.model, stored_parameters(held), others());
    {
      const autograd::NoGrad no_grad;
      for (size_t i = 0; i < held.size(); ++i) Tensor(held[i].tensor).copy_(weights[i].second);
    }
    std::vector<StoredTensor> wanted = stored_state(optimizer_.state(), own_parameters());
    const size_t own = wanted.size();
    for (StoredTensor& scales : stored_whole(loaded.fp8)) wanted.push_back(std::move(scales));
    NamedTensors state = load_stored(from.optimizer, wanted, others());
    state.resize(own);
    optimizer_.load_state(state);
    run_id_ = loaded.info.run_id;
    loader_.seek(loaded.info.data_cursor);
    saved_ = step;
    return loaded;
  }

  /// The scales of fp8 in a checkpoint.
  NamedTensors fp8_state(const CheckpointTensors& from) const {
    NamedTensors state;
    for (const CheckpointTensor& each : from.tensors()) {
      if (optim::DelayedScaling::owns(each.name)) state.emplace_back(each.name, from.load(each.name));
    }
    const bool fp8 = o_.precision == Precision::fp8;
    if (fp8 == state.empty()) {
      fail(ErrorKind::kUsage, "train",
           fp8 ? "precision = fp8: the checkpoint is of a run that did not multiply in fp8"
               : "the checkpoint is of a run with precision = fp8, and keeps its scales",
           "; a run keeps its precision");
    }
    return state;
  }

  /// All ranks of a run take part. @param metrics_file  of the rank that speaks
  void report_held_out(int64_t done, MetricsFile* metrics_file) {
    const HeldOutLoss loss = parallel_ ? held_out_loss(*parallel_, data_.held_out, data_.tokenizer, o_.eval_batch)
                                       : held_out_loss(gpt_, data_.held_out, data_.tokenizer, o_.eval_batch);
    if (metrics_file == nullptr) return;
    log::info("step ", done, ": held-out loss ", fixed(loss.nats_per_token, 4), " nats per token, ",
              fixed(loss.bits_per_byte(), 4), " bits per byte (", grouped(loss.tokens), " tokens, ",
              grouped(loss.bytes), " bytes)");
    metrics_file->write(
        {{"step", done - 1}, {"held_out_loss", loss.nats_per_token}, {"held_out_bits_per_byte", loss.bits_per_byte()}});
  }

  void print_sample(int64_t done) {
    models::SamplingOptions sampling;
    sampling.temperature = 0.8;
    sampling.top_p = 0.95;
    sampling.seed = static_cast<uint64_t>(done);
    gpt_.eval();
    const std::vector<int32_t> prompt = data_.tokenizer.encode(o_.sample_prompt);
    const std::vector<int32_t> ids =
        models::generate(gpt_, prompt.empty() ? std::vector<int32_t>{0} : prompt, o_.sample_tokens, sampling);
    gpt_.train();
    log::info("sample after step ", done, ":\n", o_.sample_prompt, data_.tokenizer.decode(ids));
  }

  const TrainOptions o_;
  const Device device_;
  World& world_;
  const std::string config_text_;
  DataDirectory data_;
  std::unique_ptr<models::ParallelGpt> parallel_;
  std::unique_ptr<models::Gpt> alone_;  ///< if no others take part
  models::Gpt& gpt_;
  optim::Adam optimizer_;
  text::Loader loader_;
  std::optional<models::Trainer> trainer_;
  std::string graph_reason_, run_id_, last_checkpoint_ = "no checkpoint";
  CheckpointSaver saver_;
  int64_t saved_ = -1, tokens_ = 0;
  optim::DelayedScaling::Counts fp8_;
  double seconds_ = 0;
};

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

/// A new run among the checkpoints of another, or one that goes on before the last, would mix the two: the next
/// --resume would find the one with more steps.
void refuse_later_checkpoints(const TrainOptions& o, const std::optional<CheckpointManifest>& from,
                              const Options& options) {
  for (const ListedCheckpoint& other : list_checkpoints(o.out.string())) {
    if (from && (other.manifest.step <= from->step || !verify_checkpoint(other.path).empty())) continue;
    options.reject(
        "out",
        from ? "a later checkpoint than the one to go on from is there, " : "checkpoints of a run are there already, ",
        other.path, ". To go on from the last one: weft train --resume ", o.out.string(),
        ". Otherwise give another --out");
  }
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
  // Started again by a launcher with the same command: what the run saved in the meantime comes before what it began
  // with.
  if (launched.restart > 0 && !o.dry_run && find_latest_checkpoint(o.out.string()).path) o.resume = o.out.string();

  std::optional<CheckpointManifest> from;
  std::string from_path;
  std::optional<Options> second;
  if (!o.resume.empty()) {
    // The options again, this time above the file that was saved with the run.
    const std::string path = models::resolve_checkpoint(o.resume, [](const std::string& line) { log::warn(line); });
    from = read_checkpoint_manifest(path);
    from_path = path;
    o = TrainOptions();
    second.emplace("train", "Trains a GPT on prepared data.");
    o.declare(*second);
    second->action("resume", &o.resume, "DIR", "");
    second->load(fs::path(path) / "config.toml");
    if (!second->parse(args)) return 0;
    // The run may have been moved since: it goes on where it lies, unless this call says otherwise.
    if (second->origin("out").source == Source::kFile) o.out = directory_above(path);
    log::info("resuming from ", path, " at step ", from->step);
  }
  const Options& options = second ? *second : first;
  o.check(options);
  // A layout can be looked at before its ranks are there.
  const bool looks = o.dry_run && launched.launcher == dist::Launcher::none && !o.mesh.empty();
  const dist::Mesh mesh = o.check_ranks(options, looks ? 0 : world.size(), launched.elastic);
  const Device device = world.device(o.dry_run ? o.device.planned(options) : o.device.device(options));
  DataDirectory data = DataDirectory::open(o.data);
  refuse_too_large(o, mesh, data.tokenizer.vocab_size());
  if (o.dry_run) {
    if (world.speaks()) print_dry_run(o, device, mesh, options, data);
    return 0;
  }

  refuse_later_checkpoints(o, from, options);
  const PlannedData planned{data.train, data.tokenizer.vocab_size()};
  if (mesh.size() == 1) refuse_if_it_cannot_fit(o, device, planned);
  const std::string config_text = options.toml(false);
  bool complete = false;
  // All ranks have looked at the options and at what is in the directory before any writes there.
  world.connect(device);
  if (world.speaks()) say_if_adapted(o, mesh);
  if (world.size() > 1) {
    world.group().barrier();
    if (world.speaks()) log::info("mesh ", mesh.to_string(), ", ZeRO ", static_cast<int>(o.zero));
  }
  if (o.pipeline_measure) o.pipeline_split = measured_split(o, mesh, device, world, data.tokenizer.vocab_size());
  const auto train = [&] {
    Run run(o, device, world, mesh, config_text, std::move(data), from_path);
    if (!world.speaks()) {
      complete = run.train();
      return;
    }
    // Whatever could be wrong with options and data was found above: a refused call leaves nothing behind.
    make_directories(o.out);
    write_file_atomic((o.out / "config.toml").string(), as_bytes(config_text));
    log::info("device ", device, " (", backend(device).name(), "), ", num_threads(), " threads; writing to ",
              o.out.string());
    complete = run.train();
    run.print_summary();
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
