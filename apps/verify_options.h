#pragma once
#include <string>
#include <vector>

#include "apps/options.h"
#include "apps/train_options.h"
#include "models/verify/verify.h"

namespace weft::apps {

/// Everything that `weft verify` can be told of one comparison; names are those of `weft train`.
struct VerifyOptions {
  std::string mesh, then;
  dist::Zero zero = dist::Zero::kNone;
  int64_t zero_ranks = 0;
  int64_t bucket = 4096;
  dist::PipelineKind pipeline = dist::PipelineKind::k1F1B;
  int64_t pipeline_chunks = 1;
  std::vector<int64_t> pipeline_split;
  bool sequence_parallel = false;
  int64_t layers = 4, heads = 2, width = 24, context = 7, vocab = 29;
  double dropout = 0.1;
  models::Recompute recompute;
  int64_t batch = 2, accumulate = 8, steps = 3;
  enum class Precision : uint8_t { f64, f32, bf16, f16, fp8 };
  Precision precision = Precision::f32;
  OptimizerKind optimizer = OptimizerKind::adamw;
  double lr = 1e-2, weight_decay = 0.1, clip = 0.5;
  int64_t seed = 1;

  void declare(Options& options);
  DType dtype() const;
  /// Rules between options, and what is to be compared. @throws Error kUsage.
  models::Verification verification(const Options& options) const;

 private:
  models::ParallelOptions layout(const Options& options, const std::string& name, const std::string& text) const;
};

/// The arguments of the `number`-th comparison that `seed` stands for: a mesh of two to eight ranks, sizes that do not
/// divide, and any of the other options. A pure function.
std::vector<std::string> random_arguments(int64_t seed, int64_t number);

/// What such arguments ask for, whatever the environment says.
models::Verification verification_of(const std::vector<std::string>& arguments);

}  // namespace weft::apps
