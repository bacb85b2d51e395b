#pragma once
#include <vector>

#include "core/random.h"
#include "core/tensor.h"

namespace weft {

/// Dropout (Srivastava et al. 2014), scaled so that the expectation is x.
///
///   y[i] = stream.bits(first + i) >= round(p * 2^32) ? x[i] / (1 - p) : 0      (i counts elements in row-major order)
///
/// The mask is a pure function of the stream: equal on every device, for any number of threads and any division of a
/// tensor into parts that says where its elements start.
///
/// @param x         any shape, any float dtype
/// @param p         probability of zero, in [0, 1)
/// @param stream    whose bits make the mask; take a new name or step for each use
/// @param training  false: x itself comes back, as it does for p = 0
/// @param first     number of x's first element in the stream, for a part of a larger tensor
/// @param step      if defined, f64 [1] on x's device: the stream's step, read when the mask is made, so that recorded
///                  work (core/backend.h) draws the masks of the step that runs; a whole number below 2^53
/// @return          shape and dtype of x; the product is computed in f32 (f64 for f64) and rounded once
/// @throws Error  kValue unless 0 <= p < 1; kDType; kDevice for a step elsewhere.
/// Differentiable any number of times. Saved for backward: step alone; the mask is made again.
Tensor dropout(const Tensor& x, double p, RandomStream stream, bool training = true, uint64_t first = 0,
               const Tensor& step = {});

/// Elements of a tensor that follow each other, and so do their numbers in a stream.
struct StreamRun {
  int64_t count = 0;
  uint64_t first = 0;  ///< number of the first one
};

/// dropout() of a part of a larger tensor that has several pieces of it, one after the other: x's elements in row-major
/// order are those of the runs. On CUDA, a kernel for each run.
/// @throws Error  kShape if the runs' counts do not add up to x's elements or one is negative.
Tensor dropout(const Tensor& x, double p, RandomStream stream, bool training, const std::vector<StreamRun>& runs,
               const Tensor& step = {});

}  // namespace weft
