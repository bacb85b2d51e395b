#include "ops/loss_targets.h"

#include <cmath>

namespace weft {

Tensor checked_targets(const char* op, const Tensor& x, const Tensor& targets, const CrossEntropyOptions& options) {
  if (targets.dtype() != DType::i64 && targets.dtype() != DType::i32) {
    fail(ErrorKind::kDType, op, "targets must be i64 or i32, got ", targets.describe());
  }
  if (targets.device() != x.device()) {
    fail(ErrorKind::kDevice, op, "tensors must be on one device, got ", x.describe(), " on ", x.device(),
         " and targets ", targets.describe(), " on ", targets.device());
  }
  Shape rows = x.shape();
  if (x.rank() > 0) rows.erase(x.rank() - 1);
  if (x.rank() < 1 || !(targets.shape() == rows)) {
    fail(ErrorKind::kShape, op, "needs [..., n] and targets [...], got ", x.describe(), " and targets ",
         targets.describe());
  }
  if (!(options.valid_tokens >= 0) || !std::isfinite(options.valid_tokens)) {
    fail(ErrorKind::kValue, op, "valid_tokens must be a finite number >= 0, got ", options.valid_tokens);
  }
  if (options.reduction == Reduction::kSum && options.valid_tokens > 0) {
    fail(ErrorKind::kValue, op, "valid_tokens (", options.valid_tokens,
         ") is what a mean divides by; the reduction is a sum");
  }
  if (const Tensor& at = options.valid_tokens_at; at.defined()) {
    if (at.device() != x.device() || at.numel() != 1) {
      fail(ErrorKind::kDevice, op, "valid_tokens_at must be one element on ", x.device(), ", got ", at.describe(),
           " on ", at.device());
    }
    if (options.reduction == Reduction::kSum)
      fail(ErrorKind::kValue, op, "valid_tokens_at is what a mean divides by; the reduction is a sum");
  }
  return targets.to(DType::i64).contiguous();
}

KnownDenominator known_denominator(const CrossEntropyOptions& options) {
  if (options.reduction == Reduction::kSum) return {1};
  return {options.valid_tokens, options.valid_tokens_at.defined() ? options.valid_tokens_at.data<double>() : nullptr};
}

void loss_denominator(Cpu, const char* op, const LossTargets& t, const KnownDenominator& given, double* denominator) {
  const double known = given.at == nullptr ? given.value : *given.at;
  int64_t valid = 0;
  for (int64_t row = 0; row < t.rows; ++row) {
    const int64_t target = t.targets[row];
    if (target == t.ignored) continue;
    if (target < 0 || target >= t.classes) {
      fail(ErrorKind::kIndex, op, "the target of row ", row, " is ", target, " but must be from 0 to ", t.classes - 1,
           " (or ignore_index, ", t.ignored, ")");
    }
    ++valid;
  }
  if (known <= 0 && valid == 0) {
    fail(ErrorKind::kValue, op, "the mean is over valid tokens, but none of the ", t.rows,
         " targets is valid (ignore_index is ", t.ignored,
         "). Hint: Reduction::kSum, or valid_tokens of the whole batch");
  }
  *denominator = known > 0 ? known : static_cast<double>(valid);
}

template <class A>
void reduce_losses(Cpu, const double* losses, int64_t rows, const double* denominator, A* out) {
  double sum = 0;
  for (int64_t row = 0; row < rows; ++row) sum += losses[row];
  *out = static_cast<A>(sum / *denominator);
}
template void reduce_losses(Cpu, const double*, int64_t, const double*, float*);
template void reduce_losses(Cpu, const double*, int64_t, const double*, double*);

}  // namespace weft
