#pragma once
#include <functional>
#include <optional>

#include "core/tensor.h"

namespace weft {

enum class Reduction : uint8_t {
  kMean,  ///< sum of the tokens' losses over the number of valid tokens
  kSum,   ///< sum of the tokens' losses
};

struct CrossEntropyOptions {
  int64_t ignore_index = -100;  ///< rows with this target count neither in the sum nor among the valid tokens
  Reduction reduction = Reduction::kMean;
  /// If positive, the mean divides by this number instead of the valid tokens of this call: with the count of the whole
  /// batch, the losses and gradients of its micro-batches add up to those of the batch, however ragged they are.
  double valid_tokens = 0;
  /// If defined, f64 [1] on the device of the input: the number that stands for valid_tokens, read when the loss is
  /// computed, so that recorded work (core/backend.h) divides by that of the step that runs.
  Tensor valid_tokens_at = {};
};

/// Cross-entropy of a softmax with one class per row.
///
///   loss = sum_n (ln(sum_v exp(logits[n, v])) - logits[n, targets[n]]) / valid,   n over rows with a valid target
///
/// @param logits   [..., V], V >= 1, any float dtype
/// @param targets  [...], the shape of logits without its last dimension, i64 or i32; each in [0, V) or ignore_index
/// @return         shape [], f32 (f64 for f64). A row's sum is accumulated in f32 (f64 for f64), rows in f64 in order.
/// @throws Error   kIndex naming the first row whose target is no class; kShape; kDType; kValue if the mean is over no
///                 valid token (the sum over none is 0) or valid_tokens is not a finite number >= 0 or not used by the
///                 reduction.
/// Saved for backward: logits, targets and the logarithm of the sum per row; probabilities are computed again.
Tensor cross_entropy(const Tensor& logits, const Tensor& targets, const CrossEntropyOptions& options = {});

/// Which classes the rows of a head's weight are, where other processes have the others.
struct ClassSlice {
  int64_t first = 0;  ///< number of the weight's row 0
  int64_t all = 0;    ///< number of classes of all processes
  int64_t most = 0;   ///< largest number of classes that a process has
  /// f64 [n, 2] of every process, joined along dimension 0 in the same order on each. Called once for each chunk.
  std::function<Tensor(const Tensor&)> gather = {};
};

struct LinearCrossEntropyOptions : CrossEntropyOptions {
  /// Rows whose logits are held at a time; 0: linear_cross_entropy_rows(). Values agree to rounding whatever it is.
  int64_t chunk_rows = 0;
  /// If given, the weight has some of the classes only. The loss is that of all, equal on every process; the gradient
  /// of the weight is that of its rows; the gradient of x is what these classes contribute, which the caller adds up
  /// over the processes. Targets are numbers among all classes.
  std::optional<ClassSlice> slice = {};
};

/// The language-model head: cross_entropy(x W^T, targets) without a tensor of all logits.
///
/// Rows are taken in chunks. A chunk's logits become its gradient in the place where they are; with it the products
/// that give dx and dW are formed at once, in the forward pass (as in Liger-Kernel, Hsu et al. 2024), so that nothing
/// is computed twice and the backward pass only scales by the incoming gradient. If all rows fit one chunk, the
/// gradient of the logits is kept instead, and the backward pass forms the products straight into the leaf's gradient.
///
/// @param x        [..., C], any float dtype
/// @param weight   [V, C], dtype of x, V >= 1
/// @param targets  [...], the shape of x without its last dimension, i64 or i32; each in [0, V) or ignore_index
/// @return         shape [], f32 (f64 for f64); logits are f32 (f64 for f64) and their gradient is rounded to bf16 for
///                 bf16 inputs. f16 is computed in f32.
/// @throws Error   as cross_entropy(); kValue for a negative chunk_rows.
/// Saved for backward: one chunk: x, weight and the gradient of the logits [N, V]; several: dx [N, C] and dW [V, C] in
/// f32 (f64 for f64).
///
/// With a slice of the classes, each process makes ln(sum exp) of its logits of a row and, if it has the row's target,
/// that logit; these two numbers of every row and process are all that they exchange, and each takes the same logarithm
/// of the same sum of them. All call it with equal rows, targets and chunk_rows (which by default goes by the most
/// classes that a process has).
Tensor linear_cross_entropy(const Tensor& x, const Tensor& weight, const Tensor& targets,
                            const LinearCrossEntropyOptions& options = {});

/// Rows of a chunk for N rows, C channels and V classes: as many as have 16 MiB of f32 logits, but at least 256, below
/// which the products lose speed; and all N if their logits take no more memory than a chunk and dW would.
int64_t linear_cross_entropy_rows(int64_t rows, int64_t channels, int64_t classes);

}  // namespace weft
