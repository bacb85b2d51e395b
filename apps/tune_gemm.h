#pragma once
#include <filesystem>
#include <optional>
#include <string>

#include "core/device.h"
#include "core/dtype.h"
#include "models/gpt.h"

namespace weft::apps {

/// A training step whose products are to be tuned.
struct TunedStep {
  models::GptConfig model;
  int64_t batch = 0;
  DType dtype = DType::f32;
  bool tf32 = false, fp8 = false;
};

/// That of a configuration of `weft train`, as saved with a run in its config.toml.
TunedStep tuned_step_of(const std::filesystem::path& training);

/// Takes two such steps on random tokens, tunes each product that they queue (ops/gemm_algorithms.h), prints a line for
/// each, and writes the list to `path`. A product is the same whether or not it adds to what is there, so that one
/// micro-batch a step shows them all.
void tune_training_step(const TunedStep& step, Device device, const std::string& path, bool quick);

}  // namespace weft::apps
