#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/index_kernels.cpp"
#include "hwy/foreach_target.h"  // must come before highway.h
//
#include <algorithm>
#include <cstring>
#include <tuple>

#include "core/thread_pool.h"
#include "hwy/highway.h"
#include "ops/index_kernels.h"
#include "ops/norm_lanes-inl.h"

#ifndef WEFT_OPS_INDEX_KERNELS_ONCE
#define WEFT_OPS_INDEX_KERNELS_ONCE
namespace weft::detail {
template <class T>
using EmbeddingRows = void (*)(const EmbeddingBackward<T>&, int64_t begin, int64_t end);
using EmbeddingTable =
    std::tuple<EmbeddingRows<float>, EmbeddingRows<double>, EmbeddingRows<Half>, EmbeddingRows<BFloat16>>;

/// Rows of bytes: y[i] = table[ids[i]], or 0 for id -1, for i in [begin, end) of `count`.
struct RowCopy {
  const int64_t* ids;
  const uint8_t* table;
  uint8_t* y;
  int64_t count, bytes;
};
}  // namespace weft::detail
#endif

HWY_BEFORE_NAMESPACE();
namespace weft::detail {
namespace HWY_NAMESPACE {

/// Rows [begin, end) of the table: each is written once, by one thread. The workspace holds starts and order.
template <class T>
void embedding_rows(const EmbeddingBackward<T>& a, int64_t begin, int64_t end) {
  const Tag<T> d;
  const int64_t *starts = a.workspace, *order = starts + a.vocabulary + 1;
  for (int64_t v = begin; v < end; ++v) {
    const int64_t first = starts[v], last = starts[v + 1];
    T* out = a.dtable + v * a.columns;
    if (first == last) {
      if (!a.accumulate) std::memset(static_cast<void*>(out), 0, static_cast<size_t>(a.columns) * sizeof(T));
      continue;
    }
    for_lanes(d, a.columns, [&](auto, int64_t j, auto which) HWY_ATTR {
      auto sum = load<T>(d, a.dy + order[first] * a.columns + j, which);
      for (int64_t i = first + 1; i < last; ++i) sum = hn::Add(sum, load<T>(d, a.dy + order[i] * a.columns + j, which));
      if (a.accumulate) sum = hn::Add(load<T>(d, out + j, which), sum);
      store<T>(d, sum, out + j, which);
    });
  }
}

template <bool kStream>
void copy_rows_as(const RowCopy& a, int64_t begin, int64_t end) {
  [[maybe_unused]] const hn::ScalableTag<uint8_t> d;
  [[maybe_unused]] const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  // Rows lie anywhere, so the processor cannot guess what comes next: it is told three rows ahead, a line at a time,
  // for a burst of requests would hold up the copy.
  constexpr int64_t kAhead = 3, kLine = 64;
  for (int64_t i = begin; i < end; ++i) {
    uint8_t* to = a.y + i * a.bytes;
    if (a.ids[i] < 0) {
      std::memset(to, 0, static_cast<size_t>(a.bytes));
      continue;
    }
    const uint8_t* from = a.table + a.ids[i] * a.bytes;
    const uint8_t* ahead = a.table + std::max<int64_t>(0, a.ids[std::min(i + kAhead, end - 1)]) * a.bytes;
    int64_t line = 0;
    for (; line + kLine <= a.bytes; line += kLine) {
      __builtin_prefetch(ahead + line, 0, 2);
      if constexpr (kStream) {
        for (int64_t j = line; j < line + kLine; j += lanes) hn::Stream(hn::LoadU(d, from + j), d, to + j);
      } else {
        std::memcpy(to + line, from + line, kLine);
      }
    }
    std::memcpy(to + line, from + line, static_cast<size_t>(a.bytes - line));
  }
  if constexpr (kStream) hwy::FlushStream();
}

void copy_rows(const RowCopy& a, int64_t begin, int64_t end) {
  worth_streaming(a.y, a.count, a.bytes) ? copy_rows_as<true>(a, begin, end) : copy_rows_as<false>(a, begin, end);
}

const EmbeddingTable* embedding_table() {
  static constexpr EmbeddingTable kTable{embedding_rows<float>, embedding_rows<double>, embedding_rows<Half>,
                                         embedding_rows<BFloat16>};
  return &kTable;
}

}  // namespace HWY_NAMESPACE
}  // namespace weft::detail
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace weft {
namespace detail {
HWY_EXPORT(embedding_table);
HWY_EXPORT(copy_rows);
}  // namespace detail

namespace {
/// Bytes of a piece of work: small enough to share evenly, large enough to be worth a hand-over.
constexpr int64_t kGrainBytes = int64_t{64} << 10;
int64_t grain(int64_t bytes) { return std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, bytes)); }
}  // namespace

int64_t first_outside(Cpu, const int64_t* ids, int64_t count, int64_t limit) {
  const auto outside = [limit](int64_t id) { return id < 0 || id >= limit; };
  const int64_t* found = std::find_if(ids, ids + count, outside);
  return found == ids + count ? -1 : found - ids;
}

void local_ids(Cpu, const int64_t* ids, int64_t count, int64_t first, int64_t rows, int64_t* local) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t id = ids[i] - first;
    local[i] = id >= 0 && id < rows ? id : -1;
  }
}

void embedding_forward(Cpu, const int64_t* ids, int64_t count, const void* table, int64_t, int64_t bytes, void* y) {
  if (bytes == 0) return;
  const detail::RowCopy rows{ids, static_cast<const uint8_t*>(table), static_cast<uint8_t*>(y), count, bytes};
  const auto copy = HWY_DYNAMIC_DISPATCH(detail::copy_rows);
  parallel_for(count, grain(bytes), [&](int64_t begin, int64_t end) { copy(rows, begin, end); });
}

template <class T>
int64_t embedding_workspace(Cpu, int64_t count, int64_t vocabulary, int64_t) {
  return vocabulary + 1 + count;
}

template <class T>
void embedding_backward(Cpu, const EmbeddingBackward<T>& a) {
  // A stable counting sort: order[starts[v]] to order[starts[v + 1] - 1] are the places of id v, in order. While places
  // are handed out starts[v] moves to where starts[v + 1] was, so the counts go in one further on.
  int64_t *starts = a.workspace, *order = starts + a.vocabulary + 1;
  std::fill(starts, order, int64_t{0});
  for (int64_t i = 0; i < a.count; ++i) {
    if (a.ids[i] >= 0) ++starts[a.ids[i] + 1];
  }
  for (int64_t v = 0; v < a.vocabulary; ++v) starts[v + 1] += starts[v];
  for (int64_t i = 0; i < a.count; ++i) {
    if (a.ids[i] >= 0) order[starts[a.ids[i]]++] = i;
  }
  for (int64_t v = a.vocabulary; v > 0; --v) starts[v] = starts[v - 1];
  starts[0] = 0;
  const auto rows = std::get<detail::EmbeddingRows<T>>(*HWY_DYNAMIC_DISPATCH(detail::embedding_table)());
  parallel_for(a.vocabulary, grain(a.columns * static_cast<int64_t>(sizeof(T))),
               [&](int64_t begin, int64_t end) { rows(a, begin, end); });
}

namespace {
/// Calls element(position in the index, position in x) for all elements of lines [begin, end), each line in order.
template <class Element>
void for_lines(const GatherLines& a, int64_t begin, int64_t end, Element element) {
  for (int64_t line = begin; line < end; ++line) {
    const int64_t first = line / a.inner * a.count * a.inner + line % a.inner;
    const int64_t start = a.line_start(line / a.inner, line % a.inner);
    for (int64_t j = 0; j < a.count; ++j) {
      const int64_t at = first + j * a.inner;
      element(at, start + a.index[at] * a.stride);
    }
  }
}

template <class Element>
void for_all_lines(const GatherLines& a, Element element) {
  parallel_for(a.outer * a.inner, grain(a.count * 16),
               [&](int64_t begin, int64_t end) { for_lines(a, begin, end, element); });
}
}  // namespace

void gather_forward(Cpu, const GatherLines& lines, const void* x, int size, void* y) {
  const auto copy = [&]<class Word>() {
    for_all_lines(lines, [&](int64_t at, int64_t from) {
      std::memcpy(static_cast<char*>(y) + at * size, static_cast<const char*>(x) + from * size, sizeof(Word));
    });
  };
  dispatch_bytes(size, copy);
}

template <class T>
void gather_backward(Cpu, const GatherLines& lines, const T* dy, Accumulate<T>* dx) {
  for_all_lines(lines, [&](int64_t at, int64_t to) { dx[to] += static_cast<Accumulate<T>>(dy[at]); });
}

#define WEFT_INDEX_INSTANCE(T)                                             \
  template int64_t embedding_workspace<T>(Cpu, int64_t, int64_t, int64_t); \
  template void embedding_backward(Cpu, const EmbeddingBackward<T>&);      \
  template void gather_backward(Cpu, const GatherLines&, const T*, Accumulate<T>*);
WEFT_INDEX_INSTANCE(float)
WEFT_INDEX_INSTANCE(double)
WEFT_INDEX_INSTANCE(Half)
WEFT_INDEX_INSTANCE(BFloat16)
#undef WEFT_INDEX_INSTANCE

}  // namespace weft
#endif
