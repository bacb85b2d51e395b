#pragma once
#include <array>
#include <iosfwd>
#include <optional>
#include <string>
#include <vector>

#include "models/verify/training_record.h"

namespace weft::models {

/// A training run on one or several layouts, to be compared with the same run on one rank.
struct Verification {
  TrainingProblem problem;
  /// Trained on one after the other; each goes on from what the one before left.
  std::vector<ParallelOptions> layouts;
  int64_t steps = 3;  ///< on each layout
};

/// What of a step is compared, in the order in which a step computes it.
enum class Compared : uint8_t { kLoss, kGradient, kNorm, kParameter, kState };
inline constexpr int kComparedKinds = 5;
/// "loss", "gradient", "norm", "parameter", "state".
const char* name(Compared what);

/// One number of a layout's run that is not what it should be, and what else is known about it.
struct Difference {
  size_t layout = 0;  ///< number in Verification::layouts
  int64_t step = 0;
  Compared what = Compared::kLoss;
  std::string tensor;   ///< name of the tensor, the norm, or "micro-batch 3"
  Shape shape;          ///< of the whole tensor
  int64_t element = 0;  ///< in the flattened whole tensor
  double expected = 0, got = 0;
  double bound = 0;                     ///< that was exceeded; 0: the two should have been equal
  bool missing = false;                 ///< no rank has this element
  bool copies = false;                  ///< `expected` is what another rank of the layout has
  std::vector<int> ranks;               ///< those that have it wrong; first of them: whose value `got` is
  int64_t compared = 0, different = 0;  ///< tensors of this kind in this step

  /// The first function of a forward pass, in the order of one rank, whose output differs.
  struct Origin {
    int rank = 0;
    int64_t micro_batch = 0;
    std::string place;    ///< SeenOutput::place
    int64_t element = 0;  ///< of the output as the rank has it, flattened
    double expected = 0, got = 0;
    double bound = 0;  ///< that was exceeded; 0: the two should have been equal
  };
  std::optional<Origin> origin;
  /// What looking at the forward passes once more has shown, where that is not an origin.
  std::string note;
};

/// The largest error of a tensor over all steps, where a layout is not promised to be bit-equal.
struct BoundedError {
  Compared what = Compared::kGradient;
  std::string tensor;
  double difference = 0, bound = 0;  ///< of the step where the ratio of the two is the largest
  double ratio() const { return bound > 0 ? difference / bound : difference > 0 ? 1e300 : 0; }
};

struct VerifyReport {
  /// Whether every layout is promised to have the bits of one rank: those without tp and cp.
  bool exact = true;
  struct Tally {
    int64_t tensors = 0, elements = 0, different = 0;  ///< compared; tensors that differed
  };
  std::array<Tally, kComparedKinds> tallies;  ///< [Compared]; over ranks and steps, up to the first difference
  std::optional<Difference> first;
  std::vector<BoundedError> errors;  ///< if not exact: of every tensor
  bool equal() const { return !first; }
};

/// Runs all layouts and the one rank and compares loss of every micro-batch, gradient of every parameter, norms,
/// parameters and optimizer state of every step, on every rank. Layouts without tp and cp must have the bits of one
/// rank; of others, each step must be within a bound of what one rank does from where they were
/// (docs/parallelism/verify.md). Stops at the first step with a difference, and looks for where in the forward pass it
/// begins.
/// @param hooks  for the layouts' runs alone
/// @throws Error as record_training().
VerifyReport verify(const Verification& verification, const TrainingHooks* hooks = nullptr);

/// The report as `weft verify` prints it: a table, and the first difference in words.
/// @param all_errors  every tensor's error instead of the largest ones
void print_report(std::ostream& out, const Verification& verification, const VerifyReport& report, bool all_errors);

}  // namespace weft::models
