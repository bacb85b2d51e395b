#pragma once
#include "core/autograd.h"
#include "dist/group.h"
#include "dist/sequence_layout.h"
#include "ops/attention.h"

namespace weft::dist {

/// Causal attention over a sequence whose tokens are shared out over a group (Liu et al. 2023, "Ring Attention with
/// Blockwise Transformers"). Every rank keeps its queries; keys and values go around the ring of ranks, and what a rank
/// has attended to so far is merged with what comes by the logarithm of the softmaxes' sums.
///
///   y[b, i, h] = sum_{j <= i} p[i, j] v[b, j, h'],   i over this rank's global positions, j over those of all ranks
///
/// Keys and values are sent on while the rank computes with them; of each rank's tokens it computes with those that its
/// queries see, and with none where the mask leaves none. The backward pass sends them around again, and after them
/// the sums of their gradients, which end where the keys live. The order of all sums is a function of layout and rank.
///
/// @param q        [B, layout.count(rank), H * D]: this rank's tokens in the order of layout.ranges(rank); f32, f64,
/// f16
///                 or bf16
/// @param k        [B, layout.count(rank), kv_heads * D]
/// @param v        shape of k
/// @param options  heads, kv_heads and scale as in attention(); causal with query_offset 0
/// @param group    one rank: plain attention(). It must outlive the graph, and all ranks must run forward and backward
///                 passes of their calls in the same order
/// @param keep     kRecipe: the result is not kept for the backward pass but made again there, with another trip of
///                 keys and values around the ring
/// @return         [B, layout.count(rank), H * D]. Between parts of the keys results and gradients stay in f32 (f64 for
///                 f64) and are rounded once, at the end.
/// @throws Error   kShape, kDType, kDevice, kValue naming what does not fit; GroupError.
///
/// Bytes that rank r sends, with W = kv_heads * D, T tokens in all and T_r on rank r, n ranks, e bytes an element and a
/// bytes an element of sums (4; 8 for f64):
///
///   forward   2 B W e (T - T_{(r + 1) mod n})                about 2 B W T e (n - 1) / n
///   backward  2 B W e (T - T_{(r + 1) mod n}) + 2 B W a (T - T_r)
///
/// Saved for backward: q, k, v, y of this rank's tokens and the logarithm of each softmax's sum.
Tensor ring_attention(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options, Group& group,
                      const SequenceLayout& layout, autograd::Keep keep = autograd::Keep::kValue);

}  // namespace weft::dist
