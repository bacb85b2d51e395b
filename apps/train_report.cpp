#include "apps/train_report.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <iostream>
#include <nlohmann/json.hpp>

#include "apps/device_option.h"
#include "apps/files.h"
#include "core/backend.h"
#include "core/log.h"
#include "models/speed_of_light.h"

namespace weft::apps {
namespace {

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

/// What computes the attention of a step on each rank.
std::string describe_attention(const TrainOptions& o, Device device) {
  const dist::Mesh mesh = o.mesh.empty() ? dist::Mesh() : dist::Mesh::parse(o.mesh);
  if (mesh.size(dist::Axis::cp) > 1) return "our own kernels: the ranks of cp have parts of the keys";
  const int tp = mesh.size(dist::Axis::tp);
  const int64_t heads = (o.heads + tp - 1) / tp;
  AttentionShape shape{.batch = o.batch, .heads = heads, .kv_heads = heads};
  shape.queries = shape.keys = o.context;
  shape.head_size = o.width / o.heads;
  shape.scale = 1 / std::sqrt(static_cast<double>(shape.head_size));
  return o.device.describe_attention(device, shape, o.dtype());
}

}  // namespace

TrainReport::TrainReport(const TrainOptions& options, const World& world, Device device, const models::GptConfig& model,
                         const models::Trainer& trainer, std::string graph_reason)
    : o_(options), device_(device), trainer_(trainer), graph_reason_(std::move(graph_reason)), speaks_(world.speaks()) {
  if (!speaks_) return;
  const int64_t first = trainer_.steps();
  metrics_.emplace(o_.out / "metrics.jsonl", first, first == o_.steps);
  const models::MachineSpeed machine = models::machine_speed(device_, o_.dtype());
  // Ranks are alike, and a step can be shared out among them.
  bound_ = models::step_bound(model, o_.batch * o_.context * o_.accumulate, machine).total() /
           static_cast<double>(world.size());
  log::info("speed of light of a step: ", fixed(bound_ * 1e3, 1), " ms (GEMM peak ",
            fixed(machine.gemm_flops * 1e-9, 0), " GFLOP/s, copy ", fixed(machine.copy_bytes * 1e-9, 0), " GB/s, ",
            machine.threads, " threads of ", machine.name, world.size() > 1 ? concat(", ", world.size(), " ranks") : "",
            ")");
  log::info("cuda graph: ", describe_cuda_graph(graph_reason_));
  log::info("attention: ", describe_attention(o_, device_));
  progress_.emplace(
      ProgressOptions{.title = "train", .total = o_.steps, .start = first, .line_seconds = o_.log_seconds});
}

void TrainReport::step(const models::StepMetrics& m) {
  if (!speaks_) return;
  const int64_t done = m.step + 1;
  const double percent = 100 * bound_ / m.times.total();
  const double speed = static_cast<double>(m.tokens) / m.times.total();
  seconds_ += m.times.total();
  tokens_ += m.tokens;
  nlohmann::json entry = {{"step", m.step},
                          {"loss", m.loss},
                          {"grad_norm", m.grad_norm},
                          {"lr", m.lr},
                          {"loss_scale", m.loss_scale},
                          {"skipped", m.skipped},
                          {"tokens", m.tokens},
                          {"tokens_per_second", speed},
                          {"percent_of_speed_of_light", percent},
                          {"seconds", to_json(m.times)}};
  if (trainer_.fp8()) entry["fp8_converted"] = m.fp8.converted, entry["fp8_saturated"] = m.fp8.saturated;
  metrics_->write(entry.dump());
  fp8_.converted += m.fp8.converted;
  fp8_.saturated += m.fp8.saturated;
  if (m.skipped)
    log::info("step ", done, " was skipped: gradients overflowed at a loss scale of ", significant(m.loss_scale));
  if (!progress_->due(done)) return;
  fields_ = concat("loss ", fixed(m.loss, 4), "  |g| ", fixed(m.grad_norm, 3), "  lr ", significant(m.lr), "  ",
                   grouped(static_cast<int64_t>(speed)), " tok/s  ", fixed(percent, 0), "% of SOL");
  if (trainer_.fp8()) fields_ += concat("  fp8 sat ", saturation(m.fp8));
  progress_->update(done, fields_);
}

void TrainReport::held_out(int64_t done, const HeldOutLoss& loss) {
  if (!speaks_) return;
  log::info("step ", done, ": held-out loss ", fixed(loss.nats_per_token, 4), " nats per token, ",
            fixed(loss.bits_per_byte(), 4), " bits per byte (", grouped(loss.tokens), " tokens, ", grouped(loss.bytes),
            " bytes)");
  const nlohmann::json entry = {
      {"step", done - 1}, {"held_out_loss", loss.nats_per_token}, {"held_out_bits_per_byte", loss.bits_per_byte()}};
  metrics_->write(entry.dump());
}

void TrainReport::sample(int64_t done, const std::string& text) {
  if (speaks_) log::info("sample after step ", done, ":\n", text);
}

void TrainReport::saved(const std::string& checkpoint) {
  last_checkpoint_ = checkpoint;
  if (speaks_) log::info("saved ", checkpoint);
}

void TrainReport::stopped(const char* signal) {
  if (!speaks_) return;
  log::info("stopped by ", *signal ? signal : "another rank", " after step ", trainer_.steps(), " of ", o_.steps);
  progress_.reset();
}

void TrainReport::finished() {
  if (speaks_) progress_->finish(fields_);
}

void TrainReport::summary() const {
  if (!speaks_) return;
  const MemoryStatistics memory = allocator(device_).statistics();
  std::cout << "steps " << trainer_.steps() << ", " << grouped(tokens_) << " tokens in " << fixed(seconds_, 1)
            << " s of training ("
            << grouped(seconds_ > 0 ? static_cast<int64_t>(static_cast<double>(tokens_) / seconds_) : 0)
            << " tokens/s)\n";
  if (trainer_.fp8()) {
    std::cout << "fp8: " << grouped(fp8_.saturated) << " of " << grouped(fp8_.converted)
              << " elements converted were beyond the largest number and saturated (" << saturation(fp8_) << ")\n";
  }
  std::cout << "cuda graph: "
            << (graph_reason_.empty() ? trainer_.graph().summary() : describe_cuda_graph(graph_reason_)) << "\n"
            << "memory:\n"
            << memory_table(memory) << "written: " << last_checkpoint_ << ", " << (o_.out / "metrics.jsonl").string()
            << ", " << (o_.out / "config.toml").string() << "\n";
}

}  // namespace weft::apps
