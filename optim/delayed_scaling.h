#pragma once
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "ops/matmul_fp8.h"
#include "optim/parameter.h"

namespace weft::optim {

/// Delayed scaling of fp8 tensors (Micikevicius et al. 2022, section 3.2; the recipe of NVIDIA's Transformer Engine).
/// Each linear layer has three tensors, input, weight and gradient, and for each of them, in step t,
///
///   scale_t = 2^(floor(log2(largest / max(amax_{t-16} ... amax_{t-1}))) - 1)        largest: 448 (e4m3), 57,344 (e5m2)
///
/// where amax is the largest magnitude that a step saw, over all of its micro-batches. A scale is known before its
/// tensor is, so that conversion is one pass; a tensor that outgrows its history saturates, which is counted. Scales
/// are powers of two: they do not round. The margin of one bit lets a tensor double before it saturates. In the first
/// step, which has no history, a tensor is scaled by its own amax.
class DelayedScaling {
 public:
  static constexpr int64_t kHistory = 16;  ///< steps

  /// @param layers  their names; @throws Error kDevice on a device that does not multiply 8-bit floats.
  DelayedScaling(std::vector<std::string> layers, Device device);

  /// What linear_fp8() is given for layer i.
  const std::shared_ptr<Fp8Layer>& layer(size_t i) const { return layers_[i]; }
  size_t size() const { return layers_.size(); }
  const std::vector<std::string>& names() const { return names_; }

  /// Forgets what an unfinished step has seen.
  void begin_step();
  /// Elements of this step.
  struct Counts {
    int64_t converted = 0;
    int64_t saturated = 0;
  };
  /// Reads from the device: call it where the host has waited anyway. @throws Error kValue naming the first tensor in
  /// which an infinity or NaN was seen: conversion hides infinities.
  Counts counts() const { return total(names_, seen()); }

  // counts() in pieces, for processes that have parts of a step or of the model: what one has seen, three for each
  // layer by Fp8Role; what all have seen instead; and their total over layers of those names, with the same error.
  std::vector<Fp8Stats> seen() const;
  void see(std::span<const Fp8Stats> stats);
  static Counts total(std::span<const std::string> layers, std::span<const Fp8Stats> stats);

  /// 0, or NaN where counts() would throw: f32 [1]. Work of the device alone, which can be recorded (core/backend.h).
  Tensor verdict() const;
  /// The step is complete: its amaxes enter the history, and the scales follow.
  void update();
  /// Drops the weights in 8 bits, which are kept for the micro-batches of a step; another use converts and counts anew.
  void forget_weights();
  /// Steps that the history has seen.
  int64_t updates() const { return updates_; }

  /// "fp8.<layer>.amax_history" (f32 [3, 16], newest first), "fp8.<layer>.scale" (f32 [3]) and "fp8.updates" (i64 [1]).
  NamedTensors state() const;
  /// @throws Error kData, before anything is changed, if a tensor is missing, unknown, given twice, of another shape or
  /// dtype, or holds what no run leaves.
  void load_state(const NamedTensors& tensors);
  /// Whether a tensor of a checkpoint belongs to a state.
  static bool owns(const std::string& name) { return name.starts_with("fp8."); }

 private:
  std::vector<std::string> names_;
  Tensor history_;  // f32 [3 layers, 16]
  Tensor scales_;   // f32 [3 layers, 4], an Fp8Scale each
  Tensor stats_;    // i64 [3 layers, 3], an Fp8Stats each
  std::vector<std::shared_ptr<Fp8Layer>> layers_;
  int64_t updates_ = 0;
};

}  // namespace weft::optim
