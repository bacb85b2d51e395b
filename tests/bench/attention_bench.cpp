// Speed of ops/attention.h on the shapes of GPT training and of generation.
//
//   attention_bench [--threads 1,2] [--rounds N] [--dtype f32|bf16|f16|f64] [--filter TEXT]
//
// Medians over rounds in which forward and backward take turns, and the best round. GFLOP/s count what must be
// computed: products over visible (query, key) pairs only, two forward and five backward (the scores again, and four
// gradients).
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "core/autograd.h"
#include "core/random.h"
#include "core/thread_pool.h"
#include "ops/attention.h"

namespace {

using namespace weft;

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<long>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

struct Case {
  const char* name;
  int64_t batch, heads, tokens, head_size;
  int64_t cached = 0;  ///< > 0: `tokens` new ones over so many in a cache, forward only
};

constexpr Case kCases[] = {
    {"gpt a: B12 H4 T64 D32", 12, 4, 64, 32},      {"gpt b: B16 H6 T256 D64", 16, 6, 256, 64},
    {"gpt2: B4 H12 T64 D64", 4, 12, 64, 64},       {"gpt2: B1 H12 T1024 D64", 1, 12, 1024, 64},
    {"one head: B1 H1 T2048 D64", 1, 1, 2048, 64}, {"wide rows: B1 H16 T512 D64", 1, 16, 512, 64},
    {"D128: B1 H8 T512 D128", 1, 8, 512, 128},     {"decode: B1 H12 1 over 1023 D64", 1, 12, 1, 64, 1023},
};

Tensor random(const Shape& shape, DType dtype) {
  const Tensor values = Tensor::empty(shape, DType::f32);
  fill_normal(values, RandomStream(1, "bench"), 0, 1);
  return values.to(dtype);
}

void run(const Case& c, DType dtype, int threads, int rounds) {
  set_num_threads(threads);
  const double visible = static_cast<double>(c.tokens) * static_cast<double>(c.cached) +
                         0.5 * static_cast<double>(c.tokens * (c.tokens + 1));
  const double product = 2.0 * static_cast<double>(c.batch * c.heads * c.head_size) * visible;
  const int64_t channels = c.heads * c.head_size, keys = c.tokens + c.cached;
  const int repeats = static_cast<int>(std::clamp(2e8 / (7 * product), 1.0, 200.0));
  std::vector<double> forward, backward;
  Tensor qkv = random({c.batch, keys, 3 * channels}, dtype).requires_grad_(c.cached == 0);
  const Tensor dout = random({c.batch, c.tokens, channels}, dtype);
  const std::vector<Tensor> parts = c.cached > 0 ? qkv.split(channels, -1) : std::vector<Tensor>();
  for (int round = -1; round < rounds; ++round) {
    double f = 0, b = 0;
    for (int i = 0; i < repeats; ++i) {
      const double t0 = seconds();
      const Tensor out = c.cached > 0 ? attention(parts[0].narrow(1, c.cached, c.tokens), parts[1], parts[2],
                                                  {.heads = c.heads, .query_offset = c.cached})
                                      : causal_attention(qkv, c.heads);
      const double t1 = seconds();
      f += t1 - t0;
      if (c.cached > 0) continue;
      (void)autograd::gradients({out}, {qkv}, {dout});
      b += seconds() - t1;
    }
    if (round < 0) continue;
    forward.push_back(f / repeats);
    backward.push_back(b / repeats);
  }
  const double f = median(forward), b = median(backward);
  const double best_f = *std::min_element(forward.begin(), forward.end()),
               best_b = *std::min_element(backward.begin(), backward.end());
  std::printf("%-32s %s %2d thr | forward %9.1f us %6.1f GFLOP/s, best %6.1f", c.name, name(dtype), threads, f * 1e6,
              2 * product / f * 1e-9, 2 * product / best_f * 1e-9);
  if (c.cached == 0) {
    std::printf(" | backward %9.1f us %6.1f GFLOP/s, best %6.1f", b * 1e6, 5 * product / b * 1e-9,
                5 * product / best_b * 1e-9);
  }
  std::printf("\n");
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<int> thread_counts = {1, 2};
  int rounds = 15;
  DType dtype = DType::f32;
  std::string filter;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string option = argv[i], value = argv[i + 1];
    if (option == "--threads") {
      thread_counts.clear();
      for (size_t at = 0; at < value.size();
           at = value.find(',', at) == std::string::npos ? value.size() : value.find(',', at) + 1) {
        thread_counts.push_back(std::max(1, std::atoi(value.c_str() + at)));
      }
    } else if (option == "--rounds") {
      rounds = std::max(1, std::atoi(value.c_str()));
    } else if (option == "--dtype") {
      dtype = parse_dtype(value);
    } else if (option == "--filter") {
      filter = value;
    }
  }
  for (const Case& c : kCases) {
    if (std::string(c.name).find(filter) == std::string::npos) continue;
    for (const int threads : thread_counts) run(c, dtype, threads, rounds);
  }
  return 0;
}
