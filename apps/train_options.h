#pragma once
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "apps/device_option.h"
#include "apps/options.h"
#include "dist/mesh.h"
#include "models/parallel_gpt.h"
#include "models/step_graph.h"
#include "optim/adam.h"
#include "optim/schedule.h"

namespace weft::apps {

enum class OptimizerKind : uint8_t { adamw, lamb };

/// In what numbers a model is trained. f32: everything. tf32: products on GPUs that have it round their operands to 10
/// bits; elsewhere it is f32. bf16, f16: weights, activations and gradients; the optimizer keeps the weights in f32,
/// and with f16 losses are scaled dynamically (optim/loss_scale.h). fp8: bf16 whose linear layers in the blocks
/// multiply in fp8 (optim/delayed_scaling.h).
enum class Precision : uint8_t { f32, tf32, bf16, f16, fp8 };

/// Everything that `weft train` can be told.
struct TrainOptions {
  // data
  std::filesystem::path data;
  int64_t batch = 16;
  int64_t accumulate = 1;
  int64_t prefetch = 2;
  // model
  int64_t layers = 4, heads = 4, width = 128, context = 64;
  double dropout = 0;
  models::Recompute recompute;
  // optimizer
  OptimizerKind optimizer = OptimizerKind::adamw;
  double lr = 1e-3, min_lr = 1e-4, weight_decay = 0.1, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, clip = 1.0;
  int64_t warmup = 100;
  bool offload_optimizer = false, offload_activations = false;
  // parallel
  std::string mesh;
  dist::Zero zero = dist::Zero::kNone;
  int64_t zero_ranks = 0;
  bool sequence_parallel = false;
  dist::PipelineKind pipeline = dist::PipelineKind::k1F1B;
  int64_t pipeline_chunks = 1;
  std::vector<int64_t> pipeline_split;
  bool pipeline_measure = false;
  bool deterministic = false;
  // run
  DeviceOption device;
  models::GraphUse cuda_graph = models::GraphUse::automatic;
  Precision precision = Precision::f32;
  std::filesystem::path out = "out";
  int64_t steps = 1000;
  int64_t seed = 1;
  int64_t save_every = 500, keep = 3;
  bool save_async = false;
  int64_t eval_every = 0, eval_batch = 32;
  int64_t sample_every = 0, sample_tokens = 64;
  std::string sample_prompt = "\n";
  double log_seconds = 10;
  // this call only
  bool dry_run = false;
  std::string resume;

  /// Declares all of it.
  void declare(Options& options);
  /// Rules between options. @throws Error kUsage.
  void check(const Options& options) const;

  /// Rules between options and the ranks of the run (0: as many as the mesh has); how they are laid out. @throws Error
  /// kUsage.
  /// @param elastic  the launcher may change the number of ranks: the mesh gets as much dp as makes it fit them
  dist::Mesh check_ranks(const Options& options, int ranks, bool elastic) const;

  void check_pipeline(const Options& options, const dist::Mesh& layout) const;

  models::GptConfig model(int64_t vocab) const;
  models::ParallelOptions parallel(const dist::Mesh& layout) const;
  DType dtype() const {
    if (precision == Precision::bf16 || precision == Precision::fp8) return DType::bf16;
    return precision == Precision::f16 ? DType::f16 : DType::f32;
  }
  optim::AdamOptions adam() const;
  optim::CosineSchedule schedule() const;

 private:
  /// The mesh of `ranks` ranks that differs from the given one in dp only. @throws Error kUsage if there is none.
  dist::Mesh adapted_mesh(const Options& options, int ranks) const;
};

/// The kinds of pipeline schedules under their names.
std::vector<std::pair<std::string, dist::PipelineKind>> pipeline_kinds();

}  // namespace weft::apps
