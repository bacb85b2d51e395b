// Sums over any dimensions, and which element of a row is the extreme one.
#include <algorithm>
#include <bit>
#include <cstdint>

#include "cuda/column_sum.cuh"
#include "cuda/device.cuh"
#include "cuda/launch.cuh"
#include "cuda/strided.cuh"
#include "ops/reduce_kernels.h"

namespace weft {
namespace {

using cuda::divide_up;
using cuda::grid_for;
using cuda::kFull;
using cuda::kWarp;
using cuda::load_pack;
using cuda::Pack;
using cuda::start;
using cuda::Strided;
using cuda::SumOutput;
using cuda::thread_count;
using cuda::thread_index;
using cuda::widen;

// ---- sums whose terms are closer together than its neighbours ----

constexpr int kThreads = 256;

/// The terms of output o begin at outputs.offsets(o)[1], its result lies at [0].
struct RowSums {
  Strided<2> outputs;
  Strided<1> terms;
  int64_t packs;  ///< of kCount neighbouring terms; the last one may have fewer
  int64_t pieces = 1, piece_packs = 0;
};

/// threadIdx.x counts packs of one piece of an output's terms, threadIdx.y outputs. The terms of a pack are added in
/// f32, all else in f64. kFlat is for terms at one stride; without kAligned a pack is read element by element.
template <class T, int kCount, bool kAligned, bool kFlat>
__global__ void __launch_bounds__(kThreads)
    sum_rows(const __grid_constant__ RowSums shape, const T* x, SumOutput<T> out, double* sums) {
  using A = Accumulate<T>;
  constexpr int kInFlight = kCount == 1 ? 8 : 4;
  __shared__ double scratch[kWarp];
  const int lanes = static_cast<int>(blockDim.x);
  const int64_t work = shape.outputs.count * shape.pieces, groups = blockDim.y;
  // Whole blocks take part to the end: the lanes of one warp may belong to several outputs.
  for (int64_t begin = blockIdx.x * groups; begin < work; begin += gridDim.x * groups) {
    const int64_t task = begin + threadIdx.y;
    int64_t at[2] = {};
    double total = 0;
    if (task < work) {
      const int64_t output = task / shape.pieces, piece = task % shape.pieces;
      shape.outputs.offsets(output, at);
      const int64_t end = piece + 1 == shape.pieces ? shape.packs : (piece + 1) * shape.piece_packs;
      for (int64_t first = piece * shape.piece_packs + threadIdx.x; first < end; first += kInFlight * lanes) {
        Pack<T, kCount> in[kInFlight];
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
          in[k] = {};
          const int64_t pack = first + k * lanes;
          if (pack >= end) continue;
          int64_t offset[1] = {};
          if constexpr (kFlat)
            offset[0] = pack * kCount * shape.terms.strides[0][0];
          else
            shape.terms.offsets(pack * kCount, offset);
          const T* from = x + at[1] + offset[0];
          if (kAligned && (pack + 1) * kCount <= shape.terms.count) {
            in[k] = load_pack<kCount>(from);
          } else {
#pragma unroll
            for (int e = 0; e < kCount; ++e) {
              if (pack * kCount + e < shape.terms.count) in[k].at[e] = from[e];
            }
          }
        }
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
          A part = widen(in[k].at[0]);
#pragma unroll
          for (int e = 1; e < kCount; ++e) part += widen(in[k].at[e]);
          total += static_cast<double>(part);
        }
      }
    }
    if (lanes > kWarp) {
      total = cuda::block_reduce(total, cuda::Sum(), scratch);
    } else {
      for (int step = lanes / 2; step > 0; step /= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
    }
    if (threadIdx.x != 0 || task >= work) continue;
    if (sums == nullptr) {
      out.put(at[0], total);
    } else {
      sums[task % shape.pieces * shape.outputs.count + task / shape.pieces] = total;
    }
  }
}

template <class T>
void start_row_sums(Cuda device, RowSums shape, const T* x, const SumOutput<T>& out, const Strided<1>& results) {
  const Strided<1>& terms = shape.terms;
  const int last = terms.rank - 1;
  const bool flat = terms.rank <= 1;
  // Packs only where the shape allows them: the order of additions is not to depend on where x lies.
  bool packs = terms.rank > 0 && terms.strides[0][last] == 1 && (flat || terms.sizes[last] % kFull<T> == 0);
  bool aligned = packs && cuda::packs_fit<kFull<T>>(x);
  for (int d = 0; d < last; ++d) aligned = aligned && terms.strides[0][d] % kFull<T> == 0;
  for (int d = 0; d < shape.outputs.rank; ++d) aligned = aligned && shape.outputs.strides[1][d] % kFull<T> == 0;
  shape.packs = divide_up(terms.count, packs ? kFull<T> : 1);
  // As many threads to a sum as have something to do, a whole block from 1024 packs on; several blocks to a long sum
  // where there are not enough sums for all.
  constexpr int64_t kLong = 1024;
  const auto few =
      static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(std::clamp<int64_t>(shape.packs, 1, kWarp))));
  const int64_t lanes = shape.packs >= kLong ? kThreads : few;
  shape.pieces = std::clamp<int64_t>(cuda::kSumBlocks / shape.outputs.count, 1,
                                     std::max<int64_t>(1, shape.packs / (kThreads * 8)));
  shape.piece_packs = divide_up(shape.packs, shape.pieces);
  shape.pieces = std::max<int64_t>(1, divide_up(shape.packs, std::max<int64_t>(1, shape.piece_packs)));
  double* sums = shape.pieces == 1 ? nullptr : cuda::piece_sums();
  const int64_t groups = kThreads / lanes;
  const cuda::Grid grid{
      static_cast<unsigned>(std::min<int64_t>(divide_up(shape.outputs.count * shape.pieces, groups), int64_t{1} << 20)),
      dim3(static_cast<unsigned>(lanes), static_cast<unsigned>(groups))};
  const auto run = [&]<bool kFlat>() {
    if (!packs) {
      start(device, grid, sum_rows<T, 1, true, kFlat>, shape, x, out, sums);
    } else if (aligned) {
      start(device, grid, sum_rows<T, kFull<T>, true, kFlat>, shape, x, out, sums);
    } else {
      start(device, grid, sum_rows<T, kFull<T>, false, kFlat>, shape, x, out, sums);
    }
  };
  flat ? run.template operator()<true>() : run.template operator()<false>();
  if (sums != nullptr)
    start(device, grid_for(results.count), cuda::add_pieces<T>, results, shape.pieces, static_cast<const double*>(sums),
          out);
}

/// A sum with its kept and its summed dimensions apart, each from the widest stride of x to the narrowest.
struct SumShape {
  Shape kept, summed;
  Strides kept_y, kept_x, summed_x;

  SumShape(const StridedView& y, const StridedView& x) {
    const int rank = y.shape.rank();
    int order[kMaxRank] = {};
    // A dimension that repeats its elements goes first: it must not part neighbours.
    const auto wider = [&](int a, int b) {
      return x.strides[b] != 0 && (x.strides[a] == 0 || x.strides[a] > x.strides[b]);
    };
    for (int d = 0; d < rank; ++d) {
      int place = d;
      for (; place > 0 && wider(d, order[place - 1]); --place) order[place] = order[place - 1];
      order[place] = d;
    }
    for (int i = 0; i < rank; ++i) {
      const int d = order[i];
      if (y.shape[d] == 1) continue;
      if (y.strides[d] == 0) {
        summed.push_back(y.shape[d]);
        summed_x.push_back(x.strides[d]);
      } else {
        kept.push_back(y.shape[d]);
        kept_y.push_back(y.strides[d]);
        kept_x.push_back(x.strides[d]);
      }
    }
  }

  /// Whether neighbours in memory go to different sums.
  bool side_by_side() const {
    if (kept.empty() || kept_x.back() != 1) return false;
    return summed.empty() || summed_x.back() != 1;
  }
};

// ---- extremes ----

/// A candidate: the better one has the first NaN, or else the largest (smallest) number, or else the lower index.
template <class A>
struct Extreme {
  A value;
  int64_t index = -1;  ///< none

  __device__ void add(Extreme other, bool largest) {
    if (other.index < 0) return;
    const bool nan = value != value, other_nan = other.value != other.value;
    const bool better = index < 0 || (nan || other_nan ? other_nan && !nan
                                      : largest        ? other.value > value
                                                       : other.value < value);
    const bool equal = index >= 0 && (nan ? other_nan : value == other.value);
    if (better || (equal && other.index < index)) *this = other;
  }
  __device__ Extreme from_lane(int step) const {
    return {__shfl_xor_sync(0xffffffffu, value, step), __shfl_xor_sync(0xffffffffu, index, step)};
  }
};

/// Rows x [rows, n] of which each is cut in pieces; `found` [rows, pieces] takes the index of each piece's extreme.
/// With `candidates` [rows, n] only those elements are looked at.
struct ExtremeRows {
  int64_t rows, n, row_stride, stride, pieces;
  const int64_t* candidates;
  bool largest;
};

constexpr int kInFlightExtreme = 8;

template <class T>
__global__ void __launch_bounds__(kThreads) find_extreme(ExtremeRows shape, const T* x, int64_t* found) {
  using A = Accumulate<T>;
  __shared__ A values[kThreads / kWarp];
  __shared__ int64_t indices[kThreads / kWarp];
  const int lanes = static_cast<int>(blockDim.x), warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t work = shape.rows * shape.pieces, piece_size = (shape.n + shape.pieces - 1) / shape.pieces;
  for (int64_t task = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; task < work;
       task += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    const int64_t row = task / shape.pieces, piece = task % shape.pieces;
    const T* const from = x + row * shape.row_stride;
    const int64_t end = (piece + 1) * piece_size < shape.n ? (piece + 1) * piece_size : shape.n;
    Extreme<A> best{};
    for (int64_t first = piece * piece_size + threadIdx.x; first < end; first += kInFlightExtreme * lanes) {
      Extreme<A> in[kInFlightExtreme];
#pragma unroll
      for (int k = 0; k < kInFlightExtreme; ++k) {
        const int64_t i = first + k * lanes;
        in[k] = {};
        if (i >= end) continue;
        in[k].index = shape.candidates == nullptr ? i : shape.candidates[row * shape.n + i];
        in[k].value = widen(from[in[k].index * shape.stride]);
      }
#pragma unroll
      for (const Extreme<A>& candidate : in) best.add(candidate, shape.largest);
    }
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) best.add(best.from_lane(step), shape.largest);
    if (lanes > kWarp) {
      if (threadIdx.x % kWarp == 0) values[warp] = best.value, indices[warp] = best.index;
      __syncthreads();
      for (int w = 0; w < lanes / kWarp; ++w) best.add({values[w], indices[w]}, shape.largest);
      __syncthreads();
    }
    if (threadIdx.x == 0) found[task] = best.index;
  }
}

/// For rows that lie side by side: a lane to a row, so that neighbouring rows are read together.
constexpr int kAcross = 32, kAlong = 8;
template <class T>
__global__ void __launch_bounds__(kAcross* kAlong) find_extreme_across(ExtremeRows shape, const T* x, int64_t* found) {
  using A = Accumulate<T>;
  __shared__ A values[kAlong][kAcross];
  __shared__ int64_t indices[kAlong][kAcross];
  for (int64_t begin = static_cast<int64_t>(blockIdx.x) * kAcross; begin < shape.rows;
       begin += static_cast<int64_t>(gridDim.x) * kAcross) {
    const int64_t row = begin + threadIdx.x;
    Extreme<A> best{};
    for (int64_t i = threadIdx.y; row < shape.rows && i < shape.n; i += kAlong) {
      best.add({widen(x[row * shape.row_stride + i * shape.stride]), i}, shape.largest);
    }
    values[threadIdx.y][threadIdx.x] = best.value;
    indices[threadIdx.y][threadIdx.x] = best.index;
    __syncthreads();
    for (int k = 0; k < kAlong; ++k) best.add({values[k][threadIdx.x], indices[k][threadIdx.x]}, shape.largest);
    __syncthreads();
    if (threadIdx.y == 0 && row < shape.rows) found[row] = best.index;
  }
}

template <class T>
__global__ void pick_elements(int64_t rows, T* y, const T* x, int64_t row_stride, int64_t stride,
                              const int64_t* index) {
  for (int64_t r = thread_index(); r < rows; r += thread_count()) y[r] = x[r * row_stride + index[r] * stride];
}

/// 16 elements to a thread, which is one store where the mask is aligned.
constexpr int kMarks = 16;
__global__ void mark_elements(const int64_t* index, bool* mask, int64_t count, int64_t n, bool aligned) {
  for (int64_t i = thread_index(); i * kMarks < count; i += thread_count()) {
    const int64_t first = i * kMarks;
    int64_t row = first / n, column = first % n, marked = index[row];
    Pack<bool, kMarks> out;
#pragma unroll
    for (int k = 0; k < kMarks; ++k, ++column) {
      if (column == n && first + k < count) {
        column = 0;
        marked = index[++row];
      }
      out.at[k] = column == marked;
    }
    if (aligned && first + kMarks <= count) {
      cuda::store_pack(mask + first, out);
    } else {
#pragma unroll
      for (int k = 0; k < kMarks; ++k) {
        if (first + k < count) mask[first + k] = out.at[k];
      }
    }
  }
}

}  // namespace

void sum_over(Cuda device, const StridedView& y, const StridedView& x, double divisor) {
  const SumShape shape(y, x);
  const Strided<1> results(shape.kept, {&shape.kept_y}), terms(shape.summed, {&shape.summed_x});
  if (results.count == 0) return;
  dispatch_float(y.dtype, "sum", [&]<class T>() {
    const T* from = static_cast<const T*>(x.data);
    const SumOutput<T> out{.y = static_cast<T*>(y.data), .divisor = divisor};
    const Strided<2> kept(shape.kept, {&shape.kept_y, &shape.kept_x});
    if (!shape.side_by_side())
      return start_row_sums<T>(device, {.outputs = kept, .terms = terms, .packs = 0}, from, out, results);
    // The columns are what the innermost of the merged dimensions holds.
    const int last = kept.rank - 1;
    cuda::ColumnSums sums{
        .matrices = kept, .rows = terms, .columns = kept.sizes[last], .step = kept.strides[0][last], .tiles = 0};
    sums.matrices.rank = last;
    sums.matrices.count = kept.count / sums.columns;
    cuda::start_column_sums(device, sums, from, out, results);
  });
}

void extreme_index(Cuda device, const StridedView& x, bool largest, int64_t* index) {
  ExtremeRows shape{.rows = x.shape[0],
                    .n = x.shape[1],
                    .row_stride = x.strides[0],
                    .stride = x.strides[1],
                    .pieces = 1,
                    .candidates = nullptr,
                    .largest = largest};
  if (shape.rows == 0 || shape.n == 0) return;
  dispatch_float(x.dtype, largest ? "max" : "min", [&]<class T>() {
    const T* from = static_cast<const T*>(x.data);
    constexpr int64_t kMostBlocks = 1 << 20;
    if (shape.row_stride < shape.stride && shape.rows >= kAcross) {
      const auto blocks = static_cast<unsigned>(std::min<int64_t>(divide_up(shape.rows, kAcross), kMostBlocks));
      return start(device, {blocks, dim3(kAcross, kAlong)}, find_extreme_across<T>, shape, from, index);
    }
    const auto run = [&](const ExtremeRows& rows, int64_t* found) {
      const bool small = rows.n <= kWarp * kInFlightExtreme;
      const unsigned groups = small ? kThreads / kWarp : 1;
      const auto blocks =
          static_cast<unsigned>(std::min<int64_t>(divide_up(rows.rows * rows.pieces, groups), kMostBlocks));
      start(device, {blocks, dim3(small ? kWarp : kThreads, groups)}, find_extreme<T>, rows, from, found);
    };
    // Long rows that are too few for the device are cut, and the pieces' extremes compared in a second step.
    constexpr int64_t kPiece = int64_t{1} << 14;
    shape.pieces = std::clamp<int64_t>(cuda::kSumBlocks / shape.rows, 1, divide_up(shape.n, kPiece));
    shape.pieces = divide_up(shape.n, divide_up(shape.n, shape.pieces));
    if (shape.pieces == 1) return run(shape, index);
    auto* found = static_cast<int64_t*>(cuda::current_context().workspace);
    run(shape, found);
    shape.n = shape.pieces;
    shape.pieces = 1;
    shape.candidates = found;
    run(shape, index);
  });
}

void pick(Cuda device, const StridedView& y, const StridedView& x, const int64_t* index) {
  const int64_t rows = x.shape[0];
  if (rows == 0) return;
  dispatch_float(x.dtype, "max", [&]<class T>() {
    start(device, grid_for(rows), pick_elements<T>, rows, static_cast<T*>(y.data), static_cast<const T*>(x.data),
          x.strides[0], x.strides[1], index);
  });
}

void mark(Cuda device, const int64_t* index, bool* mask, int64_t rows, int64_t n) {
  const int64_t count = rows * n;
  if (count == 0) return;
  start(device, grid_for(divide_up(count, kMarks)), mark_elements, index, mask, count, n,
        cuda::packs_fit<kMarks>(mask));
}

}  // namespace weft
