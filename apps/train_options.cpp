#include "apps/train_options.h"

namespace weft::apps {
namespace {

/// Smaller tensors are not worth a copy: at 20 GB/s it takes as long as three kernels take to start.
constexpr int64_t kOffloadFrom = int64_t{1} << 18;

}  // namespace

std::vector<std::pair<std::string, dist::PipelineKind>> pipeline_kinds() {
  std::vector<std::pair<std::string, dist::PipelineKind>> kinds;
  for (const dist::PipelineKind kind : dist::kPipelineKinds) kinds.emplace_back(dist::name(kind), kind);
  return kinds;
}

void TrainOptions::declare(Options& o) {
  o.section("data", "The data");
  o.add("data", &data, {.placeholder = "DIR"},
        "what `weft data prepare` wrote: train.tokens, heldout.tokens, tokenizer.json");
  o.add("batch", &batch, {.min = 1, .max = 1 << 20, .unit = "sequences"}, "rows of a micro-batch");
  o.add("accumulate", &accumulate, {.min = 1, .max = 1 << 20, .unit = "micro-batches"},
        "micro-batches of one step; their gradients add up to that of one large batch");
  o.add("prefetch", &prefetch, {.min = 0, .max = 1024, .unit = "batches"},
        "batches prepared ahead on a thread of their own");

  o.section("model", "The model: GPT-2's architecture");
  o.add("layers", &layers, {.min = 1, .max = 10000}, "transformer blocks");
  o.add("heads", &heads, {.min = 1, .max = 1 << 20}, "attention heads; must divide the width");
  o.add("width", &width, {.min = 1, .max = 1 << 24}, "channels of the residual stream");
  o.add("context", &context, {.min = 1, .max = 1 << 24, .unit = "tokens"}, "positions of a sequence");
  o.add("dropout", &dropout, {.min = 0, .below = 1}, "probability with which an activation is dropped in training");
  o.add("recompute",
        {.switches = {{"block", &recompute.block},
                      {"norm", &recompute.norm},
                      {"activation", &recompute.activation},
                      {"attention", &recompute.attention}},
         .was_bool = "true is \"block\" now, false is \"none\""},
        "what the backward pass computes a second time instead of keeping it: whole blocks, or outputs of their norms, "
        "of GELU and of attention; same numbers");

  o.section("optimizer", "The optimizer");
  o.add("optimizer", &optimizer, {{"adamw", OptimizerKind::adamw}, {"lamb", OptimizerKind::lamb}},
        "the rule by which weights change");
  o.add("lr", &lr, {.min = 0, .max = 1e3}, "highest learning rate, reached after the warm-up");
  o.add("min_lr", &min_lr, {.min = 0, .max = 1e3}, "learning rate at the end of the cosine");
  o.add("warmup", &warmup, {.min = 0, .unit = "steps"}, "steps of linear warm-up");
  o.add("weight_decay", &weight_decay, {.min = 0, .max = 1e3},
        "decoupled decay of weight matrices; norms, biases and embeddings are spared");
  o.add("beta1", &beta1, {.min = 0, .below = 1}, "decay of the mean of gradients");
  o.add("beta2", &beta2, {.min = 0, .below = 1}, "decay of the mean of squared gradients");
  o.add("eps", &eps, {.above = 0}, "added to the root of the mean square");
  o.add("clip", &clip, {.min = 0}, "largest global gradient norm; 0 does not clip");

  o.section("parallel", "Several ranks: weft launch -n N -- train ...");
  o.add(
      "mesh", &mesh, {.placeholder = "AXES"},
      "how ranks are laid out, dp=2,pp=2 say: dp ranks train copies of the model on a share of a step's micro-batches, "
      "pp ranks have a range of its layers each, cp ranks a share of each sequence, tp ranks a share of every layer; "
      "empty: dp with all of them");
  o.add("zero", &zero,
        {{"0", dist::Zero::kNone},
         {"1", dist::Zero::kOptimizer},
         {"2", dist::Zero::kGradients},
         {"3", dist::Zero::kParameters}},
        "what ranks share out instead of each keeping all of it (ZeRO): 1 the optimizer's state, 2 gradients too, 3 "
        "weights too");
  o.add("zero_ranks", &zero_ranks, {.min = 0, .max = 1 << 20, .unit = "ranks"},
        "with --zero 1 or 3: neighbouring copies that share out states among them, one machine's say; every such group "
        "has all of them (hybrid sharding); 0: all copies together");
  o.add("sequence_parallel", &sequence_parallel,
        "with tp: its ranks also share the rows of the activations between the layers that they share");
  o.add("pipeline", &pipeline, pipeline_kinds(),
        "with pp: the order in which a rank computes micro-batches; eager-1f1b hides slow links, for nearly twice the "
        "activations of 1f1b, which waits for every transfer; `weft plan schedule` draws it; same numbers");
  o.add("pipeline_chunks", &pipeline_chunks, {.min = 1, .max = 1 << 16, .unit = "stages"},
        "with pp: stages a rank, of fewer layers each; other than 1 for --pipeline interleaved alone");
  o.add("pipeline_split", &pipeline_split, {.min = 1, .unit = "layers"}, {},
        "with pp: layers of each stage, 3,3,4,2 say; empty: as even as can be, by the FLOPs of layers and head");
  o.add("pipeline_measure", &pipeline_measure,
        "with pp: split layers by the time that a layer and the head take on the first rank instead; same numbers");
  o.add("deterministic", &deterministic,
        "add up the gradients of micro-batches in the order that several ranks add them up in, so that one rank has "
        "their bits; several always do");

  o.section("run", "The run");
  device.declare(o);
  declare_cuda_graph(o, &cuda_graph);
  o.add("precision", &precision,
        {{"f32", Precision::f32},
         {"tf32", Precision::tf32},
         {"bf16", Precision::bf16},
         {"f16", Precision::f16},
         {"fp8", Precision::fp8}},
        "numbers of weights and activations: f32; tf32: f32 whose products round to 10 bits on a GPU; bf16, f16: with "
        "f32 master weights, f16 with dynamic loss scaling; fp8: bf16 whose linear layers in the blocks multiply in 8 "
        "bits with delayed scaling (GPUs from compute capability 8.9 on, or a CPU, which emulates it)");
  o.add("offload", {.switches = {{"optimizer", &offload_optimizer}, {"activations", &offload_activations}}},
        "what waits in the host's memory while a GPU does not need it: the optimizer's state, saved activations of the "
        "blocks; same numbers");
  o.add("out", &out, {.placeholder = "DIR"}, "where checkpoints, metrics.jsonl and the resolved config.toml go");
  o.add("steps", &steps, {.min = 1, .max = int64_t{1} << 40}, "optimizer steps of the whole run");
  o.add("seed", &seed, {.min = 0}, "of the initial weights, the data order and dropout");
  o.add("save_every", &save_every, {.min = 0, .unit = "steps"}, "steps between checkpoints; 0 saves at the end only");
  o.add("save_async", &save_async,
        "write checkpoints in the background, from a copy in the host's memory, while training goes on");
  o.add("keep", &keep, {.min = 1, .max = 1 << 20, .unit = "checkpoints"}, "newest checkpoints that stay");
  o.add("eval_every", &eval_every, {.min = 0, .unit = "steps"},
        "steps between evaluations on heldout.tokens; 0 evaluates at the end only");
  o.add("eval_batch", &eval_batch, {.min = 1, .max = 1 << 20, .unit = "sequences"}, "rows of a batch in evaluations");
  o.add("sample_every", &sample_every, {.min = 0, .unit = "steps"}, "steps between printed samples; 0 prints none");
  o.add("sample_tokens", &sample_tokens, {.min = 1, .max = 1 << 20, .unit = "tokens"}, "length of a printed sample");
  o.add("sample_prompt", &sample_prompt, {}, "text that a printed sample continues");
  o.add("log_seconds", &log_seconds, {.min = 0, .max = 86400, .unit = "seconds"},
        "time between progress lines where there is no terminal");

  o.action("dry_run", &dry_run, "print configuration, parameters, memory by category and FLOPs, and exit");
}

void TrainOptions::check(const Options& options) const {
  if (data.empty()) options.reject("data", "must be given: the directory that `weft data prepare` wrote");
  if (width % heads != 0) options.reject("heads", "must divide width = ", width, ", got ", heads);
  if (precision == Precision::fp8 && width % 16 != 0) {
    options.reject("width",
                   "must be a multiple of 16 with precision = fp8, whose products read 16 numbers at a time; got ",
                   width);
  }
  if ((offload_optimizer || offload_activations) && device.planned(options).kind == DeviceKind::cpu) {
    options.reject("offload", "is for a CUDA device; this run is on the CPU, where the memory is the host's already");
  }
  if (min_lr > lr) options.reject("min_lr", "must be at most lr = ", lr, ", got ", min_lr);
  if (warmup >= steps && warmup > 0) options.reject("warmup", "must be below steps = ", steps, ", got ", warmup);
}

dist::Mesh TrainOptions::adapted_mesh(const Options& options, int ranks) const {
  const dist::Mesh given = dist::Mesh::parse(mesh);
  const int copy = given.size() / given.size(dist::Axis::dp);
  if (ranks % copy != 0) {
    options.reject("mesh", weft::quoted(mesh), " cannot adapt to ", ranks, " ranks: each copy of the model takes ",
                   copy, ". Hint: weft launch --elastic with numbers of ranks that are multiples of ", copy);
  }
  return dist::Mesh({ranks / copy, given.size(dist::Axis::pp), given.size(dist::Axis::cp), given.size(dist::Axis::tp)});
}

dist::Mesh TrainOptions::check_ranks(const Options& options, int ranks, bool elastic) const {
  dist::Mesh layout;
  try {
    if (mesh.empty()) {
      layout = dist::Mesh({ranks, 1, 1, 1});
    } else {
      layout = elastic ? adapted_mesh(options, ranks) : dist::Mesh::parse(mesh, ranks);
    }
  } catch (const Error& error) {
    if (ranks == 0) options.reject("mesh", "makes no layout: ", error.what());
    options.reject("mesh", "does not fit the ", ranks,
                   ranks == 1 ? " rank of this run: " : " ranks of this run: ", error.what());
  }
  ranks = layout.size();
  if (sequence_parallel && layout.size(dist::Axis::tp) == 1)
    options.reject("sequence_parallel", "is for the ranks of tp, of which the mesh ", weft::quoted(mesh), " has one");
  if (heads < layout.size(dist::Axis::tp))
    options.reject("heads", "must be at least one for each rank of tp = ", layout.size(dist::Axis::tp), ", got ",
                   heads);
  const int copies = layout.size(dist::Axis::dp);
  if (accumulate < copies) {
    options.reject("accumulate", "every one of the ", copies, " copies needs a micro-batch of each step, got ",
                   accumulate, ". Hint: a smaller --batch and as many more micro-batches are the same step");
  }
  if (zero == dist::Zero::kGradients && accumulate % copies != 0) {
    options.reject("accumulate", "micro-batches of a step must be shared out evenly among ", copies,
                   " copies with zero = 2, which adds up those of all at once; got ", accumulate,
                   ". Hint: --zero 1 shares out any number");
  }
  if (const int sharing = copies * layout.size(dist::Axis::cp); zero_ranks > 0 && sharing % zero_ranks != 0)
    options.reject("zero_ranks", "must divide the ", sharing, " copies, got ", zero_ranks);
  if (zero_ranks > 0 && zero != dist::Zero::kOptimizer && zero != dist::Zero::kParameters)
    options.reject("zero_ranks", "is for --zero 1 and --zero 3");
  check_pipeline(options, layout);
  const int tensor_ranks = layout.size(dist::Axis::tp);
  if (precision == Precision::fp8 && !models::fp8_fits(model(1), tensor_ranks))
    options.reject("precision", models::kFp8Parts, "; heads = ", heads, " and width = ", width,
                   " do not make such parts for tp = ", tensor_ranks);
  return layout;
}

void TrainOptions::check_pipeline(const Options& options, const dist::Mesh& layout) const {
  const int ranks = layout.size(dist::Axis::pp);
  const int64_t stages = ranks * pipeline_chunks;
  if (stages > layers)
    options.reject("mesh", "makes a pipeline of ", stages, " stages of at least one layer each; there are ", layers,
                   " layers");
  if (pipeline_chunks > 1 && (pipeline != dist::PipelineKind::kInterleaved || ranks == 1))
    options.reject("pipeline_chunks", "is for --pipeline interleaved on several pipeline ranks, got ", pipeline_chunks);
  if (ranks > 1 && pipeline == dist::PipelineKind::kInterleaved &&
      accumulate % (ranks * layout.size(dist::Axis::dp)) != 0)
    options.reject("accumulate", "must be a multiple of ", ranks, " for each of ", layout.size(dist::Axis::dp),
                   " copies with --pipeline interleaved on ", ranks, " ranks, got ", accumulate);
  if (pipeline_measure && (ranks == 1 || !pipeline_split.empty()))
    options.reject("pipeline_measure", "is for several pipeline ranks without --pipeline-split");
  if (pipeline_split.empty()) return;
  int64_t total = 0;
  for (const int64_t count : pipeline_split) total += count;
  if (static_cast<int64_t>(pipeline_split.size()) != stages || total != layers)
    options.reject("pipeline_split", "must have a number of layers for each of ", stages, " stages that add up to ",
                   layers, ", got ", pipeline_split.size(), " that add up to ", total);
}

models::ParallelOptions TrainOptions::parallel(const dist::Mesh& layout) const {
  models::ParallelOptions parallel;
  parallel.mesh = layout, parallel.zero = zero, parallel.schedule = pipeline;
  parallel.sequence = sequence_parallel, parallel.shard_ranks = static_cast<int>(zero_ranks);
  parallel.chunks = static_cast<int>(pipeline_chunks), parallel.stage_layers = pipeline_split;
  return parallel;
}

models::GptConfig TrainOptions::model(int64_t vocab) const {
  models::GptConfig config;
  config.layers = layers, config.heads = heads, config.width = width, config.context = context, config.vocab = vocab;
  config.dropout = dropout, config.recompute = recompute;
  if (offload_activations) config.offload_from = kOffloadFrom;
  return config;
}

optim::AdamOptions TrainOptions::adam() const {
  optim::AdamOptions adam;
  adam.beta1 = beta1, adam.beta2 = beta2, adam.eps = eps, adam.weight_decay = weight_decay, adam.clip_norm = clip;
  adam.trust_ratio = optimizer == OptimizerKind::lamb, adam.offload = offload_optimizer;
  return adam;
}

optim::CosineSchedule TrainOptions::schedule() const {
  return {.peak = lr, .floor = min_lr, .warmup = warmup, .total = steps};
}

}  // namespace weft::apps
