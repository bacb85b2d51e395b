#pragma once
#include <string>
#include <utility>
#include <vector>

#include "core/offload.h"
#include "models/trainer.h"
#include "optim/adam.h"

namespace weft::models {

/// A way of training one small model, and all that its options for saving memory may not change: losses, weights and
/// optimizer state.
struct MemoryRun {
  struct Options {
    DType dtype = DType::f32;
    Recompute recompute = {};
    bool offload_activations = false, offload_optimizer = false;
    bool trust_ratio = false;
    int64_t layers = 5, accumulate = 2;
    double dropout = 0.1;
  };
  static constexpr int64_t kVocab = 37, kWidth = 32, kContext = 8, kBatch = 2;
  /// Of the sizes below, activations move and statistics of rows stay.
  static constexpr int64_t kOffloadFrom = 512;

  Gpt gpt;
  optim::Adam adam;
  text::Loader loader{tokens(), {.batch = kBatch, .context = kContext, .seed = 2, .prefetch = 0}};
  Trainer trainer;

  MemoryRun(Device device, const Options& o, int64_t step = 0)
      : gpt(config(o), device, 1, o.dtype),
        adam(gpt.parameters(), adam_options(o)),
        trainer(gpt, adam, loader, {.peak = 1e-3, .warmup = 2, .total = 100}, o.accumulate, step) {}

  static GptConfig config(const Options& o) {
    GptConfig config;
    config.layers = o.layers, config.heads = 2, config.width = kWidth, config.context = kContext;
    config.vocab = kVocab, config.dropout = o.dropout, config.recompute = o.recompute;
    if (o.offload_activations) config.offload_from = kOffloadFrom;
    return config;
  }
  static optim::AdamOptions adam_options(const Options& o) {
    optim::AdamOptions adam;
    adam.clip_norm = 1.0, adam.weight_decay = 0.1, adam.trust_ratio = o.trust_ratio;
    adam.offload = o.offload_optimizer, adam.offload_piece = 1000;  // cuts tensors, and joins small ones
    return adam;
  }
  static std::shared_ptr<text::TokenVector> tokens() {
    const RandomStream stream(5, "tokens");
    std::vector<int32_t> tokens(500);
    for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int32_t>(stream.below(i, kVocab));
    return std::make_shared<text::TokenVector>(std::move(tokens), kVocab);
  }

  std::vector<double> losses(int steps) {
    std::vector<double> out;
    for (int i = 0; i < steps; ++i) out.push_back(trainer.step().loss);
    return out;
  }
  std::vector<std::vector<double>> state() const {
    std::vector<std::vector<double>> out;
    for (const auto& [name, tensor] : gpt.named_tensors()) out.push_back(tensor.to_vector<double>());
    for (const auto& [name, tensor] : adam.state()) out.push_back(tensor.to_vector<double>());
    return out;
  }
  /// The loss of one batch, its graph still there.
  Tensor loss() const {
    std::vector<int32_t> ids(kBatch * kContext), targets(ids.size());
    for (size_t i = 0; i < ids.size(); ++i)
      ids[i] = static_cast<int32_t>(i * 7 % kVocab), targets[i] = static_cast<int32_t>(i * 11 % kVocab);
    const Device device = gpt.parameters()[0].tensor.device();
    const Shape shape = {kBatch, kContext};
    return gpt.loss(Tensor::from(ids, shape, device), Tensor::from(targets, shape, device), {.step = 3});
  }
  std::vector<std::vector<double>> gradients() const {
    loss().backward();
    std::vector<std::vector<double>> out;
    for (const Parameter& parameter : gpt.parameters()) {
      out.push_back(parameter.tensor.grad().to_vector<double>());
      parameter.tensor.clear_grad();
    }
    return out;
  }
};

/// Every set of parts of a block that can be computed again, the block itself among them.
inline std::vector<Recompute> all_recomputations() {
  std::vector<Recompute> all;
  for (int bits = 0; bits < 16; ++bits) {
    all.push_back({.block = (bits & 8) != 0,
                   .norm = (bits & 1) != 0,
                   .activation = (bits & 2) != 0,
                   .attention = (bits & 4) != 0});
  }
  return all;
}

inline std::string name(const Recompute& r) {
  return std::string(r.block ? "block " : "") + (r.norm ? "norm " : "") + (r.activation ? "activation " : "") +
         (r.attention ? "attention " : "");
}

/// Bytes of activations now, and the most there were since the last reset_peak().
inline MemoryStatistics::Use activations(const Allocator& allocator) {
  return allocator.statistics().categories[static_cast<size_t>(MemoryCategory::activations)];
}

}  // namespace weft::models
