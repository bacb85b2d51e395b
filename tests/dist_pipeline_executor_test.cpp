// A pipeline computes what one process computes, to the last bit, in every schedule.
#include "dist/pipeline/executor.h"

#include <gtest/gtest.h>

#include <mutex>

#include "core/autograd.h"
#include "core/random.h"
#include "dist/threads.h"
#include "ops/elementwise.h"
#include "ops/matmul.h"
#include "ops/reduce.h"
#include "tests/error_of.h"

namespace weft::dist {
namespace {

constexpr int kLayers = 12;
constexpr int64_t kRows = 3, kWidth = 5;

/// A model of two streams: x = x + h, h = gelu(x W^T + b), and a loss over both.
struct Model {
  std::vector<Tensor> weights, biases;
  Model() {
    for (int layer = 0; layer < kLayers; ++layer) {
      weights.push_back(Tensor::empty({kWidth, kWidth}));
      biases.push_back(Tensor::empty({kWidth}));
      fill_normal(weights.back(), RandomStream(1, concat("weight", layer)), 0, 0.5);
      fill_normal(biases.back(), RandomStream(1, concat("bias", layer)), 0, 0.5);
      weights.back().requires_grad_(), biases.back().requires_grad_();
    }
  }

  static std::vector<Tensor> data(int micro_batch) {
    Tensor x = Tensor::empty({kRows, kWidth});
    fill_normal(x, RandomStream(2, "data").at_step(static_cast<uint64_t>(micro_batch)), 0, 1);
    return {x, x * x};
  }
  std::vector<Tensor> layers(int first, int end, std::vector<Tensor> streams) const {
    for (int layer = first; layer < end; ++layer) {
      const auto i = static_cast<size_t>(layer);
      const Tensor x = streams[0] + streams[1];
      streams = {x, gelu(linear(x, weights[i], biases[i]))};
    }
    return streams;
  }
  static Tensor loss(const std::vector<Tensor>& streams) { return mean(streams[0] * streams[1]); }
};

struct Outcome {
  std::vector<std::vector<float>> gradients;
  std::vector<double> losses;
};

Outcome alone(int micro_batches, double scale) {
  const Model model;
  Outcome outcome;
  for (int i = 0; i < micro_batches; ++i) {
    const Tensor loss = Model::loss(model.layers(0, kLayers, Model::data(i)));
    loss.backward(Tensor::full({}, scale));
    outcome.losses.push_back(loss.item());
  }
  for (size_t i = 0; i < kLayers; ++i) {
    outcome.gradients.push_back(model.weights[i].grad().to_vector<float>());
    outcome.gradients.push_back(model.biases[i].grad().to_vector<float>());
  }
  return outcome;
}

/// Layers of each stage: uneven ones.
std::vector<int> split(int stages) {
  std::vector<int> cuts;
  for (int s = 0; s <= stages; ++s)
    cuts.push_back(s == 0 ? 0 : s == stages ? kLayers : std::min(kLayers - stages + s, s + 1));
  return cuts;
}

Outcome piped(PipelineKind kind, const PipelineShape& shape, double scale, int steps = 1,
              const std::function<PipelineHooks(int rank)>& hooks = {}) {
  Outcome outcome;
  outcome.gradients.resize(2 * kLayers);
  std::mutex mutex;
  run_threads(shape.ranks, [&](Group& world) {
    const Model model;
    const PipelineSchedule schedule = make_pipeline_schedule(kind, shape);
    const std::vector<int> cuts = split(schedule.stages());
    std::vector<PipelineStage> stages;
    for (int s = world.rank(); s < schedule.stages(); s += shape.ranks) {
      stages.push_back([&model, &cuts, &schedule, s](int micro_batch, const std::vector<Tensor>& inputs) {
        std::vector<Tensor> streams = model.layers(cuts[static_cast<size_t>(s)], cuts[static_cast<size_t>(s) + 1],
                                                   s == 0 ? Model::data(micro_batch) : inputs);
        if (s + 1 < schedule.stages()) return streams;
        return std::vector<Tensor>{Model::loss(streams)};
      });
    }
    PipelineExecutor executor(world, schedule, stages, {{{kRows, kWidth}}, {{kRows, kWidth}}});
    if (hooks) executor.set_hooks(hooks(world.rank()));
    std::vector<Tensor> losses;
    for (int step = 0; step < steps; ++step) {
      for (size_t i = 0; i < kLayers; ++i) model.weights[i].clear_grad(), model.biases[i].clear_grad();
      losses = executor.run(scale);
    }
    const std::lock_guard lock(mutex);
    for (const Tensor& loss : losses) outcome.losses.push_back(loss.item());
    for (int s = world.rank(); s < schedule.stages(); s += shape.ranks) {
      for (int layer = cuts[static_cast<size_t>(s)]; layer < cuts[static_cast<size_t>(s) + 1]; ++layer) {
        const auto i = static_cast<size_t>(layer);
        outcome.gradients[2 * i] = model.weights[i].grad().to_vector<float>();
        outcome.gradients[2 * i + 1] = model.biases[i].grad().to_vector<float>();
      }
    }
  });
  return outcome;
}

TEST(PipelineExecutor, HasTheBitsOfOneProcessInEverySchedule) {
  for (const int micro_batches : {1, 4, 6, 12}) {
    const Outcome expected = alone(micro_batches, 0.25);
    for (const PipelineKind kind : kPipelineKinds) {
      for (int ranks = 1; ranks <= 4; ++ranks) {
        const bool chunked = kind == PipelineKind::kInterleaved || kind == PipelineKind::kGPipe;
        for (int chunks = 1; chunks <= (chunked ? 3 : 1); ++chunks) {
          if (kind == PipelineKind::kInterleaved && micro_batches % ranks != 0) continue;
          const Outcome outcome = piped(kind, {ranks, micro_batches, chunks}, 0.25);
          EXPECT_EQ(outcome.gradients, expected.gradients) << kind << ' ' << ranks << ' ' << micro_batches;
          EXPECT_EQ(outcome.losses, expected.losses) << kind << ' ' << ranks << ' ' << micro_batches;
        }
      }
    }
  }
}

TEST(PipelineExecutor, RunsOneStepAfterAnother) {
  EXPECT_EQ(piped(PipelineKind::k1F1B, {3, 5}, 1, 4).gradients, alone(5, 1).gradients);
}

TEST(PipelineExecutor, HooksAreToldWhenAStageBeginsAndEnds) {
  const auto told_by = [](PipelineKind kind, const PipelineShape& shape) {
    std::vector<std::string> told(static_cast<size_t>(shape.ranks));
    piped(kind, shape, 1, 1, [&](int rank) {
      const auto note = [&text = told[static_cast<size_t>(rank)]](const char* what) {
        return [&text, what](int stage, Pass pass) {
          text += concat(what, stage, pass == Pass::kForward ? 'f' : 'b', ' ');
        };
      };
      return PipelineHooks{note("+"), note("-")};
    });
    return told;
  };
  EXPECT_EQ(told_by(PipelineKind::kGPipe, {1, 3, 3}),
            (std::vector<std::string>{"+0f -0f +1f -1f +2f -2f +2b -2b +1b -1b +0b -0b "}));
  EXPECT_EQ(told_by(PipelineKind::kGPipe, {2, 2, 2}),
            (std::vector<std::string>{"+0f -0f +2f -2f +2b -2b +0b -0b ", "+1f -1f +3f -3f +3b -3b +1b -1b "}));
  EXPECT_EQ(told_by(PipelineKind::kZeroBubble, {2, 3}),
            (std::vector<std::string>{"+0f +0b -0f -0b ", "+1f +1b -1f -1b "}));
}

TEST(PipelineExecutor, StagesThatGiveTheWrongThingAreNamed) {
  const auto run = [](const PipelineStage& first) {
    run_threads(2, [&](Group& world) {
      const PipelineStage last = [](int, const std::vector<Tensor>& inputs) {
        return std::vector<Tensor>{mean(inputs[0])};
      };
      PipelineExecutor(world, make_pipeline_schedule(PipelineKind::kGPipe, {2, 1}), {world.rank() == 0 ? first : last},
                       {{{2}}})
          .run();
    });
  };
  EXPECT_ERROR(ErrorKind::kValue, "stage 0 must give 1 tensors, got 0",
               run([](int, const std::vector<Tensor>&) { return std::vector<Tensor>{}; }));
  EXPECT_ERROR(ErrorKind::kShape, "output 0 of stage 0 must be f32 [2], got f32 [3]",
               run([](int, const std::vector<Tensor>&) { return std::vector<Tensor>{Tensor::ones({3})}; }));
  Group self = self_group();
  EXPECT_ERROR(ErrorKind::kValue, "the schedule is for 2 ranks, the group has 1",
               PipelineExecutor(self, make_pipeline_schedule(PipelineKind::kGPipe, {2, 1}), {{}}, {}));
  EXPECT_ERROR(ErrorKind::kValue, "the schedule has 1 stages a rank, got 0",
               PipelineExecutor(self, make_pipeline_schedule(PipelineKind::kGPipe, {1, 1}), {}, {}));
}

}  // namespace
}  // namespace weft::dist
