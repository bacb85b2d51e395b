// weft bench gemm: matrix products at training shapes or at a given one.
#include <algorithm>
#include <iostream>

#include "apps/bench.h"
#include "apps/bench_table.h"
#include "apps/files.h"
#include "apps/step_shapes.h"
#include "apps/tune_gemm.h"
#include "core/memory.h"
#include "core/random.h"
#include "ops/gemm.h"
#include "ops/gemm_types.h"
#include "ops/launch.h"

namespace weft::apps {
namespace {

const models::GptConfig kQuick = {.layers = 1, .heads = 1, .width = 16, .context = 8, .vocab = 24};

/// C[m, n] = A B, with A stored as [k, m] or B as [n, k] where it is transposed.
struct Product {
  std::string name;
  int64_t m, n, k;
  bool trans_a = false, trans_b = false;
};

/// The three products of a linear layer: y = x W^T, dx = dy W, dW = dy^T x.
void add_linear(std::vector<Product>& to, const std::string& name, int64_t tokens, int64_t in, int64_t out) {
  to.push_back({name + " forward", tokens, out, in, false, true});
  to.push_back({name + " dx", tokens, in, out});
  to.push_back({name + " dW", out, in, tokens, true});
}

std::vector<Product> training_products(const models::GptConfig& c, int64_t tokens) {
  std::vector<Product> all;
  add_linear(all, "qkv", tokens, c.width, 3 * c.width);
  add_linear(all, "proj", tokens, c.width, c.width);
  add_linear(all, "fc", tokens, c.width, 4 * c.width);
  add_linear(all, "fcproj", tokens, 4 * c.width, c.width);
  add_linear(all, "head", tokens, c.width, c.vocab);
  return all;
}

void run(const Product& p, DType dtype, Device device, BenchTable& table) {
  const MemoryScope scope(MemoryCategory::workspace);
  // What the CPU does with f16: its products are f32's.
  const DType made = gemm_widens(dtype, device.kind) ? DType::f32 : dtype;
  const Tensor a = Tensor::empty({p.m, p.k}, made, device), b = Tensor::empty({p.k, p.n}, made, device),
               c = Tensor::empty({p.m, p.n}, made, device);
  fill_uniform(a, RandomStream(0, "bench a"), -1, 1);
  fill_uniform(b, RandomStream(0, "bench b"), -1, 1);
  const double m = static_cast<double>(p.m), n = static_cast<double>(p.n), k = static_cast<double>(p.k);
  const Work work = {.bytes = (m * k + k * n + m * n) * static_cast<double>(size_of(made)), .flops = 2 * m * n * k};
  const std::string name =
      concat(p.name, " ", p.m, " x ", p.n, " x ", p.k, p.trans_a ? " A^T" : "", p.trans_b ? " B^T" : "");
  table.measure(name, "product", work, [&] {
    launch(device, "bench", [&](auto on) {
      dispatch_gemm(on, made, [&]<class Element>() {
        using T = GemmType<Element>;
        gemm(on, make_gemm(p.trans_a, p.trans_b, p.m, p.n, p.k, static_cast<const T*>(a.raw()), p.trans_a ? p.m : p.k,
                           static_cast<const T*>(b.raw()), p.trans_b ? p.k : p.n, static_cast<T*>(c.raw()), p.n));
      });
    });
  });
}

}  // namespace

int bench_gemm(std::span<const std::string> args) {
  BenchOptions o;
  std::vector<int64_t> size;
  std::string shape = "auto";
  std::vector<std::string> shapes = step_shape_names();
  shapes.insert(shapes.begin(), "auto");
  int64_t batch = 0;
  Options options("bench gemm",
                  "Times matrix products of random numbers: those of a training step's linear layers, or a given one, "
                  "against the GEMM peak.");
  o.declare(options);
  options.add("size", &size, {.min = 1, .max = 1 << 24}, {.max = 3},
              "m,n,k: one product A[m, k] B[k, n] in all layouts");
  options.add("shape", &shape, {.choices = shapes},
              concat("whose products; auto: c on a CPU, 124m on a GPU. ", kStepShapesHelp));
  options.add("batch", &batch, {.min = 0, .max = 1 << 20, .unit = "sequences"},
              "rows of a micro-batch; 0: the shape's");
  std::filesystem::path training;
  std::string tune;
  options.add("training", &training, {.placeholder = "FILE"},
              "tune for this configuration of weft train (a run's config.toml) instead of a shape");
  options.action(
      "tune", &tune, "FILE",
      "time the GPU library's algorithms for every product of a training step, and write the fastest to FILE "
      "for --gemm-algorithms");
  if (!options.parse(args)) return 0;
  if (!size.empty() && size.size() != 3) options.reject("size", "takes three numbers m,n,k, got ", size.size());
  if (!size.empty() && options.given("shape")) options.reject("shape", "cannot be given together with --size");
  if (tune.empty() && !training.empty()) options.reject("training", "goes with --tune FILE");
  if (!tune.empty() && !size.empty()) options.reject("size", "cannot be given together with --tune");
  const Device device = o.start(options);
  if (shape == "auto") shape = device.kind == DeviceKind::cpu ? "c" : "124m";
  if (!tune.empty()) {
    if (device.kind == DeviceKind::cpu)
      fail(ErrorKind::kUsage, "bench gemm", "--tune is for a GPU, but the device is ", device);
    check_writable(tune);
    const StepShape& chosen = step_shape(shape);
    const TunedStep step = !training.empty() ? tuned_step_of(training)
                           : o.quick         ? TunedStep{kQuick, 2, o.precision}
                                             : TunedStep{chosen.config, batch > 0 ? batch : chosen.batch, o.precision};
    tune_training_step(step, device, tune, o.quick);
    return 0;
  }
  std::vector<Product> products;
  if (!size.empty()) {
    for (const bool trans_a : {false, true}) {
      for (const bool trans_b : {false, true}) products.push_back({"", size[0], size[1], size[2], trans_a, trans_b});
    }
  } else if (o.quick) {
    products = training_products(kQuick, kQuick.context);
  } else {
    const StepShape& chosen = step_shape(shape);
    products = training_products(chosen.config, (batch > 0 ? batch : chosen.batch) * chosen.config.context);
  }
  BenchTable table("bench gemm", o, device, static_cast<int64_t>(products.size()));
  for (const Product& product : products) {
    run(product, o.precision, device, table);
    allocator(device).release_cached();
  }
  table.finish();
  return 0;
}

}  // namespace weft::apps
