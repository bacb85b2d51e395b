// weft bench attention: tiled attention on the shapes of GPT training and of generation.
#include <cmath>
#include <iostream>

#include "apps/bench.h"
#include "apps/bench_table.h"
#include "apps/files.h"
#include "core/autograd.h"
#include "core/memory.h"
#include "core/random.h"
#include "ops/attention.h"
#include "ops/attention_library.h"

namespace weft::apps {
namespace {

struct AttentionSize {
  int64_t batch, heads, tokens, head_size;
  int64_t cached = 0;  ///< > 0: `tokens` new ones over so many in a cache, forward only
};

std::vector<AttentionSize> sizes_for(Device device, bool tiny) {
  if (tiny) return {{1, 2, 16, 8}, {2, 2, 1, 8, 15}};
  if (device.kind == DeviceKind::cpu) {
    return {{12, 4, 64, 32},   {16, 6, 256, 64}, {4, 12, 64, 64},
            {1, 12, 1024, 64}, {1, 8, 512, 128}, {1, 12, 1, 64, 1023}};
  }
  return {{64, 12, 1024, 64}, {32, 16, 1024, 64}, {8, 25, 1024, 64}, {16, 16, 2048, 64},
          {4, 16, 8192, 64},  {16, 8, 2048, 128}, {4, 8, 8192, 128}, {64, 12, 1, 64, 1023}};
}

Tensor random(const Shape& shape, DType dtype, Device device) {
  const Tensor values = Tensor::empty(shape, dtype, device);
  fill_uniform(values, RandomStream(1, "bench attention"), -1, 1);
  return values;
}

std::string name_of(const AttentionSize& s) {
  return concat("B ", s.batch, ", H ", s.heads, ", T ", s.tokens,
                s.cached > 0 ? concat(" over ", s.cached) : std::string(), ", D ", s.head_size);
}

double count(int64_t x) { return static_cast<double>(x); }

/// One token over a cache: every key is seen, and read once; its bytes are the measure.
void run_cached(const AttentionSize& s, DType dtype, Device device, BenchTable& table) {
  const int64_t channels = s.heads * s.head_size, keys = s.tokens + s.cached;
  const Tensor qkv = random({s.batch, keys, 3 * channels}, dtype, device);
  const autograd::NoGrad no_grad;
  const std::vector<Tensor> parts = qkv.split(channels, -1);
  const Tensor q = parts[0].narrow(1, s.cached, s.tokens);
  const Work work = {.bytes = count(s.batch * (2 * keys + 2 * s.tokens) * channels) * count(size_of(dtype))};
  table.measure(name_of(s), "forward", work,
                [&] { (void)attention(q, parts[1], parts[2], {.heads = s.heads, .query_offset = s.cached}); });
}

struct Passes {
  Timing forward, backward;
};

/// A sequence to itself. Half of the T^2 pairs: two products forward, five backward, 2 D FLOP a pair each.
Passes run_whole(const AttentionSize& s, const std::string& name, DType dtype, Device device, BenchTable& table) {
  const int64_t channels = s.heads * s.head_size;
  Tensor qkv = random({s.batch, s.tokens, 3 * channels}, dtype, device);
  const double products = count(s.batch * s.tokens) * count(s.tokens) * count(channels);
  Passes passes;
  {
    const autograd::NoGrad no_grad;
    passes.forward =
        table.measure(name, "forward", {.flops = 2 * products}, [&] { (void)causal_attention(qkv, s.heads); });
  }
  qkv.requires_grad_();
  const Tensor out = causal_attention(qkv, s.heads), dout = random({s.batch, s.tokens, channels}, dtype, device);
  passes.backward = table.measure(name, "backward", {.flops = 5 * products},
                                  [&] { (void)autograd::gradients({out}, {qkv}, {dout}, true); });
  return passes;
}

/// What computes it, as chosen and as far as the device has it; with `automatic`, our own kernels and cuDNN's.
std::vector<AttentionChoice> choices_for(const AttentionSize& s, const BenchOptions& o, Device device) {
  if (s.cached > 0 || device.kind == DeviceKind::cpu || o.device.attention != AttentionChoice::automatic)
    return {o.device.attention};
  AttentionShape shape{.batch = s.batch, .heads = s.heads, .kv_heads = s.heads};
  shape.queries = shape.keys = s.tokens;
  shape.head_size = s.head_size;
  shape.scale = 1 / std::sqrt(static_cast<double>(s.head_size));
  const std::string which = describe_attention(device, shape, o.precision);
  std::cout << name_of(s) << ": " << which << '\n';
  if (which.starts_with("cuDNN")) return {AttentionChoice::flash, AttentionChoice::automatic};
  return {AttentionChoice::flash};
}

/// Measures a size by all of its choices, and says what cuDNN takes of the time of our own kernels.
void run(const AttentionSize& s, const std::vector<AttentionChoice>& choices, DType dtype, Device device,
         BenchTable& table) {
  if (s.cached > 0) return run_cached(s, dtype, device, table);
  std::vector<Passes> passes;
  for (const AttentionChoice choice : choices) {
    if (device.kind == DeviceKind::cuda) use_attention(device, choice);
    const std::string name =
        choices.size() > 1 && choice != AttentionChoice::flash ? name_of(s) + " (cuDNN)" : name_of(s);
    passes.push_back(run_whole(s, name, dtype, device, table));
  }
  if (passes.size() < 2) return;
  std::cout << name_of(s) << ": cuDNN takes " << fixed(passes[1].forward.median / passes[0].forward.median, 3)
            << " of the time of our own kernels forward, "
            << fixed(passes[1].backward.median / passes[0].backward.median, 3) << " backward" << std::endl;
}

}  // namespace

int bench_attention(std::span<const std::string> args) {
  BenchOptions o;
  std::vector<int64_t> size;
  Options options("bench attention",
                  "Times causal attention over packed q, k and v: 2 B T^2 C FLOP forward and 5 B T^2 C backward, C = H "
                  "D, against the GEMM peak; one token over a cache by its bytes. On a GPU with cuDNN, our own kernels "
                  "and cuDNN's, and the ratio of their times.");
  o.declare(options);
  options.add("size", &size, {.min = 1, .max = 1 << 24}, {.max = 4},
              "B,H,T,D: batch, heads, tokens, head size; without it the shapes of GPT-2's sizes");
  if (!options.parse(args)) return 0;
  if (!size.empty() && size.size() != 4) options.reject("size", "takes four numbers B,H,T,D, got ", size.size());
  const Device device = o.start(options);
  const std::vector<AttentionSize> sizes =
      size.empty() ? sizes_for(device, o.quick) : std::vector<AttentionSize>{{size[0], size[1], size[2], size[3]}};
  std::vector<std::vector<AttentionChoice>> choices;
  int64_t rows = 0;
  for (const AttentionSize& each : sizes) {
    choices.push_back(choices_for(each, o, device));
    rows += each.cached > 0 ? 1 : 2 * static_cast<int64_t>(choices.back().size());
  }
  BenchTable table("bench attention", o, device, rows);
  for (size_t i = 0; i < sizes.size(); ++i) {
    run(sizes[i], choices[i], o.precision, device, table);
    allocator(device).release_cached();
  }
  if (device.kind == DeviceKind::cuda) use_attention(device, o.device.attention);
  table.finish();
  return 0;
}

}  // namespace weft::apps
