#pragma once
#include <sstream>
#include <string>

#include "models/verify/verify.h"

// A layout that is compared with one rank.

namespace weft::models {

/// 8 micro-batches of 2 rows; the gradient of a qkv matrix has 1,728 elements, that of an MLP's matrix 2,304, and no
/// other tensor has as many. Ranks of a data-parallel group cut them at element 1,024.
inline Verification verification(const std::string& mesh, dist::Zero zero = dist::Zero::kNone) {
  Verification v;
  GptConfig& config = v.problem.config;
  config.layers = 5, config.heads = 2, config.width = 24, config.context = 7, config.vocab = 29, config.dropout = 0.1;
  v.problem.seed = 3, v.problem.micro_batches = 8;
  v.problem.adam.weight_decay = 0.1, v.problem.adam.clip_norm = 0.1;
  v.steps = 2;
  v.layouts.resize(1);
  v.layouts[0].mesh = dist::Mesh::parse(mesh), v.layouts[0].zero = zero;
  v.layouts[0].bucket_bytes = 1;  // each tensor travels by itself
  return v;
}
inline constexpr int64_t kQkv = 1728, kMlp = 2304;

inline std::string text_of(const Verification& v, const VerifyReport& report) {
  std::ostringstream out;
  print_report(out, v, report, false);
  return std::move(out).str();
}

}  // namespace weft::models
