#pragma once
// Sums over the rows of matrices: the bias gradient, and every sum whose terms are further apart than its neighbours.
// Each element is read once. Up to four rows at a time are added in f32, their totals in f64, which costs a fraction of
// the time that the memory takes.
#include <algorithm>
#include <bit>
#include <cstdint>

#include "cuda/context.h"
#include "cuda/device.cuh"
#include "cuda/launch.cuh"
#include "cuda/strided.cuh"

namespace weft::cuda {

/// Where sums go: y (+)= total / divisor, rounded once.
template <class T>
struct SumOutput {
  T* y;
  double divisor = 1;
  bool accumulate = false;
  __device__ void put(int64_t at, double total) const {
    if (divisor != 1) total /= divisor;
    if (accumulate) total += static_cast<double>(widen(y[at]));
    y[at] = narrow<T>(static_cast<Accumulate<T>>(total));
  }
};

/// Blocks with which a sum fills the device; a constant, so that the order of additions is a function of the shape.
inline constexpr int64_t kSumBlocks = 1056;

/// The f64 sums of the pieces into which the terms of each of `outputs` results are cut, [pieces, outputs]. They lie in
/// the memory that all work on the device's stream shares, of which they need a few MiB at most: what is queued behind
/// the kernel that adds them up may use it for itself.
inline double* piece_sums() { return static_cast<double*>(current_context().workspace); }

template <class T>
__global__ void add_pieces(const __grid_constant__ Strided<1> outputs, int64_t pieces, const double* sums,
                           SumOutput<T> out) {
  for (int64_t i = thread_index(); i < outputs.count; i += thread_count()) {
    double total = 0;
#pragma unroll 8
    for (int64_t p = 0; p < pieces; ++p) total += sums[p * outputs.count + i];
    int64_t at[1];
    outputs.offsets(i, at);
    out.put(at[0], total);
  }
}

/// Matrices whose rows are added up: matrix m begins at matrices.offsets(m)[1], its results at [0].
struct ColumnSums {
  Strided<2> matrices;
  Strided<1> rows;
  int64_t columns;
  int64_t step;   ///< from a column's result to the next one's
  int64_t tiles;  ///< in which the columns of a matrix are cut
  int64_t pieces = 1, piece_rows = 0;
};

inline constexpr int kSumThreads = 512;

/// A block adds up one piece of the rows of one tile of columns: threadIdx.x counts packs of columns, threadIdx.y rows.
/// Without kAligned a pack is read element by element; kFlat is for rows at one stride.
template <class From, class To, int kCount, bool kAligned, bool kFlat>
__global__ void __launch_bounds__(kSumThreads, kFlat ? 2 : 1)
    sum_columns(const __grid_constant__ ColumnSums shape, const From* x, SumOutput<To> out, double* sums) {
  using A = Accumulate<From>;
  constexpr int kRows = kFlat ? 4 : 2;  // on their way at once
  const int lanes = static_cast<int>(blockDim.x), groups = static_cast<int>(blockDim.y);
  const int64_t work = shape.matrices.count * shape.tiles * shape.pieces;
  double* const shared = dynamic_shared<double>();  // [groups, lanes, kCount]
  for (int64_t block = blockIdx.x; block < work; block += gridDim.x) {
    const int64_t tile = block % shape.tiles, piece = block / shape.tiles % shape.pieces,
                  matrix = block / shape.tiles / shape.pieces;
    int64_t origin[2];
    shape.matrices.offsets(matrix, origin);
    const int64_t first_column = tile * lanes * kCount,
                  column = first_column + static_cast<int64_t>(threadIdx.x) * kCount;
    const int64_t end = piece + 1 == shape.pieces ? shape.rows.count : (piece + 1) * shape.piece_rows;
    double totals[kCount] = {};
    if (column < shape.columns) {
      const From* from = x + origin[1] + column;
      for (int64_t row = piece * shape.piece_rows + threadIdx.y; row < end; row += kRows * groups) {
        Pack<From, kCount> in[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          in[r] = {};
          if (row + r * groups >= end) continue;
          int64_t at[1];
          if constexpr (kFlat)
            at[0] = (row + r * groups) * shape.rows.strides[0][0];
          else
            shape.rows.offsets(row + r * groups, at);
          if constexpr (kAligned) {
            in[r] = load_pack<kCount>(from + at[0]);
          } else {
#pragma unroll
            for (int e = 0; e < kCount; ++e) in[r].at[e] = from[at[0] + e];
          }
        }
#pragma unroll
        for (int e = 0; e < kCount; ++e) {
          A sum = widen(in[0].at[e]);
#pragma unroll
          for (int r = 1; r < kRows; ++r) sum += widen(in[r].at[e]);
          totals[e] += static_cast<double>(sum);
        }
      }
    }
#pragma unroll
    for (int e = 0; e < kCount; ++e) shared[(threadIdx.y * lanes + threadIdx.x) * kCount + e] = totals[e];
    __syncthreads();
    const int width = lanes * kCount;
    for (int c = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
         c < width && first_column + c < shape.columns; c += lanes * groups) {
      double total = shared[c];
      for (int g = 1; g < groups; ++g) total += shared[g * width + c];
      if (sums == nullptr) {
        out.put(origin[0] + (first_column + c) * shape.step, total);
      } else {
        sums[(piece * shape.matrices.count + matrix) * shape.columns + first_column + c] = total;
      }
    }
    __syncthreads();
  }
}

/// `results` are all results, of one matrix after the other: where they lie.
template <class From, class To>
void start_column_sums(Cuda device, ColumnSums shape, const From* x, const SumOutput<To>& out,
                       const Strided<1>& results) {
  const int64_t rows = shape.rows.count, elements = shape.matrices.count * rows * shape.columns;
  // Packs only where the shape allows them: the order of additions is not to depend on where x lies.
  bool packs = shape.columns % kFull<From> == 0;
  for (int d = 0; d < shape.rows.rank; ++d) packs = packs && shape.rows.strides[0][d] % kFull<From> == 0;
  for (int d = 0; d < shape.matrices.rank; ++d) packs = packs && shape.matrices.strides[1][d] % kFull<From> == 0;
  const int64_t count = packs ? kFull<From> : 1;
  // A line of 128 bytes across, or a whole warp's 512 where there is enough to do for all; the other threads go down.
  constexpr int64_t kLarge = int64_t{1} << 22;
  const auto lanes = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(
      std::min<int64_t>(divide_up(shape.columns, count), packs && elements < kLarge ? 8 : kWarp))));
  const auto wanted =
      static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(std::max<int64_t>(1, divide_up(rows, 4)))));
  const int64_t groups = std::clamp<int64_t>(wanted, kWarp / lanes, kSumThreads / lanes);
  shape.tiles = divide_up(shape.columns, lanes * count);
  const int64_t blocks = shape.matrices.count * shape.tiles;
  shape.pieces = std::clamp<int64_t>(kSumBlocks / blocks, 1, std::max<int64_t>(1, rows / (groups * 16)));
  shape.piece_rows = divide_up(rows, shape.pieces);
  shape.pieces = std::max<int64_t>(1, divide_up(rows, std::max<int64_t>(1, shape.piece_rows)));
  double* sums = shape.pieces == 1 ? nullptr : piece_sums();
  const Grid grid{static_cast<unsigned>(std::min<int64_t>(blocks * shape.pieces, int64_t{1} << 20)),
                  dim3(static_cast<unsigned>(lanes), static_cast<unsigned>(groups)),
                  static_cast<size_t>(lanes * groups * count) * sizeof(double)};
  const auto run = [&]<bool kFlat>() {
    if (!packs) {
      start(device, grid, sum_columns<From, To, 1, true, kFlat>, shape, x, out, sums);
    } else if (packs_fit<kFull<From>>(x)) {
      start(device, grid, sum_columns<From, To, kFull<From>, true, kFlat>, shape, x, out, sums);
    } else {
      start(device, grid, sum_columns<From, To, kFull<From>, false, kFlat>, shape, x, out, sums);
    }
  };
  shape.rows.rank <= 1 ? run.template operator()<true>() : run.template operator()<false>();
  if (sums != nullptr)
    start(device, grid_for(results.count), add_pieces<To>, results, shape.pieces, static_cast<const double*>(sums),
          out);
}

}  // namespace weft::cuda
