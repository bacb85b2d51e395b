#include "dist/pipeline/drawing.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <tuple>

#include "core/error.h"

namespace weft::dist {
namespace {

char letter(PipelineOp op) {
  switch (op) {
    case PipelineOp::kForward:
      return 'F';
    case PipelineOp::kBackward:
      return 'B';
    case PipelineOp::kBackwardInput:
      return 'b';
    default:
      return 'w';
  }
}

/// "F3", or "F3b" for the second of a rank's stages.
std::string label(const PipelineSchedule& schedule, const PipelineAction& action) {
  if (schedule.shape.chunks == 1) return concat(letter(action.op), action.micro_batch);
  const int chunk = action.stage / schedule.shape.ranks;
  return concat(letter(action.op), action.micro_batch,
                chunk < 26 ? std::string(1, static_cast<char>('a' + chunk)) : concat('\'', chunk));
}

}  // namespace

std::string draw_pipeline(const PipelineSchedule& schedule, const PipelineTimeline& timeline, int width) {
  double unit = 0;
  size_t cell = 2;
  for (const auto& spans : timeline.ranks) {
    for (const PipelineSpan& span : spans) {
      const double time = span.end - span.begin;
      if (time > 0 && (unit == 0 || time < unit)) unit = time;
      cell = std::max(cell, label(schedule, span.action).size());
    }
  }
  if (unit == 0) fail(ErrorKind::kValue, "pipeline drawing", "no action takes any time");
  const double columns = std::ceil(timeline.makespan / unit - 1e-6);
  const double wide = columns * static_cast<double>(cell + 1);
  if (wide > width) {
    fail(ErrorKind::kValue, "pipeline drawing", "the picture would be ",
         grouped(static_cast<int64_t>(std::min(wide, 9e18))), " characters wide, and at most ", width,
         " are allowed. Hint: fewer micro-batches, or write a trace");
  }
  const size_t digits = std::to_string(timeline.ranks.size() - 1).size();
  std::string out;
  for (size_t rank = 0; rank < timeline.ranks.size(); ++rank) {
    std::vector<std::string> cells(static_cast<size_t>(columns), std::string(cell, '.'));
    for (const PipelineSpan& span : timeline.ranks[rank]) {
      const auto first = static_cast<size_t>(std::lround(span.begin / unit));
      const auto last = std::min(cells.size(), static_cast<size_t>(std::lround(span.end / unit)));
      for (size_t i = first; i < last; ++i) {
        std::string text = i == first ? label(schedule, span.action) : std::string();
        text.resize(cell, i == first ? ' ' : '-');
        cells[i] = text;
      }
    }
    const std::string number = std::to_string(rank);
    out += concat("rank ", std::string(digits - number.size(), ' '), number, " |");
    for (const std::string& text : cells) out += ' ' + text;
    out += '\n';
  }
  return out;
}

std::string trace_pipeline(const PipelineSchedule& schedule, const PipelineTimeline& timeline, double microseconds) {
  using nlohmann::json;
  json events = json::array();
  std::map<std::tuple<bool, int, int>, const PipelineSpan*> spans;  // backward?, stage, micro-batch
  for (size_t rank = 0; rank < timeline.ranks.size(); ++rank) {
    events.push_back(
        {{"name", "thread_name"}, {"ph", "M"}, {"pid", 0}, {"tid", rank}, {"args", {{"name", concat("rank ", rank)}}}});
    for (const PipelineSpan& span : timeline.ranks[rank]) {
      events.push_back({{"name", label(schedule, span.action)},
                        {"cat", span.action.op == PipelineOp::kForward ? "forward" : "backward"},
                        {"ph", "X"},
                        {"ts", span.begin * microseconds},
                        {"dur", (span.end - span.begin) * microseconds},
                        {"pid", 0},
                        {"tid", rank},
                        {"args", {{"stage", span.action.stage}, {"micro_batch", span.action.micro_batch}}}});
      if (span.action.op == PipelineOp::kBackwardWeight) continue;
      spans[{span.action.op != PipelineOp::kForward, span.action.stage, span.action.micro_batch}] = &span;
    }
  }
  int id = 0;
  for (const auto& [key, from] : spans) {
    const auto [backward, stage, micro_batch] = key;
    const auto to = spans.find({backward, stage + (backward ? -1 : 1), micro_batch});
    if (to == spans.end() || schedule.rank_of(stage) == schedule.rank_of(std::get<1>(to->first))) continue;
    const auto arrow = [&](const char* phase, double time, int at) {
      json event = {{"name", backward ? "gradient" : "activation"},
                    {"cat", "transfer"},
                    {"ph", phase},
                    {"id", id},
                    {"ts", time * microseconds},
                    {"pid", 0},
                    {"tid", schedule.rank_of(at)}};
      if (*phase == 'f') event["bp"] = "e";
      events.push_back(std::move(event));
    };
    arrow("s", from->end, stage);
    arrow("f", to->second->begin, std::get<1>(to->first));
    ++id;
  }
  return json{{"displayTimeUnit", "ms"}, {"traceEvents", std::move(events)}}.dump(1) + '\n';
}

}  // namespace weft::dist
