#include "models/verify/bounds.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <utility>

#include "models/verify/bits.h"
#include "optim/exact_sum.h"

namespace weft::models {
namespace {

constexpr double kComparable = 8;
/// Of an element in one update.
constexpr double kRoundings = 16;
/// Unit roundoff of e4m3, of three bits behind the first.
constexpr double kFp8Unit = 0x1p-4;

/// In which sums of a dtype are added up.
DType sums_in(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

double largest(const std::vector<double>& values) {
  double most = 0;
  for (const double value : values) most = std::max(most, std::abs(value));
  return most;
}

/// State in another dtype: masters of weights that are no longer rounded go.
TrainingState cast(const TrainingState& state, DType from, DType to) {
  if (from == to) return state;
  TrainingState result;
  for (const auto& [name, tensor] : state.parameters) result.parameters.emplace_back(name, tensor.to(to));
  for (const auto& [name, tensor] : state.state) {
    if (name.ends_with(".master")) continue;
    result.state.emplace_back(name, is_float(tensor.dtype()) ? tensor.to(to) : tensor);
  }
  return result;
}

std::vector<double> values_of(const std::vector<HeldPart>& parts, const std::string& name) {
  for (const HeldPart& held : parts) {
    if (held.name == name) return held.values.to_vector<double>();
  }
  return {};
}

std::optional<double> norm_of(const RankStep& step, const std::string& name) {
  for (const auto& [norm, value] : step.norms) {
    if (norm == name) return value;
  }
  return std::nullopt;
}

/// Amaxes and scales of fp8, in which tensors of any size are beside each other, are compared by their logarithms.
std::vector<double> comparable(const std::string& name, std::vector<double> values) {
  constexpr double kSmallest = 0x1p-200;  // stands for 0, below every other
  if (!optim::DelayedScaling::owns(name) || name == "fp8.updates") return values;
  for (double& value : values) value = std::log2(std::max(value, kSmallest));
  return values;
}

/// Whole tensors as one rank would hold them.
std::vector<HeldPart> as_held(const NamedTensors& tensors) {
  std::vector<HeldPart> held;
  for (const auto& [name, tensor] : tensors) held.push_back({name, TensorPart::all(tensor.shape()), tensor});
  return held;
}

class Step {
 public:
  Step(const Verification& verification, size_t layout, int64_t step, const TrainingState& before,
       const std::vector<RankStep>& ranks, VerifyReport& report)
      : problem_(verification.problem),
        step_(step),
        before_(before),
        ranks_(ranks),
        report_(report),
        bits_(report, layout, step) {}

  bool compare() {
    const DType dtype = problem_.dtype;
    const Yardstick yardstick(problem_);
    one_ = step_alone(problem_, dtype, step_, before_);
    const RankStep fine = dtype == DType::f64 ? one_ : step_alone(problem_, DType::f64, step_, before_);
    const RankStep measured =
        yardstick.measured_in() == dtype ? one_ : step_alone(problem_, yardstick.measured_in(), step_, before_);
    together_.losses = ranks_.front().losses;
    if (!bits_.losses(together_, ranks_) || !losses(yardstick, measured, fine)) return false;
    if (!agree(Compared::kGradient) || !gradients(yardstick, measured, fine)) return false;
    return agree(Compared::kParameter) && agree(Compared::kState) && update();
  }

 private:
  /// Puts the ranks' parts together; false if an element is missing or ranks disagree.
  bool agree(Compared what) {
    if (!bits_.complete(what, one_, ranks_)) return false;
    together_.*parts_of(what) = as_held(put_together(ranks_, parts_of(what)));
    if (bits_.tensors(what, together_, ranks_)) return true;
    report_.first->note = concat("ranks that have the same elements disagree; rank ", holder(*report_.first), " has ",
                                 report_.first->expected);
    report_.first->copies = true;
    return false;
  }

  /// The lowest rank that has the element as it was put together.
  size_t holder(const Difference& difference) const {
    for (size_t r = 0; r < ranks_.size(); ++r) {
      for (const HeldPart& held : ranks_[r].*parts_of(difference.what)) {
        bool has = false;
        held.part.for_each_run([&](int64_t at, int64_t, int64_t count) {
          has = has || (difference.element >= at && difference.element < at + count);
        });
        if (held.name == difference.tensor && has) return r;
      }
    }
    return 0;
  }

  bool losses(const Yardstick& yardstick, const RankStep& measured, const RankStep& fine) {
    const double bound = yardstick.bound(measured.losses, fine.losses);
    const std::optional<size_t> worst =
        exceeds(Compared::kLoss, "of micro-batches", together_.losses, fine.losses, bound);
    if (!worst) return true;
    int64_t different = 0;
    for (size_t j = 0; j < fine.losses.size(); ++j)
      different += !(std::abs(together_.losses[j] - fine.losses[j]) <= bound);
    bits_.count(Compared::kLoss, 0, 0, different);
    Difference first = bits_.difference(Compared::kLoss, concat("micro-batch ", *worst));
    first.element = static_cast<int64_t>(*worst), first.bound = bound;
    first.expected = one_.losses[*worst], first.got = together_.losses[*worst];
    for (size_t r = 0; r < ranks_.size(); ++r) {
      const auto& own = ranks_[r].micro_batches;
      if (std::find(own.begin(), own.end(), first.element) != own.end()) first.ranks.push_back(static_cast<int>(r));
    }
    return bits_.finish(std::move(first), static_cast<int64_t>(one_.losses.size()), different);
  }

  bool gradients(const Yardstick& yardstick, const RankStep& measured, const RankStep& fine) {
    std::map<std::string, double> bounds;
    for (const HeldPart& held : fine.gradients)
      bounds[held.name] = yardstick.bound(values_of(measured.gradients, held.name), held.values.to_vector<double>());
    return tensors(Compared::kGradient, fine.gradients, bounds);
  }

  /// Every tensor of a kind against `expected`.
  bool tensors(Compared what, const std::vector<HeldPart>& expected, const std::map<std::string, double>& bounds) {
    std::optional<Difference> first;
    int64_t different = 0;
    // A wrong gradient spoils those of the layers before it.
    for (size_t i = 0; i < expected.size(); ++i) {
      const HeldPart& held = what == Compared::kGradient ? expected[expected.size() - 1 - i] : expected[i];
      const std::vector<double> wanted = held.values.to_vector<double>();
      const std::vector<double> got = values_of(together_.*parts_of(what), held.name);
      const double bound = bounds.at(held.name);
      const std::optional<size_t> worst =
          exceeds(what, held.name, comparable(held.name, got), comparable(held.name, wanted), bound);
      if (!worst) continue;
      ++different;
      bits_.count(what, 0, 0, 1);
      if (first) continue;
      first = bits_.difference(what, held.name);
      first->shape = held.part.whole, first->element = static_cast<int64_t>(*worst), first->bound = bound;
      first->expected = wanted[*worst], first->got = got[*worst];
      first->ranks = holders(*first);
    }
    return bits_.finish(std::move(first), static_cast<int64_t>(expected.size()), different);
  }

  /// Ranks that have the element.
  std::vector<int> holders(const Difference& difference) const {
    std::vector<int> found;
    for (size_t r = 0; r < ranks_.size(); ++r) {
      for (const HeldPart& held : ranks_[r].*parts_of(difference.what)) {
        if (held.name != difference.tensor) continue;
        held.part.for_each_run([&](int64_t at, int64_t, int64_t count) {
          if (difference.element >= at && difference.element < at + count) found.push_back(static_cast<int>(r));
        });
      }
    }
    return found;
  }

  /// Notes the largest error; where it is beyond the bound, its element.
  std::optional<size_t> exceeds(Compared what, const std::string& tensor, const std::vector<double>& got,
                                const std::vector<double>& expected, double bound) {
    BoundedError error{what, tensor, 0, bound};
    std::optional<size_t> worst;
    for (size_t i = 0; i < expected.size(); ++i) {
      const double difference = i < got.size() ? std::abs(got[i] - expected[i]) : INFINITY;
      if (!(difference <= bound) && (!worst || !(difference <= error.difference))) worst = i;
      if (!(difference <= error.difference)) error.difference = difference;
    }
    const auto found = std::find_if(report_.errors.begin(), report_.errors.end(), [&](const BoundedError& other) {
      return other.what == what && other.tensor == tensor;
    });
    if (found == report_.errors.end()) {
      report_.errors.push_back(error);
    } else if (error.ratio() > found->ratio()) {
      *found = error;
    }
    return worst;
  }

  /// One rank's update from the same state, given the layout's gradients: the rules are elementwise but for norms,
  /// whose squares are added up in other blocks.
  bool update() {
    TrainingHooks hooks;
    hooks.at = [&](TrainingMoment moment, const RankView& view) {
      if (moment != TrainingMoment::kReduced) return;
      for (const Parameter& parameter : view.parallel.parameters()) {
        for (const HeldPart& held : together_.gradients) {
          if (held.name == parameter.name) parameter.tensor.set_grad(held.values.clone());
        }
      }
    };
    const RankStep alone = step_alone(problem_, problem_.dtype, step_, before_, false, &hooks);
    if (!norms(alone)) return false;
    const double clip = relative(alone, "clip factor");
    std::map<std::string, double> parameters, state;
    for (const HeldPart& held : alone.parameters) parameters[held.name] = parameter_bound(held, alone, clip);
    for (const HeldPart& held : alone.state) state[held.name] = state_bound(held, alone, clip);
    return tensors(Compared::kParameter, alone.parameters, parameters) && tensors(Compared::kState, alone.state, state);
  }

  /// How far a norm of the layout's is from one rank's, relative to it.
  double relative(const RankStep& alone, const std::string& name) const {
    double most = 0;
    const double expected = norm_of(alone, name).value_or(1);
    for (const RankStep& rank : ranks_) {
      const double got = norm_of(rank, name).value_or(expected);
      if (got != expected) most = std::max(most, std::abs(got - expected) / std::abs(expected));
    }
    return most;
  }

  /// Squares are added up in blocks of kSquareBlock terms: relative errors of two such sums of positive terms differ by
  /// less than 2 kSquareBlock u, those of their roots by half of that. Updates are made of gradients that were clipped
  /// by such a root.
  bool norms(const RankStep& alone) {
    const double unit = unit_roundoff(sums_in(problem_.dtype)) * static_cast<double>(optim::kSquareBlock);
    std::optional<Difference> first;
    int64_t different = 0;
    for (const auto& [name, expected] : alone.norms) {
      const double bound = std::abs(expected) * unit * (name == "gradient norm" || name == "clip factor" ? 1 : 4);
      for (size_t r = 0; r < ranks_.size(); ++r) {
        const std::optional<double> got = norm_of(ranks_[r], name);
        if (!got) continue;
        bits_.count(Compared::kNorm, 1, 1);
        if (!exceeds(Compared::kNorm, name, {*got}, {expected}, bound)) continue;
        ++different;
        bits_.count(Compared::kNorm, 0, 0, 1);
        if (!first) {
          first = bits_.difference(Compared::kNorm, name);
          first->expected = expected, first->got = *got, first->bound = bound;
        }
        if (first->tensor == name) first->ranks.push_back(static_cast<int>(r));
      }
    }
    return bits_.finish(std::move(first), static_cast<int64_t>(alone.norms.size()), different);
  }

  /// 0 where norms have the same bits. A gradient that is off by a relative `clip` moves the mean of gradients over the
  /// root of that of squares by less than `lever` times that. Beside that, the rule has fewer than kRoundings.
  double parameter_bound(const HeldPart& held, const RankStep& alone, double clip) const {
    double ratio = 0;
    for (const char* norm : {"squared norm of ", "squared norm of the update of ", "trust ratio of "})
      ratio = std::max(ratio, relative(alone, norm + held.name));
    if (clip == 0 && ratio == 0) return 0;
    const optim::AdamOptions& adam = problem_.adam;
    const auto t = static_cast<double>(step_ + 1);
    const double lever =
        (1 - adam.beta1) / (1 - std::pow(adam.beta1, t)) * std::sqrt((1 - std::pow(adam.beta2, t)) / (1 - adam.beta2));
    const std::vector<double> after = held.values.to_vector<double>();
    std::vector<double> change = values_of(as_held(before_.parameters), held.name);
    for (size_t i = 0; i < change.size(); ++i) change[i] -= after[i];
    const double rate = problem_.lr * norm_of(alone, "trust ratio of " + held.name).value_or(1);
    const double unit = unit_roundoff(held.values.dtype());
    return (ratio + kRoundings * unit) * largest(change) + (clip + kRoundings * unit) * rate * lever +
           kRoundings * unit * largest(after);
  }

  double state_bound(const HeldPart& held, const RankStep& alone, double clip) const {
    // A scale leaves room for an amax to double, and follows it by as much.
    if (optim::DelayedScaling::owns(held.name)) return held.name == "fp8.updates" ? 0 : kFp8Margin;
    const std::string parameter = held.name.substr(0, held.name.rfind('.'));
    if (held.name.ends_with(".master")) {
      HeldPart master = held;
      master.name = parameter;
      return parameter_bound(master, alone, clip);
    }
    if (clip == 0) return 0;
    const double unit = unit_roundoff(sums_in(problem_.dtype));
    const double most =
        largest(held.values.to_vector<double>()) + largest(values_of(as_held(before_.state), held.name));
    return held.name == "steps" ? 0 : (2 * clip + kRoundings * unit) * most;
  }

  const TrainingProblem& problem_;
  int64_t step_;
  const TrainingState& before_;
  const std::vector<RankStep>& ranks_;
  VerifyReport& report_;
  BitComparison bits_;
  RankStep one_, together_;
};

}  // namespace

double unit_roundoff(DType dtype) {
  switch (dtype) {
    case DType::f64:
      return 0x1p-53;
    case DType::f16:
      return 0x1p-11;
    case DType::bf16:
      return 0x1p-8;
    default:
      return 0x1p-24;
  }
}

Yardstick::Yardstick(const TrainingProblem& problem)
    : dtype_(problem.dtype), unit_(problem.fp8 ? kFp8Unit : unit_roundoff(problem.dtype)) {
  const int64_t tokens = problem.micro_batches * problem.rows * problem.config.context;
  longest_ = static_cast<double>(std::max({tokens, 4 * problem.config.width, problem.config.vocab}));
}

double Yardstick::bound(const std::vector<double>& measured, const std::vector<double>& fine) const {
  double error = 0;
  for (size_t i = 0; i < fine.size(); ++i) error = std::max(error, std::abs(measured[i] - fine[i]));
  error *= unit_roundoff(dtype_) / unit_roundoff(measured_in());
  const double unit = unit_ + std::sqrt(longest_) * unit_roundoff(sums_in(dtype_));
  return kComparable * std::max(error, unit * largest(fine));
}

TrainingRecord record_alone(TrainingProblem problem, const RecordOptions& options) {
  problem.config.recompute = {};
  return record_training(problem, {}, options);
}

RankStep step_alone(TrainingProblem problem, DType dtype, int64_t step, const TrainingState& before, bool watch,
                    const TrainingHooks* hooks) {
  const TrainingState start = cast(before, problem.dtype, dtype);
  problem.fp8 = problem.fp8 && dtype == problem.dtype;
  problem.dtype = dtype;
  return record_alone(std::move(problem),
                      {.first_step = step, .steps = 1, .start = &start, .watch = watch, .hooks = hooks})
      .steps.front()
      .front();
}

bool compare_within_bounds(const Verification& verification, size_t layout, int64_t step, const TrainingState& before,
                           const std::vector<RankStep>& ranks, VerifyReport& report) {
  return Step(verification, layout, step, before, ranks, report).compare();
}

}  // namespace weft::models
