#include "models/layers.h"

#include "core/autograd.h"
#include "ops/elementwise.h"
#include "ops/index.h"
#include "ops/matmul.h"

namespace weft::models {

Linear::Linear(const TensorPart& weight, const TensorPart& bias, double deviation, const Init& init)
    : weight_(add("weight", init.normal("weight", weight, deviation), ParameterRole::weight, weight)),
      bias_(add("bias", init.constant(bias.shape(), 0), ParameterRole::bias, bias)) {}

Linear::Linear(int64_t in, int64_t out, double deviation, const Init& init, bool bias)
    : weight_(add("weight", init.normal("weight", TensorPart::all({out, in}), deviation), ParameterRole::weight)) {
  if (bias) bias_ = add("bias", init.constant({out}, 0), ParameterRole::bias);
}

bool Linear::multiplies_in_fp8() const { return fp8_ != nullptr && is_training() && autograd::grad_mode(); }

Tensor Linear::operator()(const Tensor& x) const { return product(x, bias_); }

Tensor Linear::after_gelu(const Tensor& x, autograd::Keep keep) const { return product_of_gelu(x, bias_, keep); }

Tensor Linear::product(const Tensor& x, const Tensor& bias) const {
  return multiplies_in_fp8() ? linear_fp8(x, weight_, bias, fp8_) : linear(x, weight_, bias);
}

Tensor Linear::product_of_gelu(const Tensor& x, const Tensor& bias, autograd::Keep keep) const {
  if (!multiplies_in_fp8()) return gelu_linear(x, weight_, bias, keep);
  const Tensor activated = gelu(x);
  if (keep == autograd::Keep::kRecipe)
    autograd::remade("gelu", activated, [](const std::vector<Tensor>& in) { return gelu(in[0]); }, {x});
  return linear_fp8(activated, weight_, bias, fp8_);
}

ColumnLinear::ColumnLinear(int64_t in, int64_t out, const std::vector<IndexRange>& outputs, double deviation,
                           const Init& init, const Split& split)
    : Linear(TensorPart::along({out, in}, 0, outputs), TensorPart::along({out}, 0, outputs), deviation, init),
      split_(split) {}

Tensor ColumnLinear::operator()(const Tensor& x, int64_t rows) const {
  return Linear::operator()(split_.enter(x, rows));
}

RowLinear::RowLinear(int64_t in, int64_t out, IndexRange inputs, double deviation, const Init& init, const Split& split)
    : Linear(TensorPart::along({out, in}, 1, {inputs}), TensorPart::all({out}), deviation, init), split_(split) {}

Tensor RowLinear::operator()(const Tensor& x) const {
  if (!split_.active()) return Linear::operator()(x);
  return split_.leave(product(x, {})) + split_.shared(bias_);
}

Tensor RowLinear::after_gelu(const Tensor& x, autograd::Keep keep) const {
  if (!split_.active()) return Linear::after_gelu(x, keep);
  return split_.leave(product_of_gelu(x, {}, keep)) + split_.shared(bias_);
}

Embedding::Embedding(int64_t count, int64_t width, double deviation, const Init& init, const Split& split)
    : split_(split), count_(count) {
  const TensorPart part = TensorPart::along({count, width}, 0, {split.share(count)});
  weight_ = add("weight", init.normal("weight", part, deviation), ParameterRole::embedding, part);
}

Tensor Embedding::operator()(const Tensor& ids) const {
  if (!split_.active()) return embedding(ids, weight_);
  const Tensor rows = embedding(ids, weight_, split_.share(count_).begin, count_);
  return split_.leave(split_.sequence() ? rows.reshape({ids.numel(), rows.size(-1)}) : rows);
}

LayerNorm::LayerNorm(int64_t width, double eps, const Init& init, const Split& split)
    : split_(split),
      weight_(add("weight", init.constant({width}, 1), ParameterRole::norm)),
      bias_(add("bias", init.constant({width}, 0), ParameterRole::norm)),
      eps_(eps) {}

Tensor LayerNorm::operator()(const Tensor& x) const {
  return layer_norm(x, split_.shared(weight_), split_.shared(bias_), eps_);
}

ResidualNorm LayerNorm::add_and_norm(const Tensor& x, const Tensor& branch, autograd::Keep keep) const {
  const Tensor weight = split_.shared(weight_), bias = split_.shared(bias_);
  const ResidualNorm out = branch.defined() ? residual_layer_norm(x, branch, weight, bias, eps_)
                                            : ResidualNorm{x, layer_norm(x, weight, bias, eps_)};
  if (keep == autograd::Keep::kRecipe) {
    const auto again = [eps = eps_](const std::vector<Tensor>& in) { return layer_norm(in[0], in[1], in[2], eps); };
    autograd::remade("layer_norm", out.normed, again, {out.sum, weight, bias});
  }
  return out;
}

}  // namespace weft::models
