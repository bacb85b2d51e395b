// A GPT whose sequences are shared out over ranks is the whole one: loss, gradients, masks, bytes.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <map>

#include "core/autograd.h"
#include "dist/threads.h"
#include "models/gpt.h"
#include "tests/error_of.h"
#include "tests/values.h"

namespace weft::models {
namespace {

using dist::Group;
using dist::SequenceLayout;
using testing::same_bits;

constexpr int64_t kBatch = 3, kVocab = 23;

GptConfig small(double dropout = 0.2) {
  return {.layers = 2, .heads = 4, .width = 12, .context = 29, .vocab = kVocab, .dropout = dropout};
}

GptPart on(Group& context) {
  GptPart part;
  part.context = &context;
  return part;
}

Tensor some_ids(const char* name, int64_t tokens) {
  std::vector<int32_t> ids;
  const RandomStream stream(5, name);
  for (uint64_t i = 0; i < static_cast<uint64_t>(kBatch * tokens); ++i)
    ids.push_back(static_cast<int32_t>(stream.below(i, kVocab)));
  return Tensor::from(ids, {kBatch, tokens});
}

/// Every fifth one is not valid.
Tensor some_targets(int64_t tokens) {
  std::vector<int32_t> targets = some_ids("targets", tokens).to_vector<int32_t>();
  for (size_t i = 4; i < targets.size(); i += 5) targets[i] = -1;
  return Tensor::from(targets, {kBatch, tokens});
}

double valid(const Tensor& targets) {
  double count = 0;
  for (const int32_t target : targets.to_vector<int32_t>()) count += target >= 0;
  return count;
}

GptStep step_of(const Tensor& targets, std::optional<SequenceLayout> layout = {}) {
  return {.step = 3, .first_row = 2, .valid_tokens = valid(targets), .layout = layout};
}

using Gradients = std::map<std::string, Tensor>;

/// The loss and every gradient.
std::pair<Tensor, Gradients> alone(const GptConfig& config, DType dtype, int64_t tokens) {
  const Gpt gpt(config, Device::cpu(), 1, dtype);
  const Tensor targets = some_targets(tokens), loss = gpt.loss(some_ids("ids", tokens), targets, step_of(targets));
  loss.backward();
  Gradients gradients;
  for (const Parameter& p : gpt.parameters()) gradients[p.name] = p.tensor.grad();
  return {loss.detach(), gradients};
}

/// The same as the sums over a context group, on each of its ranks.
std::pair<Tensor, Gradients> shared_out(Group& context, const GptPart& part, const GptConfig& config, DType dtype,
                                        int64_t tokens) {
  const SequenceLayout layout(tokens, context.size());
  const Gpt gpt(config, Device::cpu(), 1, dtype, part);
  const auto mine = [&](const Tensor& x) { return layout.take(x, 1, context.rank()); };
  const Tensor targets = some_targets(tokens);
  const Tensor loss = gpt.loss(mine(some_ids("ids", tokens)), mine(targets), step_of(targets, layout));
  loss.backward();
  Gradients gradients;
  const autograd::NoGrad no_grad;
  for (const Parameter& p : gpt.parameters()) gradients[p.name] = context.all_reduce(p.tensor.grad().contiguous());
  return {context.all_reduce(loss.detach()), gradients};
}

/// Largest |got - want|, in units of the largest |want|; infinite if a NaN is in the way.
double error(const Tensor& got, const Tensor& want) {
  const std::vector<double> a = got.to_vector<double>(), b = want.to_vector<double>();
  EXPECT_TRUE(got.shape() == want.shape()) << got.describe() << ' ' << want.describe();
  double worst = 0, most = 0;
  for (size_t i = 0; i < a.size() && i < b.size(); ++i) {
    const double e = std::abs(a[i] - b[i]);
    if (!(e <= worst)) worst = std::isnan(e) ? INFINITY : e;
    most = std::max(most, std::abs(b[i]));
  }
  return worst == 0 ? 0 : worst / most;
}

/// Sums of as many terms as there are rows, in another order: roundings are as likely up as down, so that they grow
/// with the square root; two blocks of two branches follow one another. bf16 rounds activations and gradients between
/// them, and each rank's gradients before they are added.
double bound(DType dtype, int64_t tokens) {
  if (dtype == DType::f64) return 1e-12;
  return (dtype == DType::f32 ? 0x1p-24 : 0x1p-9) * 4 * std::sqrt(static_cast<double>(4 + kBatch * tokens));
}

TEST(ContextGpt, LossAndEveryGradientAddUpToThoseOfOneProcess) {
  for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) {
    for (const int64_t tokens : {29, 16, 5, 1}) {  // uneven, even, with empty chunks, with ranks that have nothing
      const auto [want_loss, want] = alone(small(), dtype, tokens);
      for (const int ranks : {1, 2, 3, 4}) {
        SCOPED_TRACE(concat(dtype, ", ", tokens, " tokens on ", ranks, " ranks"));
        dist::run_threads(ranks, [&](Group& world) {
          const auto [loss, gradients] = shared_out(world, on(world), small(), dtype, tokens);
          EXPECT_LE(error(loss, want_loss), bound(dtype, tokens));
          for (const auto& [name, gradient] : gradients) {
            EXPECT_LE(error(gradient, want.at(name)), bound(dtype, tokens)) << name;
          }
        });
      }
    }
  }
}

TEST(ContextGpt, OtherMasksWouldBeSeen) {
  const auto [want_loss, want] = alone(small(), DType::f64, 16);
  const SequenceLayout layout(16, 2);
  dist::run_threads(2, [&](Group& world) {
    const Gpt gpt(small(), Device::cpu(), 1, DType::f64, on(world));
    const auto mine = [&](const Tensor& x) { return layout.take(x, 1, world.rank()); };
    const Tensor targets = some_targets(16);
    GptStep step = step_of(targets, layout);
    step.first_row += world.rank();  // other rows' masks on one of the ranks
    const autograd::NoGrad no_grad;
    const Tensor loss = world.all_reduce(gpt.loss(mine(some_ids("ids", 16)), mine(targets), step));
    EXPECT_GT(error(loss, want_loss), 1e-4);
  });
}

TEST(ContextGpt, RecomputationKeepsTheBits) {
  dist::run_threads(3, [](Group& world) {
    const auto run = [&](const Recompute& recompute) {
      GptConfig config = small();
      config.recompute = recompute;
      return shared_out(world, on(world), config, DType::f32, 29).second;
    };
    const Gradients plain = run({});
    for (const Recompute& recompute : {Recompute{.block = true}, Recompute{.attention = true},
                                       Recompute{.block = true, .norm = true, .activation = true, .attention = true}}) {
      for (const auto& [name, gradient] : run(recompute)) EXPECT_TRUE(same_bits(gradient, plain.at(name))) << name;
    }
  });
}

TEST(ContextGpt, OneRankHasTheBitsOfThePlainModel) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const auto [want_loss, want] = alone(small(), dtype, 29);
    dist::run_threads(1, [&](Group& world) {
      const auto [loss, gradients] = shared_out(world, on(world), small(), dtype, 29);
      EXPECT_TRUE(same_bits(loss, want_loss));
      for (const auto& [name, gradient] : gradients) EXPECT_TRUE(same_bits(gradient, want.at(name))) << name;
      EXPECT_EQ(world.traffic(dist::Collective::send).calls, 0);
      const Gpt gpt(small(), Device::cpu(), 1, dtype, on(world));
      EXPECT_TRUE(gpt.logits(some_ids("ids", 29)).defined());
    });
  }
}

TEST(ContextGpt, ComposesWithLayersThatAreCut) {
  const auto [want_loss, want] = alone(small(), DType::f64, 29);
  for (const bool sequence : {false, true}) {
    dist::run_threads(4, [&](Group& world) {
      const int tp = world.rank() % 2, cp = world.rank() / 2;
      Group tensor = world.subgroup(std::array{2 * cp, 2 * cp + 1}, concat("tp", cp));
      Group context = world.subgroup(std::array{tp, tp + 2}, concat("cp", tp));
      GptPart part = on(context);
      part.tensor = &tensor, part.sequence = sequence;
      const auto [loss, gradients] = shared_out(context, part, small(), DType::f64, 29);
      EXPECT_LE(error(loss, want_loss), 1e-12);
      const Gpt gpt(small(), Device::cpu(), 1, DType::f64, part);
      for (const Parameter& p : gpt.parameters()) {
        const Tensor& whole = want.at(p.name);
        EXPECT_LE(error(gradients.at(p.name), p.part ? p.part->of(whole) : whole), 1e-12)
            << p.name << ", sequence " << sequence;
      }
    });
  }
}

TEST(ContextGpt, SendsKeysAndValuesAndNothingElse) {
  constexpr int64_t kTokens = 16;
  for (const int ranks : {2, 4}) {
    const SequenceLayout layout(kTokens, ranks);
    dist::run_threads(ranks, [&](Group& world) {
      const Gpt gpt(small(), Device::cpu(), 1, DType::bf16, on(world));
      const auto mine = [&](const Tensor& x) { return layout.take(x, 1, world.rank()); };
      const Tensor targets = some_targets(kTokens);
      gpt.loss(mine(some_ids("ids", kTokens)), mine(targets), step_of(targets, layout)).backward();
      // Two layers; keys and values twice in 2 bytes, their gradients once in 4.
      const int64_t others = kTokens * (ranks - 1) / ranks;
      EXPECT_EQ(world.traffic(dist::Collective::send).bytes_sent, 2 * 2 * kBatch * 12 * others * (2 + 2 + 4));
      int64_t calls = 0;
      for (const auto& traffic : world.traffic()) calls += traffic.calls;
      EXPECT_EQ(calls, world.traffic(dist::Collective::send).calls + world.traffic(dist::Collective::recv).calls);
    });
  }
}

TEST(ContextGpt, WhatCannotBeIsNamed) {
  const auto run = [](const std::function<void(const Gpt&, const Tensor& ids)>& call, DType dtype = DType::f32) {
    dist::run_threads(2, [&](Group& world) {
      Gpt gpt(small(), Device::cpu(), 1, dtype, on(world));
      call(gpt, SequenceLayout(16, 2).take(some_ids("ids", 16), 1, world.rank()));
    });
  };
  const GptStep step = {.valid_tokens = 48, .layout = SequenceLayout(16, 2)};
  const auto loss = [&](const GptStep& changed) {
    return [&run, changed] { run([&](const Gpt& gpt, const Tensor& ids) { gpt.loss(ids, ids, changed); }); };
  };
  EXPECT_ERROR(ErrorKind::kValue, "the step does not say how. Hint: GptStep::layout", loss({.valid_tokens = 48})());
  EXPECT_ERROR(ErrorKind::kValue, "Hint: GptStep::valid_tokens", loss({.layout = SequenceLayout(16, 2)})());
  EXPECT_ERROR(ErrorKind::kValue, "the step's layout is for 3 ranks, and 2 share",
               loss({.valid_tokens = 48, .layout = SequenceLayout(24, 3)})());
  EXPECT_ERROR(ErrorKind::kShape, "10 of a sequence's 20 tokens, got ids [3, 8]",
               loss({.valid_tokens = 48, .layout = SequenceLayout(20, 2)})());
  EXPECT_ERROR(ErrorKind::kState, "logits needs whole sequences; those of this model are shared out over 2 ranks",
               run([](const Gpt& gpt, const Tensor& ids) { gpt.logits(ids); }));
  EXPECT_ERROR(ErrorKind::kState, "generation needs whole sequences", run([](const Gpt& gpt, const Tensor& ids) {
                 KvCache cache;
                 gpt.next_logits(ids, cache);
               }));
  const Gpt plain(small(), Device::cpu());
  EXPECT_ERROR(ErrorKind::kValue, "the step's layout is for 2 ranks, and 1 share",
               plain.loss(some_ids("ids", 8), some_ids("ids", 8), step));
}

}  // namespace
}  // namespace weft::models
