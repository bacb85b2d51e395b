// What of a training step is not finite is named on every rank alike, wherever on the mesh it is.
#include "models/not_finite.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <mutex>
#include <set>

#include "core/autograd.h"
#include "core/random.h"
#include "dist/threads.h"
#include "models/trainer.h"
#include "optim/adam.h"

namespace weft::models {
namespace {

using dist::Mesh;
using dist::Zero;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

struct Layout {
  std::string mesh;
  Zero zero = Zero::kNone;
  bool sequence = false;
};

std::string title(const Layout& layout) {
  return concat("mesh ", quoted(layout.mesh), ", ZeRO ", static_cast<int>(layout.zero),
                layout.sequence ? ", sequence parallel" : "");
}

GptConfig config() { return {.layers = 4, .heads = 2, .width = 16, .context = 6, .vocab = 23}; }

std::shared_ptr<text::TokenVector> tokens() {
  const RandomStream stream(1, "tokens");
  std::vector<int32_t> ids;
  for (uint64_t i = 0; i < 2000; ++i) ids.push_back(static_cast<int32_t>(stream.below(i, 23)));
  return std::make_shared<text::TokenVector>(ids, 23);
}

/// What a step on the layout fails with, the same on all ranks. @param spoil  is given each rank's model before
std::string failure_of_a_step(const Layout& layout, const std::function<void(ParallelGpt&)>& spoil) {
  constexpr int64_t kMicroBatches = 5;
  const Mesh mesh = Mesh::parse(layout.mesh);
  std::mutex mutex;
  std::set<std::string> messages;
  dist::run_threads(mesh.size(), [&](dist::Group& world) {
    ParallelOptions options;
    options.mesh = mesh, options.zero = layout.zero, options.sequence = layout.sequence, options.bucket_bytes = 2048;
    ParallelGpt parallel(world, options, config(), Device::cpu(), 1);
    optim::Adam adam(parallel.parameters(), {}, parallel.norms());
    const std::vector<int64_t> shares = parallel.shares(layout.zero == Zero::kGradients ? 4 : kMicroBatches);
    text::Loader loader(tokens(), {.batch = 2,
                                   .context = 6,
                                   .rank = parallel.data_rank(),
                                   .world_size = parallel.data_ranks(),
                                   .shares = parallel.consecutive() ? shares : std::vector<int64_t>()});
    Trainer trainer(parallel.gpt(), adam, loader, {.peak = 1e-3, .total = 10},
                    shares[static_cast<size_t>(parallel.data_rank())]);
    trainer.parallelize(parallel, layout.zero == Zero::kGradients ? 4 : kMicroBatches);
    spoil(parallel);
    std::string message = "no error";
    try {
      trainer.step();
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::kValue);
      message = error.what();
    }
    EXPECT_EQ(adam.steps(), 0);
    const std::lock_guard lock(mutex);
    messages.insert(message);
  });
  EXPECT_EQ(messages.size(), 1u) << "ranks say different things: " << *messages.begin() << "\n" << *messages.rbegin();
  return *messages.begin();
}

/// Elements of the whole tensor `name`, where this rank has them: in the model, and in what its optimizer updates.
void set(ParallelGpt& parallel, const std::string& name, int64_t first, int64_t count, double value) {
  const autograd::NoGrad no_grad;
  const auto in = [&](const Tensor& tensor, const TensorPart& part) {
    const Tensor flat = tensor.detach().reshape({-1});
    part.for_each_run([&](int64_t at, int64_t from, int64_t length) {
      const int64_t begin = std::max(at, first), end = std::min(at + length, first + count);
      if (begin < end) flat.narrow(0, from + begin - at, end - begin).fill_(value);
    });
  };
  const Parameters own = parallel.parameters();
  const std::vector<TensorPart> parts = parallel.parts();
  for (size_t i = 0; i < own.size(); ++i) {
    if (own[i].name == name) in(own[i].tensor, parts[i]);
  }
  if (parallel.sharded()) return;
  for (const Parameter& held : parallel.gpt().parameters()) {
    if (held.name == name) in(held.tensor, held.part.value_or(TensorPart::all(held.tensor.shape())));
  }
}

void expect_parts(const std::string& message, const std::vector<std::string>& parts) {
  for (const std::string& part : parts) EXPECT_NE(message.find(part), std::string::npos) << part << "\nin: " << message;
}

const std::vector<Layout> kLayouts = {{.mesh = "dp=2"},
                                      {.mesh = "dp=2", .zero = Zero::kOptimizer},
                                      {.mesh = "dp=2", .zero = Zero::kGradients},
                                      {.mesh = "dp=3", .zero = Zero::kParameters},
                                      {.mesh = "pp=2"},
                                      {.mesh = "pp=4"},
                                      {.mesh = "tp=2"},
                                      {.mesh = "tp=2", .sequence = true},
                                      {.mesh = "cp=2"},
                                      {.mesh = "dp=2,pp=2", .zero = Zero::kParameters},
                                      {.mesh = "dp=2,pp=2,tp=2", .zero = Zero::kOptimizer}};

/// The first rank whose stage has the layer, among four even stages or fewer.
std::string stage_of(const Layout& layout, int layer) {
  const int stages = Mesh::parse(layout.mesh).size(dist::Axis::pp);
  return stages == 1 ? "" : concat("pp=", layer * stages / 4);
}

TEST(NotFinite, AWeightIsNamedWithItsElementOfTheWholeTensorOnEveryLayout) {
  for (const Layout& layout : kLayouts) {
    SCOPED_TRACE(title(layout));
    const std::string message = failure_of_a_step(layout, [](ParallelGpt& parallel) {
      // A later one too, on another rank of a pipeline.
      set(parallel, "h.3.attn.qkv.weight", 3, 1, kNaN);
      set(parallel, "h.2.mlp.fc.weight", 777, 1, kNaN);
    });
    expect_parts(message, {"the loss of step 0 is ", ": weight \"h.2.mlp.fc.weight\" is nan at element 777, on rank ",
                           stage_of(layout, 2)});
  }
}

TEST(NotFinite, TheFirstTensorThatOverflowsIsNamedWithItsRankOnEveryLayout) {
  for (const Layout& layout : kLayouts) {
    SCOPED_TRACE(title(layout));
    const std::string message =
        failure_of_a_step(layout, [](ParallelGpt& parallel) { set(parallel, "h.2.mlp.fc.weight", 0, 64 * 16, 3e38); });
    expect_parts(message, {"every weight is finite, and the first tensor that is not is the output of linear",
                           "at or after h.2.mlp.fc.weight", ", in micro-batch 0, on rank ", stage_of(layout, 2)});
  }
}

TEST(NotFinite, OneRankAloneSaysTheSameWithoutARank) {
  const std::string message = failure_of_a_step(
      {.mesh = ""}, [](ParallelGpt& parallel) { set(parallel, "h.2.mlp.fc.weight", 0, 64 * 16, 3e38); });
  expect_parts(message, {"the first tensor that is not is the output of linear", "at or after h.2.mlp.fc.weight"});
  EXPECT_EQ(message.find("rank"), std::string::npos) << message;
  EXPECT_EQ(message.find("micro-batch"), std::string::npos) << message;
}

TEST(NotFinite, AGradientIsNamedOnEveryLayoutAndTheLastLayerComesFirst) {
  for (const Layout& layout : kLayouts) {
    if (Mesh::parse(layout.mesh).size(dist::Axis::tp) > 1) continue;  // a cut weight has no element 100 of the whole
    SCOPED_TRACE(title(layout));
    const std::string message = failure_of_a_step(layout, [](ParallelGpt& parallel) {
      for (const Parameter& parameter : parallel.gpt().parameters()) {
        if (parameter.name != "h.0.attn.proj.weight" && parameter.name != "h.2.mlp.proj.weight") continue;
        parameter.tensor.register_hook([](const Tensor& gradient) {
          const autograd::NoGrad no_grad;
          const Tensor spoilt = gradient.clone();
          spoilt.reshape({-1}).narrow(0, 100, 1).fill_(kNaN);
          return spoilt;
        });
      }
    });
    expect_parts(message, {"the gradient of \"h.2.mlp.proj.weight\" (", ") is nan at element 100, on rank ",
                           stage_of(layout, 2), "the step was not taken"});
  }
}

}  // namespace
}  // namespace weft::models
