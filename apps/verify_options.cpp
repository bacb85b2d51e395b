#include "apps/verify_options.h"

#include <algorithm>
#include <iostream>

#include "core/random.h"
#include "dist/sequence_layout.h"

namespace weft::apps {

using dist::Axis;
using dist::PipelineKind;

void VerifyOptions::declare(Options& o) {
  o.section("layout", "The layout that is compared with one rank");
  o.add("mesh", &mesh, {.placeholder = "AXES"}, "axes of the mesh and their sizes, dp=2,pp=2 say");
  o.add("then", &then, {.placeholder = "AXES"},
        "go on for as many steps on this mesh, with what the first one left; stages as even as can be");
  o.add("zero", &zero,
        {{"0", dist::Zero::kNone},
         {"1", dist::Zero::kOptimizer},
         {"2", dist::Zero::kGradients},
         {"3", dist::Zero::kParameters}},
        "what data-parallel ranks share out (ZeRO)");
  o.add("zero_ranks", &zero_ranks, {.min = 0, .max = 64, .unit = "ranks"},
        "with --zero 1 or 3: copies of the first mesh that share out states among them; 0: all together");
  o.add("bucket", &bucket, {.min = 1, .max = int64_t{1} << 40, .unit = "bytes"}, "of gradients that travel together");
  o.add("pipeline", &pipeline, pipeline_kinds(), "with pp: the order in which a rank computes micro-batches");
  o.add("pipeline_chunks", &pipeline_chunks, {.min = 1, .max = 1 << 16, .unit = "stages"},
        "with pp: stages a rank; other than 1 for --pipeline interleaved alone");
  o.add("pipeline_split", &pipeline_split, {.min = 1, .unit = "layers"}, {},
        "with pp: layers of each stage; empty: as even as can be");
  o.add("sequence_parallel", &sequence_parallel, "with tp: its ranks share the rows of activations too");
  o.add("recompute",
        {.switches = {{"block", &recompute.block},
                      {"norm", &recompute.norm},
                      {"activation", &recompute.activation},
                      {"attention", &recompute.attention}}},
        "what the layout's backward passes compute a second time");
  o.section("model", "The model");
  o.add("layers", &layers, {.min = 1, .max = 1000}, "transformer blocks");
  o.add("heads", &heads, {.min = 1, .max = 1 << 20}, "attention heads; must divide the width");
  o.add("width", &width, {.min = 1, .max = 1 << 20}, "channels of the residual stream");
  o.add("context", &context, {.min = 1, .max = 1 << 20, .unit = "tokens"}, "length of the sequences");
  o.add("vocab", &vocab, {.min = 1, .max = 1 << 24, .unit = "ids"}, "size of the vocabulary");
  o.add("dropout", &dropout, {.min = 0, .below = 1}, "probability with which an activation is dropped");
  o.add("precision", &precision,
        {{"f64", Precision::f64},
         {"f32", Precision::f32},
         {"bf16", Precision::bf16},
         {"f16", Precision::f16},
         {"fp8", Precision::fp8}},
        "of weights, activations and gradients; fp8: bf16 whose linear layers in the blocks multiply in 8 bits");
  o.section("training", "The training");
  o.add("steps", &steps, {.min = 1, .max = 1 << 20}, "optimizer steps on each mesh");
  o.add("batch", &batch, {.min = 1, .max = 1 << 20, .unit = "sequences"}, "rows of a micro-batch");
  o.add("accumulate", &accumulate, {.min = 1, .max = 1 << 20}, "micro-batches of a step, of all ranks together");
  o.add("optimizer", &optimizer, {{"adamw", OptimizerKind::adamw}, {"lamb", OptimizerKind::lamb}},
        "the rule by which weights change");
  o.add("lr", &lr, {.min = 0, .max = 1e3}, "learning rate");
  o.add("weight_decay", &weight_decay, {.min = 0, .max = 1e3}, "decay of weight matrices");
  o.add("clip", &clip, {.min = 0}, "largest global gradient norm; 0 does not clip");
  o.add("seed", &seed, {.min = 0}, "of weights, data and dropout, and of --fuzz");
}

DType VerifyOptions::dtype() const {
  switch (precision) {
    case Precision::f64:
      return DType::f64;
    case Precision::f16:
      return DType::f16;
    case Precision::bf16:
    case Precision::fp8:
      return DType::bf16;
    case Precision::f32:
      break;
  }
  return DType::f32;
}

models::ParallelOptions VerifyOptions::layout(const Options& options, const std::string& name,
                                              const std::string& text) const {
  models::ParallelOptions layout;
  layout.mesh = dist::Mesh::parse(text);
  layout.zero = zero, layout.bucket_bytes = bucket, layout.schedule = pipeline;
  const dist::Mesh& on = layout.mesh;
  const int tensor = on.size(Axis::tp);
  if (tensor > heads || tensor > vocab)
    options.reject(name, "has more tp ranks than there are heads or words to share, got ", quoted(text), ", ", heads,
                   " heads and ", vocab, " words");
  models::GptConfig config;
  config.heads = heads, config.width = width;
  if (precision == Precision::fp8 && !models::fp8_fits(config, tensor))
    options.reject("precision", models::kFp8Parts, "; heads = ", heads, " and width = ", width,
                   " do not make such parts for ", weft::quoted(text));
  layout.sequence = sequence_parallel && tensor > 1;
  const dist::SequenceLayout tokens(context, on.size(Axis::cp));
  for (int rank = 0; layout.sequence && rank < tokens.ranks(); ++rank) {
    if (tokens.count(rank) == 0)
      options.reject("context", "must have a token for each of ", tokens.ranks(),
                     " cp ranks with --sequence-parallel, got ", context);
  }
  constexpr int kMostRanks = 64;
  if (on.size() > kMostRanks)
    options.reject(name, "may have ", kMostRanks, " ranks, threads of this process, at most, got ", on.size());
  const int ranks = on.size(Axis::pp), copies = on.size(Axis::dp);
  if (accumulate < copies || (zero == dist::Zero::kGradients && accumulate % copies != 0))
    options.reject("accumulate", "must be at least one for each of ", copies,
                   " data-parallel ranks, and as many for each with --zero 2, got ", accumulate);
  const bool first = name == "mesh";
  layout.chunks = first ? static_cast<int>(pipeline_chunks) : 1;
  if (layout.chunks > 1 && (pipeline != PipelineKind::kInterleaved || ranks == 1))
    options.reject("pipeline_chunks", "is for --pipeline interleaved on several pipeline ranks, got ", layout.chunks);
  if (const int64_t stages = ranks * layout.chunks; stages > layers)
    options.reject(name, "makes a pipeline of ", stages, " stages of at least one layer each; there are ", layers,
                   " layers");
  if (ranks > 1 && pipeline == PipelineKind::kInterleaved && accumulate % (copies * ranks) != 0)
    options.reject("accumulate", "must be a multiple of the ", ranks, " pipeline ranks for each of ", copies,
                   " copies with --pipeline interleaved, got ", accumulate);
  const int64_t sharing = copies * on.size(Axis::cp);
  if (first && zero_ranks > 0 && (sharing % zero_ranks != 0 || zero == dist::Zero::kGradients))
    options.reject("zero_ranks", "must divide the ", sharing, " copies, and is not for --zero 2; got ", zero_ranks);
  layout.shard_ranks = first ? static_cast<int>(zero_ranks) : 0;
  if (!first || pipeline_split.empty()) return layout;
  layout.stage_layers = pipeline_split;
  int64_t total = 0;
  for (const int64_t count : pipeline_split) total += count;
  if (static_cast<int64_t>(pipeline_split.size()) != ranks * layout.chunks || total != layers)
    options.reject("pipeline_split", "must have a number of layers for each of ", ranks * layout.chunks,
                   " stages that add up to ", layers, ", got ", pipeline_split.size(), " that add up to ", total);
  return layout;
}

models::Verification VerifyOptions::verification(const Options& options) const {
  if (width % heads != 0) options.reject("heads", "must divide the width, got ", heads, " and ", width);
  models::Verification verification;
  models::TrainingProblem& problem = verification.problem;
  problem.config.layers = layers, problem.config.heads = heads, problem.config.width = width;
  problem.config.context = context, problem.config.vocab = vocab, problem.config.dropout = dropout;
  problem.config.recompute = recompute;
  problem.seed = static_cast<uint64_t>(seed), problem.dtype = dtype();
  problem.fp8 = precision == Precision::fp8;
  problem.rows = batch, problem.micro_batches = accumulate, problem.lr = lr;
  problem.adam.weight_decay = weight_decay, problem.adam.clip_norm = clip;
  problem.adam.trust_ratio = optimizer == OptimizerKind::lamb;
  verification.steps = steps;
  verification.layouts.push_back(layout(options, "mesh", mesh));
  if (options.given("then")) verification.layouts.push_back(layout(options, "then", then));
  return verification;
}

models::Verification verification_of(const std::vector<std::string>& arguments) {
  VerifyOptions o;
  Options options("verify", "");
  o.declare(options);
  if (!options.parse(arguments, {}, std::cout)) fail(ErrorKind::kUsage, "verify", "--help is no comparison");
  return o.verification(options);
}

namespace {

/// Numbers of one comparison, in the order in which they are asked for.
class Dice {
 public:
  Dice(int64_t seed, int64_t number)
      : stream_(RandomStream(static_cast<uint64_t>(seed), "verify").at_step(static_cast<uint64_t>(number))) {}
  int64_t from_to(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(stream_.below(next_++, static_cast<uint64_t>(high - low + 1)));
  }
  bool one_in(int64_t n) { return from_to(1, n) == 1; }
  template <class T>
  T one_of(const std::vector<T>& choices) {
    return choices[static_cast<size_t>(from_to(0, static_cast<int64_t>(choices.size()) - 1))];
  }

 private:
  RandomStream stream_;
  uint64_t next_ = 0;
};

}  // namespace

std::vector<std::string> random_arguments(int64_t seed, int64_t number) {
  constexpr int64_t kRanks = 8;
  Dice dice(seed, number);
  std::vector<std::string> arguments;
  const auto give = [&](const std::string& option, const auto& value) {
    arguments.push_back("--" + option);
    arguments.push_back(concat(value));
  };

  int64_t dp = 1, pp = 1, cp = 1, tp = 1;
  while (dp * pp * cp * tp < 2 || dp * pp * cp * tp > kRanks) {
    dp = dice.from_to(1, kRanks), pp = dice.from_to(1, 4);
    cp = dice.one_in(3) ? dice.from_to(2, 4) : 1, tp = dice.one_in(3) ? dice.from_to(2, 4) : 1;
  }
  const std::string schedule =
      pp == 1 ? "1f1b" : dice.one_of<std::string>({"gpipe", "1f1b", "eager-1f1b", "interleaved", "zero-bubble"});
  const bool interleaved = schedule == "interleaved";
  const int64_t chunks = interleaved ? dice.from_to(1, 2) : 1;
  const int64_t stages = pp * chunks, layers = stages + dice.from_to(0, 3);
  const int64_t share = interleaved ? pp * dice.from_to(1, 2) : dice.from_to(1, 3);
  const int64_t zero = dice.from_to(0, 3);
  const bool even = interleaved || zero == 2;
  const int64_t accumulate = dp * share + (even ? 0 : dice.from_to(0, dp - 1));
  give(
      "mesh",
      dist::Mesh({static_cast<int>(dp), static_cast<int>(pp), static_cast<int>(cp), static_cast<int>(tp)}).to_string());
  give("zero", zero);
  if (zero != 2 && dice.one_in(2)) {
    std::vector<int64_t> divisors;
    for (int64_t d = 1; d <= dp * cp; ++d) {
      if (dp * cp % d == 0) divisors.push_back(d);
    }
    give("zero-ranks", dice.one_of(divisors));
  }
  const bool sequence = dice.one_in(2);
  if (tp > 1 && sequence) arguments.push_back("--sequence-parallel");
  give("bucket", dice.one_of<int64_t>({1, 500, 4096, 1 << 20}));
  give("layers", layers);
  if (pp > 1) give("pipeline", schedule);
  if (chunks > 1) give("pipeline-chunks", chunks);
  if (pp > 1 && dice.one_in(3)) {
    std::vector<int64_t> split(static_cast<size_t>(stages), 1);
    for (int64_t rest = layers - stages; rest > 0; --rest) ++split[static_cast<size_t>(dice.from_to(0, stages - 1))];
    std::string text;
    for (const int64_t count : split) text += concat(text.empty() ? "" : ",", count);
    give("pipeline-split", text);
  }
  if (dice.one_in(3)) give("recompute", dice.one_of<std::string>({"block", "norm", "activation", "norm,attention"}));

  const int64_t heads = dice.from_to(tp, 5);
  const int64_t channels = dice.from_to(1, 7);
  const int64_t context = sequence ? dice.from_to(2 * cp, 9) : dice.from_to(1, 9);
  give("context", context);
  give("vocab", dice.from_to(4, 67));
  give("dropout", dice.one_of<std::string>({"0", "0.1", "0.5"}));
  const auto precision = dice.one_of<std::string>({"f64", "f32", "f32", "bf16", "f16", "fp8"});
  give("precision", precision);
  // Products in 8 bits are of sizes that are multiples of 16, on each rank of tp.
  models::GptConfig config;
  config.heads = heads, config.width = heads * (precision == "fp8" ? 16 : channels);
  while (precision == "fp8" && !models::fp8_fits(config, static_cast<int>(tp))) config.width = 16 * ++config.heads;
  give("heads", config.heads);
  give("width", config.width);
  give("steps", dice.from_to(1, 3));
  give("batch", dice.from_to(1, 3));
  give("accumulate", accumulate);
  give("optimizer", dice.one_of<std::string>({"adamw", "lamb"}));
  give("lr", dice.one_of<std::string>({"0.001", "0.03"}));
  give("weight-decay", dice.one_of<std::string>({"0", "0.1"}));
  give("clip", dice.one_of<std::string>({"0", "0.01", "0.5", "100"}));
  give("seed", dice.from_to(0, 9999));
  if (dice.one_in(3)) {
    // Any other mesh that the step's micro-batches fit.
    std::vector<std::string> meshes;
    for (int copies = 1; copies <= kRanks; ++copies) {
      for (int ranks = 1; copies * ranks <= kRanks; ++ranks) {
        if (copies > accumulate || (even && accumulate % copies != 0) || ranks > layers) continue;
        if (interleaved && ranks > 1 && accumulate % (copies * ranks) != 0) continue;
        for (int tensor = 1; copies * ranks * tensor <= kRanks && tensor <= std::min<int64_t>(config.heads, 4);
             ++tensor) {
          if (precision == "fp8" && !models::fp8_fits(config, tensor)) continue;
          for (int sharing = 1; copies * ranks * tensor * sharing <= kRanks && sharing <= cp; ++sharing)
            meshes.push_back(dist::Mesh({copies, ranks, sharing, tensor}).to_string());
        }
      }
    }
    give("then", dice.one_of(meshes));
  }
  return arguments;
}

}  // namespace weft::apps
