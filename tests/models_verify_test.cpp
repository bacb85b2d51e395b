// Every layout trains as one rank does, and where one does not, the report says what is wrong and where.
#include "models/verify/verify.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <set>
#include <sstream>

#include "core/autograd.h"
#include "dist/engine.h"

namespace weft::models {
namespace {

using dist::Collective;
using dist::Engine;
using dist::Mesh;
using dist::Operation;
using dist::Zero;

/// 8 micro-batches of 2 rows; the gradient of a qkv matrix has 1,728 elements, that of an MLP's matrix 2,304, and no
/// other tensor has as many. Ranks of a data-parallel group cut them at element 1,024.
Verification verification(const std::string& mesh, Zero zero = Zero::kNone) {
  Verification v;
  GptConfig& config = v.problem.config;
  config.layers = 5, config.heads = 2, config.width = 24, config.context = 7, config.vocab = 29, config.dropout = 0.1;
  v.problem.seed = 3, v.problem.micro_batches = 8;
  v.problem.adam.weight_decay = 0.1, v.problem.adam.clip_norm = 0.1;
  v.steps = 2;
  v.layouts.resize(1);
  v.layouts[0].mesh = Mesh::parse(mesh), v.layouts[0].zero = zero;
  v.layouts[0].bucket_bytes = 1;  // each tensor travels by itself
  return v;
}
constexpr int64_t kQkv = 1728, kMlp = 2304;

std::string text_of(const Verification& v, const VerifyReport& report) {
  std::ostringstream out;
  print_report(out, v, report, false);
  return std::move(out).str();
}

// ---- what is right ----

TEST(Verify, ALayoutOfEverythingIsEqualInEveryBitAndAnotherMeshGoesOnFromIt) {
  Verification v = verification("dp=2,pp=2", Zero::kGradients);
  v.problem.adam.trust_ratio = true, v.problem.config.recompute.block = true;
  ParallelOptions next;
  next.mesh = Mesh::parse("dp=3"), next.zero = Zero::kOptimizer;
  v.layouts.push_back(next);
  const VerifyReport report = verify(v);
  EXPECT_TRUE(report.equal()) << text_of(v, report);
  EXPECT_TRUE(report.exact);
  // 8 losses, 4 ranks and then 3, 2 steps each.
  EXPECT_EQ(report.tallies[static_cast<size_t>(Compared::kLoss)].tensors, 8 * (4 + 3) * 2);
  for (const VerifyReport::Tally& tally : report.tallies) {
    EXPECT_GT(tally.elements, 0);
    EXPECT_EQ(tally.different, 0);
  }
  EXPECT_NE(text_of(v, report).find("equal in every bit"), std::string::npos);
}

TEST(Verify, TensorAndContextParallelismStayWithinBoundsThatAreNotFarAway) {
  for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) {
    Verification v = verification("cp=2,tp=2", Zero::kNone);
    v.problem.dtype = dtype, v.problem.adam.trust_ratio = true;
    const VerifyReport report = verify(v);
    EXPECT_TRUE(report.equal()) << text_of(v, report);
    EXPECT_FALSE(report.exact);
    // Something was rounded otherwise, and a gradient's bound is no more than a few units of its precision.
    bool gradients = false;
    for (const BoundedError& error : report.errors) gradients = gradients || error.difference > 0;
    EXPECT_TRUE(gradients);
    const double unit = dtype == DType::f64 ? 0x1p-53 : dtype == DType::f32 ? 0x1p-24 : 0x1p-8;
    for (const BoundedError& error : report.errors) {
      if (error.what == Compared::kLoss) {
        EXPECT_LT(error.bound, 200 * unit * std::log(29.0));
      }
    }
  }
}

// ---- what is not ----

/// Runs operations of one rank in another way than they should.
class Disturbed final : public Engine {
 public:
  using Run = std::function<int64_t(const Operation& op, Engine& engine)>;
  Disturbed(std::shared_ptr<Engine> engine, Run run)
      : Engine(std::shared_ptr<dist::Board>(engine, &engine->board()), engine->rank()),
        engine_(std::move(engine)),
        run_(std::move(run)) {}
  const char* name() const override { return engine_->name(); }
  Device device() const override { return engine_->device(); }
  int64_t run(const Operation& op) override { return run_(op, *engine_); }

 private:
  std::shared_ptr<Engine> engine_;
  Run run_;
};

using Bytes = std::vector<std::byte>;
int64_t bytes_of(const Tensor& t) { return t.numel() * size_of(t.dtype()); }
Bytes content(const Tensor& t) {
  const auto* begin = static_cast<const std::byte*>(t.raw());
  return {begin, begin + bytes_of(t)};
}
void write(const Tensor& t, const Bytes& bytes) { std::memcpy(t.raw(), bytes.data(), bytes.size()); }

/// Hooks that disturb a rank's operations.
TrainingHooks engine_of(int rank, Disturbed::Run run) {
  TrainingHooks hooks;
  hooks.engine = [rank, run](std::shared_ptr<Engine> engine) -> std::shared_ptr<Engine> {
    if (engine->rank() != rank) return engine;
    return std::make_shared<Disturbed>(std::move(engine), run);
  };
  return hooks;
}
/// The same, counting: a step that is run once more counts anew.
TrainingHooks counting_engine_of(int rank,
                                 std::function<int64_t(const Operation& op, Engine& engine, int& count)> run) {
  TrainingHooks hooks;
  hooks.engine = [rank, run](std::shared_ptr<Engine> engine) -> std::shared_ptr<Engine> {
    if (engine->rank() != rank) return engine;
    const auto count = std::make_shared<int>(0);
    return std::make_shared<Disturbed>(
        std::move(engine), [run, count](const Operation& op, Engine& inner) { return run(op, inner, *count); });
  };
  return hooks;
}
TrainingHooks micro_batches_of(int rank, std::function<void(int64_t j, MicroBatch&, GptStep&)> change) {
  TrainingHooks hooks;
  hooks.micro_batch = [rank, change](int at, int64_t, int64_t j, MicroBatch& batch, GptStep& step) {
    if (rank < 0 || at == rank) change(j, batch, step);
  };
  return hooks;
}
TrainingHooks moments_of(int rank, TrainingMoment moment, std::function<void(const RankView&)> change) {
  TrainingHooks hooks;
  hooks.at = [rank, moment, change](TrainingMoment now, const RankView& view) {
    if ((rank < 0 || view.rank == rank) && now == moment) change(view);
  };
  return hooks;
}

/// Adds up as another reducer does, and then answers with something else.
class WrongNorms final : public optim::NormReducer {
 public:
  using Change = std::function<void(std::span<optim::ExactSum> reduced, std::span<const optim::ExactSum> own,
                                    const Parameters& parameters)>;
  WrongNorms(std::shared_ptr<optim::NormReducer> norms, Change change, bool complete = true)
      : norms_(std::move(norms)), change_(std::move(change)), complete_(complete) {}
  bool exact() const override { return true; }
  void reduce(std::span<double> squares, const Parameters& parameters) override { norms_->reduce(squares, parameters); }
  void reduce(std::span<optim::ExactSum> squares, const Parameters& parameters) override {
    const std::vector<optim::ExactSum> own(squares.begin(), squares.end());
    norms_->reduce(squares, parameters);
    if (change_) change_(squares, own, parameters);
  }
  void complete(std::vector<double>& squares, const Parameters& parameters) override {
    std::vector<double> all = squares;
    norms_->complete(all, parameters);
    if (complete_) squares = all;
  }

 private:
  std::shared_ptr<optim::NormReducer> norms_;
  Change change_;
  bool complete_;
};
TrainingHooks norms_of(int rank, WrongNorms::Change change, bool complete = true) {
  TrainingHooks hooks;
  hooks.norms = [=](int at, std::shared_ptr<optim::NormReducer> norms) -> std::shared_ptr<optim::NormReducer> {
    if (rank >= 0 && at != rank) return norms;
    return std::make_shared<WrongNorms>(std::move(norms), change, complete);
  };
  return hooks;
}
const auto kOwnSums = [](std::span<optim::ExactSum> reduced, std::span<const optim::ExactSum> own, const Parameters&) {
  std::copy(own.begin(), own.end(), reduced.begin());
};

const Tensor& parameter(const Parameters& parameters, const std::string& name) {
  for (const Parameter& candidate : parameters) {
    if (candidate.name == name) return candidate.tensor;
  }
  throw std::runtime_error("no parameter " + name);
}

TEST(Verify, WhatChangesNoNumberIsNoDifference) {
  // Residual stream and branch change places between two stages: only their sum is used.
  const auto last = std::make_shared<Tensor>();
  const TrainingHooks hooks = engine_of(1, [last](const Operation& op, Engine& engine) {
    const int64_t sent = engine.run(op);
    if (op.stamp.op != Collective::recv) return sent;
    if (!last->defined()) {
      *last = op.output;
      return sent;
    }
    const Bytes first = content(*last), second = content(op.output);
    write(*last, second), write(op.output, first);
    *last = {};
    return sent;
  });
  const Verification v = verification("pp=2");
  const VerifyReport report = verify(v, &hooks);
  EXPECT_TRUE(report.equal()) << text_of(v, report);
}

struct Bug {
  std::string title;
  Verification at;
  TrainingHooks hooks;
  // what the report must say
  Compared what;
  std::string tensor;
  std::vector<int> ranks;
  std::string origin = {};  ///< place in the forward pass, on the last of `ranks`
  int64_t micro_batch = -1;
  int64_t step = 0;
  int origin_rank = -1;  ///< where it is not the last of `ranks`
};

/// The sum over data-parallel ranks of gradients of that many elements is done by `change` on rank 1.
TrainingHooks gradient_sum(int64_t elements, std::function<void(const Operation&, const Bytes& input)> change) {
  return engine_of(1, [=](const Operation& op, Engine& engine) {
    const bool wanted = op.stamp.op == Collective::reduce_scatter && op.input.numel() == elements;
    const Bytes input = wanted ? content(op.input) : Bytes();
    const int64_t sent = engine.run(op);
    if (wanted) change(op, input);
    return sent;
  });
}

std::vector<Bug> bugs_of_gradients() {
  std::vector<Bug> bugs;
  bugs.push_back({"a sum over ranks is missing",
                  verification("dp=2", Zero::kOptimizer),
                  gradient_sum(kQkv,
                               [](const Operation& op, const Bytes& input) {
                                 // This rank's part of its own gradients.
                                 std::memcpy(op.output.raw(), input.data() + input.size() - bytes_of(op.output),
                                             static_cast<size_t>(bytes_of(op.output)));
                               }),
                  Compared::kGradient,
                  "h.4.attn.qkv.weight",
                  {1}});
  bugs.push_back({"a sum is divided by the number of ranks",
                  verification("dp=2", Zero::kGradients),
                  gradient_sum(kQkv,
                               [](const Operation& op, const Bytes&) {
                                 float* values = op.output.data<float>();
                                 for (int64_t i = 0; i < op.output.numel(); ++i) values[i] /= 2;
                               }),
                  Compared::kGradient,
                  "h.4.attn.qkv.weight",
                  {1}});
  Verification rounded = verification("dp=2", Zero::kOptimizer);
  rounded.problem.dtype = DType::bf16;
  bugs.push_back({"gradients are rounded to bf16 before they are added up",
                  rounded,
                  engine_of(1,
                            [](const Operation& op, Engine& engine) {
                              if (op.stamp.op == Collective::reduce_scatter && op.input.numel() == kMlp) {
                                float* values = op.input.data<float>();
                                for (int64_t i = 0; i < kMlp; ++i) values[i] = static_cast<float>(BFloat16(values[i]));
                              }
                              return engine.run(op);
                            }),
                  Compared::kGradient,
                  "h.4.mlp.proj.weight",
                  {0, 1}});
  bugs.push_back({"the tied weight's use in the head counts twice",
                  verification("dp=2"),
                  moments_of(-1, TrainingMoment::kMade,
                             [](const RankView& view) {
                               view.parallel.gpt().head().register_hook([](const Tensor& gradient) {
                                 const autograd::NoGrad no_grad;
                                 const Tensor twice = gradient.clone();
                                 float* values = twice.data<float>();
                                 for (int64_t i = 0; i < twice.numel(); ++i) values[i] *= 2;
                                 return twice;
                               });
                             }),
                  Compared::kGradient,
                  "wte.weight",
                  {0, 1}});
  bugs.push_back({"the gradient of one micro-batch is dropped",
                  verification("dp=2", Zero::kOptimizer),
                  moments_of(1, TrainingMoment::kMade,
                             [](const RankView& view) {
                               const auto calls = std::make_shared<int>(0);
                               parameter(view.parallel.gpt().parameters(), "h.3.ln_1.weight")
                                   .register_hook([calls](const Tensor& gradient) {
                                     return ++*calls == 3 ? Tensor::zeros_like(gradient) : gradient;
                                   });
                             }),
                  Compared::kGradient,
                  "h.3.ln_1.weight",
                  {}});
  bugs.push_back({"the last bucket is lost",
                  verification("dp=2"),
                  moments_of(1, TrainingMoment::kReduced,
                             [](const RankView& view) {
                               const Tensor& t = parameter(view.parallel.parameters(), "wpe.weight");
                               t.set_grad(Tensor::zeros_like(t.detach()));
                             }),
                  Compared::kGradient,
                  "wpe.weight",
                  {1}});
  bugs.push_back({"the two uses of the tied weight are not added up",
                  verification("pp=2"),
                  engine_of(1,
                            [](const Operation& op, Engine& engine) {
                              const bool wanted = op.stamp.op == Collective::all_reduce && op.input.numel() == 29 * 24;
                              const Bytes own = wanted ? content(op.input) : Bytes();
                              const int64_t sent = engine.run(op);
                              if (wanted) write(op.output, own);
                              return sent;
                            }),
                  Compared::kGradient,
                  "wte.weight",
                  {1}});
  return bugs;
}

std::vector<Bug> bugs_of_losses() {
  std::vector<Bug> bugs;
  const auto projections = [](const RankView& view, const std::function<void(const std::string&, const Tensor&)>& run) {
    const autograd::NoGrad no_grad;
    for (const Parameter& p : view.parallel.gpt().parameters()) {
      if (p.name.starts_with("h.3.attn.proj.") || p.name.starts_with("h.3.mlp.proj.")) run(p.name, p.tensor.detach());
    }
  };
  TrainingHooks dropped;
  const auto kept = std::make_shared<std::map<std::string, Tensor>>();
  dropped.at = [=](TrainingMoment moment, const RankView& view) {
    if (view.rank != 1) return;
    if (moment == TrainingMoment::kBegun) {
      projections(view, [&](const std::string& name, Tensor t) { (*kept)[name] = t.clone(), t.zero_(); });
    } else if (moment == TrainingMoment::kPassed) {
      projections(view, [&](const std::string& name, Tensor t) { t.copy_(kept->at(name)); });
    }
  };
  Verification three = verification("pp=2");
  three.layouts[0].stage_layers = {3, 2};
  bugs.push_back(
      {"a layer adds nothing", three, dropped, Compared::kLoss, "micro-batch 0", {0, 1}, "h.3.attn.proj: linear", 0});
  bugs.push_back({"a branch is lost between two stages",
                  three,
                  engine_of(1,
                            [count = std::make_shared<int>(0)](const Operation& op, Engine& engine) {
                              const int64_t sent = engine.run(op);
                              if (op.stamp.op == Collective::recv && ++*count % 2 == 0)
                                write(op.output, Bytes(static_cast<size_t>(bytes_of(op.output))));
                              return sent;
                            }),
                  Compared::kLoss,
                  "micro-batch 0",
                  {0, 1},
                  "h.3.ln_1: residual_layer_norm",
                  0});
  bugs.push_back({"a gradient is lost between two stages",
                  three,
                  engine_of(0,
                            [count = std::make_shared<int>(0)](const Operation& op, Engine& engine) {
                              const int64_t sent = engine.run(op);
                              if (op.stamp.op == Collective::recv && ++*count % 2 == 0)
                                write(op.output, Bytes(static_cast<size_t>(bytes_of(op.output))));
                              return sent;
                            }),
                  Compared::kGradient,
                  "h.2.mlp.proj.bias",
                  {0}});
  bugs.push_back({"losses are means of each micro-batch",
                  verification("dp=2"),
                  micro_batches_of(-1,
                                   [](int64_t, MicroBatch& batch, GptStep& step) {
                                     const std::vector<int32_t> targets = batch.targets.to_vector<int32_t>();
                                     const auto valid = std::count_if(targets.begin(), targets.end(),
                                                                      [](int32_t t) { return t >= 0; });
                                     step.valid_tokens = std::max(1.0, static_cast<double>(valid));
                                   }),
                  Compared::kLoss,
                  "micro-batch 0",
                  {0},
                  "wte: linear_cross_entropy",
                  0});
  bugs.push_back({"one rank divides the loss by its own valid tokens",
                  verification("dp=2"),
                  micro_batches_of(1, [](int64_t, MicroBatch&, GptStep& step) { step.valid_tokens *= 0.5; }),
                  Compared::kLoss,
                  "micro-batch 5",
                  {1},
                  "wte: linear_cross_entropy",
                  5});
  bugs.push_back({"random numbers go by the rank",
                  verification("dp=2"),
                  micro_batches_of(1, [](int64_t, MicroBatch&, GptStep& step) { step.step += 1000; }),
                  Compared::kLoss,
                  "micro-batch 5",
                  {1},
                  "wpe: dropout",
                  4});
  bugs.push_back({"rows are counted from each rank's first one",
                  verification("dp=4"),
                  micro_batches_of(2, [](int64_t j, MicroBatch&, GptStep& step) { step.first_row = (j - 4) * 2; }),
                  Compared::kLoss,
                  "micro-batch 5",
                  {2},
                  "wpe: dropout",
                  4});
  const Verification plain = verification("dp=2");
  bugs.push_back({"a rank trains on another micro-batch",
                  plain,
                  micro_batches_of(1,
                                   [problem = plain.problem](int64_t j, MicroBatch& batch, GptStep& step) {
                                     if (j == 6) batch = problem.micro_batch(static_cast<int64_t>(step.step), 5);
                                   }),
                  Compared::kLoss,
                  "micro-batch 6",
                  {1},
                  "wte: embedding",
                  6});
  return bugs;
}

std::vector<Bug> bugs_of_updates() {
  std::vector<Bug> bugs;
  bugs.push_back(
      {"a tied weight's gradient counts twice in the norm",
       verification("pp=2"),
       norms_of(-1,
                [](std::span<optim::ExactSum> reduced, std::span<const optim::ExactSum>, const Parameters& parameters) {
                  for (size_t p = 0; p < parameters.size(); ++p) {
                    if (parameters[p].name == "wte.weight") reduced[p].add(optim::ExactSum(reduced[p]));
                  }
                }),
       Compared::kNorm,
       "gradient norm",
       {0, 1}});
  bugs.push_back({"one rank clips by the norm of its shards",
                  verification("dp=2", Zero::kOptimizer),
                  norms_of(1, kOwnSums),
                  Compared::kNorm,
                  "gradient norm",
                  {1}});
  bugs.push_back({"one rank clips by the norm of its stage",
                  verification("dp=2,pp=2"),
                  norms_of(3, {}, false),
                  Compared::kNorm,
                  "gradient norm",
                  {3}});
  Verification lamb = verification("dp=2", Zero::kOptimizer);
  lamb.problem.adam.trust_ratio = true;
  TrainingHooks own_ratio;
  own_ratio.norms = [](int rank, std::shared_ptr<optim::NormReducer> norms) -> std::shared_ptr<optim::NormReducer> {
    if (rank != 1) return norms;
    const auto calls = std::make_shared<int>(0);  // gradients, weights, updates, ...
    return std::make_shared<WrongNorms>(
        std::move(norms), [calls](std::span<optim::ExactSum> reduced, std::span<const optim::ExactSum> own,
                                  const Parameters& parameters) {
          if ((*calls)++ % 3 == 0) return;
          for (size_t p = 0; p < parameters.size(); ++p) {
            if (parameters[p].name == "h.1.mlp.fc.weight") reduced[p] = own[p];
          }
        });
  };
  bugs.push_back({"the trust ratio is that of a shard",
                  lamb,
                  own_ratio,
                  Compared::kNorm,
                  "squared norm of h.1.mlp.fc.weight",
                  {1}});
  TrainingHooks decay;
  decay.arguments = [](int rank, TrainingProblem& problem, ParallelOptions&) {
    if (rank == 1) problem.adam.weight_decay = 0;
  };
  bugs.push_back({"one rank does not decay weights",
                  verification("dp=2"),
                  decay,
                  Compared::kParameter,
                  "h.0.attn.qkv.weight",
                  {1}});
  TrainingHooks stale;
  const auto before = std::make_shared<std::map<int64_t, Tensor>>();
  stale.at = [before](TrainingMoment moment, const RankView& view) {
    if (view.rank != 1) return;
    const autograd::NoGrad no_grad;
    Tensor weight = parameter(view.parallel.gpt().parameters(), "h.2.mlp.fc.weight").detach();
    if (moment == TrainingMoment::kUpdated) (*before)[view.step] = weight.clone();
    if (moment == TrainingMoment::kGathered) weight.copy_(before->at(view.step));
  };
  bugs.push_back({"a rank keeps weights from before the others' update",
                  verification("dp=2", Zero::kOptimizer),
                  stale,
                  Compared::kParameter,
                  "h.2.mlp.fc.weight",
                  {1}});
  bugs.push_back({"shards are put together in the wrong order",
                  verification("dp=2", Zero::kGradients),
                  engine_of(1,
                            [](const Operation& op, Engine& engine) {
                              const int64_t sent = engine.run(op);
                              if (op.stamp.op != Collective::all_gather || op.output.numel() != kMlp) return sent;
                              const Bytes all = content(op.output);
                              const auto first = static_cast<std::ptrdiff_t>(op.stamp.send_counts[0] * 4);
                              Bytes swapped(all.begin() + first, all.end());
                              swapped.insert(swapped.end(), all.begin(), all.begin() + first);
                              write(op.output, swapped);
                              return sent;
                            }),
                  Compared::kParameter,
                  "h.0.mlp.fc.weight",
                  {1}});
  bugs.push_back({"copies of a weight drift apart",
                  verification("dp=2,pp=2"),
                  moments_of(2, TrainingMoment::kGathered,
                             [](const RankView& view) {
                               const autograd::NoGrad no_grad;
                               Tensor bias = parameter(view.parallel.gpt().parameters(), "h.1.ln_2.bias").detach();
                               float* values = bias.data<float>();
                               if (view.step == 1) values[5] = std::nextafter(values[5], 1.0f);
                             }),
                  Compared::kParameter,
                  "h.1.ln_2.bias",
                  {2},
                  "",
                  -1,
                  1});
  Verification moved = verification("dp=2", Zero::kOptimizer);
  ParallelOptions stages;
  stages.mesh = Mesh::parse("pp=2"), stages.stage_layers = {3, 2};
  moved.layouts.push_back(stages);
  TrainingHooks forgotten;
  forgotten.loaded = [](int rank, TrainingState& start) {
    for (auto& [name, tensor] : start.state) {
      if (rank == 1 && name == "h.4.mlp.fc.bias.exp_avg") tensor = Tensor::zeros_like(tensor);
    }
  };
  bugs.push_back({"a state is not moved to the new mesh",
                  moved,
                  forgotten,
                  Compared::kParameter,
                  "h.4.mlp.fc.bias",
                  {1},
                  "",
                  -1,
                  2});
  return bugs;
}

/// On meshes that are held to bounds instead of bits.
std::vector<Bug> bugs_within_layers() {
  std::vector<Bug> bugs;
  /// The n-th sum over tp of a run, counted from 0, is left out on rank 1; the first is that of the embedding.
  const auto not_summed = [](int n) {
    return counting_engine_of(1, [n](const Operation& op, Engine& engine, int& count) {
      const bool wanted = op.stamp.op == Collective::all_reduce && op.stamp.lane.starts_with("tp") && count++ == n;
      const Bytes own = wanted ? content(op.input) : Bytes();
      const int64_t sent = engine.run(op);
      if (wanted) write(op.output, own);
      return sent;
    });
  };
  bugs.push_back({"heads are not added up on one rank of tp",
                  verification("tp=2"),
                  not_summed(1),
                  Compared::kLoss,
                  "micro-batch 0",
                  {0, 1},
                  "h.0.attn.proj: linear",
                  0});
  bugs.push_back({"copies of a norm's weight drift apart",
                  verification("dp=2,tp=2"),
                  moments_of(3, TrainingMoment::kGathered,
                             [](const RankView& view) {
                               const autograd::NoGrad no_grad;
                               Tensor weight = parameter(view.parallel.gpt().parameters(), "h.1.ln_2.weight").detach();
                               float* values = weight.data<float>();
                               values[5] = std::nextafter(values[5], 2.0f);
                             }),
                  Compared::kParameter,
                  "h.1.ln_2.weight",
                  {3}});
  bugs.push_back({"tokens of one rank of cp count twice",
                  verification("cp=2"),
                  micro_batches_of(1, [](int64_t, MicroBatch&, GptStep& step) { step.valid_tokens *= 0.5; }),
                  Compared::kLoss,
                  "micro-batch",
                  {0, 1},
                  "wte: linear_cross_entropy",
                  0,
                  0,
                  0});  // a sum of both ranks
  bugs.push_back({"one block of keys and values does not arrive on one rank of cp",
                  verification("cp=2"),
                  counting_engine_of(1,
                                     [](const Operation& op, Engine& engine, int& count) {
                                       const int64_t sent = engine.run(op);
                                       if (op.stamp.op == Collective::recv && count++ == 0)
                                         write(op.output, Bytes(static_cast<size_t>(bytes_of(op.output))));
                                       return sent;
                                     }),
                  Compared::kLoss,
                  "micro-batch",
                  {0, 1},
                  "h.0.attn.qkv: causal_attention",
                  0});
  Verification rows = verification("tp=2");
  rows.layouts[0].sequence = true;
  bugs.push_back({"rows of the other rank are lost in front of a cut matrix",
                  rows,
                  counting_engine_of(1,
                                     [](const Operation& op, Engine& engine, int& count) {
                                       const int64_t sent = engine.run(op);
                                       if (op.stamp.op == Collective::all_gather && count++ == 0) {
                                         Bytes all = content(op.output);
                                         std::fill(all.begin(),
                                                   all.begin() + static_cast<std::ptrdiff_t>(all.size() / 2),
                                                   std::byte{0});
                                         write(op.output, all);
                                       }
                                       return sent;
                                     }),
                  Compared::kLoss,
                  "micro-batch 0",
                  {0, 1},
                  "h.0.attn.qkv: linear",
                  0});
  bugs.push_back({"hidden channels are not added up on one rank of tp",
                  verification("tp=2"),
                  not_summed(4),
                  Compared::kLoss,
                  "micro-batch 0",
                  {0, 1},
                  "h.1.mlp.proj: linear",
                  0});
  bugs.push_back({"the gradient of a cut matrix lacks one rank's share",
                  verification("tp=2"),
                  moments_of(1, TrainingMoment::kReduced,
                             [](const RankView& view) {
                               const Tensor gradient =
                                   parameter(view.parallel.parameters(), "h.3.attn.qkv.weight").grad();
                               float* values = gradient.data<float>();
                               for (int64_t i = 0; i < gradient.numel(); ++i) values[i] *= 1.001f;
                             }),
                  Compared::kGradient,
                  "h.3.attn.qkv.weight",
                  {1}});
  return bugs;
}

/// Of amaxes and scales of fp8, on meshes that have the bits of one rank and on those that do not.
std::vector<Bug> bugs_of_fp8() {
  const auto in_fp8 = [](const std::string& mesh) {
    Verification v = verification(mesh);
    v.problem.config.width = 32, v.problem.dtype = DType::bf16, v.problem.fp8 = true;
    return v;
  };
  // Rank 1 keeps the amaxes that it saw itself.
  const auto not_agreed = [] {
    return engine_of(1, [](const Operation& op, Engine& engine) {
      const bool wanted = op.stamp.op == Collective::all_reduce && op.stamp.reduction == dist::Reduction::max &&
                          op.input.numel() == 5 * 4 * kFp8Roles;
      const Bytes own = wanted ? content(op.input) : Bytes();
      const int64_t sent = engine.run(op);
      if (wanted) write(op.output, own);
      return sent;
    });
  };
  std::vector<Bug> bugs;
  bugs.push_back({"amaxes are not agreed on over data-parallel ranks",
                  in_fp8("dp=2"),
                  not_agreed(),
                  Compared::kState,
                  "fp8.h.0.attn.proj.amax_history",
                  {1}});
  bugs.push_back({"amaxes are not agreed on over the ranks of tp",
                  in_fp8("tp=2"),
                  not_agreed(),
                  Compared::kState,
                  "fp8.h.0.attn.qkv.amax_history",
                  {1}});
  bugs.push_back({"amaxes are not agreed on over the ranks of cp",
                  in_fp8("cp=2"),
                  not_agreed(),
                  Compared::kState,
                  "fp8.h.0.attn.qkv.amax_history",
                  {1}});
  Verification moved = in_fp8("dp=2");
  moved.layouts.push_back(moved.layouts[0]);
  TrainingHooks forgotten;
  forgotten.loaded = [](int rank, TrainingState& start) {
    for (auto& [name, tensor] : start.state) {
      if (rank == 1 && name == "fp8.h.2.mlp.fc.scale") tensor = Tensor::ones(tensor.shape(), tensor.dtype());
    }
  };
  bugs.push_back({"scales do not come back",
                  moved,
                  forgotten,
                  Compared::kLoss,
                  "micro-batch",
                  {1},
                  "h.2.mlp.fc: linear_fp8",
                  4,
                  2});
  return bugs;
}

/// The same layout without the bug; once for all bugs of a layout.
void expect_equal_without_bugs(const Verification& v) {
  static std::set<std::string> seen;
  const std::string key =
      concat(v.layouts.front().mesh.to_string(), ' ', static_cast<int>(v.layouts.front().zero), ' ', v.layouts.size(),
             ' ', v.problem.dtype, v.problem.fp8 ? " fp8 " : " ", v.problem.adam.trust_ratio);
  if (!seen.insert(key).second) return;
  const VerifyReport right = verify(v);
  EXPECT_TRUE(right.equal()) << text_of(v, right);
}

void expect_found(const std::vector<Bug>& bugs) {
  for (const Bug& bug : bugs) {
    const ::testing::ScopedTrace trace(__FILE__, __LINE__, bug.title);
    expect_equal_without_bugs(bug.at);
    const VerifyReport report = verify(bug.at, &bug.hooks);
    const std::string text = text_of(bug.at, report);
    if (!report.first) {
      ADD_FAILURE() << "not found\n" << text;
      continue;
    }
    const Difference& first = *report.first;
    EXPECT_EQ(name(first.what), std::string(name(bug.what))) << text;
    EXPECT_TRUE(first.tensor.starts_with(bug.tensor)) << text;
    if (!bug.ranks.empty()) {
      EXPECT_EQ(first.ranks, bug.ranks) << text;
    }
    EXPECT_EQ(first.step, bug.step) << text;
    EXPECT_NE(text.find(bug.tensor), std::string::npos) << text;
    if (bug.origin.empty()) continue;
    if (!first.origin) {
      ADD_FAILURE() << "no origin\n" << text;
      continue;
    }
    EXPECT_EQ(first.origin->place, bug.origin) << text;
    EXPECT_EQ(first.origin->micro_batch, bug.micro_batch) << text;
    EXPECT_EQ(first.origin->rank, bug.origin_rank < 0 ? bug.ranks.back() : bug.origin_rank) << text;
  }
}

TEST(Verify, FindsWhatIsWrongWithGradients) { expect_found(bugs_of_gradients()); }
TEST(Verify, FindsWhatIsWrongWithLossesAndWhereItBegins) { expect_found(bugs_of_losses()); }
TEST(Verify, FindsWhatIsWrongWithNormsUpdatesAndMoves) { expect_found(bugs_of_updates()); }
TEST(Verify, FindsWhatIsWrongWithScalesOfFp8) { expect_found(bugs_of_fp8()); }
TEST(Verify, FindsWhatIsWrongWhereNumbersMayDiffer) { expect_found(bugs_within_layers()); }

}  // namespace
}  // namespace weft::models
