#include "ops/column_sum.h"

#include "cuda/column_sum.cuh"

namespace weft {

template <class T>
void column_sum(Cuda device, const T* x, int64_t rows, int64_t columns, int64_t row_stride, T* out, bool accumulate) {
  if (columns == 0) return;
  const Strides one{1}, down{row_stride};
  cuda::start_column_sums(
      device,
      {.matrices = {Shape{}, {&one, &one}}, .rows = {Shape{rows}, {&down}}, .columns = columns, .step = 1, .tiles = 0},
      x, cuda::SumOutput<T>{.y = out, .accumulate = accumulate}, {Shape{columns}, {&one}});
}

template void column_sum(Cuda, const float*, int64_t, int64_t, int64_t, float*, bool);
template void column_sum(Cuda, const double*, int64_t, int64_t, int64_t, double*, bool);

}  // namespace weft
