// Scales of fp8 tensors and of f16 losses on every mesh: ranks agree on them, and they are those of one process.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <map>
#include <mutex>

#include "core/autograd.h"
#include "core/random.h"
#include "dist/threads.h"
#include "models/fp8_agreement.h"
#include "models/trainer.h"
#include "optim/adam.h"
#include "tests/error_of.h"

namespace weft::models {
namespace {

using dist::Axis;
using dist::Mesh;
using dist::PipelineKind;
using dist::Zero;

constexpr int64_t kVocab = 37, kMicroBatches = 4;

struct Case {
  const char* mesh;
  Zero zero = Zero::kNone;
  PipelineKind schedule = PipelineKind::k1F1B;
  bool recompute = false;
  bool sequence = false;
  bool exact = true;  ///< has the bits of one process
};

GptConfig config_of(const Case& c) {
  GptConfig config;
  config.layers = 4, config.heads = 2, config.width = 32, config.context = 8, config.vocab = kVocab;
  config.dropout = 0.1, config.recompute.block = c.recompute;
  return config;
}

std::shared_ptr<text::TokenVector> some_tokens() {
  const RandomStream stream(5, "tokens");
  std::vector<int32_t> tokens(2000);
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int32_t>(stream.below(i, kVocab));
  return std::make_shared<text::TokenVector>(std::move(tokens), kVocab);
}

/// A rank's objects.
struct Rank {
  dist::Group& world;
  ParallelGpt parallel;
  optim::Adam adam;
  text::Loader loader;
  Trainer trainer;

  static ParallelOptions options(const Case& c) {
    ParallelOptions options;
    options.mesh = Mesh::parse(c.mesh), options.zero = c.zero, options.schedule = c.schedule;
    options.sequence = c.sequence, options.bucket_bytes = 4096;
    return options;
  }
  int64_t share() const { return parallel.shares(kMicroBatches)[static_cast<size_t>(parallel.data_rank())]; }

  Rank(dist::Group& ranks, const Case& c, DType dtype)
      : world(ranks),
        parallel(ranks, options(c), config_of(c), Device::cpu(), 3, dtype),
        adam(parallel.parameters(), {.clip_norm = 0.5}, parallel.norms()),
        loader(some_tokens(),
               {.batch = 2,
                .context = 8,
                .seed = 2,
                .rank = parallel.data_rank(),
                .world_size = parallel.data_ranks(),
                .shares = parallel.consecutive() ? parallel.shares(kMicroBatches) : std::vector<int64_t>()}),
        trainer(parallel.gpt(), adam, loader, {.peak = 5e-3, .floor = 5e-4, .warmup = 2, .total = 20}, share()) {
    trainer.parallelize(parallel, kMicroBatches);
  }
};

/// The same program on the ranks of a mesh as threads.
void on_ranks(const Case& c, DType dtype, const std::function<void(Rank& rank)>& program) {
  dist::run_threads(Mesh::parse(c.mesh).size(), [&](dist::Group& world) {
    Rank rank(world, c, dtype);
    program(rank);
  });
}

std::string title(const Case& c) {
  return concat("mesh ", quoted(c.mesh), ", ZeRO ", static_cast<int>(c.zero), ", ", c.schedule,
                c.recompute ? ", recomputed" : "", c.sequence ? ", sequence parallel" : "");
}

constexpr Case kCases[] = {
    {.mesh = "dp=2"},
    {.mesh = "dp=3", .zero = Zero::kOptimizer},
    {.mesh = "dp=2", .zero = Zero::kGradients, .recompute = true},
    {.mesh = "dp=2", .zero = Zero::kParameters},
    {.mesh = "dp=2", .zero = Zero::kParameters, .recompute = true},
    {.mesh = "pp=2"},
    {.mesh = "dp=2,pp=2", .zero = Zero::kParameters, .schedule = PipelineKind::kZeroBubble},
    {.mesh = "tp=2", .exact = false},
    {.mesh = "dp=2,tp=2", .zero = Zero::kParameters, .sequence = true, .exact = false},
    {.mesh = "cp=2", .recompute = true, .exact = false},
    {.mesh = "pp=2,cp=2,tp=2", .zero = Zero::kOptimizer, .exact = false},
};

// ---- fp8 ----

/// What a process knows after each step.
struct Fp8Step {
  double loss = 0;
  int64_t converted = 0, saturated = 0;
  bool operator==(const Fp8Step&) const = default;
};

std::vector<Fp8Step> fp8_steps(Rank& rank, int steps) {
  rank.trainer.scale_fp8(rank.parallel.use_fp8());
  std::vector<Fp8Step> out;
  for (int i = 0; i < steps; ++i) {
    if (i == 2 && !rank.parallel.sharded()) {
      // A norm that grows makes the inputs of the first matrix saturate.
      const autograd::NoGrad no_grad;
      for (const Parameter& parameter : rank.parallel.gpt().parameters()) {
        if (parameter.name == "h.0.ln_1.weight") Tensor(parameter.tensor).fill_(64);
      }
    }
    const StepMetrics m = rank.trainer.step();
    out.push_back({m.loss, m.fp8.converted, m.fp8.saturated});
  }
  return out;
}

TEST(Fp8OnAMesh, CountsEveryElementOnceAndHasTheLossesOfOneProcess) {
  std::vector<Fp8Step> alone, kept_alone;
  on_ranks({.mesh = ""}, DType::bf16, [&](Rank& rank) { alone = fp8_steps(rank, 4); });
  on_ranks({.mesh = "", .zero = Zero::kParameters}, DType::bf16, [&](Rank& rank) { kept_alone = fp8_steps(rank, 4); });
  EXPECT_GT(alone[2].saturated, 1000);
  for (const Case& c : kCases) {
    const ::testing::ScopedTrace trace(__FILE__, __LINE__, title(c));
    const std::vector<Fp8Step>& one = c.zero == Zero::kParameters ? kept_alone : alone;
    on_ranks(c, DType::bf16, [&](Rank& rank) {
      const std::vector<Fp8Step> many = fp8_steps(rank, 4);
      for (size_t i = 0; i < one.size(); ++i) {
        EXPECT_EQ(many[i].converted, one[i].converted) << i;
        if (c.exact) {
          EXPECT_EQ(many[i], one[i]) << i;
        } else {
          // Other roundings of few elements; a copy that counted would double what saturates in step 2.
          const auto seen = static_cast<double>(one[i].saturated);
          EXPECT_NEAR(static_cast<double>(many[i].saturated), seen, 0.02 * seen + 50) << i;
          EXPECT_NEAR(many[i].loss, one[i].loss, 0.02 * one[i].loss) << i;
        }
      }
    });
  }
}

TEST(Fp8OnAMesh, InTheFirstStepAPartHasTheScaleOfTheWhole) {
  for (const Case& c : {Case{.mesh = "tp=2"}, Case{.mesh = "cp=2"}, Case{.mesh = "cp=2,tp=2"}}) {
    const ::testing::ScopedTrace trace(__FILE__, __LINE__, title(c));
    std::mutex mutex;
    std::vector<Fp8Stats> seen;                            // in one process
    std::map<size_t, std::vector<int64_t>> before, after;  // by call, of each rank
    on_ranks({.mesh = ""}, DType::bf16, [&](Rank& rank) {
      rank.trainer.scale_fp8(rank.parallel.use_fp8());
      rank.trainer.step();
      seen = rank.trainer.fp8()->seen();
    });
    on_ranks(c, DType::bf16, [&](Rank& rank) {
      const auto scaling = rank.parallel.use_fp8();
      const Mesh::Coordinates at = Mesh::parse(c.mesh).coordinates_of(rank.world.rank());
      size_t calls = 0;
      for (size_t i = 0; i < scaling->size(); ++i) {
        for (size_t role = 0; role < kFp8Roles; ++role) {
          auto& raise = scaling->layer(i)->raise_amax[role];
          if (!raise) continue;
          raise = [&, i, role, inner = raise](const Tensor& stats) {
            const int64_t own = stats.to_vector<int64_t>()[0];
            inner(stats);
            if (role == static_cast<size_t>(Fp8Role::kWeight)) {
              EXPECT_EQ(stats.to_vector<int64_t>()[0], static_cast<int64_t>(seen[kFp8Roles * i + role].amax))
                  << scaling->names()[i];
            }
            const std::lock_guard lock(mutex);
            before[calls].push_back(own), after[calls].push_back(stats.to_vector<int64_t>()[0]);
            ++calls;
          };
        }
      }
      rank.trainer.scale_fp8(scaling);
      rank.trainer.step();
      const size_t first = calls;
      EXPECT_GT(first, 0u) << at[0];
      rank.trainer.step();
      EXPECT_EQ(calls, first) << "from the second step on, scales are known before their tensors";
    });
    bool differed = false;
    for (const auto& [call, amaxes] : after) {
      const std::vector<int64_t>& own = before[call];
      if (Mesh::parse(c.mesh).size() == 2) {
        const int64_t most = *std::max_element(own.begin(), own.end());
        for (const int64_t amax : amaxes) EXPECT_EQ(amax, most) << call;
      }
      differed |= own.front() != own.back();
    }
    EXPECT_TRUE(differed) << "there was nothing to agree on";
  }
}

/// Fp8Stats that a test makes up: an amax of its own for each tensor, and as many elements.
Fp8Stats made_up(size_t tensor) {
  return {
      .amax = std::bit_cast<uint32_t>(1 + static_cast<float>(tensor)), .saturated = tensor, .converted = 100 + tensor};
}

TEST(Fp8OnAMesh, AnInfinityOnOneRankIsNamedOnAll) {
  for (const char* mesh : {"dp=2", "dp=2,pp=2", "pp=2,tp=2", "cp=2"}) {
    for (int bad = 0; bad < Mesh::parse(mesh).size(); ++bad) {
      const ::testing::ScopedTrace trace(__FILE__, __LINE__, concat(mesh, ", rank ", bad));
      const bool last_stage = Mesh::parse(mesh).size(Axis::pp) == 1 ||
                              Mesh::parse(mesh).coordinates_of(bad)[static_cast<size_t>(Axis::pp)] == 1;
      const std::string layer = last_stage ? "h.3.mlp.fc" : "h.1.mlp.fc";
      on_ranks({.mesh = mesh}, DType::bf16, [&](Rank& rank) {
        const auto scaling = rank.parallel.use_fp8();
        std::vector<Fp8Stats> stats(kFp8Roles * scaling->size(), made_up(1));
        for (size_t i = 0; i < scaling->size(); ++i) {
          if (rank.world.rank() == bad && scaling->names()[i] == layer)
            stats[kFp8Roles * i + 2].amax = std::bit_cast<uint32_t>(INFINITY);
        }
        scaling->see(stats);
        EXPECT_ERROR(ErrorKind::kValue, concat("the gradient of ", quoted(layer), " has an element that is inf"),
                     rank.parallel.fp8_counts());
      });
    }
  }
}

TEST(Fp8OnAMesh, AgreeingSendsTwoAllReducesOf24And48BytesALayer) {
  on_ranks({.mesh = "dp=2,pp=2"}, DType::bf16, [](Rank& rank) {
    rank.parallel.use_fp8();
    const dist::Group::Traffic before = rank.world.traffic(dist::Collective::all_reduce);
    rank.parallel.fp8_counts();
    const dist::Group::Traffic after = rank.world.traffic(dist::Collective::all_reduce);
    EXPECT_EQ(after.calls - before.calls, 2);
    EXPECT_EQ(after.bytes_sent - before.bytes_sent, 2 * (24 + 48) * 16 * 3 / 4);
  });
}

TEST(Fp8OnAMesh, WeightsIn8BitsGoWhereWeightsAreSharedOut) {
  for (const char* mesh : {"dp=2", "dp=2,pp=2"}) {
    on_ranks({.mesh = mesh, .zero = Zero::kParameters}, DType::bf16, [](Rank& rank) {
      rank.trainer.scale_fp8(rank.parallel.use_fp8());
      rank.trainer.step();
      for (size_t i = 0; i < rank.trainer.fp8()->size(); ++i)
        EXPECT_FALSE(rank.trainer.fp8()->layer(i)->weight.values.defined());
    });
  }
}

TEST(Fp8OnAMesh, WhatCannotBeIsSaid) {
  on_ranks({.mesh = "dp=2"}, DType::bf16, [](Rank& rank) {
    EXPECT_ERROR(ErrorKind::kState, "Hint: ParallelGpt::use_fp8()", rank.parallel.fp8_counts());
  });
  dist::run_threads(2, [](dist::Group& world) {
    GptConfig config = config_of({.mesh = ""});
    config.heads = 16;  // of 2 channels, 16 of them on each rank
    EXPECT_TRUE(fp8_fits(config, 2));
    EXPECT_FALSE(fp8_fits(config, 3)) << "heads: 6, 5 and 5";
    config.heads = 3, config.width = 48;
    EXPECT_TRUE(fp8_fits(config, 3));
    config.heads = 2, config.width = 80;
    EXPECT_FALSE(fp8_fits(config, 2)) << "heads of 40 channels";
    config.width = 16;
    ParallelGpt narrow(world, {.mesh = Mesh::parse("tp=2")}, config, Device::cpu(), 1, DType::bf16);
    EXPECT_ERROR(ErrorKind::kValue, "got width 16 and 2 heads for 2 ranks", narrow.use_fp8());
  });
}

// ---- f16 ----

struct F16Step {
  double loss = 0, grad_norm = 0, loss_scale = 0;
  bool skipped = false;
};

/// Steps in f16 of which number 2 overflows in one element of a gradient: in that of a weight of block 3 in the last
/// micro-batch, on the ranks of which `wanted` says that it is theirs.
std::vector<F16Step> f16_steps(Rank& rank, const std::function<bool(const Mesh::Coordinates&)>& wanted) {
  rank.trainer.scale_loss(optim::LossScale({.initial = 1024, .interval = 3}));
  const ParallelOptions& options = rank.parallel.options();
  const int64_t share = rank.share();
  const auto backward_passes = std::make_shared<int64_t>(0);
  if (wanted(options.mesh.coordinates_of(rank.world.rank()))) {
    for (const Parameter& parameter : rank.parallel.gpt().parameters()) {
      if (parameter.name != "h.3.mlp.fc.weight") continue;
      parameter.tensor.register_hook([=](const Tensor& gradient) {
        if (++*backward_passes != 3 * share) return gradient;
        const autograd::NoGrad no_grad;
        const Tensor with = gradient.clone();
        with.select(0, 0).select(0, 0).fill_(INFINITY);
        return with;
      });
    }
  }
  std::vector<F16Step> out;
  for (int i = 0; i < 7; ++i) {
    std::vector<std::vector<double>> before, after;
    for (const Parameter& parameter : rank.parallel.parameters())
      before.push_back(parameter.tensor.to_vector<double>());
    const StepMetrics m = rank.trainer.step();
    for (const Parameter& parameter : rank.parallel.parameters()) after.push_back(parameter.tensor.to_vector<double>());
    EXPECT_EQ(before == after, m.skipped) << "step " << i << " of rank " << rank.world.rank();
    out.push_back({m.loss, m.grad_norm, m.loss_scale, m.skipped});
  }
  EXPECT_EQ(rank.adam.steps(), 6);
  return out;
}

TEST(F16OnAMesh, AnOverflowOnAnyOneRankSkipsThatStepOnAllAndIsThatOfOneProcess) {
  std::vector<F16Step> one;
  on_ranks({.mesh = ""}, DType::f16, [&](Rank& rank) { one = f16_steps(rank, [](const auto&) { return true; }); });
  for (size_t i = 0; i < one.size(); ++i) {
    EXPECT_EQ(one[i].skipped, i == 2);
    EXPECT_EQ(one[i].loss_scale, i <= 2 ? 1024 : i < 6 ? 512 : 1024) << i;
  }
  for (const Case& c : kCases) {
    const Mesh mesh = Mesh::parse(c.mesh);
    for (const Axis axis : {Axis::dp, Axis::cp, Axis::tp}) {
      if (mesh.size(axis) == 1 && !(mesh.size(Axis::pp) == mesh.size() && axis == Axis::dp)) continue;
      const ::testing::ScopedTrace trace(__FILE__, __LINE__,
                                         concat(title(c), ", overflow on the last of ", dist::name(axis)));
      on_ranks(c, DType::f16, [&](Rank& rank) {
        const std::vector<F16Step> many = f16_steps(rank, [&](const Mesh::Coordinates& at) {
          for (const Axis other : {Axis::dp, Axis::cp, Axis::tp}) {
            if (at[static_cast<size_t>(other)] != (other == axis || other == Axis::dp ? mesh.size(other) - 1 : 0))
              return false;
          }
          return true;
        });
        for (size_t i = 0; i < one.size(); ++i) {
          EXPECT_EQ(many[i].skipped, one[i].skipped) << i;
          EXPECT_EQ(many[i].loss_scale, one[i].loss_scale) << i;
          if (c.exact) {
            EXPECT_EQ(many[i].loss, one[i].loss) << i;
          } else {
            EXPECT_NEAR(many[i].loss, one[i].loss, 0.01 * one[i].loss) << i;  // f16 sums in another order
          }
        }
      });
    }
  }
}

}  // namespace
}  // namespace weft::models
