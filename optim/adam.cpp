#include "optim/adam.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/autograd.h"
#include "core/thread_pool.h"
#include "optim/adam_kernel.h"

namespace weft::optim {
namespace {

/// Elements of a piece of work; pieces of all tensors are shared out together, so that small tensors cost no barrier.
constexpr int64_t kPiece = 1 << 14;

void check(const AdamOptions& options) {
  const auto require = [](bool holds, const char* name, double value, const char* rule) {
    if (!holds) fail(ErrorKind::kValue, "adam", name, " must be ", rule, ", got ", value);
  };
  require(options.beta1 >= 0 && options.beta1 < 1, "beta1", options.beta1, "in [0, 1)");
  require(options.beta2 >= 0 && options.beta2 < 1, "beta2", options.beta2, "in [0, 1)");
  require(options.eps >= static_cast<double>(std::numeric_limits<float>::min()) && std::isfinite(options.eps), "eps",
          options.eps, "at least 1.2e-38");
  require(options.weight_decay >= 0 && std::isfinite(options.weight_decay), "weight_decay", options.weight_decay,
          "at least 0");
  require(options.clip_norm >= 0 && std::isfinite(options.clip_norm), "clip_norm", options.clip_norm,
          "at least 0 (0 is no clipping)");
}

DType state_dtype(DType parameter) { return parameter == DType::f64 ? DType::f64 : DType::f32; }

/// A norm of gradients whose squares still fit in f32.
constexpr double kLargestNorm = 1e19;

/// One tensor of a step, ready for the kernels.
struct Work {
  size_t parameter = 0;
  Tensor weight, gradient, exp_avg, exp_avg_sq;
  bool ratio = false;
  double weight_decay = 0;
  double lr = 0;
};

struct Piece {
  size_t work;
  int64_t begin, end;
};

/// kernel(work, begin, count, typed pointers...) over all pieces whose work passes `filter`.
template <class Filter, class Kernel>
void for_each_piece(const std::vector<Work>& works, const std::vector<Piece>& pieces, Filter filter, Kernel kernel) {
  parallel_tasks(static_cast<int64_t>(pieces.size()), [&](int64_t i) {
    const Piece& piece = pieces[static_cast<size_t>(i)];
    const Work& work = works[piece.work];
    if (!filter(work)) return;
    const auto run = [&]<class T>() {
      kernel(static_cast<size_t>(i), work, piece.end - piece.begin, work.weight.data<T>() + piece.begin,
             work.gradient.data<T>() + piece.begin, work.exp_avg.data<T>() + piece.begin,
             work.exp_avg_sq.data<T>() + piece.begin);
    };
    work.weight.dtype() == DType::f64 ? run.template operator()<double>() : run.template operator()<float>();
  });
}

}  // namespace

Adam::Adam(Parameters parameters, const AdamOptions& options, std::shared_ptr<NormReducer> norms)
    : Optimizer(std::move(parameters)), options_(options), norms_(std::move(norms)) {
  check(options_);
  if (norms_ == nullptr) fail(ErrorKind::kValue, "adam", "needs a NormReducer, got null");
  const MemoryScope scope(MemoryCategory::optimizer);
  for (const Parameter& parameter : parameters_) {
    const Tensor& tensor = parameter.tensor;
    if (tensor.device().kind != DeviceKind::cpu) {
      fail(ErrorKind::kDevice, "adam", "updates parameters on the CPU; ", quoted(parameter.name), " is on ",
           tensor.device());
    }
    const DType dtype = state_dtype(tensor.dtype());
    Slot slot;
    slot.exp_avg = Tensor::zeros(tensor.shape(), dtype, tensor.device());
    slot.exp_avg_sq = Tensor::zeros(tensor.shape(), dtype, tensor.device());
    if (dtype != tensor.dtype()) slot.master = tensor.detach().to(dtype);
    slot.version = tensor.storage()->version();
    slots_.push_back(std::move(slot));
  }
}

NamedTensors Adam::state_tensors() const {
  NamedTensors tensors;
  for (size_t i = 0; i < slots_.size(); ++i) {
    const std::string& name = parameters_[i].name;
    tensors.emplace_back(name + ".exp_avg", slots_[i].exp_avg);
    tensors.emplace_back(name + ".exp_avg_sq", slots_[i].exp_avg_sq);
    if (slots_[i].master.defined()) tensors.emplace_back(name + ".master", slots_[i].master);
  }
  return tensors;
}

/// The master keeps what rounding took from the parameter, so that equal values after rounding mean: nothing happened.
void Adam::follow_parameter(size_t index) {
  Slot& slot = slots_[index];
  const Tensor& tensor = parameters_[index].tensor;
  if (!slot.master.defined() || DryRun::active() || slot.version == tensor.storage()->version()) return;
  dispatch_all(tensor.dtype(), [&]<class T>() {
    const T* parameter = tensor.data<T>();
    float* master = slot.master.data<float>();
    parallel_for(tensor.numel(), kPiece, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const float value = static_cast<float>(parameter[i]);
        if (static_cast<float>(T(master[i])) != value) master[i] = value;
      }
    });
  });
}

StepReport Adam::step(double lr) {
  if (!(lr >= 0) || !std::isfinite(static_cast<float>(lr))) {
    fail(ErrorKind::kValue, "adam", "the learning rate must be at least 0 and finite, got ", lr);
  }
  const autograd::NoGrad no_grad;
  const MemoryScope scope(MemoryCategory::workspace);
  StepReport report;
  report.grad_norm = grad_norm(parameters_, *norms_);
  report.clip_factor = options_.clip_norm > 0 ? clip_factor(report.grad_norm, options_.clip_norm) : 1.0;
  const bool narrow = std::any_of(parameters_.begin(), parameters_.end(),
                                  [](const Parameter& p) { return p.tensor.dtype() != DType::f64; });
  if (narrow && report.grad_norm * report.clip_factor > kLargestNorm) {
    fail(ErrorKind::kValue, "adam", "the gradients have norm ", report.grad_norm,
         ", and their squares do not fit in the f32 state; the step was ", "not taken. Hint: clip_norm");
  }

  std::vector<Work> works;
  std::vector<Piece> pieces;
  for (size_t p = 0; p < parameters_.size(); ++p) {
    const Parameter& parameter = parameters_[p];
    const Tensor gradient = parameter.tensor.grad();
    if (!gradient.defined()) continue;
    const Slot& slot = slots_[p];
    Work work;
    work.parameter = p;
    work.weight = slot.master.defined() ? slot.master : parameter.tensor.detach();
    work.gradient = gradient.to(work.weight.dtype()).contiguous();
    work.exp_avg = slot.exp_avg;
    work.exp_avg_sq = slot.exp_avg_sq;
    work.weight_decay = parameter.role == ParameterRole::weight ? options_.weight_decay : 0.0;
    work.ratio =
        options_.trust_ratio && (parameter.role == ParameterRole::weight || parameter.role == ParameterRole::embedding);
    work.lr = lr;
    for (int64_t begin = 0; begin < gradient.numel(); begin += kPiece) {
      pieces.push_back({works.size(), begin, std::min(gradient.numel(), begin + kPiece)});
    }
    works.push_back(std::move(work));
  }
  ++steps_;
  for (const Work& work : works) {
    follow_parameter(work.parameter);
    parameters_[work.parameter].tensor.begin_change("adam");
  }
  if (DryRun::active()) return report;

  const double t = static_cast<double>(steps_);
  const auto constants = [&]<class T>(const Work& work) {
    return AdamConstants<T>{static_cast<T>(report.clip_factor),
                            static_cast<T>(options_.beta1),
                            static_cast<T>(options_.beta2),
                            static_cast<T>(1 - options_.beta1),
                            static_cast<T>(1 - options_.beta2),
                            static_cast<T>(1 / (1 - std::pow(options_.beta1, t))),
                            static_cast<T>(1 / (1 - std::pow(options_.beta2, t))),
                            static_cast<T>(options_.eps),
                            static_cast<T>(work.weight_decay),
                            static_cast<T>(work.lr)};
  };
  for_each_piece(
      works, pieces, [](const Work& work) { return !work.ratio; },
      [&]<class T>(size_t, const Work& work, int64_t n, T* w, const T* g, T* m, T* v) {
        adam_update(n, w, g, m, v, constants.template operator()<T>(work));
      });
  if (options_.trust_ratio) {
    std::vector<SquareSums> sums(pieces.size());
    for_each_piece(
        works, pieces, [](const Work& work) { return work.ratio; },
        [&]<class T>(size_t piece, const Work& work, int64_t n, T* w, const T* g, T* m, T* v) {
          sums[piece] = adam_moments<T>(n, w, g, m, v, constants.template operator()<T>(work));
        });
    std::vector<double> weights(parameters_.size(), 0.0), updates(parameters_.size(), 0.0);
    for (size_t i = 0; i < pieces.size(); ++i) {
      weights[works[pieces[i].work].parameter] += sums[i].weight;
      updates[works[pieces[i].work].parameter] += sums[i].update;
    }
    norms_->reduce(weights, parameters_);
    norms_->reduce(updates, parameters_);
    for (Work& work : works) {
      const double weight = std::sqrt(weights[work.parameter]), update = std::sqrt(updates[work.parameter]);
      if (work.ratio && weight > 0 && update > 0) work.lr *= weight / update;
    }
    for_each_piece(
        works, pieces, [](const Work& work) { return work.ratio; },
        [&]<class T>(size_t, const Work& work, int64_t n, T* w, const T*, T* m, T* v) {
          adam_apply<T>(n, w, m, v, constants.template operator()<T>(work));
        });
  }
  for (const Work& work : works) {
    Tensor parameter = parameters_[work.parameter].tensor;
    if (slots_[work.parameter].master.defined()) parameter.copy_(work.weight);
    slots_[work.parameter].version = parameter.storage()->version();
  }
  return report;
}

}  // namespace weft::optim
