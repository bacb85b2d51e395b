// Embedding. Its gradient sorts the places of the ids first, so that each row of the table has a
// fixed order of summation; then every block adds the same number of rows, however often an id occurs.
#include <algorithm>
#include <bit>

#include "cuda/context.h"
#include "cuda/device.cuh"
#include "cuda/fault.cuh"
#include "cuda/launch.cuh"
#include "cuda/store_whole.cuh"
#include "ops/index_kernels.h"

namespace weft {
namespace {

using cuda::divide_up;
using cuda::grid_for;
using cuda::is_inside;
using cuda::kFull;
using cuda::kWarp;
using cuda::load_pack;
using cuda::narrow;
using cuda::Pack;
using cuda::packs_fit;
using cuda::start;
using cuda::store_pack;
using cuda::store_whole;
using cuda::thread_count;
using cuda::thread_index;
using cuda::widen;

constexpr int kThreads = 256;
/// Loads that a thread starts before it needs the first.
constexpr int kFlight = 4;

__global__ void report_ids(const int64_t* ids, int64_t count, int64_t limit, const char* op, const char* what,
                           cuda::Fault* fault) {
  for (int64_t i = thread_index(); i < count; i += thread_count()) {
    const int64_t id = ids[i];
    if (!is_inside(id, limit)) cuda::report(fault, cuda::Fault::kOutside, op, what, i, id, limit);
  }
}

// ---- rows of a table; a warp to a row ----

cuda::Grid grid_for_rows(int64_t rows) { return grid_for(rows * kWarp, kThreads); }

/// 16 bytes of memory traffic for each id.
__global__ void make_local(const int64_t* ids, int64_t count, int64_t first, int64_t rows, int64_t* local) {
  for (int64_t i = thread_index(); i < count; i += thread_count()) {
    const int64_t id = ids[i] - first;
    local[i] = is_inside(id, rows) ? id : -1;
  }
}

/// Reads and writes each byte of a row once; rows of `words` words.
template <class Word>
__global__ void __launch_bounds__(kThreads)
    copy_rows(const int64_t* ids, int64_t count, const Word* table, int64_t vocabulary, int64_t words, Word* y) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int64_t i = thread_index() / kWarp; i < count; i += thread_count() / kWarp) {
    const int64_t id = ids[i];
    Word* to = y + i * words;
    if (!is_inside(id, vocabulary)) {
      for (int64_t at = lane; at < words; at += kWarp) to[at] = Word{};
      continue;
    }
    const Word* from = table + id * words;
    for (int64_t at = lane; at < words; at += kFlight * kWarp) {
      Word held[kFlight];
#pragma unroll
      for (int u = 0; u < kFlight; ++u) {
        if (at + u * kWarp < words) held[u] = from[at + u * kWarp];
      }
#pragma unroll
      for (int u = 0; u < kFlight; ++u) {
        if (at + u * kWarp < words) to[at + u * kWarp] = held[u];
      }
    }
  }
}

/// Rows of the table that no id names.
template <class T, int kCount>
__global__ void __launch_bounds__(kThreads)
    clear_rows(const unsigned char* named, int64_t vocabulary, int64_t columns, T* dtable) {
  Pack<T, kCount> zeros;
#pragma unroll
  for (int e = 0; e < kCount; ++e) zeros.at[e] = T(0.0f);
  for (int64_t v = thread_index() / kWarp; v < vocabulary; v += thread_count() / kWarp) {
    if (named[v]) continue;
    for (int64_t at = threadIdx.x % kWarp * kCount; at < columns; at += kWarp * kCount)
      store_pack(dtable + v * columns + at, zeros);
  }
}

// ---- a stable radix sort of the places by their ids ----

constexpr int kDigits = 256;  // also the threads of a block: one to a digit
constexpr int kDigitBits = 8;
constexpr int kSortWarps = kDigits / kWarp;
constexpr int kSortItems = 16;
constexpr int kSortTile = kDigits * kSortItems;

/// Words are (id << place_bits | place); an id outside the vocabulary counts as number `vocabulary`, which comes last.
struct Words {
  const int64_t* ids;     ///< what the first pass reads,
  const uint64_t* words;  ///< or what an earlier one wrote
  int64_t count, vocabulary;
  int place_bits, digit;

  __device__ uint64_t operator[](int64_t i) const {
    if (words != nullptr) return words[i];
    const int64_t id = is_inside(ids[i], vocabulary) ? ids[i] : vocabulary;
    return static_cast<uint64_t>(id) << place_bits | static_cast<uint64_t>(i);
  }
  __device__ unsigned digit_of(uint64_t word) const {
    return static_cast<unsigned>(word >> (place_bits + digit * kDigitBits)) % kDigits;
  }
};

/// counts[tile][digit]; the first pass also marks the ids that occur.
__global__ void __launch_bounds__(kDigits) count_digits(Words in, unsigned* counts, unsigned char* named) {
  __shared__ unsigned tile_counts[kDigits];
  tile_counts[threadIdx.x] = 0;
  __syncthreads();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kSortTile + threadIdx.x;
#pragma unroll
  for (int u = 0; u < kSortItems; ++u) {
    const int64_t i = first + u * kDigits;
    if (i >= in.count) break;
    const uint64_t word = in[i];
    atomicAdd(&tile_counts[in.digit_of(word)], 1u);
    if (in.words == nullptr && is_inside(in.ids[i], in.vocabulary)) named[in.ids[i]] = 1;
  }
  __syncthreads();
  counts[static_cast<int64_t>(blockIdx.x) * kDigits + threadIdx.x] = tile_counts[threadIdx.x];
}

/// The sum over the threads in front of this one; a block of kDigits threads.
__device__ int64_t sum_before(int64_t value) {
  __shared__ int64_t totals[kSortWarps];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  int64_t sum = value;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int64_t other = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == kWarp - 1) totals[warp] = sum;
  __syncthreads();
  int64_t before = 0;
  for (int w = 0; w < warp; ++w) before += totals[w];
  return before + sum - value;
}

/// Each word to its place behind the words of smaller digits, and of the same digit further in front. Warps take
/// neighbouring parts of the tile, and their lanes neighbouring words.
__global__ void __launch_bounds__(kDigits) move_words(Words in, const unsigned* counts, uint64_t* out) {
  __shared__ unsigned found[kSortWarps][kDigits];
  __shared__ int64_t starts[kDigits];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  int64_t before = 0, all = 0;
#pragma unroll 8
  for (int64_t tile = 0; tile < gridDim.x; ++tile) {
    const unsigned here = counts[tile * kDigits + threadIdx.x];
    before += tile < blockIdx.x ? here : 0;
    all += here;
  }
  starts[threadIdx.x] = sum_before(all) + before;
  for (int w = 0; w < kSortWarps; ++w) found[w][threadIdx.x] = 0;
  __syncthreads();

  const int64_t first = static_cast<int64_t>(blockIdx.x) * kSortTile + warp * kWarp * kSortItems + lane;
  uint64_t words[kSortItems];
  unsigned ranks[kSortItems];
#pragma unroll
  for (int u = 0; u < kSortItems; ++u) {
    if (first + u * kWarp < in.count) words[u] = in[first + u * kWarp];
  }
#pragma unroll
  for (int u = 0; u < kSortItems; ++u) {
    const bool exists = first + u * kWarp < in.count;
    const unsigned digit = exists ? in.digit_of(words[u]) : kDigits;
    const unsigned same = __match_any_sync(0xffffffffu, digit);
    const unsigned rank = static_cast<unsigned>(__popc(same & ((1u << lane) - 1)));
    const unsigned earlier = exists ? found[warp][digit] : 0;
    __syncwarp();
    if (exists && rank == 0) found[warp][digit] = earlier + static_cast<unsigned>(__popc(same));
    __syncwarp();
    ranks[u] = earlier + rank;
  }
  __syncthreads();
  unsigned warps_before = 0;
  for (int w = 0; w < kSortWarps; ++w) {
    const unsigned here = found[w][threadIdx.x];
    found[w][threadIdx.x] = warps_before;
    warps_before += here;
  }
  __syncthreads();
#pragma unroll
  for (int u = 0; u < kSortItems; ++u) {
    if (first + u * kWarp >= in.count) break;
    const unsigned digit = in.digit_of(words[u]);
    out[starts[digit] + found[warp][digit] + ranks[u]] = words[u];
  }
}

// ---- sums of the rows of each id ----

/// Rows that a block adds.
constexpr int kTile = 64;

/// Places in the order of their ids.
struct Sorted {
  const uint64_t* words;
  int64_t count;
  int place_bits;

  __device__ int64_t id(int64_t i) const { return static_cast<int64_t>(words[i] >> place_bits); }
  __device__ int64_t place(int64_t i) const {
    return static_cast<int64_t>(words[i] & ((uint64_t{1} << place_bits) - 1));
  }
  /// The first word of an id larger than `id`.
  __device__ int64_t end_of(int64_t id) const {
    int64_t begin = 0, end = count;
    while (begin < end) {
      const int64_t middle = begin + (end - begin) / 2;
      if (this->id(middle) <= id)
        begin = middle + 1;
      else
        end = middle;
    }
    return begin;
  }
};

template <int kCount, class A>
__device__ void load_sums(const A* from, A (&sums)[kCount]) {
  constexpr int kPack = std::min(kCount, kFull<A>);
#pragma unroll
  for (int p = 0; p < kCount; p += kPack) {
    const Pack<A, kPack> pack = load_pack<kPack>(from + p);
#pragma unroll
    for (int e = 0; e < kPack; ++e) sums[p + e] = pack.at[e];
  }
}
template <int kCount, class A>
__device__ void store_sums(A* to, const A (&sums)[kCount]) {
  constexpr int kPack = std::min(kCount, kFull<A>);
#pragma unroll
  for (int p = 0; p < kCount; p += kPack) {
    Pack<A, kPack> pack;
#pragma unroll
    for (int e = 0; e < kPack; ++e) pack.at[e] = sums[p + e];
    store_pack(to + p, pack);
  }
}

template <int kCount, class T>
__device__ void finish_row(const EmbeddingBackward<T>& a, int64_t id, int64_t column,
                           const Accumulate<T> (&sums)[kCount]) {
  T* const to = a.dtable + id * a.columns + column;
  Accumulate<T> values[kCount];
#pragma unroll
  for (int e = 0; e < kCount; ++e) values[e] = sums[e];
  if (a.accumulate) {
    const Pack<T, kCount> old = load_pack<kCount>(to);
#pragma unroll
    for (int e = 0; e < kCount; ++e) values[e] += widen(old.at[e]);
  }
  Pack<T, kCount> row;
#pragma unroll
  for (int e = 0; e < kCount; ++e) row.at[e] = narrow<T>(values[e]);
  store_whole(to, row);
}

/// A block adds the rows of one tile of sorted places, blockIdx.y counts its columns. Sums of ids that also have rows
/// in a neighbouring tile go to partials[tile]: [0] if the id has rows in front of the tile, else [1]. Reads each
/// element of dy once.
template <class T, int kCount>
__global__ void __launch_bounds__(kThreads) sum_tiles(EmbeddingBackward<T> a, Sorted sorted, Accumulate<T>* partials) {
  using A = Accumulate<T>;
  constexpr int kAhead = 8;
  __shared__ int64_t ids[kTile + 2];  // from the one in front of the tile to the one behind it; -1: none
  __shared__ int64_t places[kTile];
  const int64_t tile = blockIdx.x, begin = tile * kTile;
  for (int i = static_cast<int>(threadIdx.x); i < kTile + 2; i += static_cast<int>(blockDim.x)) {
    const int64_t at = begin + i - 1;
    const bool exists = at >= 0 && at < sorted.count;
    ids[i] = exists ? sorted.id(at) : -1;
    if (exists && i > 0 && i <= kTile) places[i - 1] = sorted.place(at);
  }
  __syncthreads();
  const auto is_row = [&](int i) { return is_inside(ids[i + 1], a.vocabulary); };
  for (int64_t column = (blockIdx.y * blockDim.x + threadIdx.x) * kCount; column < a.columns;
       column += gridDim.y * blockDim.x * kCount) {
    A sums[kCount];
    for (int first = 0; first < kTile && is_row(first); first += kAhead) {
      Pack<T, kCount> rows[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        if (is_row(first + u)) rows[u] = load_pack<kCount>(a.dy + places[first + u] * a.columns + column);
      }
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int i = first + u;
        if (!is_row(i)) break;
        const int64_t id = ids[i + 1];
        const bool is_first = i == 0 || ids[i] != id, is_last = i + 1 == kTile || ids[i + 2] != id;
#pragma unroll
        for (int e = 0; e < kCount; ++e) {
          const A x = widen(rows[u].at[e]);
          sums[e] = is_first ? x : sums[e] + x;
        }
        if (!is_last) continue;
        const bool from_before = ids[0] == id, goes_on = i + 1 == kTile && ids[kTile + 1] == id;
        if (from_before || goes_on) {
          store_sums(partials + (2 * tile + (from_before ? 0 : 1)) * a.columns + column, sums);
        } else {
          finish_row(a, id, column, sums);
        }
      }
    }
  }
}

/// Ids with rows in several tiles: the block of the first one adds the tiles' sums in order.
template <class T, int kCount>
__global__ void __launch_bounds__(kThreads)
    join_tiles(EmbeddingBackward<T> a, Sorted sorted, const Accumulate<T>* partials) {
  const int64_t tile = blockIdx.x, begin = tile * kTile, end = begin + kTile;
  if (end >= sorted.count) return;
  const int64_t id = sorted.id(end);
  if (id >= a.vocabulary || sorted.id(end - 1) != id || (begin > 0 && sorted.id(begin - 1) == id)) return;
  const int64_t last = (sorted.end_of(id) - 1) / kTile;
  for (int64_t column = (blockIdx.y * blockDim.x + threadIdx.x) * kCount; column < a.columns;
       column += gridDim.y * blockDim.x * kCount) {
    Accumulate<T> sums[kCount], more[kCount];
    load_sums(partials + (2 * tile + 1) * a.columns + column, sums);
#pragma unroll 4
    for (int64_t next = tile + 1; next <= last; ++next) {
      load_sums(partials + 2 * next * a.columns + column, more);
#pragma unroll
      for (int e = 0; e < kCount; ++e) sums[e] += more[e];
    }
    finish_row(a, id, column, sums);
  }
}

/// How embedding_backward() divides its workspace; sizes in bytes.
template <class T>
struct Workspace {
  int64_t sort_tiles, tiles;
  int64_t partials, words, counts, named;

  Workspace(int64_t count, int64_t vocabulary, int64_t columns)
      : sort_tiles(divide_up(count, kSortTile)),
        tiles(divide_up(count, kTile)),
        partials(divide_up(2 * tiles * columns * static_cast<int64_t>(sizeof(Accumulate<T>)), 16) * 16),
        words(count * static_cast<int64_t>(sizeof(uint64_t))),
        counts(sort_tiles * kDigits * static_cast<int64_t>(sizeof(unsigned))),
        named(vocabulary) {}
  int64_t bytes() const { return partials + 2 * words + counts + named; }
};

template <class T, int kCount>
void add_rows(Cuda device, const EmbeddingBackward<T>& a, const Sorted& sorted, int64_t tiles, Accumulate<T>* partials,
              const unsigned char* named) {
  if (!a.accumulate)
    start(device, grid_for_rows(a.vocabulary), clear_rows<T, kCount>, named, a.vocabulary, a.columns, a.dtable);
  if (tiles == 0) return;
  constexpr int64_t kMostParts = 65535;
  const int64_t packs = a.columns / kCount;
  const int threads = static_cast<int>(std::min<int64_t>(divide_up(packs, kWarp) * kWarp, kThreads));
  const dim3 blocks(static_cast<unsigned>(tiles),
                    static_cast<unsigned>(std::min(divide_up(packs, threads), kMostParts)));
  start(device, {blocks, static_cast<unsigned>(threads)}, sum_tiles<T, kCount>, a, sorted, partials);
  start(device, {blocks, static_cast<unsigned>(threads)}, join_tiles<T, kCount>, a, sorted, partials);
}

}  // namespace

void report_outside(Cuda device, const char* what, const int64_t* ids, int64_t count, int64_t limit) {
  if (count == 0) return;
  start(device, grid_for(count), report_ids, ids, count, limit, device.op, what, cuda::current_context().fault);
}

void local_ids(Cuda device, const int64_t* ids, int64_t count, int64_t first, int64_t rows, int64_t* local) {
  if (count == 0) return;
  start(device, grid_for(count), make_local, ids, count, first, rows, local);
}

void embedding_forward(Cuda device, const int64_t* ids, int64_t count, const void* table, int64_t vocabulary,
                       int64_t bytes, void* y) {
  if (count == 0 || bytes == 0) return;
  const auto rows = [&]<class Word>() {
    start(device, grid_for_rows(count), copy_rows<Word>, ids, count, static_cast<const Word*>(table), vocabulary,
          bytes / static_cast<int64_t>(sizeof(Word)), static_cast<Word*>(y));
  };
  const uint64_t all =
      reinterpret_cast<uintptr_t>(table) | reinterpret_cast<uintptr_t>(y) | static_cast<uint64_t>(bytes);
  if (all % 16 == 0) return rows.template operator()<Pack<uint64_t, 2>>();
  if (all % 8 == 0) return rows.template operator()<uint64_t>();
  if (all % 4 == 0) return rows.template operator()<uint32_t>();
  if (all % 2 == 0) return rows.template operator()<uint16_t>();
  rows.template operator()<uint8_t>();
}

template <class T>
int64_t embedding_workspace(Cuda, int64_t count, int64_t vocabulary, int64_t columns) {
  return divide_up(Workspace<T>(count, vocabulary, columns).bytes(), sizeof(int64_t));
}

template <class T>
void embedding_backward(Cuda device, const EmbeddingBackward<T>& a) {
  if (a.vocabulary == 0 || a.columns == 0) return;
  const Workspace<T> sizes(a.count, a.vocabulary, a.columns);
  char* rest = reinterpret_cast<char*>(a.workspace);
  const auto take = [&rest]<class Element>(Element*& array, int64_t bytes) {
    array = reinterpret_cast<Element*>(rest);
    rest += bytes;
  };
  Accumulate<T>* partials;
  uint64_t *words, *others;
  unsigned* counts;
  unsigned char* named;
  take(partials, sizes.partials);
  take(words, sizes.words);
  take(others, sizes.words);
  take(counts, sizes.counts);
  take(named, sizes.named);

  WEFT_CUDA(cudaMemsetAsync(named, 0, static_cast<size_t>(sizes.named), static_cast<cudaStream_t>(device.stream)));
  const int place_bits = std::bit_width(static_cast<uint64_t>(std::max<int64_t>(a.count, 1) - 1));
  const int id_bits = std::bit_width(static_cast<uint64_t>(a.vocabulary));
  Words in{a.ids, nullptr, a.count, a.vocabulary, place_bits, 0};
  for (; a.count > 0 && in.digit * kDigitBits < id_bits; ++in.digit) {
    const cuda::Grid grid{static_cast<unsigned>(sizes.sort_tiles), kDigits};
    start(device, grid, count_digits, in, counts, named);
    start(device, grid, move_words, in, counts, words);
    in.words = words;
    std::swap(words, others);
  }
  const Sorted sorted{in.words, a.count, place_bits};
  if (packs_fit<kFull<T>>(a.dy, a.columns) && packs_fit<kFull<T>>(a.dtable)) {
    return add_rows<T, kFull<T>>(device, a, sorted, sizes.tiles, partials, named);
  }
  add_rows<T, 1>(device, a, sorted, sizes.tiles, partials, named);
}

#define WEFT_INDEX_INSTANCE(T)                                              \
  template int64_t embedding_workspace<T>(Cuda, int64_t, int64_t, int64_t); \
  template void embedding_backward(Cuda, const EmbeddingBackward<T>&);
WEFT_INDEX_INSTANCE(float)
WEFT_INDEX_INSTANCE(double)
WEFT_INDEX_INSTANCE(Half)
WEFT_INDEX_INSTANCE(BFloat16)
#undef WEFT_INDEX_INSTANCE

}  // namespace weft
