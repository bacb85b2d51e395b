// A model spread over a mesh writes what one process writes.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <mutex>

#include "core/autograd.h"
#include "dist/threads.h"
#include "models/generate.h"
#include "tests/error_of.h"

namespace weft::models {
namespace {

using dist::Mesh;
using dist::Zero;

struct Layout {
  std::string mesh;
  Zero zero = Zero::kNone;
  int chunks = 1;
  bool sequence = false;
  DType dtype = DType::f32;
};

std::string title(const Layout& l) {
  return concat("mesh ", quoted(l.mesh), ", ZeRO ", static_cast<int>(l.zero), ", ", l.chunks, " chunks, ", l.dtype,
                l.sequence ? ", sequence parallel" : "");
}

/// Words and heads that two ranks cannot share evenly.
GptConfig config() {
  GptConfig config;
  config.layers = 5, config.heads = 3, config.width = 24, config.context = 8, config.vocab = 29;
  return config;
}

constexpr uint64_t kSeed = 3;
/// Fits into the context; the generation outgrows it twice.
const std::vector<int32_t> kPrompt = {4, 28, 0};
constexpr int64_t kTokens = 14;
const SamplingOptions kSampling = {.temperature = 3, .top_p = 0.95, .seed = 5};

/// On every rank of the layout.
void on_ranks(const Layout& layout, const std::function<void(ParallelGpt&)>& program) {
  dist::run_threads(Mesh::parse(layout.mesh).size(), [&](dist::Group& world) {
    ParallelOptions options;
    options.mesh = Mesh::parse(layout.mesh), options.zero = layout.zero, options.chunks = layout.chunks;
    options.sequence = layout.sequence, options.bucket_bytes = 4096;
    if (layout.chunks > 1) options.schedule = dist::PipelineKind::kInterleaved;
    ParallelGpt parallel(world, options, config(), Device::cpu(), kSeed, layout.dtype);
    parallel.gpt().eval();
    program(parallel);
  });
}

void expect_text_of_one_process(const Layout& layout) {
  SCOPED_TRACE(title(layout));
  const Gpt alone(config(), Device::cpu(), kSeed, layout.dtype);
  const std::vector<int32_t> expected = generate(alone, kPrompt, kTokens, kSampling);
  // Greedy text of a model that has not been trained repeats itself: this one must not, to tell anything.
  std::vector<int32_t> different = expected;
  std::sort(different.begin(), different.end());
  ASSERT_GE(std::unique(different.begin(), different.end()) - different.begin(), 6);
  std::mutex mutex;
  on_ranks(layout, [&](ParallelGpt& parallel) {
    const std::vector<int32_t> got = generate(parallel, kPrompt, kTokens, kSampling);
    const std::lock_guard lock(mutex);
    EXPECT_EQ(got, expected);
  });
}

TEST(ParallelGeneration, StagesOfAPipelineWriteTheTextOfOneProcess) {
  expect_text_of_one_process({.mesh = "pp=2"});
  expect_text_of_one_process({.mesh = "pp=5"});
  expect_text_of_one_process({.mesh = "pp=2", .chunks = 2});
  expect_text_of_one_process({.mesh = "pp=3", .dtype = DType::bf16});
}

TEST(ParallelGeneration, WeightsThatNoRankHasWholeWriteTheTextOfOneProcess) {
  expect_text_of_one_process({.mesh = "", .zero = Zero::kParameters});
  expect_text_of_one_process({.mesh = "dp=2", .zero = Zero::kParameters});
  expect_text_of_one_process({.mesh = "dp=2,pp=2", .zero = Zero::kParameters});
  expect_text_of_one_process({.mesh = "cp=3", .zero = Zero::kParameters});
}

TEST(ParallelGeneration, LayersAndSequencesThatAreSharedOutWriteTheTextOfOneProcess) {
  expect_text_of_one_process({.mesh = "cp=2"});
  expect_text_of_one_process({.mesh = "tp=2"});
  expect_text_of_one_process({.mesh = "tp=3", .sequence = true});
  expect_text_of_one_process({.mesh = "dp=2,pp=2,cp=2,tp=2", .zero = Zero::kParameters, .sequence = true});
}

TEST(ParallelGeneration, LogitsHaveTheBitsOfOneProcessWithoutTensorParallelism) {
  const Gpt alone(config(), Device::cpu(), kSeed);
  const Tensor prompt = Tensor::from(std::vector<int32_t>{1, 2, 3, 4}, {2, 2}), next = prompt.narrow(1, 0, 1);
  for (const Layout& layout :
       {Layout{.mesh = "pp=2"}, {.mesh = "dp=2", .zero = Zero::kParameters}, {.mesh = "cp=2,pp=2"}}) {
    SCOPED_TRACE(title(layout));
    KvCache alone_seen;
    alone.next_logits(prompt, alone_seen);
    const std::vector<double> expected = alone.next_logits(next.contiguous(), alone_seen).to_vector<double>();
    const int stages = Mesh::parse(layout.mesh).size(dist::Axis::pp);
    int with_logits = 0;
    std::mutex mutex;
    on_ranks(layout, [&](ParallelGpt& parallel) {
      KvCache seen;
      parallel.next_logits(prompt, seen);
      const Tensor logits = parallel.next_logits(next.contiguous(), seen);
      EXPECT_EQ(seen.positions(), 3);
      EXPECT_EQ(logits.defined(), parallel.gpt().has_head());
      if (!logits.defined()) return;
      const std::lock_guard lock(mutex);
      ++with_logits;
      EXPECT_EQ(logits.to_vector<double>(), expected);
    });
    EXPECT_EQ(with_logits, Mesh::parse(layout.mesh).size() / stages);
  }
}

TEST(ParallelGeneration, WeightsThatAreNotNumbersEndItOnAllRanks) {
  const std::string message = testing::error_of(ErrorKind::kValue, [] {
    on_ranks({.mesh = "pp=2"}, [](ParallelGpt& parallel) {
      if (parallel.gpt().has_head()) {
        const autograd::NoGrad no_grad;
        Tensor(parallel.gpt().head()).fill_(std::numeric_limits<double>::quiet_NaN());
      }
      generate(parallel, kPrompt, kTokens, kSampling);
    });
  });
  EXPECT_NE(message.find("rank 1"), std::string::npos) << message;
  EXPECT_NE(message.find("the logit of token 0 is NaN"), std::string::npos) << message;
}

}  // namespace
}  // namespace weft::models
