// Twelve layouts save, and each loads what each has saved: the next losses are those of a run that never changed.
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <mutex>
#include <span>

#include "core/autograd.h"
#include "core/random.h"
#include "dist/threads.h"
#include "models/checkpoint/saver.h"
#include "models/parallel_gpt.h"
#include "optim/adam.h"

namespace weft::models {
namespace {

namespace fs = std::filesystem;
using dist::Mesh;
using dist::PipelineKind;
using dist::Zero;

constexpr int64_t kRows = 2, kContext = 6, kVocab = 29, kMicroBatches = 4;

struct Layout {
  const char* mesh;
  Zero zero = Zero::kNone;
  PipelineKind schedule = PipelineKind::k1F1B;
  int chunks = 1;
  bool exact = true;  ///< has the bits of one process
};

constexpr Layout kLayouts[] = {
    {""},
    {"dp=2", Zero::kOptimizer},
    {"dp=4", Zero::kGradients},
    {"dp=3", Zero::kParameters},
    {"pp=2", Zero::kNone, PipelineKind::kZeroBubble},
    {"pp=2", Zero::kNone, PipelineKind::kInterleaved, 2},
    {"dp=2,pp=3", Zero::kOptimizer, PipelineKind::kGPipe},
    {"dp=2,pp=2", Zero::kParameters},
    {"tp=2", Zero::kNone, PipelineKind::k1F1B, 1, false},
    {"cp=2", Zero::kOptimizer, PipelineKind::k1F1B, 1, false},
    {"dp=2,tp=2", Zero::kParameters, PipelineKind::k1F1B, 1, false},
    {"pp=2,cp=2,tp=2", Zero::kGradients, PipelineKind::k1F1B, 1, false},
};

constexpr Layout kFp8Layouts[] = {
    {""},
    {"dp=2", Zero::kParameters},
    {"dp=2,pp=2", Zero::kOptimizer, PipelineKind::kZeroBubble},
    {"dp=2,tp=2", Zero::kNone, PipelineKind::k1F1B, 1, false},
    {"pp=2,cp=2", Zero::kGradients, PipelineKind::k1F1B, 1, false},
};

GptConfig config(bool fp8) {
  GptConfig config;
  config.layers = fp8 ? 3 : 5, config.heads = fp8 ? 2 : 3, config.width = fp8 ? 32 : 24;
  config.context = kContext, config.vocab = kVocab, config.dropout = 0.1;
  return config;
}

MicroBatch data_of(int64_t step, int64_t j) {
  const RandomStream stream = RandomStream(9, "data").at_step(static_cast<uint64_t>(step));
  std::vector<int32_t> ids, targets;
  for (int64_t i = 0; i < kRows * kContext; ++i) {
    const auto at = static_cast<uint64_t>((j * kRows * kContext + i) * 2);
    ids.push_back(static_cast<int32_t>(stream.below(at, kVocab)));
    targets.push_back(static_cast<int32_t>(stream.below(at + 1, kVocab)));
  }
  return {Tensor::from(ids, {kRows, kContext}), Tensor::from(targets, {kRows, kContext})};
}

/// Takes two steps on a layout: from the start, saving after the first, or from what another has saved after it. The
/// losses of the second.
std::vector<double> train(const Layout& layout, const fs::path& directory, bool resumes, bool fp8) {
  std::vector<double> result;
  const Mesh mesh = Mesh::parse(layout.mesh);
  dist::run_threads(mesh.size(), [&](dist::Group& world) {
    ParallelOptions options;
    options.mesh = mesh, options.zero = layout.zero, options.schedule = layout.schedule, options.chunks = layout.chunks;
    options.bucket_bytes = 4096;
    ParallelGpt parallel(world, options, config(fp8), Device::cpu(), 3, fp8 ? DType::bf16 : DType::f32);
    const std::shared_ptr<optim::DelayedScaling> scaling = fp8 ? parallel.use_fp8() : nullptr;
    optim::Adam optimizer(parallel.parameters(), {.weight_decay = 0.1, .clip_norm = 0.5, .trust_ratio = true},
                          parallel.norms());
    Parameters own = parallel.parameters();
    for (size_t i = 0; i < own.size(); ++i) own[i].part = parallel.parts()[i];
    const auto stored = [&] {
      std::vector<StoredTensor> state = stored_state(optimizer.state(), own);
      if (!fp8) return state;
      for (StoredTensor& scales : stored_whole(scaling->state())) state.push_back(std::move(scales));
      return state;
    };
    const Parameters held = parallel.sharded() ? own : parallel.gpt().parameters();
    if (resumes) {
      const OpenCheckpoint from = open_checkpoint((directory / "step_00000001").string(), world);
      const NamedTensors weights = load_stored(from.model, stored_parameters(held), &world);
      const autograd::NoGrad no_grad;
      for (size_t i = 0; i < held.size(); ++i) {
        Tensor(held[i].tensor).fill_(0.5);  // it must not have had what it was to load
        Tensor(held[i].tensor).copy_(weights[i].second);
      }
      const NamedTensors state = load_stored(from.optimizer, stored(), &world);
      const auto scales = std::find_if(state.begin(), state.end(),
                                       [](const auto& entry) { return optim::DelayedScaling::owns(entry.first); });
      optimizer.load_state({state.begin(), scales});
      if (fp8) scaling->load_state({scales, state.end()});
    }
    const int64_t share = parallel.shares(kMicroBatches)[static_cast<size_t>(parallel.data_rank())];
    for (int64_t step = resumes ? 1 : 0; step < 2; ++step) {
      parallel.begin_step(kMicroBatches);
      if (fp8) scaling->begin_step();
      std::vector<MicroBatch> batches;
      for (int64_t i = 0; i < share; ++i) batches.push_back(data_of(step, parallel.micro_batch(i)));
      const std::vector<double> losses = parallel
                                             .run(batches,
                                                  [&](size_t i) {
                                                    const int64_t j = parallel.micro_batch(static_cast<int64_t>(i));
                                                    return GptStep{.step = static_cast<uint64_t>(step),
                                                                   .first_row = j * kRows,
                                                                   .valid_tokens = kMicroBatches * kRows * kContext};
                                                  })
                                             .to_vector<double>();
      parallel.reduce();
      if (fp8) parallel.fp8_counts();
      optimizer.step(1e-2);
      parallel.gather();
      if (fp8) scaling->update();
      optimizer.zero_grad();
      if (world.rank() == 0) result = losses;
      if (resumes || step > 0) continue;
      ShardedContent content;
      content.model = stored_parameters(held), content.optimizer = stored();
      content.step = 1;
      CheckpointSaver(directory.string(), &world).save(content);
    }
  });
  return result;
}

/// @param bound  of a loss relative to one process's, where layouts have other sums
void expect_each_goes_on_from_each(std::span<const Layout> layouts, bool fp8, double bound) {
  const fs::path root = fs::temp_directory_path() / concat("weft-reshard-", ::getpid());
  fs::remove_all(root);
  std::vector<double> expected;
  for (size_t from = 0; from < layouts.size(); ++from) {
    const fs::path directory = root / std::to_string(from);
    const std::vector<double> unbroken = train(layouts[from], directory, false, fp8);
    if (from == 0) expected = unbroken;
    for (const Layout& to : layouts) {
      const ::testing::ScopedTrace trace(__FILE__, __LINE__,
                                         concat(quoted(layouts[from].mesh), " saves, ", quoted(to.mesh), " goes on"));
      const std::vector<double> losses = train(to, directory, true, fp8);
      ASSERT_EQ(losses.size(), expected.size());
      for (size_t i = 0; i < losses.size(); ++i) {
        if (layouts[from].exact && to.exact) {
          EXPECT_EQ(losses[i], expected[i]) << i;
        } else {
          EXPECT_NEAR(losses[i], expected[i], bound * expected[i]) << i;
        }
      }
    }
  }
  fs::remove_all(root);
}

TEST(Reshard, EachOfTwelveLayoutsGoesOnFromWhatEachHasSaved) {
  expect_each_goes_on_from_each(kLayouts, false, 2e-5);  // other sums of up to 96 f32 products
}

TEST(Reshard, InFp8EachGoesOnWithTheScalesThatEachHasSaved) {
  // Roundings to a sixteenth that fall to the other side, in few of the products of a loss of kVocab words.
  expect_each_goes_on_from_each(kFp8Layouts, true, 5e-3);
}

}  // namespace
}  // namespace weft::models
