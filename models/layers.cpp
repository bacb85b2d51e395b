#include "models/layers.h"

#include "core/autograd.h"
#include "ops/index.h"
#include "ops/matmul.h"

namespace weft::models {

Linear::Linear(int64_t in, int64_t out, double deviation, const Init& init, bool bias)
    : weight_(add("weight", init.normal("weight", {out, in}, deviation), ParameterRole::weight)) {
  if (bias) bias_ = add("bias", init.constant({out}, 0), ParameterRole::bias);
}

Tensor Linear::operator()(const Tensor& x) const {
  if (fp8_ != nullptr && is_training() && autograd::grad_mode()) return linear_fp8(x, weight_, bias_, fp8_);
  return linear(x, weight_, bias_);
}

Embedding::Embedding(int64_t count, int64_t width, double deviation, const Init& init)
    : weight_(add("weight", init.normal("weight", {count, width}, deviation), ParameterRole::embedding)) {}

Tensor Embedding::operator()(const Tensor& ids) const { return embedding(ids, weight_); }

LayerNorm::LayerNorm(int64_t width, double eps, const Init& init)
    : weight_(add("weight", init.constant({width}, 1), ParameterRole::norm)),
      bias_(add("bias", init.constant({width}, 0), ParameterRole::norm)),
      eps_(eps) {}

Tensor LayerNorm::operator()(const Tensor& x) const { return layer_norm(x, weight_, bias_, eps_); }

ResidualNorm LayerNorm::add_and_norm(const Tensor& x, const Tensor& branch, autograd::Keep keep) const {
  const ResidualNorm out =
      branch.defined() ? residual_layer_norm(x, branch, weight_, bias_, eps_) : ResidualNorm{x, (*this)(x)};
  if (keep == autograd::Keep::kRecipe) {
    const auto again = [eps = eps_](const std::vector<Tensor>& in) { return layer_norm(in[0], in[1], in[2], eps); };
    autograd::remade("layer_norm", out.normed, again, {out.sum, weight_, bias_});
  }
  return out;
}

}  // namespace weft::models
