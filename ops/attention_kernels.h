#pragma once
#include <cstdint>

#include "core/dtype.h"
#include "ops/kernel_device.h"

namespace weft {

/// Where q, k, v and the like lie: element c of head h of token t of batch b is at(b, h, t)[c].
template <class T>
struct HeadView {
  T* data = nullptr;
  int64_t batch = 0, head = 0, token = 0;  ///< strides in elements
  T* at(int64_t b, int64_t h, int64_t t) const { return data + b * batch + h * head + t * token; }
};

struct AttentionShape {
  int64_t batch = 0, heads = 0, kv_heads = 0;
  int64_t queries = 0, keys = 0, head_size = 0;
  bool causal = true;
  int64_t query_offset = 0;
  double scale = 1;
};

template <class T>
struct AttentionForward {
  AttentionShape shape;
  HeadView<const T> q, k, v;
  HeadView<T> out;
  Accumulate<T>* lse;  ///< [B, H, Tq]: ln(sum_j exp(score))
  /// If it has data, the result is written here, unrounded, instead of to `out`: for keys that come in parts, the
  /// result over those so far. With lse_before it is read first, as the result over the parts before, whose lse that is
  /// (Milakov & Gimelshein 2018); without, these keys are the first part, of which every query must see one.
  HeadView<Accumulate<T>> so_far = {};
  const Accumulate<T>* lse_before = nullptr;  ///< [B, H, Tq], in other memory than lse
};

template <class T>
struct AttentionBackward {
  AttentionShape shape;
  HeadView<const T> q, k, v, out, dout;
  const Accumulate<T>* lse;
  HeadView<T> dq, dk, dv;
  Accumulate<T>* workspace;  ///< attention_workspace(device, shape) elements; null if that is 0
  /// If they have data, the gradients are added to these, unrounded, instead of written to dq, dk and dv: where keys
  /// come in parts. `out` and `lse` are those over all keys.
  HeadView<Accumulate<T>> dq_sum = {}, dk_sum = {}, dv_sum = {};
};

/// Elements of workspace that the backward pass needs, a function of the shape alone. On the CPU, with few heads, the
/// queries of a head are dealt out to several tasks, each with sums of its own for dk and dv; on CUDA, each query has
/// its sum of dout * out.
int64_t attention_workspace(Cpu, const AttentionShape& shape);
int64_t attention_workspace(Cuda, const AttentionShape& shape);

// CUDA: in f16 and bf16 with heads of up to 128 columns, the weights and their gradients are rounded to T before they
// are multiplied with v, dout, q and k by tensor cores. Bits are a function of shape and values alone. The CPU does the
// same in bf16 with more than kAttentionFewQueries queries where its products take pairs of bfloat16 ("avx512bf16",
// ops/gemm.h); elsewhere weights stay f32.

template <class T>
void attention_forward(Cpu, const AttentionForward<T>& arguments);
template <class T>
void attention_forward(Cuda, const AttentionForward<T>& arguments);
template <class T>
void attention_backward(Cpu, const AttentionBackward<T>& arguments);
template <class T>
void attention_backward(Cuda, const AttentionBackward<T>& arguments);

namespace detail {

// Queries and keys of a tile: 64 x 64 scores of f32 take half of a 32 KiB L1 cache.
inline constexpr int64_t kAttentionQueries = 64;
inline constexpr int64_t kAttentionKeys = 64;

/// Up to this many queries, lanes run along keys and head size instead of queries, which would leave most of them idle.
inline constexpr int64_t kAttentionFewQueries = 4;

/// A head's columns in scratch memory: whole vectors of any instruction set.
inline int64_t padded_head_size(int64_t head_size) { return (head_size + 15) / 16 * 16; }

/// The work of one (batch, key head) in units of one block of queries of one query head, the longest first, dealt out
/// to `chunks` tasks in turn.
struct AttentionUnits {
  AttentionUnits(const AttentionShape& s, int64_t chunk_count)
      : group(s.heads / s.kv_heads),
        blocks((s.queries + kAttentionQueries - 1) / kAttentionQueries),
        chunks(chunk_count) {}
  int64_t count() const { return group * blocks; }
  int64_t block(int64_t unit) const { return blocks - 1 - unit / group; }
  int64_t head(int64_t kv_head, int64_t unit) const { return kv_head * group + unit % group; }
  int64_t group, blocks, chunks;
};

/// At least `bytes`, aligned to 64 bytes, of this thread's scratch memory. Kept until the thread ends.
void* attention_scratch(int64_t bytes);

/// Hands out pieces of this thread's scratch memory for elements of T; `count` elements in at most `pieces` pieces.
template <class T>
class AttentionScratch {
 public:
  AttentionScratch(int64_t count, int64_t pieces)
      : next_(static_cast<T*>(attention_scratch((count + pieces * kLine) * static_cast<int64_t>(sizeof(T))))) {}
  T* take(int64_t count) {
    T* piece = next_;
    next_ += (count + kLine - 1) / kLine * kLine;
    return piece;
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(T);
  T* next_;
};

}  // namespace detail
}  // namespace weft
