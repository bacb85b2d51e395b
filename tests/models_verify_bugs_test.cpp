// Where a layout does not train as one rank does, the report says what is wrong and where.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>

#include "core/autograd.h"
#include "tests/disturbed_training.h"
#include "tests/verification.h"

namespace weft::models {
namespace {

using dist::Collective;
using dist::Engine;
using dist::Mesh;
using dist::Operation;
using dist::Zero;

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
