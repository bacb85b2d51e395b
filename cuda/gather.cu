// Gather: an element to a thread forward, a line to a thread backward.
#include <span>

#include "cuda/device.cuh"
#include "cuda/fault.cuh"
#include "cuda/launch.cuh"
#include "cuda/strided.cuh"
#include "ops/index_kernels.h"

namespace weft {
namespace {

using cuda::grid_for;
using cuda::is_inside;
using cuda::start;
using cuda::Strided;
using cuda::thread_count;
using cuda::thread_index;
using cuda::widen;

/// The index's elements and where in x, along dim, they begin.
Strided<1> starts_of(const GatherLines& lines) {
  const auto rank = static_cast<size_t>(lines.rank);
  Strides strides{std::span(lines.strides, rank)};
  strides[lines.dim] = 0;
  return Strided<1>(Shape{std::span(lines.sizes, rank)}, {&strides});
}

/// The lines: where in x and in the index they begin.
Strided<2> lines_of(const GatherLines& lines) {
  const auto rank = static_cast<size_t>(lines.rank);
  Shape shape{std::span(lines.sizes, rank)};
  const Strides strides{std::span(lines.strides, rank)}, own = contiguous_strides(shape);
  shape[lines.dim] = 1;
  return Strided<2>(shape, {&strides, &own});
}

template <class Word>
__global__ void gather_elements(const __grid_constant__ Strided<1> starts, const int64_t* index, int64_t length,
                                int64_t stride, const Word* x, Word* y) {
  for (int64_t i = thread_index(); i < starts.count; i += thread_count()) {
    int64_t offset[1];
    starts.offsets(i, offset);
    const int64_t at = index[i];
    if (is_inside(at, length)) y[i] = x[offset[0] + at * stride];
  }
}

/// A thread to a line: no two lines share an element of x.
template <class T>
__global__ void scatter_lines(const __grid_constant__ Strided<2> lines, const int64_t* __restrict__ index,
                              int64_t count, int64_t inner, int64_t length, int64_t stride, const T* __restrict__ dy,
                              Accumulate<T>* __restrict__ dx) {
  for (int64_t line = thread_index(); line < lines.count; line += thread_count()) {
    int64_t offset[2];
    lines.offsets(line, offset);
#pragma unroll 4
    for (int64_t j = 0; j < count; ++j) {
      const int64_t from = offset[1] + j * inner, at = index[from];
      if (is_inside(at, length)) dx[offset[0] + at * stride] += widen(dy[from]);
    }
  }
}

}  // namespace

void gather_forward(Cuda device, const GatherLines& lines, const void* x, int size, void* y) {
  const Strided<1> starts = starts_of(lines);
  if (starts.count == 0) return;
  const auto elements = [&]<class Word>() {
    start(device, grid_for(starts.count), gather_elements<Word>, starts, lines.index, lines.length, lines.stride,
          static_cast<const Word*>(x), static_cast<Word*>(y));
  };
  dispatch_bytes(size, elements);
}

template <class T>
void gather_backward(Cuda device, const GatherLines& lines, const T* dy, Accumulate<T>* dx) {
  const Strided<2> starts = lines_of(lines);
  if (starts.count == 0 || lines.count == 0) return;
  start(device, grid_for(starts.count), scatter_lines<T>, starts, lines.index, lines.count, lines.inner, lines.length,
        lines.stride, dy, dx);
}

#define WEFT_GATHER_INSTANCE(T) template void gather_backward(Cuda, const GatherLines&, const T*, Accumulate<T>*);
WEFT_GATHER_INSTANCE(float)
WEFT_GATHER_INSTANCE(double)
WEFT_GATHER_INSTANCE(Half)
WEFT_GATHER_INSTANCE(BFloat16)
#undef WEFT_GATHER_INSTANCE

}  // namespace weft
