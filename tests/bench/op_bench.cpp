// Speed of every op case.
//
//   op_bench [--all] [--filter TEXT] [--dtype f32|bf16|f64|f16] [--threads N] [--backward]
//
// Times the forward pass of each large case (with --all of every one), and with --backward the backward pass too. A
// case that states its floating-point operations is reported in GFLOP/s, one that states its memory traffic in GB/s and
// in percent of what a plain copy of arrays beyond cache reaches here, measured in the same run. Best and median of at
// least five runs and half a second.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <string>

#include "core/autograd.h"
#include "core/thread_pool.h"
#include "tests/op_drivers.h"

namespace {

using namespace weft;
using namespace weft::testing;

struct Options {
  bool all = false, backward = false;
  std::string filter;
  DType dtype = DType::f32;
};

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

struct Timing {
  double best = 0, median = 0;
};

template <class Function>
Timing time_of(const Function& function) {
  function();  // memory is had from the system here
  std::vector<double> times;
  for (const double begin = seconds(); times.size() < 5 || seconds() - begin < 0.5;) {
    const double start = seconds();
    function();
    times.push_back(seconds() - start);
    if (times.size() == 2000) break;
  }
  std::sort(times.begin(), times.end());
  return {times.front(), times[times.size() / 2]};
}

/// Bytes read and written in a second by a copy of 256 MiB.
double copy_bandwidth() {
  const Tensor from = Tensor::zeros({1 << 26}), to = Tensor::zeros({1 << 26});
  return 2 * 4 * static_cast<double>(1 << 26) / time_of([&] { Tensor(to).copy_(from); }).best;
}

void report(const OpCase& made, const char* pass, const Timing& time, double factor, const Options& options,
            double bandwidth) {
  std::printf("%-44s %-8s %10.3f %10.3f", full_name(made).c_str(), pass, time.best * 1e3, time.median * 1e3);
  if (made.flops > 0) std::printf(" %9.1f GFLOP/s", factor * made.flops / time.best * 1e-9);
  if (made.bytes > 0) {
    const double rate = factor * made.bytes / 4 * static_cast<double>(size_of(options.dtype)) / time.best;
    std::printf(" %9.1f GB/s %5.0f %%", rate * 1e-9, 100 * rate / bandwidth);
  }
  std::printf("\n");
  std::fflush(stdout);
}

void bench(const OpCase& made, const Options& options, double bandwidth) {
  const Tensors arguments = make_arguments(made, options.dtype);
  {
    const autograd::NoGrad no_grad;
    report(made, "forward", time_of([&] { made.run(arguments); }), 1, options, bandwidth);
  }
  if (!options.backward || !made.differentiable) return;
  Tensors leaves;
  for (const Tensor& argument : arguments) leaves.push_back(argument.detach());
  for (const size_t i : differentiable_arguments(made)) leaves[i].requires_grad_();
  const Tensors outputs = made.run(leaves), cotangents = make_cotangents(made, outputs);
  const Timing time = time_of([&] {
    for (const Tensor& leaf : leaves) leaf.clear_grad();
    autograd::backward(outputs, cotangents, true);
  });
  // By the rule of thumb: twice the products, and one array more to read.
  report(made, "backward", time, made.flops > 0 ? 2 : 1.5, options, bandwidth);
}

}  // namespace

int main(int argc, char** argv) try {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    const auto value = [&]() -> std::string {
      if (i + 1 == argc) fail(ErrorKind::kUsage, "op_bench", name, " needs a value");
      return argv[++i];
    };
    if (name == "--all")
      options.all = true;
    else if (name == "--backward")
      options.backward = true;
    else if (name == "--filter")
      options.filter = value();
    else if (name == "--dtype")
      options.dtype = parse_dtype(value());
    else if (name == "--threads")
      set_num_threads(std::max(1, std::atoi(value().c_str())));
    else
      fail(ErrorKind::kUsage, "op_bench", "unknown option ", quoted(name));
  }
  const double bandwidth = copy_bandwidth();
  std::printf("%d threads, %s, copy %.1f GB/s\n%-44s %-8s %10s %10s\n", num_threads(), name(options.dtype),
              bandwidth * 1e-9, "case", "pass", "best ms", "median ms");
  for (const OpCase& made : all_op_cases()) {
    if (!options.all && !made.benchmark) continue;
    if (full_name(made).find(options.filter) == std::string::npos) continue;
    bench(made, options, bandwidth);
  }
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
