// weft bench ops: every op of ops/, forward and backward, against what the device can do at best.
#include <algorithm>
#include <iostream>

#include "apps/bench.h"
#include "apps/bench_table.h"
#include "apps/op_benches.h"
#include "core/autograd.h"
#include "core/memory.h"
#include "core/random.h"

namespace weft::apps {
namespace {

bool has_backward(const OpBench& bench) { return bench.backward.bytes > 0 || bench.backward.flops > 0; }

void run(const OpBench& bench, const BenchOptions& o, Device device, BenchTable& table) {
  const std::string name = bench.op + " " + bench.size;
  std::vector<Tensor> arguments = make_arguments(bench, o.precision, device);
  {
    const autograd::NoGrad no_grad;
    table.measure(name, "forward", bench.forward, [&] { bench.run(arguments); });
  }
  if (!has_backward(bench)) return;
  std::vector<Tensor> leaves;
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (bench.arguments[i].kind == BenchArgument::Kind::kFloat) leaves.push_back(arguments[i].requires_grad_());
  }
  const std::vector<Tensor> outputs = bench.run(arguments);
  std::vector<Tensor> cotangents;
  for (const Tensor& output : outputs) {
    cotangents.push_back(Tensor::empty(output.shape(), output.dtype(), device));
    fill_uniform(cotangents.back(), RandomStream(1, "bench cotangent"), -1, 1);
  }
  if (bench.training) {
    table.measure(name, "training", bench.backward,
                  [&] { (void)autograd::gradients(bench.run(arguments), leaves, cotangents); });
  } else {
    table.measure(name, "backward", bench.backward,
                  [&] { (void)autograd::gradients(outputs, leaves, cotangents, true); });
  }
}

}  // namespace

int bench_ops(std::span<const std::string> args) {
  BenchOptions o;
  std::string filter;
  Options options("bench ops",
                  "Times every op, forward and backward, on arrays that no cache holds: bytes against the copy "
                  "bandwidth, products against the GEMM peak, both measured in the same run.");
  o.declare(options);
  options.add("filter", &filter, {}, "only ops whose name contains this text");
  if (!options.parse(args)) return 0;
  const Device device = o.start(options);
  std::vector<OpBench> benches = op_benches(device, o.precision, o.quick);
  std::erase_if(benches, [&](const OpBench& bench) { return bench.op.find(filter) == std::string::npos; });
  if (benches.empty()) options.reject("filter", "no op has a name with ", weft::quoted(filter));
  int64_t rows = 0;
  for (const OpBench& bench : benches) rows += has_backward(bench) ? 2 : 1;
  BenchTable table("bench ops", o, device, rows);
  for (const OpBench& bench : benches) {
    run(bench, o, device, table);
    allocator(device).release_cached();
  }
  table.finish();
  return 0;
}

}  // namespace weft::apps
