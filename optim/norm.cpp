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

/// Below this a sum of squares in f32 may have lost some of them to underflow: what is lost is at most 2^-150 each.
constexpr double kUnderflow = 1e-30;

struct Piece {
  size_t parameter;
  int64_t begin, end;
};

/// The gradient as the kernels take it: contiguous f32 or f64.
Tensor readable(const Parameter& parameter) {
  const Tensor gradient = parameter.tensor.grad();
  if (!gradient.defined()) return gradient;
  if (gradient.device().kind != DeviceKind::cpu) {
    fail(ErrorKind::kDevice, "grad_norm", "reads gradients on the CPU; the gradient of ", quoted(parameter.name),
         " is on ", gradient.device());
  }
  const autograd::NoGrad no_grad;
  const MemoryScope scope(MemoryCategory::workspace);
  return gradient.dtype() == DType::f64 ? gradient.contiguous() : gradient.to(DType::f32).contiguous();
}

double squares_of(const Tensor& gradient, int64_t begin, int64_t end) {
  return gradient.dtype() == DType::f64 ? sum_of_squares(end - begin, gradient.data<double>() + begin)
                                        : sum_of_squares(end - begin, gradient.data<float>() + begin);
}

/// In f64 throughout, for values whose squares overflow or underflow f32.
double careful_squares(const Tensor& gradient, int64_t begin, int64_t end) {
  return dispatch_float(gradient.dtype(), "grad_norm", [&]<class T>() {
    const T* g = gradient.data<T>();
    double total = 0;
    for (int64_t i = begin; i < end; ++i) total += static_cast<double>(g[i]) * static_cast<double>(g[i]);
    return total;
  });
}

/// Says what is wrong with a gradient whose sum of squares is not finite.
[[noreturn]] void report(const Parameter& parameter) {
  const Tensor gradient = parameter.tensor.grad();
  if (gradient.defined()) {
    const std::vector<double> values = gradient.to_vector<double>();
    for (size_t i = 0; i < values.size(); ++i) {
      if (std::isfinite(values[i])) continue;
      fail(ErrorKind::kValue, "grad_norm", "the gradient of ", quoted(parameter.name), " (", gradient.describe(),
           ") is ", values[i], " at element ", grouped(static_cast<int64_t>(i)),
           "; the step was not taken. Hint: a lower learning rate, more warm-up or clipping");
    }
  }
  fail(ErrorKind::kValue, "grad_norm", "the squares of the gradient of ", quoted(parameter.name), " (",
       parameter.tensor.describe(),
       ") do not add up to a finite number, here or in another part of it; the step was not taken");
}

}  // namespace

double grad_norm(const Parameters& parameters, NormReducer& reducer) {
  std::vector<Tensor> gradients;
  std::vector<Piece> pieces;
  for (size_t p = 0; p < parameters.size(); ++p) {
    gradients.push_back(readable(parameters[p]));
    if (!gradients[p].defined()) continue;
    for (int64_t begin = 0; begin < gradients[p].numel(); begin += kPiece) {
      pieces.push_back({p, begin, std::min(gradients[p].numel(), begin + kPiece)});
    }
  }
  if (DryRun::active()) return 0;
  std::vector<double> partial(pieces.size());
  parallel_tasks(static_cast<int64_t>(pieces.size()), [&](int64_t i) {
    const auto& [p, begin, end] = pieces[static_cast<size_t>(i)];
    double sum = squares_of(gradients[p], begin, end);
    if (!(sum >= kUnderflow && std::isfinite(sum))) sum = careful_squares(gradients[p], begin, end);
    partial[static_cast<size_t>(i)] = sum;
  });
  std::vector<double> squares(parameters.size(), 0.0);
  for (size_t i = 0; i < pieces.size(); ++i) squares[pieces[i].parameter] += partial[i];
  const std::vector<double> own = squares;
  reducer.reduce(squares, parameters);
  for (size_t p = 0; p < parameters.size(); ++p) {
    if (!std::isfinite(own[p])) report(parameters[p]);
  }
  double total = 0;
  for (size_t p = 0; p < parameters.size(); ++p) {
    total += squares[p];
    if (!std::isfinite(total)) report(parameters[p]);
  }
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
  for (const Parameter& parameter : parameters) {
    const Tensor gradient = parameter.tensor.grad();
    if (!gradient.defined() || gradient.is_contiguous()) continue;
    fail(ErrorKind::kValue, "clip_grad_norm", "the gradient of ", quoted(parameter.name), " is not contiguous");
  }
  if (factor == 1.0 || DryRun::active()) return norm;
  for (const Parameter& parameter : parameters) {
    const Tensor gradient = parameter.tensor.grad();
    if (!gradient.defined()) continue;
    gradient.begin_change("clip_grad_norm");
    dispatch_float(gradient.dtype(), "clip_grad_norm", [&]<class T>() {
      T* g = gradient.data<T>();
      parallel_for(gradient.numel(), kPiece, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          g[i] = T(static_cast<Accumulate<T>>(g[i]) * static_cast<Accumulate<T>>(factor));
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
