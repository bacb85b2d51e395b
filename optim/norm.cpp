#include "optim/norm.h"

#include <algorithm>
#include <cmath>

#include "core/autograd.h"
#include "core/thread_pool.h"
#include "optim/adam_kernel.h"

namespace weft::optim {
namespace {

/// Elements of a piece of work: some ten microseconds of reading.
constexpr int64_t kPiece = 1 << 16;

/// The gradient as the kernels take it: contiguous f32 or f64.
Tensor readable(const Tensor& gradient) {
  const autograd::NoGrad no_grad;
  return gradient.dtype() == DType::f64 ? gradient.contiguous() : gradient.to(DType::f32).contiguous();
}

double squares_of(const Tensor& gradient, int64_t begin, int64_t end) {
  return gradient.dtype() == DType::f64 ? sum_of_squares(end - begin, gradient.data<double>() + begin)
                                        : sum_of_squares(end - begin, gradient.data<float>() + begin);
}

/// Adds in f64, for values whose squares overflow f32; throws at the first that is not finite.
double careful_squares(const Parameter& parameter, const Tensor& gradient) {
  const std::vector<double> values = gradient.to_vector<double>();
  double total = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    if (!std::isfinite(values[i])) {
      fail(ErrorKind::kValue, "grad_norm", "the gradient of ", quoted(parameter.name), " (", gradient.describe(), ") is ", values[i],
           " at element ", grouped(static_cast<int64_t>(i)), "; the step was not taken. Hint: a lower learning rate, more warm-up or clipping");
    }
    total += values[i] * values[i];
  }
  return total;
}

}  // namespace

double grad_norm(const Parameters& parameters, NormReducer& reducer) {
  struct Piece {
    size_t parameter;
    int64_t begin, end;
  };
  std::vector<Tensor> gradients(parameters.size());
  std::vector<Piece> pieces;
  for (size_t p = 0; p < parameters.size(); ++p) {
    const Tensor gradient = parameters[p].tensor.grad();
    if (!gradient.defined()) continue;
    gradients[p] = readable(gradient);
    for (int64_t begin = 0; begin < gradient.numel(); begin += kPiece) {
      pieces.push_back({p, begin, std::min(gradient.numel(), begin + kPiece)});
    }
  }
  if (DryRun::active()) return 0;
  std::vector<double> partial(pieces.size());
  parallel_tasks(static_cast<int64_t>(pieces.size()), [&](int64_t i) {
    const Piece& piece = pieces[static_cast<size_t>(i)];
    partial[static_cast<size_t>(i)] = squares_of(gradients[piece.parameter], piece.begin, piece.end);
  });
  std::vector<double> squares(parameters.size(), 0.0);
  for (size_t i = 0; i < pieces.size(); ++i) squares[pieces[i].parameter] += partial[i];
  for (size_t p = 0; p < parameters.size(); ++p) {
    if (!std::isfinite(squares[p])) squares[p] = careful_squares(parameters[p], gradients[p]);
  }
  reducer.reduce(squares, parameters);
  double total = 0;
  for (const double square : squares) total += square;
  return std::sqrt(total);
}

double grad_norm(const Parameters& parameters) {
  LocalNorms local;
  return grad_norm(parameters, local);
}

double clip_factor(double norm, double max_norm) {
  if (!(max_norm > 0)) fail(ErrorKind::kValue, "clip_factor", "the largest norm must be positive, got ", max_norm);
  return norm > max_norm ? max_norm / norm : 1.0;
}

double clip_grad_norm(const Parameters& parameters, double max_norm, NormReducer& reducer) {
  const double norm = grad_norm(parameters, reducer);
  const double factor = clip_factor(norm, max_norm);
  if (factor == 1.0 || DryRun::active()) return norm;
  for (const Parameter& parameter : parameters) {
    const Tensor gradient = parameter.tensor.grad();
    if (!gradient.defined()) continue;
    gradient.begin_change("clip_grad_norm");
    if (!gradient.is_contiguous()) fail(ErrorKind::kValue, "clip_grad_norm", "the gradient of ", quoted(parameter.name), " is not contiguous");
    dispatch_float(gradient.dtype(), "clip_grad_norm", [&]<class T>() {
      T* g = gradient.data<T>();
      parallel_for(gradient.numel(), kPiece, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) g[i] = T(static_cast<Accumulate<T>>(g[i]) * static_cast<Accumulate<T>>(factor));
      });
    });
  }
  return norm;
}

double clip_grad_norm(const Parameters& parameters, double max_norm) {
  LocalNorms local;
  return clip_grad_norm(parameters, max_norm, local);
}

}  // namespace weft::optim
