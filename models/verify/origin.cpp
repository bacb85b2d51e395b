#include "models/verify/origin.h"

#include <cmath>
#include <map>
#include <utility>

#include "core/autograd.h"
#include "dist/sequence_layout.h"
#include "models/verify/bits.h"
#include "models/verify/bounds.h"
#include "ops/elementwise.h"

namespace weft::models {
namespace {

using dist::Axis;

bool ends_with_function(const std::string& place, const std::string& function) {
  const size_t colon = place.rfind(": ");
  return place.substr(colon == std::string::npos ? 0 : colon + 2).starts_with(function);
}

std::string module_of(const std::string& place) { return place.substr(0, place.find(": ")); }

/// Outputs of a rank's forward passes as one rank would call them. Behind a cut matrix come the sum over the ranks and
/// the bias, which one rank has in one function: the last of them stands for it. Functions that only move data have no
/// counterpart.
std::vector<SeenOutput> as_one_rank_has(const std::vector<SeenOutput>& outputs) {
  std::vector<SeenOutput> all;
  for (size_t i = 0; i < outputs.size(); ++i) {
    const SeenOutput& output = outputs[i];
    const auto is = [&](const char* function) { return ends_with_function(output.place, function); };
    if (is("replicate") || is("gather_rows") || is("take_rows")) continue;
    if (is("sum_partial") && !all.empty()) {
      while (all.size() > 1 && ends_with_function(all.back().place, "reshape")) all.pop_back();
      all.back().values = output.values;
      size_t next = i + 1;  // with sequence parallelism the bias is replicated first
      if (next < outputs.size() && ends_with_function(outputs[next].place, "replicate")) ++next;
      if (next < outputs.size() && ends_with_function(outputs[next].place, "add") &&
          module_of(outputs[next].place) == module_of(output.place)) {
        all.back().values = outputs[next].values;
        i = next;
      }
      continue;
    }
    all.push_back(output);
    const std::string ring = "ring_attention";
    if (is("ring_attention")) all.back().place.replace(all.back().place.rfind(ring), ring.size(), "causal_attention");
  }
  return all;
}

class OriginSearch {
 public:
  OriginSearch(const Verification& verification, const TrainingState& before, const TrainingHooks* hooks,
               Difference& difference)
      : verification_(verification),
        layout_(verification.layouts[difference.layout]),
        before_(before),
        hooks_(hooks),
        difference_(difference) {}

  void run() {
    const TrainingProblem& problem = verification_.problem;
    const Yardstick yardstick(problem);
    const bool exact = layout_.mesh.size(Axis::tp) * layout_.mesh.size(Axis::cp) == 1;
    const auto alone = [&](DType dtype) { return step_alone(problem, dtype, difference_.step, before_, true).outputs; };
    const std::vector<SeenOutput> one = alone(problem.dtype);
    std::vector<SeenOutput> fine, measured;
    if (!exact) fine = alone(DType::f64), measured = alone(yardstick.measured_in());
    const TrainingRecord many = record_training(
        problem, layout_,
        {.first_step = difference_.step, .steps = 1, .start = &before_, .watch = true, .hooks = hooks_});
    collect(many.steps.front());
    int64_t compared = 0;
    for (size_t i = 0; i < one.size(); ++i) {
      const auto found = outputs_.find({one[i].micro_batch, one[i].place});
      if (found == outputs_.end()) {
        if (!exact) continue;
        difference_.note = concat("no rank computes ", one[i].place, " of micro-batch ", one[i].micro_batch);
        return;
      }
      bool all = true;
      for (const Seen& seen : found->second) {
        if (exact) {
          const bool whole = seen.output.values.shape() == one[i].values.shape();
          if (whole && differs(seen.rank, one[i], seen.output.values, one[i].values, 0)) return;
          all = all && whole;
          continue;
        }
        const std::optional<std::pair<Tensor, Tensor>> pair = comparable(seen, found->second, fine[i].values);
        all = all && pair;
        if (!pair) continue;
        const double bound =
            yardstick.bound(measured[i].values.to_vector<double>(), fine[i].values.to_vector<double>());
        if (differs(seen.rank, one[i], pair->first, pair->second, bound)) return;
      }
      compared += all;
    }
    if (!difference_.note.empty()) difference_.note += "; ";
    difference_.note += exact ? "every function of the forward passes has equal outputs, run once more"
                              : concat(compared, " of ", one.size(),
                                       " outputs of functions of the forward passes could be compared, and all of them "
                                       "are within their bounds, run once more");
  }

 private:
  struct Seen {
    int rank;
    SeenOutput output;
  };

  void collect(const std::vector<RankStep>& ranks) {
    for (size_t r = 0; r < ranks.size(); ++r) {
      for (const SeenOutput& output : as_one_rank_has(ranks[r].outputs))
        outputs_[{output.micro_batch, output.place}].push_back({static_cast<int>(r), output});
    }
  }

  int coordinate(int rank, Axis axis) const { return layout_.mesh.coordinates_of(rank)[static_cast<size_t>(axis)]; }

  /// What a rank has and what it should have; nothing where the slice is not known.
  std::optional<std::pair<Tensor, Tensor>> comparable(const Seen& seen, const std::vector<Seen>& all,
                                                      const Tensor& whole) const {
    const autograd::NoGrad no_grad;
    const int contexts = layout_.mesh.size(Axis::cp), tensors = layout_.mesh.size(Axis::tp);
    Tensor got = seen.output.values, expected = whole;
    if (contexts > 1 && whole.numel() == 1) {
      // A mean over tokens, of which each rank of cp has its own.
      got = got.to(DType::f64);
      for (const Seen& other : all) {
        bool same = other.rank != seen.rank;
        for (const Axis axis : {Axis::dp, Axis::pp, Axis::tp})
          same = same && coordinate(other.rank, axis) == coordinate(seen.rank, axis);
        if (same) got = got + other.output.values.to(DType::f64);
      }
      return std::pair(got, expected);
    }
    const int64_t context = verification_.problem.config.context;
    if (contexts > 1) {
      const dist::SequenceLayout tokens(context, contexts);
      const int dim = token_dim(whole.shape(), context);
      if (dim < 0) return std::nullopt;
      expected = tokens.take(expected, dim, coordinate(seen.rank, Axis::cp)).contiguous();
    }
    if (got.shape() == expected.shape()) return std::pair(got, expected);
    if (got.rank() == expected.rank() + 1 && expected.size(-1) % got.size(-1) == 0) {  // heads apart
      std::vector<int64_t> sizes(expected.shape().begin(), expected.shape().end() - 1);
      sizes.insert(sizes.end(), {expected.size(-1) / got.size(-1), got.size(-1)});
      expected = expected.reshape(Shape(sizes));
      if (got.shape() == expected.shape()) return std::pair(got, expected);
    }
    // Rows of all sequences, of which each rank of tp has some.
    if (got.rank() != expected.rank()) {
      if (got.rank() != 2 || expected.rank() < 2) return std::nullopt;
      expected = expected.reshape({-1, expected.size(-1)});
    }
    for (int d = 0; d < got.rank(); ++d) {
      if (got.size(d) == expected.size(d)) continue;
      if (tensors == 1) return std::nullopt;
      const std::optional<TensorPart>& weight = seen.output.weight;
      std::vector<IndexRange> ranges;
      if (weight && d == got.rank() - 1 && weight->whole[0] == expected.size(d) && weight->sliced()[0] == got.size(d)) {
        ranges = weight->ranges;
      } else {
        // Ranks have consecutive shares.
        int64_t begin = 0, sum = 0;
        for (const Seen& other : all) {
          bool same = other.output.values.rank() == got.rank();
          for (const Axis axis : {Axis::dp, Axis::pp, Axis::cp})
            same = same && coordinate(other.rank, axis) == coordinate(seen.rank, axis);
          if (!same) continue;
          sum += other.output.values.size(d);
          if (coordinate(other.rank, Axis::tp) < coordinate(seen.rank, Axis::tp)) begin += other.output.values.size(d);
        }
        if (sum != expected.size(d)) return std::nullopt;
        ranges = {{begin, begin + got.size(d)}};
      }
      expected = TensorPart::along(expected.shape(), d, ranges).of(expected.contiguous());
    }
    return std::pair(got, expected);
  }

  /// The first dimension behind that of the rows which has all tokens.
  static int token_dim(const Shape& shape, int64_t context) {
    for (int d = 1; d < shape.rank(); ++d) {
      if (shape[d] == context) return d;
    }
    return -1;
  }

  bool differs(int rank, const SeenOutput& at, const Tensor& values, const Tensor& wanted, double bound) {
    const std::vector<double> expected = wanted.to_vector<double>(), got = values.to_vector<double>();
    for (size_t i = 0; i < got.size(); ++i) {
      if (bound > 0 ? std::abs(got[i] - expected[i]) <= bound : same_bits(got[i], expected[i])) continue;
      difference_.origin = {rank, at.micro_batch, at.place, static_cast<int64_t>(i), expected[i], got[i], bound};
      return true;
    }
    return false;
  }

  const Verification& verification_;
  const ParallelOptions& layout_;
  const TrainingState& before_;
  const TrainingHooks* hooks_;
  Difference& difference_;
  std::map<std::pair<int64_t, std::string>, std::vector<Seen>> outputs_;
};

}  // namespace

void find_origin(const Verification& verification, const TrainingState& before, const TrainingHooks* hooks,
                 Difference& difference) {
  OriginSearch(verification, before, hooks, difference).run();
}

}  // namespace weft::models
