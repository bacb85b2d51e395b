#pragma once
#include <string>

#include "dist/pipeline/simulation.h"

namespace weft::dist {

/// A timeline as text: a line a rank, a column a unit of time (the shortest action that takes any). F3 is the forward
/// of micro-batch 3, B3 its backward (b3 to the input and w3 to the weights where they are apart), F3a and F3b
/// those of a rank's first and second stage; dashes go on with an action, dots are idle.
///   rank 0 | F0 F1 F2 .. .. B0 -- F3 B1 -- ...
/// @throws Error kValue where that would be wider than `width` characters.
std::string draw_pipeline(const PipelineSchedule& schedule, const PipelineTimeline& timeline, int width = 2000);

/// The same as trace events (JSON) for Perfetto or chrome://tracing: a thread a rank, an arrow a transfer. Times are
/// multiplied by `microseconds` a unit.
std::string trace_pipeline(const PipelineSchedule& schedule, const PipelineTimeline& timeline, double microseconds);

}  // namespace weft::dist
