// Parameters that are spread over ranks, and whole only while their unit runs, change no bit; and the memory is gone.
#include <gtest/gtest.h>

#include <map>
#include <mutex>
#include <tuple>

#include "core/autograd.h"
#include "core/memory.h"
#include "dist/data_parallel.h"
#include "dist/parameter_units.h"
#include "dist/pipeline/executor.h"
#include "dist/threads.h"
#include "models/gpt.h"
#include "ops/elementwise.h"
#include "ops/reduce.h"
#include "optim/adam.h"
#include "tests/error_of.h"

namespace weft::dist {
namespace {

struct Case {
  int ranks = 1;
  int micro_batches = 1;  ///< of each rank
  Zero zero = Zero::kParameters;
  DType dtype = DType::f32;
  bool trust_ratio = false;
  bool recompute = false;
  bool without_values = false;  ///< the model never is in memory as a whole
  int64_t bucket_bytes = 4096;
  int64_t layers = 3, width = 24, context = 7, vocab = 131;  // tables and matrices are cut inside, at odd places
  int64_t rows = 2;
  int64_t steps = 3;
  int replicas = 1;  ///< groups of `ranks`
};

std::string title(const Case& c) {
  return concat("ZeRO ", static_cast<int>(c.zero), ", ", c.replicas, " replicas of ", c.ranks, " ranks, ",
                c.micro_batches, " micro-batches each, ", c.dtype, c.trust_ratio ? ", LAMB" : "",
                c.recompute ? ", recomputed" : "", c.without_values ? ", drawn" : "", ", buckets of ", c.bucket_bytes);
}

std::pair<Tensor, Tensor> data_of(const Case& c, int64_t step, int64_t micro_batch) {
  const RandomStream stream = RandomStream(9, "data").at_step(static_cast<uint64_t>(step));
  std::vector<int32_t> ids, targets;
  for (int64_t i = 0; i < c.rows * c.context; ++i) {
    const auto at = static_cast<uint64_t>((micro_batch * c.rows * c.context + i) * 2);
    ids.push_back(static_cast<int32_t>(stream.below(at, static_cast<uint64_t>(c.vocab))));
    targets.push_back(static_cast<int32_t>(stream.below(at + 1, static_cast<uint64_t>(c.vocab))));
  }
  return {Tensor::from(ids, {c.rows, c.context}), Tensor::from(targets, {c.rows, c.context})};
}

/// One rank's model, its shards, and what runs it unit by unit.
struct Rank {
  const Case& c;
  Group shards, copies, alone;
  models::Gpt gpt;
  DataParallel parallel;
  optim::Adam optimizer;
  int64_t step = 0;

  static models::GptConfig config(const Case& c) {
    models::GptConfig config;
    config.layers = c.layers, config.heads = 2, config.width = c.width, config.context = c.context;
    config.vocab = c.vocab, config.dropout = 0.1, config.recompute.block = c.recompute;
    return config;
  }
  static optim::AdamOptions adam(const Case& c) {
    optim::AdamOptions options;
    options.weight_decay = 0.1, options.clip_norm = 0.3, options.trust_ratio = c.trust_ratio;
    return options;
  }

  /// @param at_wpe  called when the gradient of the positions is there, before it is sent
  Rank(const Case& of, Group& group, const std::function<void()>& at_wpe = {})
      : c(of),
        shards(members(group, "shards", [&](int rank) { return rank / c.ranks == group.rank() / c.ranks; })),
        copies(members(group, "copies", [&](int rank) { return rank % c.ranks == group.rank() % c.ranks; })),
        alone(group.subgroup(std::vector<int>{group.rank()}, concat("alone, ", static_cast<int>(c.zero)))),
        gpt(config(c), Device::cpu(), 3, c.dtype, {.separate_head = true, .values = !c.without_values}),
        parallel(shards, watched(at_wpe),
                 {.zero = c.zero,
                  .bucket_bytes = c.bucket_bytes,
                  .second_uses = {{.parameter = "wte.weight", .leaf = gpt.head()}},
                  .units = c.zero == Zero::kParameters ? gpt.units() : std::vector<std::vector<std::string>>{},
                  .replicas = c.replicas > 1 ? &copies : nullptr}),
        optimizer((draw(), parallel.parameters()), adam(c), parallel.norms()) {}

  Group members(Group& world, const char* name, const std::function<bool(int rank)>& belongs) const {
    std::vector<int> ranks;
    for (int rank = 0; rank < world.size(); ++rank) {
      if (belongs(rank)) ranks.push_back(rank);
    }
    return world.subgroup(ranks, concat(name, ' ', ranks.front(), ", ", static_cast<int>(c.zero)));
  }

  Parameters watched(const std::function<void()>& at_wpe) const {
    Parameters all = gpt.parameters();
    if (at_wpe) all[1].tensor.register_grad_ready_hook([at_wpe](const Tensor&) { at_wpe(); });
    return all;
  }

  void draw() {
    if (c.without_values) gpt.draw(parallel.parameters(), parallel.parts());
  }

  models::GptStep settings(int64_t j) const {
    const double all = static_cast<double>(c.replicas * c.ranks * c.micro_batches * c.rows * c.context);
    return {.step = static_cast<uint64_t>(step), .first_row = j * c.rows, .valid_tokens = all};
  }

  /// The passes of a step.
  void run(const std::function<void()>& in_unit = {}) {
    if (c.zero != Zero::kParameters) {
      for (int64_t i = 0; i < c.micro_batches; ++i) {
        const int64_t j = parallel.micro_batch(i);
        const auto [ids, targets] = data_of(c, step, j);
        gpt.loss(ids, targets, settings(j)).backward();
      }
      return;
    }
    std::vector<PipelineStage> stages;
    for (int64_t unit = 0; unit <= c.layers; ++unit) {
      stages.push_back([this, unit](int i, const std::vector<Tensor>& inputs) {
        const int64_t j = parallel.micro_batch(i);
        const auto [ids, targets] = data_of(c, step, j);
        models::GptStream stream = unit == 0 ? gpt.begin(ids, settings(j)) : models::GptStream{inputs[0], inputs[1]};
        if (unit == c.layers) return std::vector<Tensor>{gpt.finish(stream, targets, settings(j))};
        stream = gpt.blocks(stream, unit, unit + 1, settings(j));
        return std::vector<Tensor>{stream.x, stream.branch};
      });
    }
    const Shape shape = {c.rows, c.context, c.width};
    PipelineExecutor executor(
        alone, make_pipeline_schedule(PipelineKind::kGPipe, {1, c.micro_batches, static_cast<int>(c.layers) + 1}),
        stages, {{shape, c.dtype}, {shape, c.dtype}});
    executor.set_hooks({.begin =
                            [&](int unit, Pass pass) {
                              parallel.begin_unit(static_cast<size_t>(unit), pass);
                              if (in_unit) in_unit();
                            },
                        .end = [&](int unit, Pass pass) { parallel.end_unit(static_cast<size_t>(unit), pass); }});
    executor.run();
  }

  double train(const std::function<void()>& in_unit = {}) {
    parallel.begin_step(std::vector<int64_t>(static_cast<size_t>(c.replicas * c.ranks), c.micro_batches));
    run(in_unit);
    parallel.reduce();
    const double norm = optimizer.step(0.01).grad_norm;
    parallel.gather();
    optimizer.zero_grad();
    ++step;
    return norm;
  }

  /// All weights and states, whole.
  NamedTensors state() {
    NamedTensors all = optimizer.state();
    for (const Parameter& parameter : parallel.parameters())
      all.emplace_back(parameter.name + ".value", parameter.tensor.detach());
    if (c.zero == Zero::kNone) return all;
    for (auto& [name, tensor] : all) {
      if (name == "steps") continue;
      const Counts counts =
          shards.all_gather(Tensor::from(std::vector<int64_t>{tensor.numel()}, {1})).to_vector<int64_t>();
      tensor = shards.all_gather(tensor, counts);
    }
    return all;
  }
};

struct Outcome {
  std::map<std::string, std::vector<double>> state;
  std::vector<double> norms;
};

Outcome train(const Case& c) {
  Outcome outcome;
  std::mutex mutex;
  int finished = 0;
  run_threads(c.replicas * c.ranks, [&](Group& world) {
    Rank rank(c, world);
    Outcome own;
    for (int64_t step = 0; step < c.steps; ++step) own.norms.push_back(rank.train());
    for (const auto& [name, tensor] : rank.state()) own.state[name] = tensor.to_vector<double>();
    const std::lock_guard lock(mutex);
    if (finished++ == 0) outcome = own;
    EXPECT_EQ(own.state, outcome.state) << "rank " << world.rank();
    EXPECT_EQ(own.norms, outcome.norms) << "rank " << world.rank();
  });
  return outcome;
}

void expect_same(const Case& alone, const std::vector<Case>& others) {
  const Outcome expected = train(alone);
  for (const double norm : expected.norms) EXPECT_GT(norm, 0.3) << "clipping must have something to do";
  for (const Case& other : others) {
    const Outcome outcome = train(other);
    EXPECT_EQ(outcome.norms, expected.norms) << title(other);
    ASSERT_EQ(outcome.state.size(), expected.state.size());
    for (const auto& [name, values] : expected.state)
      EXPECT_EQ(outcome.state.at(name), values) << title(other) << ": " << name;
  }
}

TEST(Zero3, HasTheBitsOfOneProcess) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const bool lamb : {false, true}) {
      for (const auto& [total, shares] : std::map<int, std::vector<std::pair<int, int>>>{{1, {{1, 1}}},
                                                                                         {2, {{1, 2}, {2, 1}}},
                                                                                         {3, {{1, 3}, {3, 1}}},
                                                                                         {4, {{2, 2}, {4, 1}}},
                                                                                         {6, {{2, 3}, {3, 2}}},
                                                                                         {8, {{4, 2}}},
                                                                                         {9, {{3, 3}}},
                                                                                         {12, {{4, 3}}}}) {
        std::vector<Case> others;
        for (const auto& [ranks, micro_batches] : shares) {
          const bool odd = (ranks + micro_batches) % 2 == 1, drawn = (dtype == DType::bf16) == (ranks % 2 == 1);
          others.push_back({ranks, micro_batches, Zero::kParameters, dtype, lamb, lamb != odd, drawn});
        }
        expect_same({1, total, Zero::kNone, dtype, lamb}, others);
      }
    }
  }
}

TEST(Zero3, HasThemForAnySizeOfBucketsAndOneBlock) {
  for (const int64_t bytes : {1, 20000, 1 << 30}) {
    Case alone{1, 4, Zero::kNone}, spread{2, 2};
    alone.bucket_bytes = spread.bucket_bytes = bytes;
    expect_same(alone, {spread});
    alone.layers = spread.layers = 1;  // the two units that have the token embedding follow one another
    expect_same(alone, {spread});
  }
}

TEST(HybridSharding, HasTheBitsOfOneProcess) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    // Micro-batches that make one node in every replica, and some that do not.
    for (const auto& [replicas, ranks, micro_batches] :
         std::vector<std::tuple<int, int, int>>{{2, 2, 1}, {2, 2, 3}, {3, 2, 2}, {2, 1, 3}, {2, 3, 1}}) {
      std::vector<Case> others;
      for (const Zero zero : {Zero::kNone, Zero::kOptimizer, Zero::kGradients, Zero::kParameters}) {
        Case c{ranks, micro_batches, zero, dtype, true};
        c.replicas = replicas, c.steps = 2;
        others.push_back(c);
      }
      Case alone{1, replicas * ranks * micro_batches, Zero::kNone, dtype, true};
      alone.steps = 2;
      expect_same(alone, others);
    }
  }
}

TEST(HybridSharding, SendsOnlyRangesBetweenReplicas) {
  std::mutex mutex;
  double sent = 0;
  Case c{2, 2};
  c.replicas = 2, c.width = 64, c.context = 16, c.vocab = 128;
  run_threads(c.ranks * c.replicas, [&](Group& world) {
    Rank rank(c, world);
    const auto bytes = [&] { return static_cast<double>(rank.copies.traffic(Collective::all_reduce).bytes_sent); };
    const double before = bytes();
    rank.train();
    const std::lock_guard lock(mutex);
    sent += (bytes() - before) / (c.ranks * c.replicas);
  });
  const auto p = static_cast<double>(Rank::config(c).parameter_count() + c.vocab * c.width);
  EXPECT_NEAR(sent, 2 * 4 * p / c.ranks * (c.replicas - 1) / c.replicas, 1e-6);
}

TEST(Zero3, SendsTheBytesOfItsFormula) {
  for (const int ranks : {2, 4}) {
    for (const int micro_batches : {1, 2, 4}) {
      Case c{ranks, micro_batches};
      c.width = 64, c.context = 16, c.vocab = 128;  // every tensor fills whole blocks of memory
      std::mutex mutex;
      double sent = 0;
      run_threads(ranks, [&](Group& world) {
        Rank rank(c, world);
        const auto all = [&] {
          int64_t bytes = 0;
          for (const Collective op : {Collective::reduce_scatter, Collective::all_gather, Collective::all_to_all})
            bytes += rank.shards.traffic(op).bytes_sent;
          return static_cast<double>(bytes);
        };
        const double before = all();
        for (int64_t step = 0; step < c.steps; ++step) rank.train();
        const std::lock_guard lock(mutex);
        sent += (all() - before) / static_cast<double>(c.steps * ranks);
      });
      const auto table = static_cast<double>(c.vocab * c.width), norm = static_cast<double>(2 * c.width);
      const double p = static_cast<double>(Rank::config(c).parameter_count()) + table, last = table + norm;
      EXPECT_NEAR(sent, 4 * (3 * p - last) * (ranks - 1) / ranks, 1e-6) << title(c);
    }
  }
}

int64_t bytes_of(MemoryCategory category) {
  return allocator(Device::cpu()).statistics().categories[static_cast<size_t>(category)].current;
}

TEST(Zero3, MemoryIsThatOfItsFormula) {
  for (const int ranks : {1, 2, 4}) {
    Case c{ranks, 1};
    c.layers = 8, c.width = 128, c.context = 16, c.vocab = 256, c.without_values = true, c.bucket_bytes = 1 << 30;
    std::array<int64_t, kMemoryCategories> before{}, peak{};
    for (int i = 0; i < kMemoryCategories; ++i)
      before[static_cast<size_t>(i)] = bytes_of(static_cast<MemoryCategory>(i));
    run_threads(ranks, [&](Group& world) {
      allocator(Device::cpu()).reset_peak();
      world.barrier();
      // Ranks that wait for each other have their peaks at the same time: of parameters in every unit, of gradients
      // when all of the first one's are there but the table's, which travels by itself.
      Rank rank(c, world, [&] { world.barrier(); });
      for (int64_t step = 0; step < 2; ++step) rank.train([&] { world.barrier(); });
      world.barrier();
      const int64_t shards =
          bytes_of(MemoryCategory::parameters) - before[static_cast<size_t>(MemoryCategory::parameters)];
      const auto p = static_cast<double>(4 * Rank::config(c).parameter_count());
      EXPECT_NEAR(static_cast<double>(shards), p, 0.02 * p) << "nothing but the shards is left";
      world.barrier();
    });
    const auto statistics = allocator(Device::cpu()).statistics();
    for (size_t i = 0; i < kMemoryCategories; ++i) peak[i] = statistics.categories[i].peak - before[i];

    const auto each = [&](MemoryCategory category) {
      return static_cast<double>(peak[static_cast<size_t>(category)]) / ranks;
    };
    models::GptConfig smaller = Rank::config(c);
    smaller.layers -= 1;
    const auto p = 4 * static_cast<double>(Rank::config(c).parameter_count());
    const double block = p - 4 * static_cast<double>(smaller.parameter_count());
    const auto table = static_cast<double>(4 * c.vocab * c.width),
               positions = static_cast<double>(4 * c.context * c.width);
    std::vector<double> units(static_cast<size_t>(c.layers) + 1, block);
    units.front() += table + positions;
    units.back() = table + static_cast<double>(4 * 2 * c.width);
    const SpreadBytes expected = spread_bytes(p, units, table, ranks);
    const auto near = [&](MemoryCategory category, double formula) {
      EXPECT_NEAR(each(category), formula, 0.02 * formula) << name(category) << " on " << ranks << " ranks";
    };
    near(MemoryCategory::parameters, expected.parameters);
    near(MemoryCategory::optimizer, expected.optimizer);
    if (ranks > 1) near(MemoryCategory::gradients, expected.gradients);
  }
}

TEST(Zero3, EvaluationRunsUnitByUnitOutsideOfAStep) {
  run_threads(2, [&](Group& world) {
    Case whole{2, 1, Zero::kNone}, c{2, 1};
    Rank reference(whole, world), rank(c, world);
    const autograd::NoGrad no_grad;
    reference.gpt.eval(), rank.gpt.eval();
    const auto [ids, targets] = data_of(c, 0, 0);
    models::GptStream stream;
    for (size_t unit = 0; unit <= static_cast<size_t>(c.layers); ++unit) {
      rank.parallel.begin_unit(unit, Pass::kForward);
      if (unit == 0) stream = rank.gpt.begin(ids);
      if (unit < static_cast<size_t>(c.layers))
        stream = rank.gpt.blocks(stream, static_cast<int64_t>(unit), static_cast<int64_t>(unit) + 1);
      else
        EXPECT_EQ(rank.gpt.finish(stream, targets).item(), reference.gpt.loss(ids, targets).item());
      rank.parallel.end_unit(unit, Pass::kForward);
    }
    for (const Parameter& parameter : rank.gpt.parameters())
      EXPECT_TRUE(parameter.tensor.storage()->is_released()) << parameter.name;
  });
}

TEST(Zero3, MisuseIsNamed) {
  Group self = self_group();
  const Case c{1, 1};
  Rank rank(c, self);
  const std::vector<int64_t> one = {1};
  EXPECT_ERROR(ErrorKind::kState, "parameter \"wte.weight\", which is spread over ranks, is released",
               rank.gpt.parameters().front().tensor.to_vector<float>());
  EXPECT_ERROR(ErrorKind::kIndex, "there are 4 units, and 4 is not one", rank.parallel.begin_unit(4, Pass::kForward));
  EXPECT_ERROR(ErrorKind::kState, "unit 1 has not begun", rank.parallel.end_unit(1, Pass::kForward));
  rank.parallel.begin_unit(1, Pass::kBackward);
  EXPECT_ERROR(ErrorKind::kState, "unit 1 has begun", rank.parallel.begin_unit(1, Pass::kForward));
  EXPECT_ERROR(ErrorKind::kState, "unit 0 must have ended before a step begins", rank.parallel.begin_step(one));
  rank.parallel.end_unit(1, Pass::kBackward);
  rank.parallel.begin_unit(0, Pass::kBackward);
  rank.parallel.end_unit(0, Pass::kBackward);
  rank.parallel.begin_step(one);

  const models::Gpt gpt(Rank::config(c), Device::cpu(), 3, DType::f32, {.separate_head = true, .values = false});
  const std::vector<SecondUse> uses = {{.parameter = "wte.weight", .leaf = gpt.head()}};
  const auto with = [&](const std::vector<std::vector<std::string>>& units, const std::vector<SecondUse>& second) {
    return DataParallel(self, gpt.parameters(), {.zero = Zero::kParameters, .second_uses = second, .units = units});
  };
  auto units = gpt.units();
  EXPECT_ERROR(ErrorKind::kState, "parameter \"wte.weight\" has no values yet", with(units, uses).begin_step(one));
  EXPECT_ERROR(ErrorKind::kValue, "\"wte.weight\" must be in one unit, or two if it has a second leaf; it is in 2",
               with(units, {}));
  units.pop_back();
  EXPECT_ERROR(ErrorKind::kValue, "\"ln_f.weight\" must be in one unit", with(units, uses));
  units.push_back({"ln_g.weight"});
  EXPECT_ERROR(ErrorKind::kValue, "unit 3 has no parameter \"ln_g.weight\"", with(units, uses));
  Tensor x = Tensor::ones({4}), part = x.narrow(0, 0, 2);
  part.requires_grad_();
  EXPECT_ERROR(ErrorKind::kValue, "must have memory of its own",
               DataParallel(self, {{"x", part}}, {.zero = Zero::kParameters, .units = {{"x"}}}));
  EXPECT_ERROR(ErrorKind::kValue, "units are for parameters that are spread",
               DataParallel(self, {{"x", part}}, {.units = {{"x"}}}));
}

TEST(Zero3, WhatWasComputedBeforeAnUpdateCannotBeUsedAfterIt) {
  Group self = self_group();
  Tensor w = Tensor::full({3}, 2);
  w.requires_grad_();
  DataParallel parallel(self, {{"w", w}}, {.zero = Zero::kParameters, .units = {{"w"}}});
  parallel.begin_unit(0, Pass::kForward);
  const Tensor y = sum(w * w);
  parallel.end_unit(0, Pass::kForward);
  parallel.gather();
  parallel.begin_unit(0, Pass::kForward);
  EXPECT_ERROR(ErrorKind::kState, "[an update of its shards] changed in place", y.backward());
}

}  // namespace
}  // namespace weft::dist
