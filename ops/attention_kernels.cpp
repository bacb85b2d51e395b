// Attention on the CPU. Scores are held keys by queries: softmax then runs down the lanes with nothing to add across
// them, and every product reads its operands as they lie, but for one small transpose of a block of queries.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/attention_kernels.cpp"
#include "hwy/foreach_target.h"  // must come before highway.h
//
#include <algorithm>
#include <cstdlib>
#include <tuple>

#include "core/thread_pool.h"
#include "hwy/highway.h"
#include "ops/attention_backward-inl.h"
#include "ops/attention_forward-inl.h"
#include "ops/attention_kernels.h"

#ifndef WEFT_OPS_ATTENTION_KERNELS_ONCE
#define WEFT_OPS_ATTENTION_KERNELS_ONCE
namespace weft::detail {
template <class S>
struct AttentionKernels {
  using T = Accumulate<S>;
  void (*forward)(const AttentionForward<S>&, const AttentionUnits&, int64_t b, int64_t kv_head, int64_t chunk);
  void (*few)(const AttentionForward<S>&, int64_t b, int64_t kv_head);
  void (*backward)(const AttentionBackward<S>&, const AttentionUnits&, int64_t b, int64_t kv_head, int64_t chunk,
                   T* partial);
  void (*add)(const AttentionBackward<S>&, int64_t chunks, int64_t b, int64_t kv_head, int64_t begin, int64_t end);
};
struct AttentionTable {
  std::tuple<AttentionKernels<float>, AttentionKernels<double>, AttentionKernels<Half>, AttentionKernels<BFloat16>> all;
  AttentionKernels<BFloat16> pairs;  ///< where the processor multiplies pairs of bfloat16
};
}  // namespace weft::detail
#endif

HWY_BEFORE_NAMESPACE();
namespace weft::detail {
namespace HWY_NAMESPACE {

/// P: what the products of many queries take.
template <class S, class P = Accumulate<S>>
inline constexpr AttentionKernels<S> kAttentionKernels = {forward_chunk<P, S>, forward_few<Accumulate<S>, S>,
                                                          backward_chunk<P, S>, add_partials<Accumulate<S>, S>};

const AttentionTable* attention_table() {
#if HWY_TARGET == HWY_AVX3
  using Pairs = Bf16Pair;
#else
  using Pairs = float;  // no such instructions
#endif
  static constexpr AttentionTable kTable{
      {kAttentionKernels<float>, kAttentionKernels<double>, kAttentionKernels<Half>, kAttentionKernels<BFloat16>},
      kAttentionKernels<BFloat16, Pairs>};
  return &kTable;
}

}  // namespace HWY_NAMESPACE
}  // namespace weft::detail
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace weft {
namespace detail {
HWY_EXPORT(attention_table);

namespace {

template <class S>
const AttentionKernels<S>& attention_kernels() {
  const AttentionTable& table = *HWY_DYNAMIC_DISPATCH(attention_table)();
  if constexpr (std::is_same_v<S, BFloat16>) {
    if (gemm_multiplies_pairs()) return table.pairs;
  }
  return std::get<AttentionKernels<S>>(table.all);
}

/// Into how many tasks the units of a (batch, key head) go, if `wanted` tasks in all are enough.
int64_t chunks_for(const AttentionShape& s, int64_t wanted, int64_t most) {
  const int64_t heads = std::max<int64_t>(1, s.batch * s.kv_heads), units = AttentionUnits(s, 1).count();
  return std::clamp<int64_t>((wanted + heads - 1) / heads, 1, std::clamp<int64_t>(units, 1, most));
}
int64_t forward_chunks(const AttentionShape& s) { return chunks_for(s, 64, 64); }
/// Each task has its own dk and dv: not more than the time to add them up is worth.
int64_t backward_chunks(const AttentionShape& s) { return chunks_for(s, 32, 16); }

struct ThreadMemory {
  ~ThreadMemory() { std::free(data); }
  void* data = nullptr;
  int64_t bytes = 0;
};

}  // namespace

void* attention_scratch(int64_t bytes) {
  static thread_local ThreadMemory memory;
  if (bytes > memory.bytes) {
    std::free(memory.data);
    memory.bytes = 0;
    const size_t whole = (static_cast<size_t>(bytes) + 4095) / 4096 * 4096;
    memory.data = std::aligned_alloc(4096, whole);
    if (memory.data == nullptr)
      fail(ErrorKind::kMemory, "attention", "no memory for ", grouped(bytes), " bytes of scratch");
    memory.bytes = static_cast<int64_t>(whole);
  }
  return memory.data;
}

}  // namespace detail

int64_t attention_workspace(Cpu, const AttentionShape& s) {
  const int64_t chunks = detail::backward_chunks(s);
  return chunks == 1 ? 0 : s.batch * s.kv_heads * chunks * 2 * s.keys * detail::padded_head_size(s.head_size);
}

template <class S>
void attention_forward(Cpu, const AttentionForward<S>& a) {
  const auto& kernels = detail::attention_kernels<S>();
  const int64_t kv_heads = a.shape.kv_heads, heads = a.shape.batch * kv_heads;
  if (a.shape.queries == 0) return;
  if (a.shape.queries <= detail::kAttentionFewQueries) {
    return parallel_tasks(heads, [&](int64_t i) { kernels.few(a, i / kv_heads, i % kv_heads); });
  }
  const detail::AttentionUnits units(a.shape, detail::forward_chunks(a.shape));
  parallel_tasks(heads * units.chunks, [&](int64_t task) {
    const int64_t i = task / units.chunks;
    kernels.forward(a, units, i / kv_heads, i % kv_heads, task % units.chunks);
  });
}

template <class S>
void attention_backward(Cpu, const AttentionBackward<S>& a) {
  const auto& kernels = detail::attention_kernels<S>();
  const int64_t kv_heads = a.shape.kv_heads, heads = a.shape.batch * kv_heads, keys = a.shape.keys;
  const detail::AttentionUnits units(a.shape, detail::backward_chunks(a.shape));
  const int64_t sums = 2 * keys * detail::padded_head_size(a.shape.head_size);
  parallel_tasks(heads * units.chunks, [&](int64_t task) {
    const int64_t i = task / units.chunks;
    Accumulate<S>* partial = units.chunks == 1 ? nullptr : a.workspace + task * sums;
    kernels.backward(a, units, i / kv_heads, i % kv_heads, task % units.chunks, partial);
  });
  if (units.chunks == 1) return;
  constexpr int64_t kKeys = 256;  // keys of a piece of the sum
  const int64_t pieces = (keys + kKeys - 1) / kKeys;
  parallel_tasks(heads * pieces, [&](int64_t task) {
    const int64_t i = task / pieces, begin = task % pieces * kKeys;
    kernels.add(a, units.chunks, i / kv_heads, i % kv_heads, begin, std::min(keys, begin + kKeys));
  });
}

#define WEFT_ATTENTION_INSTANCE(S)                                  \
  template void attention_forward(Cpu, const AttentionForward<S>&); \
  template void attention_backward(Cpu, const AttentionBackward<S>&);
WEFT_ATTENTION_INSTANCE(float)
WEFT_ATTENTION_INSTANCE(double)
WEFT_ATTENTION_INSTANCE(Half)
WEFT_ATTENTION_INSTANCE(BFloat16)
#undef WEFT_ATTENTION_INSTANCE

}  // namespace weft
#endif
