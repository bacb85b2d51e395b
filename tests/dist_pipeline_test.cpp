// Pipeline schedules as data: right by construction, by the checker and by the clock of a simulation.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>
#include <tuple>

#include "dist/pipeline/drawing.h"
#include "dist/pipeline/schedule.h"
#include "dist/pipeline/simulation.h"
#include "tests/error_of.h"

namespace weft::dist {
namespace {

using Op = PipelineOp;

std::vector<PipelineSchedule> all_schedules() {
  std::vector<PipelineSchedule> all;
  for (const PipelineKind kind : kPipelineKinds) {
    for (int ranks = 1; ranks <= 8; ++ranks) {
      for (const int micro_batches : {1, 2, ranks, ranks + 1, 2 * ranks, 3 * ranks + 1, 4 * ranks}) {
        const bool chunked = kind == PipelineKind::kInterleaved || kind == PipelineKind::kGPipe;
        for (int chunks = 1; chunks <= (chunked ? 4 : 1); ++chunks) {
          if (kind == PipelineKind::kInterleaved && micro_batches % ranks != 0) continue;
          all.push_back(make_pipeline_schedule(kind, {ranks, micro_batches, chunks}));
        }
      }
    }
  }
  return all;
}

std::string title(const PipelineSchedule& s) {
  return concat(s.kind, ", ranks ", s.shape.ranks, ", micro-batches ", s.shape.micro_batches, ", chunks ",
                s.shape.chunks);
}

TEST(PipelineSchedule, EveryKindAndShapePassesTheCheck) {
  const std::vector<PipelineSchedule> all = all_schedules();
  ASSERT_GT(all.size(), 200u);
  for (const PipelineSchedule& schedule : all) {
    EXPECT_NO_THROW(check_pipeline_schedule(schedule)) << title(schedule);
  }
}

TEST(PipelineSchedule, TheBubbleIsThatOfTheFormula) {
  constexpr std::tuple<double, double, double> kCosts[] = {{1, 1, 1}, {1, 2, 1}, {2, 1, 1}, {1, 1, 2}, {1, 1.25, 0.5}};
  for (const PipelineSchedule& schedule : all_schedules()) {
    for (const auto& [f, b, w] : kCosts) {
      const auto bubble = pipeline_bubble(schedule.kind, schedule.shape, f, b, w);
      if (!bubble) continue;
      const PipelineTimeline timeline = simulate_pipeline(schedule, PipelineCosts::uniform(schedule.stages(), f, b, w));
      for (int rank = 0; rank < schedule.shape.ranks; ++rank) {
        EXPECT_NEAR(timeline.idle(rank), *bubble, 1e-9) << title(schedule) << ", rank " << rank;
      }
      const double work = schedule.shape.micro_batches * schedule.shape.chunks * (f + b + w);
      EXPECT_NEAR(timeline.bubble_fraction(), *bubble / (*bubble + work), 1e-12) << title(schedule);
    }
  }
}

TEST(PipelineSchedule, TheMemoryBoundIsReachedAndNotPassed) {
  for (const PipelineSchedule& schedule : all_schedules()) {
    const PipelineTimeline timeline = simulate_pipeline(schedule, PipelineCosts::uniform(schedule.stages(), 1, 1, 1));
    EXPECT_EQ(timeline.held, schedule.most_held) << title(schedule);
  }
}

TEST(PipelineSchedule, ZeroBubbleHoldsWhatTheFirstRankOf1F1BHolds) {
  const PipelineSchedule plain = make_pipeline_schedule(PipelineKind::k1F1B, {4, 12}),
                         zero = make_pipeline_schedule(PipelineKind::kZeroBubble, {4, 12});
  EXPECT_EQ(plain.most_held, (std::vector<int>{4, 3, 2, 1}));
  EXPECT_EQ(zero.most_held, (std::vector<int>{4, 4, 4, 4}));
}

TEST(PipelineSchedule, EagerForwardsHideTransfersOfHalfOfTheComputation) {
  // Stages of one unit in each of three parts; a micro-batch's activation and gradient take 1.5 units together.
  const auto exposed = [](PipelineKind kind) {
    const PipelineSchedule s = make_pipeline_schedule(kind, {4, 16});
    return simulate_pipeline(s, PipelineCosts::uniform(4, 1, 1, 1, 0.75)).bubble_fraction() -
           simulate_pipeline(s, PipelineCosts::uniform(4, 1, 1, 1)).bubble_fraction();
  };
  EXPECT_GT(exposed(PipelineKind::k1F1B), 0.2);
  EXPECT_LT(exposed(PipelineKind::kEager1F1B), 0.1);
  EXPECT_EQ(make_pipeline_schedule(PipelineKind::kEager1F1B, {4, 12}).most_held, (std::vector<int>{7, 5, 3, 1}));
}

TEST(PipelineSchedule, BehindSlowLinksTheSchedulesOfLeastMemoryAreAsFastAsTheirMemoryAllows) {
  // The first rank has p micro-batches under way at most, so that p of them take one's whole way at least: there and
  // back through p stages. No order of transfers changes that.
  const double f = 1, b = 1, w = 1;
  for (const int p : {2, 4, 8}) {
    for (const double t : {0.0, 0.25, 0.75, 2.0}) {
      const auto time_of_a_micro_batch = [&](PipelineKind kind) {
        const auto makespan = [&](int micro_batches) {
          return simulate_pipeline(make_pipeline_schedule(kind, {p, micro_batches}),
                                   PipelineCosts::uniform(p, f, b, w, t))
              .makespan;
        };
        const int cycles = 2 * p * (2 * p - 1);
        return (makespan(2 * cycles) - makespan(cycles)) / cycles;
      };
      const double way = 2 * t * (p - 1), computing = f + b + w;
      EXPECT_NEAR(time_of_a_micro_batch(PipelineKind::k1F1B), (p * (f + b + w) + way) / p, 1e-9) << p << ", " << t;
      EXPECT_NEAR(time_of_a_micro_batch(PipelineKind::kZeroBubble), std::max(computing, (p * (f + b) + w + way) / p),
                  1e-9)
          << p << ", " << t;
      EXPECT_NEAR(time_of_a_micro_batch(PipelineKind::kEager1F1B),
                  std::max(computing, (p * (f + b + w) + way) / (2 * p - 1)), 1e-9)
          << p << ", " << t;
    }
  }
}

TEST(PipelineSchedule, SmallerStagesMakeASmallerBubble) {
  const auto fraction = [](PipelineKind kind, int chunks) {
    const PipelineSchedule s = make_pipeline_schedule(kind, {4, 8, chunks});
    return simulate_pipeline(s, PipelineCosts::uniform(s.stages(), 1.0 / chunks, 1.0 / chunks, 1.0 / chunks))
        .bubble_fraction();
  };
  EXPECT_NEAR(fraction(PipelineKind::k1F1B, 1), 3.0 / 11, 1e-12);
  EXPECT_NEAR(fraction(PipelineKind::kInterleaved, 2), 1.5 / 9.5, 1e-12);
  EXPECT_NEAR(fraction(PipelineKind::kZeroBubble, 1), 1.0 / 9, 1e-12);
}

TEST(PipelineSchedule, StagesOfAnyCostAndSlowTransfersEndInTime) {
  for (const PipelineKind kind : kPipelineKinds) {
    const PipelineSchedule schedule = make_pipeline_schedule(kind, {4, 8, kind == PipelineKind::kInterleaved ? 2 : 1});
    PipelineCosts costs = PipelineCosts::uniform(schedule.stages(), 1, 1, 1, 0.5);
    for (size_t i = 0; i < costs.forward.size(); ++i) costs.forward[i] = 1 + static_cast<double>(i % 3);
    const PipelineTimeline timeline = simulate_pipeline(schedule, costs);
    // Nothing begins before what it needs has come.
    std::map<std::tuple<Op, int, int>, PipelineSpan> spans;
    for (const auto& rank : timeline.ranks) {
      for (const PipelineSpan& span : rank) spans[{span.action.op, span.action.stage, span.action.micro_batch}] = span;
    }
    for (const auto& [key, span] : spans) {
      const auto [op, stage, micro_batch] = key;
      if (op == Op::kForward && stage > 0) {
        EXPECT_GE(span.begin, (spans.at({op, stage - 1, micro_batch}).end + 0.5) - 1e-12);
      } else if (op == Op::kBackwardWeight) {
        EXPECT_GE(span.begin, spans.at({Op::kBackwardInput, stage, micro_batch}).end);
      } else if (op != Op::kForward && stage + 1 < schedule.stages()) {
        EXPECT_GE(span.begin, (spans.at({op, stage + 1, micro_batch}).end + 0.5) - 1e-12);
      }
    }
  }
}

/// Finds an action of a rank.
size_t find(const PipelineSchedule& s, int rank, const PipelineAction& action) {
  const auto& list = s.actions[static_cast<size_t>(rank)];
  const auto at = std::find(list.begin(), list.end(), action);
  EXPECT_NE(at, list.end());
  return static_cast<size_t>(at - list.begin());
}

struct Fault {
  const char* name;
  PipelineKind kind;
  void (*plant)(PipelineSchedule&);
  const char* message;
};

void erase(PipelineSchedule& s, int rank, const PipelineAction& action) {
  auto& list = s.actions[static_cast<size_t>(rank)];
  list.erase(list.begin() + static_cast<int64_t>(find(s, rank, action)));
}

const Fault kFaults[] = {
    {"a dropped forward and its transfers", PipelineKind::kGPipe,
     [](PipelineSchedule& s) {
       for (auto& list : s.actions) std::erase_if(list, [](const PipelineAction& a) { return a.micro_batch == 2; });
     },
     "rank 0 never does the forward of micro-batch 2 in stage 0"},
    {"a backward to the weights that nobody does", PipelineKind::kZeroBubble,
     [](PipelineSchedule& s) { erase(s, 1, {Op::kBackwardWeight, 1, 3}); },
     "rank 1 never does the backward to the weights of micro-batch 3 in stage 1"},
    {"a backward done twice", PipelineKind::k1F1B,
     [](PipelineSchedule& s) { s.actions[2].push_back({Op::kBackward, 2, 0}); }, "it was done before"},
    {"both kinds of backward", PipelineKind::k1F1B,
     [](PipelineSchedule& s) { s.actions[2].push_back({Op::kBackwardInput, 2, 0}); },
     "the gradient was computed before"},
    {"weights before the input", PipelineKind::kZeroBubble,
     [](PipelineSchedule& s) {
       std::swap(s.actions[0][find(s, 0, {Op::kBackwardInput, 0, 1})],
                 s.actions[0][find(s, 0, {Op::kBackwardWeight, 0, 1})]);
     },
     "needs the backward to the input first"},
    {"a stage on the wrong rank", PipelineKind::k1F1B,
     [](PipelineSchedule& s) { s.actions[0].push_back({Op::kForward, 1, 0}); }, "the stage is rank 1's"},
    {"a stage that is not there", PipelineKind::k1F1B,
     [](PipelineSchedule& s) { s.actions[0].push_back({Op::kForward, 9, 0}); }, "there are 3 stages"},
    {"a send that nobody receives", PipelineKind::k1F1B,
     [](PipelineSchedule& s) {
       // The last transfer of a pair, so that the order of the others holds.
       erase(s, 0, {Op::kReceiveGradient, 0, 5});
       erase(s, 0, {Op::kBackward, 0, 5});
     },
     "rank 0 never receives"},
    {"a forward without its input", PipelineKind::k1F1B,
     [](PipelineSchedule& s) { erase(s, 1, {Op::kReceiveActivation, 1, 5}); }, "needs its input first"},
    {"a receive that nobody sends", PipelineKind::k1F1B,
     [](PipelineSchedule& s) { erase(s, 0, {Op::kSendActivation, 0, 5}); }, "the ranks wait for ever: rank 0 waits in"},
    {"sends in another order than receives", PipelineKind::kGPipe,
     [](PipelineSchedule& s) {
       std::swap(s.actions[0][find(s, 0, {Op::kSendActivation, 0, 4})],
                 s.actions[0][find(s, 0, {Op::kSendActivation, 0, 5})]);
     },
     "needs what it sends first"},
    {"sends swapped after their forwards", PipelineKind::kGPipe,
     [](PipelineSchedule& s) {
       erase(s, 0, {Op::kSendActivation, 0, 4});
       const size_t behind = find(s, 0, {Op::kSendActivation, 0, 5}) + 1;
       s.actions[0].insert(s.actions[0].begin() + static_cast<int64_t>(behind), {Op::kSendActivation, 0, 4});
     },
     "the next thing that rank 0 sends ends in receiving the activation of micro-batch 5 in stage 1"},
    {"two ranks that wait for each other", PipelineKind::k1F1B,
     [](PipelineSchedule& s) {
       // Rank 0 wants the first gradient before it sends the second micro-batch, rank 1 the second micro-batch first.
       auto& list = s.actions[1];
       const size_t at = find(s, 1, {Op::kReceiveActivation, 1, 5});
       const PipelineAction receive = list[at];
       list.erase(list.begin() + static_cast<int64_t>(at));
       list.insert(list.begin() + static_cast<int64_t>(find(s, 1, {Op::kReceiveActivation, 1, 4})) + 1, receive);
       auto& first = s.actions[0];
       const size_t wanted = find(s, 0, {Op::kForward, 0, 5});
       const std::vector<PipelineAction> late(first.begin() + static_cast<int64_t>(wanted),
                                              first.begin() + static_cast<int64_t>(wanted) + 2);
       first.erase(first.begin() + static_cast<int64_t>(wanted), first.begin() + static_cast<int64_t>(wanted) + 2);
       first.insert(first.end(), late.begin(), late.end());
     },
     "the ranks wait for ever"},
    {"more in flight than the bound", PipelineKind::k1F1B, [](PipelineSchedule& s) { s.most_held[1] = 1; },
     "would hold the activations of 2 micro-batches, and its bound is 1"},
};

TEST(PipelineSchedule, EveryPlantedFaultIsNamed) {
  for (const Fault& fault : kFaults) {
    PipelineSchedule schedule = make_pipeline_schedule(fault.kind, {3, 6});
    check_pipeline_schedule(schedule);
    fault.plant(schedule);
    const std::string text = testing::error_of(ErrorKind::kValue, [&] { check_pipeline_schedule(schedule); });
    EXPECT_NE(text.find(fault.message), std::string::npos) << fault.name << ": " << text;
  }
}

TEST(PipelineSchedule, ShapesThatMakeNoSenseAreRefused) {
  EXPECT_ERROR(ErrorKind::kValue, "ranks must be from 1", make_pipeline_schedule(PipelineKind::k1F1B, {0, 4}));
  EXPECT_ERROR(ErrorKind::kValue, "micro_batches must be from 1", make_pipeline_schedule(PipelineKind::k1F1B, {2, 0}));
  EXPECT_ERROR(ErrorKind::kValue, "chunks must be 1 in schedule 1f1b",
               make_pipeline_schedule(PipelineKind::k1F1B, {2, 4, 2}));
  EXPECT_ERROR(ErrorKind::kValue, "must be a multiple of the 4 ranks in the interleaved schedule, got 6",
               make_pipeline_schedule(PipelineKind::kInterleaved, {4, 6, 2}));
  const PipelineSchedule schedule = make_pipeline_schedule(PipelineKind::k1F1B, {2, 4});
  EXPECT_ERROR(ErrorKind::kValue, "there are 2 stages, but 3 costs of the forward",
               simulate_pipeline(schedule, PipelineCosts::uniform(3, 1, 1, 1)));
  EXPECT_ERROR(ErrorKind::kValue, "must be finite and not negative",
               simulate_pipeline(schedule, PipelineCosts::uniform(2, 1, -1, 1)));
}

/// The least possible largest sum by trying every split.
double best_split(const std::vector<double>& costs, size_t from, int count) {
  const double rest = std::accumulate(costs.begin() + static_cast<int64_t>(from), costs.end(), 0.0);
  if (count == 1) return rest;
  double best = rest;
  double sum = 0;
  for (size_t end = from + 1; end + static_cast<size_t>(count) - 1 <= costs.size(); ++end) {
    sum += costs[end - 1];
    best = std::min(best, std::max(sum, best_split(costs, end, count - 1)));
  }
  return best;
}

TEST(PipelineSplit, NoOtherSplitHasACheaperDearestStage) {
  for (uint64_t seed = 0; seed < 40; ++seed) {
    const auto layers = static_cast<size_t>(1 + seed % 11);
    std::vector<double> costs;
    for (size_t i = 0; i < layers; ++i) costs.push_back(static_cast<double>((seed * 7 + i * i * 5 + i) % 9));
    for (int count = 1; count <= static_cast<int>(layers); ++count) {
      const std::vector<int> split = split_into_stages(costs, count);
      ASSERT_EQ(split.size(), static_cast<size_t>(count) + 1);
      EXPECT_EQ(split.front(), 0);
      EXPECT_EQ(split.back(), static_cast<int>(layers));
      double most = 0;
      for (size_t stage = 0; stage + 1 < split.size(); ++stage) {
        ASSERT_LT(split[stage], split[stage + 1]);
        most = std::max(most, std::accumulate(costs.begin() + split[stage], costs.begin() + split[stage + 1], 0.0));
      }
      EXPECT_EQ(most, best_split(costs, 0, count)) << "seed " << seed << ", stages " << count;
    }
  }
}

TEST(PipelineSplit, ThousandsOfLayersAreSplitAtOnce) {
  const std::vector<int> split = split_into_stages(std::vector<double>(10000, 1.0), 100);
  for (size_t stage = 0; stage < 100; ++stage) EXPECT_EQ(split[stage + 1] - split[stage], 100);
}

TEST(PipelineSplit, BadCostsAndTooManyStagesAreRefused) {
  EXPECT_ERROR(ErrorKind::kValue, "stages must be from 1 to the 2 layers, got 3", split_into_stages({1, 1}, 3));
  EXPECT_ERROR(ErrorKind::kValue, "the cost of layer 1 must be finite", split_into_stages({1, -1}, 1));
}

TEST(PipelineDrawing, AScheduleIsDrawnAsItRuns) {
  const PipelineSchedule schedule = make_pipeline_schedule(PipelineKind::k1F1B, {2, 3});
  const PipelineTimeline timeline = simulate_pipeline(schedule, PipelineCosts::uniform(2, 1, 1, 1));
  EXPECT_EQ(draw_pipeline(schedule, timeline),
            "rank 0 | F0 F1 .. .. B0 -- F2 B1 -- .. B2 --\n"
            "rank 1 | .. F0 B0 -- F1 B1 -- F2 B2 -- .. ..\n");
  EXPECT_ERROR(ErrorKind::kValue, "characters wide", draw_pipeline(schedule, timeline, 20));
}

TEST(PipelineDrawing, ATraceHasEveryActionAndEveryTransfer) {
  const PipelineSchedule schedule = make_pipeline_schedule(PipelineKind::kInterleaved, {2, 4, 2});
  const PipelineTimeline timeline = simulate_pipeline(schedule, PipelineCosts::uniform(4, 1, 1, 1, 0.25));
  const nlohmann::json trace = nlohmann::json::parse(trace_pipeline(schedule, timeline, 1000));
  int spans = 0, begun = 0, ended = 0;
  double last = 0;
  for (const auto& event : trace.at("traceEvents")) {
    const std::string phase = event.at("ph");
    spans += phase == "X", begun += phase == "s", ended += phase == "f";
    if (phase == "X") last = std::max(last, event.at("ts").get<double>() + event.at("dur").get<double>());
  }
  EXPECT_EQ(spans, 2 * 4 * 4);
  EXPECT_EQ(begun, 2 * 3 * 4);  // three borders between four stages, there and back
  EXPECT_EQ(ended, begun);
  EXPECT_NEAR(last, timeline.makespan * 1000, 1e-6);
}

}  // namespace
}  // namespace weft::dist
