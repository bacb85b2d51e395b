// weft bench attention: tiled attention on the shapes of GPT training and of generation.
#include <algorithm>
#include <iostream>

#include "apps/bench.h"
#include "apps/bench_table.h"
#include "core/autograd.h"
#include "core/memory.h"
#include "core/random.h"
#include "ops/attention.h"

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

void run(const AttentionSize& s, DType dtype, Device device, BenchTable& table) {
  const int64_t channels = s.heads * s.head_size, keys = s.tokens + s.cached;
  const std::string name = concat("B ", s.batch, ", H ", s.heads, ", T ", s.tokens,
                                  s.cached > 0 ? concat(" over ", s.cached) : std::string(), ", D ", s.head_size);
  Tensor qkv = random({s.batch, keys, 3 * channels}, dtype, device);
  const auto count = [](int64_t x) { return static_cast<double>(x); };
  if (s.cached > 0) {
    // Every key is seen, and read once: its bytes are the measure.
    const autograd::NoGrad no_grad;
    const std::vector<Tensor> parts = qkv.split(channels, -1);
    const Tensor q = parts[0].narrow(1, s.cached, s.tokens);
    const Work work = {.bytes = count(s.batch * (2 * keys + 2 * s.tokens) * channels) * count(size_of(dtype))};
    table.measure(name, "forward", work,
                  [&] { (void)attention(q, parts[1], parts[2], {.heads = s.heads, .query_offset = s.cached}); });
    return;
  }
  // Half of the T^2 pairs: two products forward, five backward, 2 D FLOP a pair each.
  const double products = count(s.batch * s.tokens) * count(s.tokens) * count(channels);
  {
    const autograd::NoGrad no_grad;
    table.measure(name, "forward", {.flops = 2 * products}, [&] { (void)causal_attention(qkv, s.heads); });
  }
  qkv.requires_grad_();
  const Tensor out = causal_attention(qkv, s.heads), dout = random({s.batch, s.tokens, channels}, dtype, device);
  table.measure(name, "backward", {.flops = 5 * products},
                [&] { (void)autograd::gradients({out}, {qkv}, {dout}, true); });
}

}  // namespace

int bench_attention(std::span<const std::string> args) {
  BenchOptions o;
  std::vector<int64_t> size;
  Options options("bench attention",
                  "Times causal attention over packed q, k and v: 2 B T^2 C FLOP forward and 5 B T^2 C backward, C = H "
                  "D, against the GEMM peak; one token over a cache by its bytes.");
  o.declare(options);
  options.add("size", &size, {.min = 1, .max = 1 << 24}, {.max = 4},
              "B,H,T,D: batch, heads, tokens, head size; without it the shapes of GPT-2's sizes");
  if (!options.parse(args)) return 0;
  if (!size.empty() && size.size() != 4) options.reject("size", "takes four numbers B,H,T,D, got ", size.size());
  const Device device = o.start(options);
  const std::vector<AttentionSize> sizes =
      size.empty() ? sizes_for(device, o.quick) : std::vector<AttentionSize>{{size[0], size[1], size[2], size[3]}};
  BenchTable table("bench attention", o, device, 2 * static_cast<int64_t>(sizes.size()));
  for (const AttentionSize& each : sizes) {
    run(each, o.precision, device, table);
    allocator(device).release_cached();
  }
  table.finish();
  return 0;
}

}  // namespace weft::apps
