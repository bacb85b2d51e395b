#pragma once
#include <optional>

#include "core/autograd.h"

namespace weft {

/// What attention() computes.
struct AttentionOptions {
  int64_t heads = 1;     ///< H, query heads
  int64_t kv_heads = 0;  ///< heads of k and v, which consecutive H / kv_heads query heads share; 0: H
  bool causal = true;    ///< a query sees the keys at its own position and before
  int64_t query_offset =
      0;  ///< position of the first query among the keys (keys that a cache held before); causal only
  std::optional<double> scale{};  ///< of the scores; unset: 1 / sqrt(D)
};

/// Causal self-attention over the packed result of one linear layer (Vaswani et al. 2017, section 3.2.1), computed in
/// tiles so that memory grows with T, not T^2 (Dao 2023, "FlashAttention-2").
///
///   y[b, i, h] = sum_{j <= i} p[i, j] v[b, j, h],  p[i, :] = softmax_{j <= i}(q[b, i, h] . k[b, j, h] / sqrt(D))
///
/// @param qkv    [B, T, 3 C]: q | k | v, each C = H * D wide, head h in columns h D to (h + 1) D; f32, f64, f16 or bf16
/// @param heads  H; must divide C
/// @return       [B, T, C], ready for the output projection. Scores and sums are kept in f32 (f64 for f64), the result
///               rounded once; where bf16 is multiplied in pairs ("avx512bf16", ops/gemm.h) and on CUDA in 16 bits, p
///               is rounded to the dtype, too. Relative error of the exponential in f32: 1e-7; weights below 2^-100 of
///               a row's largest are 0.
/// @throws Error  kShape if qkv is not [B, T, 3 C] or heads does not divide C; kValue for heads < 1; kDType.
/// Saved for backward: qkv, y and the logarithm of each softmax's sum [B, H, T] in f32 (f64 for f64). The backward pass
/// computes p again, tile by tile. Bits do not depend on the number of threads. With Keep::kRecipe, y is made again
/// from qkv wherever it was saved, here and by what reads it, for one more forward pass.
Tensor causal_attention(const Tensor& qkv, int64_t heads, autograd::Keep keep = autograd::Keep::kValue);

/// Attention of queries over keys that may be more than they are: cross-attention, or new tokens over a cache.
///
///   y[b, i, h] = sum_j p[i, j] v[b, j, h'],  p[i, :] = softmax_j(scale * q[b, i, h] . k[b, j, h']),  h' = h kv_heads /
///   H
///
/// With options.causal, j runs up to query_offset + i; else over all keys.
///
/// @param q  [B, Tq, H * D] or [B, H, Tq, D]; f32, f64, f16 or bf16. Any strides: a part of a cache or of a packed qkv
/// is
///           read where it lies, only a last dimension without unit stride is copied
/// @param k  [B, Tk, kv_heads * D] or [B, kv_heads, Tk, D]: as many dimensions as q
/// @param v  shape of k
/// @return   [B, Tq, H * D], or [B, H, Tq, D] (whose memory is [B, Tq, H, D]) if q has four dimensions. Rounding as in
///           causal_attention.
/// @throws Error  kShape naming the sizes that do not fit, or if there are queries but no keys; kValue for options that
///                make no sense; kDType, kDevice.
/// Saved for backward: q, k, v, y and the logarithm of each softmax's sum [B, H, Tq].
Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options);

/// One part of the keys of an attention whose keys come in parts.
struct AttentionPart {
  double scale = 1;          ///< of the scores
  bool causal = false;       ///< a query sees the part's keys up to query_offset + its place; else all of them
  int64_t query_offset = 0;  ///< causal only
  bool resume = false;       ///< parts came before this one; the first part must have a key for every query
};

/// Takes a part of the keys into an attention: after all parts `out` is attention() over all keys, but for the order of
/// sums, and `lse` the logarithm of each softmax's sum. Not differentiable; for rules that know how the parts come.
///
///   lse' = ln(exp(lse) + exp(lse_part)),   out' = exp(lse - lse') out + exp(lse_part - lse') out_part
///
/// @param q    [B, Tq, H, D]; f32, f64, f16 or bf16; the last dimension with unit stride, as of all that follow
/// @param k,v  [B, Tk, kv_heads, D], dtype of q; kv_heads divides H
/// @param out  [B, Tq, H, D] in f32 (f64 for f64): read with part.resume, and written; nothing is rounded between parts
/// @param lse  [B, H, Tq], row-major, dtype of out: read with part.resume, and written
/// @throws Error  kShape, kDType, kDevice; kValue if part.query_offset is negative.
void attention_part(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionPart& part, const Tensor& out,
                    const Tensor& lse);

/// Adds a part's share to the gradients of q and of the part's keys and values, given the result of all parts.
///
/// @param out, dout  [B, Tq, H, D], dtype of q: attention over all keys, rounded, and its gradient
/// @param lse        as the last attention_part() left it
/// @param dq,dk,dv   shapes of q, k, v in f32 (f64 for f64); added to. part.resume has no meaning here
void attention_part_backward(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionPart& part,
                             const Tensor& out, const Tensor& lse, const Tensor& dout, const Tensor& dq,
                             const Tensor& dk, const Tensor& dv);

/// The definition of attention(), from basic functions that hold whole score matrices: the oracle of its tests.
Tensor attention_composed(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options);

}  // namespace weft
