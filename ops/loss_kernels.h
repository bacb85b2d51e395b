#pragma once
#include <cstdint>

#include "core/dtype.h"
#include "ops/launch.h"

namespace weft {

/// Rows of logits, row-major [rows, classes] without gaps, and their targets.
struct LossTargets {
  const int64_t* targets;  ///< [rows], each a class or `ignored`
  int64_t rows, classes;
  int64_t ignored;
};

/// lse[n] = ln(sum_v exp(logits[n, v])), loss[n] = lse[n] - logits[n, target]; both 0 for ignored rows. lse may be
/// null. A NaN among the logits gives NaN.
template <class T>
void loss_forward(Cpu, const LossTargets& targets, const T* logits, Accumulate<T>* lse, double* loss);

/// dlogits[n, v] = (exp(logits[n, v] - lse[n]) - [v = target]) * scale; 0 for ignored rows.
template <class T>
void loss_backward(Cpu, const LossTargets& targets, const T* logits, const Accumulate<T>* lse, double scale,
                   T* dlogits);

/// Both in one, in place: f32 or f64 logits are overwritten with their gradient as elements of T, which is as wide or
/// narrower: row n starts where the logits' row n does.
template <class T>
void loss_in_place(Cpu, const LossTargets& targets, Accumulate<T>* logits, double scale, double* loss);

/// out = scale * x (+ out), rounded once.
template <class T>
void scale_to(Cpu, const Accumulate<T>* x, int64_t count, double scale, T* out, bool accumulate);

}  // namespace weft
