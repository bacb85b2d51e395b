// Data parallelism changes no bit: any number of ranks, any sharding of the states, any share of the micro-batches.
#include "dist/data_parallel.h"

#include <gtest/gtest.h>

#include <array>
#include <condition_variable>
#include <map>
#include <mutex>
#include <numeric>

#include "core/autograd.h"
#include "dist/engine.h"
#include "dist/threads.h"
#include "models/gpt.h"
#include "ops/elementwise.h"
#include "optim/adam.h"
#include "tests/error_of.h"

namespace weft::dist {
namespace {

constexpr int64_t kRows = 2, kContext = 7, kVocab = 29;

struct Case {
  std::vector<int64_t> micro_batches;  ///< of each rank
  Zero zero = Zero::kNone;
  int64_t bucket_bytes = 4096;
  DType dtype = DType::f32;
  bool trust_ratio = false;
  bool recompute = false;
};

std::string title(const Case& c) {
  std::string text = concat("ZeRO ", static_cast<int>(c.zero), ", buckets of ", c.bucket_bytes, " bytes, ", c.dtype,
                            c.trust_ratio ? ", LAMB" : "", c.recompute ? ", recomputed" : "", ", micro-batches");
  for (const int64_t n : c.micro_batches) text += concat(' ', n);
  return text;
}

/// Micro-batch j of a step: ids, and targets of which some do not count.
std::pair<Tensor, Tensor> data_of(int64_t step, int64_t j) {
  const RandomStream stream = RandomStream(9, "data").at_step(static_cast<uint64_t>(step));
  std::vector<int32_t> ids, targets;
  for (int64_t i = 0; i < kRows * kContext; ++i) {
    const auto at = static_cast<uint64_t>((j * kRows * kContext + i) * 3);
    ids.push_back(static_cast<int32_t>(stream.below(at, kVocab)));
    targets.push_back(stream.below(at + 1, 4) == 0 ? -1 : static_cast<int32_t>(stream.below(at + 2, kVocab)));
  }
  return {Tensor::from(ids, {kRows, kContext}), Tensor::from(targets, {kRows, kContext})};
}

struct Outcome {
  std::map<std::string, std::vector<double>> weights;
  std::vector<double> norms;
};

constexpr int64_t kSteps = 3;

/// Trains on the ranks of a case; what rank 0 has at the end, after checking that all have the same.
Outcome train(const Case& c, const std::function<void(Group&, DataParallel&)>& at_end = {}) {
  Outcome outcome;
  std::mutex mutex;
  int finished = 0;
  const int64_t total = std::accumulate(c.micro_batches.begin(), c.micro_batches.end(), int64_t{0});
  run_threads(static_cast<int>(c.micro_batches.size()), [&](Group& world) {
    models::GptConfig config;
    config.layers = 2, config.heads = 2, config.width = 24, config.context = kContext, config.vocab = kVocab;
    config.dropout = 0.1, config.recompute.block = c.recompute;
    models::Gpt gpt(config, Device::cpu(), 3, c.dtype);
    if (world.rank() > 0) {  // the first rank's weights count
      const autograd::NoGrad no_grad;
      for (const Parameter& parameter : gpt.parameters()) Tensor(parameter.tensor).fill_(0.5);
    }
    DataParallel parallel(world, gpt.parameters(), {.zero = c.zero, .bucket_bytes = c.bucket_bytes});
    optim::AdamOptions options;
    options.weight_decay = 0.1, options.clip_norm = 0.5, options.trust_ratio = c.trust_ratio;
    optim::Adam optimizer(parallel.parameters(), options, parallel.norms());
    std::vector<double> norms;
    for (int64_t step = 0; step < kSteps; ++step) {
      double valid = 0;
      for (int64_t j = 0; j < total; ++j) {
        for (const int32_t target : data_of(step, j).second.to_vector<int32_t>()) valid += target >= 0;
      }
      parallel.begin_step(c.micro_batches);
      for (int64_t i = 0; i < c.micro_batches[static_cast<size_t>(world.rank())]; ++i) {
        const int64_t j = parallel.micro_batch(i);
        const auto [ids, targets] = data_of(step, j);
        gpt.loss(ids, targets, {.step = static_cast<uint64_t>(step), .first_row = j * kRows, .valid_tokens = valid})
            .backward();
      }
      parallel.reduce();
      norms.push_back(optimizer.step(0.01).grad_norm);
      parallel.gather();
      optimizer.zero_grad();
    }
    if (at_end) at_end(world, parallel);
    Outcome own;
    own.norms = norms;
    for (const auto& [name, tensor] : gpt.named_tensors()) own.weights[name] = tensor.to_vector<double>();
    const std::lock_guard lock(mutex);
    if (finished++ == 0) outcome = own;
    EXPECT_EQ(own.weights, outcome.weights) << "rank " << world.rank();
    EXPECT_EQ(own.norms, outcome.norms) << "rank " << world.rank();
  });
  EXPECT_EQ(finished, static_cast<int>(c.micro_batches.size()));
  return outcome;
}

void expect_same(const Case& alone, const std::vector<Case>& others) {
  const Outcome expected = train(alone);
  for (const double norm : expected.norms) EXPECT_GT(norm, 0.5) << "clipping must have something to do";
  for (const Case& other : others) {
    const Outcome outcome = train(other);
    EXPECT_EQ(outcome.norms, expected.norms) << title(other);
    for (const auto& [name, values] : expected.weights)
      EXPECT_EQ(outcome.weights.at(name), values) << title(other) << ": " << name;
  }
}

TEST(DataParallel, MicroBatchesAreSharedOutAsEvenlyAsCanBe) {
  using Shares = std::vector<int64_t>;
  EXPECT_EQ(micro_batch_shares(4, 1), Shares{4});
  EXPECT_EQ(micro_batch_shares(4, 3), (Shares{2, 1, 1}));
  EXPECT_EQ(micro_batch_shares(11, 4), (Shares{3, 3, 3, 2}));
  EXPECT_EQ(micro_batch_shares(12, 4), (Shares{3, 3, 3, 3}));
  EXPECT_ERROR(ErrorKind::kValue, "3 micro-batches cannot be shared out among 4 ranks", micro_batch_shares(3, 4));
  EXPECT_ERROR(ErrorKind::kValue, "among 0 ranks", micro_batch_shares(3, 0));
}

TEST(DataParallel, HasTheBitsOfOneProcessOnAnyNumberOfRanks) {
  for (const Zero zero : {Zero::kNone, Zero::kOptimizer, Zero::kGradients}) {
    expect_same({{12}}, {{{6, 6}, zero}, {{4, 4, 4}, zero}, {{3, 3, 3, 3}, zero}, {{2, 2, 2, 2, 2, 2}, zero}});
    expect_same({{8}}, {{{4, 4}, zero}, {{2, 2, 2, 2}, zero}, {{1, 1, 1, 1, 1, 1, 1, 1}, zero}});
  }
}

TEST(DataParallel, HasThemForAnyShareOfTheMicroBatches) {
  for (const Zero zero : {Zero::kNone, Zero::kOptimizer}) {
    expect_same({{7}}, {{{6, 1}, zero}, {{1, 6}, zero}, {{2, 3, 2}, zero}, {{1, 1, 5}, zero}});
  }
  expect_same({{7}}, {{{1, 1, 1, 1, 1, 1, 1}, Zero::kGradients}});
}

TEST(DataParallel, HasThemForAnySizeOfBuckets) {
  for (const Zero zero : {Zero::kNone, Zero::kOptimizer, Zero::kGradients}) {
    expect_same({{6}}, {{{3, 3}, zero, 1}, {{3, 3}, zero, 20000}, {{2, 2, 2}, zero, 1 << 30}});
  }
}

TEST(DataParallel, HasThemInBfloat16WithLambAndRecomputation) {
  for (const Zero zero : {Zero::kNone, Zero::kOptimizer, Zero::kGradients}) {
    for (const bool lamb : {false, true}) {
      for (const DType dtype : {DType::f32, DType::bf16, DType::f64}) {
        expect_same({{4}, Zero::kNone, 4096, dtype, lamb},
                    {{{2, 2}, zero, 4096, dtype, lamb}, {{1, 1, 1, 1}, zero, 4096, dtype, lamb, true}});
      }
    }
  }
}

TEST(DataParallel, RanksKeepEqualSharesOfTheStates) {
  for (const int ranks : {2, 3, 5}) {
    train({std::vector<int64_t>(static_cast<size_t>(ranks), 1), Zero::kOptimizer, 1 << 30},
          [&](Group& world, DataParallel& parallel) {
            int64_t own = 0;
            for (const Parameter& parameter : parallel.parameters()) own += parameter.tensor.numel();
            const Tensor all = Tensor::from(std::vector<int64_t>{own}, {1});
            const double sum = world.all_reduce(all).item();
            EXPECT_NEAR(static_cast<double>(own), sum / world.size(), 1025);
          });
  }
}

TEST(DataParallel, SendsTheBytesOfItsFormula) {
  const auto sent = [](const Case& c) {
    std::map<int, std::pair<double, double>> bytes;  // rank: all steps', those of P
    std::mutex mutex;
    train(c, [&](Group& world, DataParallel& parallel) {
      double p = 0;
      for (const ShardPiece& piece : parallel.pieces()) p += static_cast<double>(piece.count()) * 4;
      if (c.zero != Zero::kNone) p = world.all_reduce(Tensor::from(std::vector<double>{p}, {1})).item();
      double all = 0;
      for (const Collective op : {Collective::reduce_scatter, Collective::all_gather, Collective::all_to_all})
        all += static_cast<double>(world.traffic(op).bytes_sent);
      // Those of the others are norms.
      if (c.zero == Zero::kNone) all += static_cast<double>(world.traffic(Collective::all_reduce).bytes_sent);
      const std::lock_guard lock(mutex);
      bytes[world.rank()] = {all / kSteps, p};
    });
    double average = 0;
    for (const auto& [rank, sums] : bytes) average += sums.first / sums.second / static_cast<double>(bytes.size());
    return average;
  };
  for (const Zero zero : {Zero::kNone, Zero::kOptimizer}) {
    EXPECT_NEAR(sent({{1, 1}, zero}), 2 * 1 / 2.0, 1e-9);
    EXPECT_NEAR(sent({{4, 4, 4}, zero}), 2 * 2 / 3.0, 1e-9);
    EXPECT_NEAR(sent({{3, 3}, zero}), 3 * 1 / 2.0, 1e-9);  // two nodes each: 2 + 1 micro-batches
  }
  EXPECT_NEAR(sent({{1, 1}, Zero::kGradients}), 2 * 1 / 2.0, 1e-9);
  EXPECT_NEAR(sent({{3, 3}, Zero::kGradients}), 4 * 1 / 2.0, 1e-9);
}

TEST(DataParallel, SumsThatEveryRankKeepsComeInOneReductionOfEachBucketWhileTheBackwardPassRuns) {
  for (const std::vector<int64_t>& shares : {std::vector<int64_t>{1, 1}, {2, 2, 2}}) {
    train({shares, Zero::kNone, 4096}, [&](Group& world, DataParallel&) {
      // What only begins after the backward pass would be an all_gather.
      EXPECT_GT(world.traffic(Collective::all_reduce).calls, kSteps);
      EXPECT_EQ(world.traffic(Collective::reduce_scatter).calls, 0);
      EXPECT_EQ(world.traffic(Collective::all_gather).calls, 0);
    });
  }
}

/// Lets each rank's first so many all-gathers pass; those of a broken one throw.
struct Gate {
  std::mutex mutex;
  std::condition_variable changed;
  int open = 0, broken_rank = -1;
  std::vector<std::vector<int64_t>> elements = std::vector<std::vector<int64_t>>(2);  ///< [rank], of those that came
  void set(int number) {
    const std::lock_guard lock(mutex);
    open = number;
    changed.notify_all();
  }
  void pass(int rank, int64_t size) {
    std::unique_lock lock(mutex);
    std::vector<int64_t>& came = elements[static_cast<size_t>(rank)];
    came.push_back(size);
    changed.wait(lock, [&] { return static_cast<int>(came.size()) <= open; });
    if (rank == broken_rank) fail(ErrorKind::kIo, "link", "torn");
  }
};

class Gated final : public Engine {
 public:
  Gated(std::shared_ptr<Engine> over, Gate& gate)
      : Engine(std::shared_ptr<Board>(over, &over->board()), over->rank()), over_(std::move(over)), gate_(gate) {}
  const char* name() const override { return over_->name(); }
  int64_t run(const Operation& op) override {
    if (op.stamp.op == Collective::all_gather) gate_.pass(rank(), op.output.numel());
    return over_->run(op);
  }

 private:
  std::shared_ptr<Engine> over_;
  Gate& gate_;
};

ThreadsOptions behind(Gate& gate) {
  ThreadsOptions options;
  options.engine = [&gate](std::shared_ptr<Engine> over) { return std::make_shared<Gated>(std::move(over), gate); };
  return options;
}

constexpr int64_t kLengths[] = {3000, 5000, 4000};  // of three parameters, each a bucket

/// A step of two ranks in which each adds 1 to what it updates, as far as gather().
void step_of_ones(DataParallel& parallel, const Parameters& weights) {
  const std::vector<int64_t> micro_batches = {1, 1};
  parallel.begin_step(micro_batches);
  for (const Parameter& weight : weights) weight.tensor.backward(Tensor::ones(weight.tensor.shape()));
  parallel.reduce();
  const autograd::NoGrad no_grad;
  for (const Parameter& own : parallel.parameters()) Tensor(own.tensor).copy_(own.tensor + Tensor::ones({1}));
  parallel.gather();
}

Parameters three_weights() {
  Parameters weights;
  for (const int64_t length : kLengths)
    weights.push_back({concat("w", weights.size()), Tensor::zeros({length}).requires_grad_()});
  return weights;
}

/// Whether all of a weight has one value.
bool is_all(const Tensor& weight, float value) {
  return weight.to_vector<float>() == std::vector<float>(static_cast<size_t>(weight.numel()), value);
}

TEST(DataParallel, UpdatedWeightsComeInTheOrderOfTheForwardPassAndAreWaitedForOneByOne) {
  for (const Zero zero : {Zero::kOptimizer, Zero::kGradients}) {
    Gate gate;
    run_threads(
        2,
        [&](Group& world) {
          const Parameters weights = three_weights();
          DataParallel parallel(world, weights, {.zero = zero, .bucket_bytes = 1});
          step_of_ones(parallel, weights);  // does not wait: nothing has passed the gate
          for (const Parameter& weight : weights) EXPECT_TRUE(weight.tensor.storage()->is_deferred());
          for (int i = 0; i < 3; ++i) {
            if (world.rank() == 0) gate.set(i + 1);
            EXPECT_TRUE(is_all(weights[static_cast<size_t>(i)].tensor, 1)) << "while the next is held up";
            if (i < 2) {
              EXPECT_TRUE(weights[2].tensor.storage()->is_deferred());
            }
          }
          gate.set(1000);
          // What nobody used in between is waited for by the next update.
          step_of_ones(parallel, weights);
          step_of_ones(parallel, weights);
          for (const Parameter& weight : weights) EXPECT_TRUE(is_all(weight.tensor, 3));
        },
        behind(gate));
    for (const std::vector<int64_t>& came : gate.elements) {
      ASSERT_EQ(came.size(), 9U);
      for (size_t i = 0; i < came.size(); ++i) EXPECT_EQ(came[i], kLengths[i % 3]);
    }
  }
}

TEST(DataParallel, WeightsOnTheirWayOutliveWhatGathersThem) {
  Gate gate;
  gate.set(1000);
  run_threads(
      2,
      [&](Group& world) {
        const Parameters weights = three_weights();
        {
          Group group = world.subgroup(std::array{0, 1}, "short");
          DataParallel parallel(group, weights, {.zero = Zero::kOptimizer});
          step_of_ones(parallel, weights);
        }
        for (const Parameter& weight : weights) EXPECT_TRUE(is_all(weight.tensor, 1));
      },
      behind(gate));
}

TEST(DataParallel, NobodyReadsAWeightThatAPeerDidNotSend) {
  Gate gate;
  gate.broken_rank = 1;
  std::mutex mutex;
  int begun = 0, named = 0;
  const auto run = [&] {
    run_threads(
        2,
        [&](Group& world) {
          const Parameters weights = three_weights();
          DataParallel parallel(world, weights, {.zero = Zero::kOptimizer, .bucket_bytes = 1});
          step_of_ones(parallel, weights);
          {
            const std::lock_guard lock(mutex);
            if (++begun == world.size()) gate.set(1000);
          }
          for (int i = 0; i < 2; ++i) {
            for (const Parameter& weight : weights) {
              try {
                is_all(weight.tensor, 1);
                ADD_FAILURE() << "rank " << world.rank() << " has read " << weight.name;
              } catch (const Error& error) {
                const bool says = std::string(error.what()).find("torn") != std::string::npos;
                const std::lock_guard lock(mutex);
                named += says;
              }
            }
          }
          (void)weights.front().tensor.raw();
        },
        behind(gate));
  };
  EXPECT_ERROR(ErrorKind::kIo, "torn", run());
  EXPECT_EQ(named, 2 * 2 * 3);
}

/// One rank with one parameter that its loss may leave out.
void with_one_parameter(const std::function<void(DataParallel&, Tensor& used, Tensor& unused)>& body) {
  Group self = self_group();
  Tensor used = Tensor::ones({3}), unused = Tensor::ones({2});
  used.requires_grad_(), unused.requires_grad_();
  DataParallel parallel(self, {{"used", used}, {"unused", unused}});
  body(parallel, used, unused);
}

TEST(DataParallel, MisuseIsNamed) {
  const std::vector<int64_t> two = {2};
  with_one_parameter([&](DataParallel& parallel, Tensor& used, Tensor& unused) {
    EXPECT_ERROR(ErrorKind::kState, "no step has begun", parallel.reduce());
    EXPECT_ERROR(ErrorKind::kState, "no step has begun", parallel.micro_batch(0));
    EXPECT_ERROR(ErrorKind::kValue, "there are 1 ranks, but micro-batches of 2",
                 parallel.begin_step(std::vector<int64_t>{1, 1}));
    EXPECT_ERROR(ErrorKind::kValue, "at least one micro-batch, got 0", parallel.begin_step(std::vector<int64_t>{0}));
    parallel.begin_step(two);
    EXPECT_ERROR(ErrorKind::kIndex, "this rank has 2 micro-batches", parallel.micro_batch(2));
    used.backward(Tensor::ones({3}));
    EXPECT_ERROR(ErrorKind::kState, "parameter \"used\" got 1 gradients from 2 micro-batches", parallel.reduce());
    used.backward(Tensor::ones({3}));
    EXPECT_ERROR(ErrorKind::kState, "parameter \"unused\" got 0 gradients from 2 micro-batches", parallel.reduce());
    unused.backward(Tensor::ones({2}));
    unused.backward(Tensor::ones({2}));
    EXPECT_ERROR(ErrorKind::kState, "the gradient of \"unused\" is there more often",
                 unused.backward(Tensor::ones({2})));
    parallel.reduce();
    EXPECT_EQ(used.grad().to_vector<float>(), (std::vector<float>{2, 2, 2}));
  });
  Group self = self_group();
  EXPECT_ERROR(ErrorKind::kValue, "parameter \"x\" must be a contiguous leaf",
               DataParallel(self, {{"x", Tensor::ones({2})}}));
}

TEST(DataParallel, BackwardPassesOutsideOfAStepAreLeftAlone) {
  with_one_parameter([](DataParallel&, Tensor& used, Tensor&) {
    used.backward(Tensor::ones({3}));
    EXPECT_EQ(used.grad().to_vector<float>(), (std::vector<float>{1, 1, 1}));
  });
}

}  // namespace
}  // namespace weft::dist
