#pragma once
#include <array>
#include <cstdint>
#include <iosfwd>
#include <string>
#include <vector>

// Pipeline schedules as pure data: which rank does what in which order. They are made, checked, timed and drawn without
// running anything (dist/pipeline/simulation.h, dist/pipeline/drawing.h); an executor only follows them.

namespace weft::dist {

/// Stage s of S has its input from stage s - 1 and gives its output to stage s + 1; backwards the other way.
enum class PipelineOp : uint8_t {
  kForward,            ///< the stage's output of a micro-batch
  kBackward,           ///< gradients of input and weights
  kBackwardInput,      ///< the gradient of the input alone: all that the stage before waits for
  kBackwardWeight,     ///< the gradients of the weights, some time after kBackwardInput
  kSendActivation,     ///< the stage's output to stage + 1; does not wait for the receiver
  kReceiveActivation,  ///< the stage's input from stage - 1; waits until it is there
  kSendGradient,       ///< the gradient of the stage's input to stage - 1
  kReceiveGradient,    ///< the gradient of the stage's output from stage + 1
};

struct PipelineAction {
  PipelineOp op = PipelineOp::kForward;
  int stage = 0;
  int micro_batch = 0;
  friend bool operator==(const PipelineAction&, const PipelineAction&) = default;
};
/// "forward of micro-batch 3 in stage 1".
std::string describe(const PipelineAction& action);
bool is_compute(PipelineOp op);
bool is_send(PipelineOp op);

enum class PipelineKind : uint8_t {
  kGPipe,  ///< all forwards, then all backwards (Huang et al. 2019); with several stages a
           ///< rank one stage after the other (breadth-first, Lamy-Poirier 2023)
  k1F1B,   ///< one forward, one backward: holds at most `ranks` micro-batches (Narayanan et al. 2019, 2021)
  /// 1F1B with twice as many forwards ahead, so that transfers are hidden that take up to a stage's time; holds up to
  /// twice as many micro-batches (Zhuang et al. 2023)
  kEager1F1B,
  kInterleaved,  ///< 1F1B with several smaller stages a rank: a bubble `chunks` times smaller (Narayanan et al. 2021)
  kZeroBubble,   ///< ZB-H1: weight gradients wait and fill the bubble, with the memory of 1F1B (Qi et al. 2023)
};
/// "gpipe", "1f1b", "eager-1f1b", "interleaved", "zero-bubble".
const char* name(PipelineKind kind);
std::ostream& operator<<(std::ostream& out, PipelineKind kind);
inline constexpr std::array kPipelineKinds = {PipelineKind::kGPipe, PipelineKind::k1F1B, PipelineKind::kEager1F1B,
                                              PipelineKind::kInterleaved, PipelineKind::kZeroBubble};

struct PipelineShape {
  int ranks = 1;          ///< p
  int micro_batches = 1;  ///< m, of one optimizer step
  int chunks = 1;         ///< v, stages a rank; other than 1 for kInterleaved and kGPipe alone
};

/// What every rank does in one optimizer step.
struct PipelineSchedule {
  PipelineKind kind = PipelineKind::k1F1B;
  PipelineShape shape;
  std::vector<std::vector<PipelineAction>> actions;  ///< [rank], in order
  std::vector<int> most_held;  ///< [rank]: the most (stage, micro-batch) pairs whose activations are kept at once

  int stages() const { return shape.ranks * shape.chunks; }
  /// Stages go around the ranks: 0, 1, ..., p - 1, 0, 1, ...
  int rank_of(int stage) const { return stage % shape.ranks; }
};

/// The schedule of a kind, with every transfer in it. Between two ranks transfers are received in the order in which
/// they are sent, so that no tags are needed.
/// @throws Error kValue: fewer than one rank, micro-batch or chunk; more than one chunk but for kInterleaved and
///         kGPipe; for kInterleaved, micro-batches that the ranks do not divide.
PipelineSchedule make_pipeline_schedule(PipelineKind kind, const PipelineShape& shape);

/// Proves a schedule right before it runs: every forward and every backward (whole, or input then weights) of every
/// stage and micro-batch once and on the rank of its stage; nothing before what it needs; between any two ranks, sends
/// and receives the same in number, kind and order; no rank waits for ever; never more held than most_held says.
/// @throws Error kValue naming the first rank and action at fault, and for a deadlock what every rank waits for.
void check_pipeline_schedule(const PipelineSchedule& schedule);

/// The layers of each stage: `count` contiguous ranges of `costs` (of one layer each, not negative) whose largest sum
/// is as small as can be; range i is [result[i], result[i + 1]). Every range has at least one layer.
/// @throws Error kValue: more stages than layers, or a cost that is negative or not finite.
std::vector<int> split_into_stages(const std::vector<double>& costs, int count);

}  // namespace weft::dist
