#pragma once
#include "core/autograd.h"
#include "models/module.h"
#include "models/split.h"
#include "ops/matmul_fp8.h"
#include "ops/norm.h"

namespace weft::models {

/// y = x W^T + b with W [out, in] (ops/matmul.h, linear). Weights start normal, biases at 0.
class Linear : public Module {
 public:
  Linear(int64_t in, int64_t out, double deviation, const Init& init, bool bias = true);
  Tensor operator()(const Tensor& x) const;
  /// The same of gelu(x), which `keep` has made again in the backward pass (ops/matmul.h, gelu_linear).
  Tensor after_gelu(const Tensor& x, autograd::Keep keep) const;
  const Tensor& weight() const { return weight_; }
  /// From now on, in training mode and where gradients are recorded, multiplies in fp8 (ops/matmul_fp8.h).
  void use_fp8(std::shared_ptr<Fp8Layer> layer) { fp8_ = std::move(layer); }
  /// Whether other processes of its split have other elements of that tensor, or else the same.
  virtual bool cuts(Fp8Role) const { return false; }

 protected:
  Linear(const TensorPart& weight, const TensorPart& bias, double deviation, const Init& init);
  Tensor product(const Tensor& x, const Tensor& bias) const;
  Tensor product_of_gelu(const Tensor& x, const Tensor& bias, autograd::Keep keep) const;
  Tensor weight_, bias_;

 private:
  bool multiplies_in_fp8() const;

  std::shared_ptr<Fp8Layer> fp8_;
};

/// A Linear of which this process has some outputs: y = enter(x) W^T + b with those rows of W and b (Shoeybi et al.
/// 2019, section 3: column-parallel, for they write x A with A = W^T).
class ColumnLinear : public Linear {
 public:
  /// @param outputs  the outputs that this process has; their ranges increase
  ColumnLinear(int64_t in, int64_t out, const std::vector<IndexRange>& outputs, double deviation, const Init& init,
               const Split& split);
  /// @param x     [..., in]; with sequence parallelism this rank's rows [share of rows, in]
  /// @param rows  of all ranks' x together; sequence parallelism only
  /// @return      [..., number of outputs here]; with sequence parallelism of all rows
  Tensor operator()(const Tensor& x, int64_t rows = 0) const;
  bool cuts(Fp8Role role) const override { return split_.active() && role != Fp8Role::kInput; }

 private:
  Split split_;
};

/// A Linear whose inputs are cut: y = leave(x W^T) + b with the columns of W that belong to this process's inputs, and
/// all of b, which is added once. Takes what a ColumnLinear gives (row-parallel there).
class RowLinear : public Linear {
 public:
  RowLinear(int64_t in, int64_t out, IndexRange inputs, double deviation, const Init& init, const Split& split);
  /// @param x  [..., number of inputs here]; with sequence parallelism [rows, ...], and y has this rank's rows
  Tensor operator()(const Tensor& x) const;
  Tensor after_gelu(const Tensor& x, autograd::Keep keep) const;
  bool cuts(Fp8Role role) const override { return split_.active() && role != Fp8Role::kGradient; }

 private:
  Split split_;
};

/// Rows of a table [count, width] by id. Starts normal. Split, each process has some rows of the table.
class Embedding : public Module {
 public:
  Embedding(int64_t count, int64_t width, double deviation, const Init& init, const Split& split = {});
  /// [..., width]; with sequence parallelism this rank's rows of the flattened result.
  Tensor operator()(const Tensor& ids) const;
  const Tensor& weight() const { return weight_; }

 private:
  Split split_;
  int64_t count_;
  Tensor weight_;
};

/// Layer normalisation over the last dimension; weight starts at 1, bias at 0. Every process has both.
class LayerNorm : public Module {
 public:
  LayerNorm(int64_t width, double eps, const Init& init, const Split& split = {});
  Tensor operator()(const Tensor& x) const;
  /// {x + branch, norm of that sum} in one pass; an undefined branch is 0. With Keep::kRecipe, rules that save the norm
  /// have it made again from the sum.
  ResidualNorm add_and_norm(const Tensor& x, const Tensor& branch, autograd::Keep keep = autograd::Keep::kValue) const;

 private:
  Split split_;
  Tensor weight_, bias_;
  double eps_;
};

}  // namespace weft::models
