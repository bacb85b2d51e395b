#include "dist/pipeline/schedule.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <ostream>
#include <utility>

#include "core/error.h"

namespace weft::dist {
namespace {

constexpr const char* kWhere = "pipeline schedule";
using Op = PipelineOp;
using Actions = std::vector<PipelineAction>;

const char* words(Op op) {
  switch (op) {
    case Op::kForward:
      return "forward";
    case Op::kBackward:
      return "backward";
    case Op::kBackwardInput:
      return "backward to the input";
    case Op::kBackwardWeight:
      return "backward to the weights";
    case Op::kSendActivation:
      return "sending the activation";
    case Op::kReceiveActivation:
      return "receiving the activation";
    case Op::kSendGradient:
      return "sending the gradient";
    default:
      return "receiving the gradient";
  }
}

Actions gpipe(const PipelineShape& shape, int rank) {
  Actions actions;
  for (int chunk = 0; chunk < shape.chunks; ++chunk) {
    for (int i = 0; i < shape.micro_batches; ++i) actions.push_back({Op::kForward, chunk * shape.ranks + rank, i});
  }
  for (int chunk = shape.chunks; chunk-- > 0;) {
    for (int i = 0; i < shape.micro_batches; ++i) actions.push_back({Op::kBackward, chunk * shape.ranks + rank, i});
  }
  return actions;
}

/// Forwards before the first backward of a rank.
int warm_up(PipelineKind kind, const PipelineShape& shape, int rank) {
  const int behind = shape.ranks - 1 - rank;
  if (kind == PipelineKind::kEager1F1B) return std::min(shape.micro_batches, 2 * behind);
  if (shape.chunks == 1) return std::min(shape.micro_batches, behind);
  return std::min(shape.micro_batches * shape.chunks, 2 * behind + (shape.chunks - 1) * shape.ranks);
}

/// 1F1B. With several chunks, groups of p micro-batches go through all chunks of a rank before the next group begins.
Actions one_forward_one_backward(PipelineKind kind, const PipelineShape& shape, int rank) {
  const int total = shape.micro_batches * shape.chunks, group = shape.ranks * shape.chunks;
  const auto at = [&](Op op, int i) -> PipelineAction {
    if (shape.chunks == 1) return {op, rank, i};
    const int chunk = i % group / shape.ranks, micro_batch = i / group * shape.ranks + i % shape.ranks;
    return {op, (op == Op::kForward ? chunk : shape.chunks - 1 - chunk) * shape.ranks + rank, micro_batch};
  };
  const int ahead = warm_up(kind, shape, rank);
  Actions actions;
  for (int i = 0; i < ahead; ++i) actions.push_back(at(Op::kForward, i));
  for (int i = 0; i < total; ++i) {
    if (i + ahead < total) actions.push_back(at(Op::kForward, i + ahead));
    actions.push_back(at(Op::kBackward, i));
  }
  return actions;
}

/// 1F1B whose weight gradients come `rank` micro-batches later: the later ranks, which hold fewer micro-batches in
/// 1F1B, then hold as many as the first, and have work left for the time in which they would wait.
Actions zero_bubble(const PipelineShape& shape, int rank) {
  const int ahead = warm_up(PipelineKind::kZeroBubble, shape, rank);
  Actions actions;
  for (int i = 0; i < ahead; ++i) actions.push_back({Op::kForward, rank, i});
  int weights = 0;
  for (int i = 0; i < shape.micro_batches; ++i) {
    if (i + ahead < shape.micro_batches) actions.push_back({Op::kForward, rank, i + ahead});
    actions.push_back({Op::kBackwardInput, rank, i});
    if (i >= rank) actions.push_back({Op::kBackwardWeight, rank, weights++});
  }
  while (weights < shape.micro_batches) actions.push_back({Op::kBackwardWeight, rank, weights++});
  return actions;
}

/// What a rank receives before it can compute, and sends afterwards: the transfers of one action.
struct Transfers {
  bool receives = false, sends = false;
  PipelineAction receive, send;
  int from = 0, to = 0;
};
Transfers transfers_of(const PipelineSchedule& s, const PipelineAction& action) {
  Transfers t;
  const int stage = action.stage, rank = s.rank_of(stage);
  const auto elsewhere = [&](int other) { return other >= 0 && other < s.stages() && s.rank_of(other) != rank; };
  if (action.op == Op::kForward) {
    t.receives = elsewhere(stage - 1), t.sends = elsewhere(stage + 1);
    t.receive = {Op::kReceiveActivation, stage, action.micro_batch}, t.from = s.rank_of(stage + s.shape.ranks - 1);
    t.send = {Op::kSendActivation, stage, action.micro_batch}, t.to = s.rank_of(stage + 1);
  } else if (action.op == Op::kBackward || action.op == Op::kBackwardInput) {
    t.receives = elsewhere(stage + 1), t.sends = elsewhere(stage - 1);
    t.receive = {Op::kReceiveGradient, stage, action.micro_batch}, t.from = s.rank_of(stage + 1);
    t.send = {Op::kSendGradient, stage, action.micro_batch}, t.to = s.rank_of(stage + s.shape.ranks - 1);
  }
  return t;
}

/// The receive that a send ends in.
PipelineAction received(const PipelineAction& send) {
  if (send.op == Op::kSendActivation) return {Op::kReceiveActivation, send.stage + 1, send.micro_batch};
  return {Op::kReceiveGradient, send.stage - 1, send.micro_batch};
}

/// The rank at the other end of a transfer.
int peer_of(const PipelineSchedule& s, const PipelineAction& action) {
  const bool next = action.op == Op::kSendActivation || action.op == Op::kReceiveGradient;
  return s.rank_of(action.stage + (next ? 1 : s.shape.ranks - 1));
}

/// Puts the transfers into a schedule that has none. What arrives from a rank is received in the order in which that
/// rank sends it, perhaps earlier than it is needed.
void add_transfers(PipelineSchedule& s) {
  const std::vector<Actions> compute = std::move(s.actions);
  std::map<std::pair<int, int>, Actions> coming;  // (from, to): receives that are still to be posted, the next one last
  for (const Actions& actions : compute) {
    for (const PipelineAction& action : actions) {
      const Transfers t = transfers_of(s, action);
      if (t.sends) coming[{s.rank_of(action.stage), t.to}].push_back(received(t.send));
    }
  }
  for (auto& [ranks, receives] : coming) std::reverse(receives.begin(), receives.end());
  s.actions.assign(compute.size(), {});
  for (size_t rank = 0; rank < compute.size(); ++rank) {
    Actions& out = s.actions[rank];
    for (const PipelineAction& action : compute[rank]) {
      const Transfers t = transfers_of(s, action);
      if (t.receives && std::find(out.begin(), out.end(), t.receive) == out.end()) {
        Actions& queue = coming[{t.from, static_cast<int>(rank)}];
        do {
          out.push_back(queue.back());
          queue.pop_back();
        } while (!(out.back() == t.receive));
      }
      out.push_back(action);
      if (t.sends) out.push_back(t.send);
    }
  }
}

/// The bounds that a kind promises.
std::vector<int> held_by(PipelineKind kind, const PipelineShape& shape) {
  std::vector<int> most;
  for (int rank = 0; rank < shape.ranks; ++rank) {
    switch (kind) {
      case PipelineKind::kGPipe:
        most.push_back(shape.micro_batches * shape.chunks);
        break;
      case PipelineKind::kZeroBubble:
        most.push_back(std::min(shape.micro_batches, shape.ranks));
        break;
      default:
        most.push_back(std::min(shape.micro_batches * shape.chunks, warm_up(kind, shape, rank) + 1));
    }
  }
  return most;
}

/// Walks through a schedule as its ranks would, without a clock.
class Walk {
 public:
  explicit Walk(const PipelineSchedule& schedule)
      : s_(schedule), next_(schedule.actions.size(), 0), held_(schedule.actions.size(), 0) {}

  void run() {
    for (bool moved = true; moved;) {
      moved = false;
      for (size_t rank = 0; rank < next_.size(); ++rank) {
        while (next_[rank] < s_.actions[rank].size() && step(static_cast<int>(rank), s_.actions[rank][next_[rank]])) {
          ++next_[rank];
          moved = true;
        }
      }
    }
    std::string stuck;
    for (size_t rank = 0; rank < next_.size(); ++rank) {
      if (next_[rank] == s_.actions[rank].size()) continue;
      stuck += concat(stuck.empty() ? "" : "; ", "rank ", rank, " waits in ", describe(s_.actions[rank][next_[rank]]));
    }
    if (!stuck.empty()) fail(ErrorKind::kValue, kWhere, "the ranks wait for ever: ", stuck);
    for (const auto& [ranks, queue] : on_the_way_) {
      if (queue.empty()) continue;
      fail(ErrorKind::kValue, kWhere, "rank ", ranks.second, " never receives what ends in its ",
           describe(queue.front()), ", sent by rank ", ranks.first);
    }
    for (int stage = 0; stage < s_.stages(); ++stage) {
      for (int i = 0; i < s_.shape.micro_batches; ++i) {
        if (!done_.contains({Op::kForward, stage, i})) missing(stage, i, "forward");
        if (!has_gradient(stage, i)) missing(stage, i, "backward");
        if (!done_.contains({Op::kBackward, stage, i}) && !done_.contains({Op::kBackwardWeight, stage, i}))
          missing(stage, i, "backward to the weights");
      }
    }
  }

 private:
  struct Less {
    bool operator()(const PipelineAction& a, const PipelineAction& b) const {
      return std::tie(a.op, a.stage, a.micro_batch) < std::tie(b.op, b.stage, b.micro_batch);
    }
  };

  [[noreturn]] void missing(int stage, int micro_batch, const char* what) const {
    fail(ErrorKind::kValue, kWhere, "rank ", s_.rank_of(stage), " never does the ", what, " of micro-batch ",
         micro_batch, " in stage ", stage);
  }
  [[noreturn]] void wrong(int rank, const PipelineAction& action, const std::string& why) const {
    fail(ErrorKind::kValue, kWhere, "rank ", rank, ", action ", next_[static_cast<size_t>(rank)], ", ",
         describe(action), ": ", why);
  }
  bool has_gradient(int stage, int micro_batch) const {
    return done_.contains({Op::kBackward, stage, micro_batch}) ||
           done_.contains({Op::kBackwardInput, stage, micro_batch});
  }

  /// False if the action has to wait for another rank.
  bool step(int rank, const PipelineAction& a) {
    if (a.stage < 0 || a.stage >= s_.stages() || a.micro_batch < 0 || a.micro_batch >= s_.shape.micro_batches)
      wrong(rank, a, concat("there are ", s_.stages(), " stages and ", s_.shape.micro_batches, " micro-batches"));
    if (s_.rank_of(a.stage) != rank) wrong(rank, a, concat("the stage is rank ", s_.rank_of(a.stage), "'s"));
    if (done_.contains(a)) wrong(rank, a, "it was done before");
    const auto need = [&](bool holds, const char* what) {
      if (!holds) wrong(rank, a, concat("needs ", what, " first"));
    };
    const int i = a.micro_batch;
    const bool first = a.stage == 0, last = a.stage == s_.stages() - 1;
    const bool input_here = !first && s_.rank_of(a.stage - 1) == rank;
    const bool gradient_here = !last && s_.rank_of(a.stage + 1) == rank;
    switch (a.op) {
      case Op::kForward:
        need(first || (input_here ? done_.contains({Op::kForward, a.stage - 1, i})
                                  : done_.contains({Op::kReceiveActivation, a.stage, i})),
             "its input");
        hold(rank, a);
        break;
      case Op::kBackward:
      case Op::kBackwardInput:
        if (has_gradient(a.stage, i)) wrong(rank, a, "the gradient was computed before");
        need(done_.contains({Op::kForward, a.stage, i}), "its forward");
        need(
            last || (gradient_here ? has_gradient(a.stage + 1, i) : done_.contains({Op::kReceiveGradient, a.stage, i})),
            "the gradient of its output");
        if (a.op == Op::kBackward) --held_[static_cast<size_t>(rank)];
        break;
      case Op::kBackwardWeight:
        need(done_.contains({Op::kBackwardInput, a.stage, i}), "the backward to the input");
        --held_[static_cast<size_t>(rank)];
        break;
      case Op::kSendActivation:
      case Op::kSendGradient: {
        const bool activation = a.op == Op::kSendActivation;
        if (activation ? last : first) wrong(rank, a, "there is no stage to send it to");
        need(activation ? done_.contains({Op::kForward, a.stage, i}) : has_gradient(a.stage, i), "what it sends");
        if (peer_of(s_, a) == rank) wrong(rank, a, "it is on the way to its own rank");
        on_the_way_[{rank, peer_of(s_, a)}].push_back(received(a));
        break;
      }
      case Op::kReceiveActivation:
      case Op::kReceiveGradient: {
        if (a.op == Op::kReceiveActivation ? first : last) wrong(rank, a, "there is no stage to receive it from");
        Actions& queue = on_the_way_[{peer_of(s_, a), rank}];
        if (queue.empty()) return false;
        if (!(queue.front() == a)) {
          wrong(rank, a,
                concat("the next thing that rank ", peer_of(s_, a), " sends ends in ", describe(queue.front())));
        }
        queue.erase(queue.begin());
        break;
      }
    }
    done_.emplace(a, true);
    return true;
  }

  void hold(int rank, const PipelineAction& a) {
    const auto r = static_cast<size_t>(rank);
    if (++held_[r] > s_.most_held[r]) {
      wrong(rank, a,
            concat("the rank would hold the activations of ", held_[r], " micro-batches, and its bound is ",
                   s_.most_held[r]));
    }
  }

  const PipelineSchedule& s_;
  std::vector<size_t> next_;
  std::vector<int> held_;
  std::map<PipelineAction, bool, Less> done_;
  std::map<std::pair<int, int>, Actions> on_the_way_;  // (from, to): the receives that what was sent ends in
};

}  // namespace

bool is_compute(PipelineOp op) { return op <= PipelineOp::kBackwardWeight; }
bool is_send(PipelineOp op) { return op == PipelineOp::kSendActivation || op == PipelineOp::kSendGradient; }

std::string describe(const PipelineAction& action) {
  return concat(words(action.op), " of micro-batch ", action.micro_batch, " in stage ", action.stage);
}

const char* name(PipelineKind kind) {
  switch (kind) {
    case PipelineKind::kGPipe:
      return "gpipe";
    case PipelineKind::k1F1B:
      return "1f1b";
    case PipelineKind::kEager1F1B:
      return "eager-1f1b";
    case PipelineKind::kInterleaved:
      return "interleaved";
    default:
      return "zero-bubble";
  }
}
std::ostream& operator<<(std::ostream& out, PipelineKind kind) { return out << name(kind); }

PipelineSchedule make_pipeline_schedule(PipelineKind kind, const PipelineShape& shape) {
  const auto require = [](bool holds, const char* what, int value, const std::string& rule) {
    if (!holds) fail(ErrorKind::kValue, kWhere, what, " must be ", rule, ", got ", value);
  };
  constexpr int kMost = 1 << 16;
  require(shape.ranks >= 1 && shape.ranks <= kMost, "ranks", shape.ranks, "from 1 to 65,536");
  require(shape.micro_batches >= 1 && shape.micro_batches <= kMost, "micro_batches", shape.micro_batches,
          "from 1 to 65,536");
  if (kind == PipelineKind::kInterleaved || kind == PipelineKind::kGPipe) {
    require(shape.chunks >= 1 && shape.chunks <= kMost / shape.ranks, "chunks", shape.chunks,
            "at least 1, and at most 65,536 stages in all");
  } else {
    require(shape.chunks == 1, "chunks", shape.chunks, concat("1 in schedule ", name(kind)));
  }
  if (kind == PipelineKind::kInterleaved) {
    require(shape.micro_batches % shape.ranks == 0, "micro_batches", shape.micro_batches,
            concat("a multiple of the ", shape.ranks, " ranks in the interleaved schedule"));
  }
  PipelineSchedule schedule;
  schedule.kind = kind;
  schedule.shape = shape;
  for (int rank = 0; rank < shape.ranks; ++rank) {
    schedule.actions.push_back(kind == PipelineKind::kGPipe        ? gpipe(shape, rank)
                               : kind == PipelineKind::kZeroBubble ? zero_bubble(shape, rank)
                                                                   : one_forward_one_backward(kind, shape, rank));
  }
  schedule.most_held = held_by(kind, shape);
  add_transfers(schedule);
  return schedule;
}

void check_pipeline_schedule(const PipelineSchedule& schedule) {
  const auto ranks = static_cast<size_t>(schedule.shape.ranks);
  if (schedule.actions.size() != ranks || schedule.most_held.size() != ranks) {
    fail(ErrorKind::kValue, kWhere, "there are ", ranks, " ranks, but lists of actions for ", schedule.actions.size(),
         " and bounds for ", schedule.most_held.size());
  }
  Walk(schedule).run();
}

std::vector<int> split_into_stages(const std::vector<double>& costs, int count) {
  const auto layers = static_cast<int>(costs.size());
  if (count < 1 || count > layers)
    fail(ErrorKind::kValue, "pipeline split", "stages must be from 1 to the ", layers, " layers, got ", count);
  std::vector<double> before(costs.size() + 1, 0);
  for (size_t i = 0; i < costs.size(); ++i) {
    if (!(costs[i] >= 0) || !std::isfinite(costs[i]))
      fail(ErrorKind::kValue, "pipeline split", "the cost of layer ", i, " must be finite and not negative, got ",
           costs[i]);
    before[i + 1] = before[i] + costs[i];
  }
  // worst[i]: the least possible largest sum of the first i layers in so many stages. Moving a boundary to the right
  // makes the stages before it dearer and the one behind it cheaper: the best place is where the two meet.
  const auto n = static_cast<size_t>(layers);
  std::vector<double> worst(before);
  std::vector<std::vector<int>> boundary(static_cast<size_t>(count), std::vector<int>(n + 1, 0));
  for (int stages = 2; stages <= count; ++stages) {
    std::vector<double> next(n + 1, std::numeric_limits<double>::infinity());
    for (int end = stages; end <= layers; ++end) {
      int low = stages - 1, high = end - 1;  // the first boundary at which the stages before are not the cheaper side
      while (low < high) {
        const int middle = (low + high) / 2;
        const auto m = static_cast<size_t>(middle);
        if (worst[m] >= before[static_cast<size_t>(end)] - before[m]) {
          high = middle;
        } else {
          low = middle + 1;
        }
      }
      for (const int at : {low - 1, low}) {
        if (at < stages - 1) continue;
        const auto a = static_cast<size_t>(at), e = static_cast<size_t>(end);
        const double most = std::max(worst[a], before[e] - before[a]);
        if (most < next[e]) next[e] = most, boundary[static_cast<size_t>(stages - 1)][e] = at;
      }
    }
    worst = std::move(next);
  }
  std::vector<int> result(static_cast<size_t>(count) + 1, layers);
  for (int stage = count - 1; stage >= 0; --stage) {
    result[static_cast<size_t>(stage)] =
        boundary[static_cast<size_t>(stage)][static_cast<size_t>(result[static_cast<size_t>(stage) + 1])];
  }
  return result;
}

}  // namespace weft::dist
