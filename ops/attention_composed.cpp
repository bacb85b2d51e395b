#include <cmath>
#include <limits>
#include <vector>

#include "ops/attention.h"
#include "ops/elementwise.h"
#include "ops/matmul.h"
#include "ops/softmax.h"

namespace weft {
namespace {

/// [B, T, heads * D] or [B, heads, T, D] as [B, heads * repeats, T, D], each head `repeats` times in a row.
Tensor by_heads(const Tensor& x, int64_t heads, int64_t repeats) {
  const Tensor split = x.rank() == 4 ? x : x.reshape({x.size(0), x.size(1), heads, x.size(2) / heads}).transpose(1, 2);
  const int64_t batch = split.size(0), tokens = split.size(2), head_size = split.size(3);
  return split.unsqueeze(2)
      .expand({batch, heads, repeats, tokens, head_size})
      .reshape({batch, heads * repeats, tokens, head_size});
}

/// [Tq, Tk]: true where a key comes after the query's position.
Tensor hidden_keys(int64_t queries, int64_t keys, int64_t query_offset, Device device) {
  std::vector<int64_t> positions(static_cast<size_t>(queries));
  for (int64_t i = 0; i < queries; ++i) positions[static_cast<size_t>(i)] = query_offset + i;
  return gt(Tensor::arange(keys, DType::i64, device), Tensor::from(positions, {queries, 1}, device));
}

}  // namespace

Tensor attention_composed(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options) {
  const int64_t heads = options.heads, kv_heads = options.kv_heads == 0 ? heads : options.kv_heads;
  const Tensor queries = by_heads(q, heads, 1), keys = by_heads(k, kv_heads, heads / kv_heads);
  const double scale = options.scale.value_or(1 / std::sqrt(static_cast<double>(queries.size(3))));
  Tensor scores = matmul(queries, keys.transpose(-1, -2)) * scale;
  if (options.causal) {
    const Tensor hidden = hidden_keys(queries.size(2), keys.size(2), options.query_offset, q.device());
    scores = masked_fill(scores, hidden, -std::numeric_limits<double>::infinity());
  }
  const Tensor out = matmul(softmax(scores), by_heads(v, kv_heads, heads / kv_heads));
  return q.rank() == 4 ? out : out.transpose(1, 2).reshape(q.shape());
}

}  // namespace weft
