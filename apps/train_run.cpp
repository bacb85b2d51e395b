#include "apps/train_run.h"

#include "apps/stop_signal.h"
#include "models/generate.h"
#include "ops/matmul.h"

namespace weft::apps {

TrainRun::TrainRun(const TrainOptions& options, Device device, World& world, const dist::Mesh& mesh,
                   const std::string& config_text, DataDirectory data, const std::optional<ResumePoint>& from)
    : o_(options),
      device_(device),
      world_(world),
      data_(std::move(data)),
      parallel_(make_parallel(mesh)),
      alone_(parallel_ ? nullptr : make_alone()),
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
      checkpoints_(o_, world_, {parallel_.get(), gpt_, optimizer_, loader_},
                   {{"config.toml", config_text}, {"tokenizer.json", data_.tokenizer_json}}) {
  std::shared_ptr<optim::DelayedScaling> fp8;
  if (options.precision == Precision::fp8) fp8 = parallel_ ? parallel_->use_fp8() : gpt_.use_fp8();
  TrainCheckpoints::Loaded loaded;
  if (from) loaded = checkpoints_.load(*from, fp8.get());
  trainer_.emplace(gpt_, optimizer_, loader_, options.schedule(), micro_batches(), loaded.info.step);
  if (parallel_) trainer_->parallelize(*parallel_, options.accumulate);
  if (options.precision == Precision::f16) trainer_->scale_loss(loaded.scale.value_or(optim::LossScale()));
  if (fp8) trainer_->scale_fp8(fp8);
  graph_reason_ = trainer_->use_graph(options.cuda_graph);
}

bool TrainRun::train() {
  std::optional<AllowTf32> tf32;
  if (o_.precision == Precision::tf32) tf32.emplace();
  const StopSignal stop;
  TrainReport report(o_, world_, device_, gpt_.config(), *trainer_, graph_reason_);
  while (trainer_->steps() < o_.steps && !agree_to_stop(stop.requested(), report)) {
    report.step(trainer_->step());
    const int64_t done = trainer_->steps();
    const bool last = done == o_.steps;
    if (o_.eval_every > 0 && done % o_.eval_every == 0 && !last) report.held_out(done, held_out());
    if (o_.sample_every > 0 && done % o_.sample_every == 0) report.sample(done, sample_text(done));
    if (last || (o_.save_every > 0 && done % o_.save_every == 0)) save(report);
  }
  const bool complete = trainer_->steps() == o_.steps;
  if (!complete && !checkpoints_.has(trainer_->steps())) save(report);
  if (const auto there = checkpoints_.finish()) report.saved(*there);
  if (complete) {
    report.finished();
    report.held_out(o_.steps, held_out());
  } else {
    report.stopped(stop.name());
  }
  report.summary();
  return complete;
}

int64_t TrainRun::micro_batches() const {
  return parallel_ ? parallel_->shares(o_.accumulate)[static_cast<size_t>(parallel_->data_rank())] : o_.accumulate;
}

std::vector<int64_t> TrainRun::loader_shares() const {
  return parallel_ && parallel_->consecutive() ? parallel_->shares(o_.accumulate) : std::vector<int64_t>();
}

std::unique_ptr<models::ParallelGpt> TrainRun::make_parallel(const dist::Mesh& mesh) const {
  if (world_.size() == 1 && !o_.deterministic && o_.zero == dist::Zero::kNone) return nullptr;
  return std::make_unique<models::ParallelGpt>(world_.group(), o_.parallel(mesh),
                                               o_.model(data_.tokenizer.vocab_size()), device_,
                                               static_cast<uint64_t>(o_.seed), o_.dtype());
}

std::unique_ptr<models::Gpt> TrainRun::make_alone() const {
  return std::make_unique<models::Gpt>(o_.model(data_.tokenizer.vocab_size()), device_, static_cast<uint64_t>(o_.seed),
                                       o_.dtype());
}

bool TrainRun::agree_to_stop(bool wish, TrainReport& report) {
  bool writing = checkpoints_.writing();
  if (world_.size() > 1) {
    const Tensor wishes = Tensor::from(std::vector<int64_t>{wish ? 1 : 0, writing ? 1 : 0}, {2}, device_);
    world_.group().all_reduce_(wishes, dist::Reduction::max);
    const std::vector<int64_t> any = wishes.to_vector<int64_t>();
    wish = any[0] > 0, writing = any[1] > 0;
  }
  if (const auto there = checkpoints_.poll(writing)) report.saved(*there);
  return wish;
}

void TrainRun::save(TrainReport& report) {
  if (const auto there = checkpoints_.finish()) report.saved(*there);
  if (const auto there = checkpoints_.save(*trainer_)) report.saved(*there);
}

HeldOutLoss TrainRun::held_out() const {
  return parallel_ ? held_out_loss(*parallel_, data_.held_out, data_.tokenizer, o_.eval_batch)
                   : held_out_loss(gpt_, data_.held_out, data_.tokenizer, o_.eval_batch);
}

std::string TrainRun::sample_text(int64_t done) {
  const bool together = parallel_ && !parallel_->whole();
  if (!together && !world_.speaks()) return "";
  models::SamplingOptions sampling;
  sampling.temperature = 0.8;
  sampling.top_p = 0.95;
  sampling.seed = static_cast<uint64_t>(done);
  gpt_.eval();
  std::vector<int32_t> prompt = data_.tokenizer.encode(o_.sample_prompt);
  if (prompt.empty()) prompt = {0};
  const std::vector<int32_t> ids = together ? models::generate(*parallel_, prompt, o_.sample_tokens, sampling)
                                            : models::generate(gpt_, prompt, o_.sample_tokens, sampling);
  gpt_.train();
  return o_.sample_prompt + data_.tokenizer.decode(ids);
}

}  // namespace weft::apps
