#pragma once
#include "core/autograd.h"
#include "models/module.h"
#include "ops/matmul_fp8.h"
#include "ops/norm.h"

namespace weft::models {

/// y = x W^T + b with W [out, in] (ops/matmul.h, linear). Weights start normal, biases at 0.
class Linear : public Module {
 public:
  Linear(int64_t in, int64_t out, double deviation, const Init& init, bool bias = true);
  Tensor operator()(const Tensor& x) const;
  const Tensor& weight() const { return weight_; }
  /// From now on, in training mode and where gradients are recorded, multiplies in fp8 (ops/matmul_fp8.h).
  void use_fp8(std::shared_ptr<Fp8Layer> layer) { fp8_ = std::move(layer); }

 private:
  Tensor weight_, bias_;
  std::shared_ptr<Fp8Layer> fp8_;
};

/// Rows of a table [count, width] by id. Starts normal.
class Embedding : public Module {
 public:
  Embedding(int64_t count, int64_t width, double deviation, const Init& init);
  Tensor operator()(const Tensor& ids) const;
  const Tensor& weight() const { return weight_; }

 private:
  Tensor weight_;
};

/// Layer normalisation over the last dimension; weight starts at 1, bias at 0.
class LayerNorm : public Module {
 public:
  LayerNorm(int64_t width, double eps, const Init& init);
  Tensor operator()(const Tensor& x) const;
  /// {x + branch, norm of that sum} in one pass; an undefined branch is 0. With Keep::kRecipe, rules that save the norm
  /// have it made again from the sum.
  ResidualNorm add_and_norm(const Tensor& x, const Tensor& branch, autograd::Keep keep = autograd::Keep::kValue) const;

 private:
  Tensor weight_, bias_;
  double eps_;
};

}  // namespace weft::models
