#include "apps/op_benches.h"

#include <algorithm>
#include <string_view>

#include "core/random.h"
#include "models/speed_of_light.h"
#include "ops/attention.h"
#include "ops/dropout.h"
#include "ops/elementwise.h"
#include "ops/index.h"
#include "ops/loss.h"
#include "ops/matmul.h"
#include "ops/norm.h"
#include "ops/reduce.h"
#include "ops/softmax.h"

namespace weft::apps {
namespace {

using Tensors = std::vector<Tensor>;
using Kind = BenchArgument::Kind;

/// Sizes of GPT-2's smallest model; as many rows as no cache holds.
struct Sizes {
  int64_t rows, channels, vocab, batch, heads, context, tokens;
  double element;  ///< bytes
  double elements() const { return static_cast<double>(rows * channels); }
  Shape matrix() const { return {rows, channels}; }
};

/// The list as it grows.
class Benches {
 public:
  explicit Benches(const Sizes& sizes) : s(sizes) {}

  void add(const char* op, std::vector<BenchArgument> arguments, std::function<Tensors(const Tensors&)> run,
           Work forward, Work backward = {}, bool training = false) {
    const std::string size = concat(arguments.front().shape);
    all.push_back({op, size, std::move(arguments), std::move(run), forward, backward, training});
  }
  /// So many passes over arrays of rows x channels elements.
  Work passes(double arrays, double bytes_per_element = 0) const {
    return {.bytes = s.elements() * (arrays * s.element + bytes_per_element)};
  }
  void unary(const char* op, Tensor (*run)(const Tensor&)) {
    // dy and x (or y) are read, dx is written; the derivative of neg needs dy alone.
    const bool linear = std::string_view(op) == "neg";
    add(
        op, {{s.matrix(), 0.5, 2}}, [run](const Tensors& in) -> Tensors { return {run(in[0])}; }, passes(2),
        passes(linear ? 2 : 3));
  }
  void binary(const char* op, Tensor (*run)(const Tensor&, const Tensor&)) {
    // dy, a and b are read, da and db are written; add hands dy on, sub negates it for b.
    const std::string_view name = op;
    const double backward = name == "add" ? 0 : name == "sub" ? 2 : 5;
    add(
        op, {{s.matrix(), 0.5, 2}, {s.matrix(), 0.5, 2}},
        [run](const Tensors& in) -> Tensors { return {run(in[0], in[1])}; }, passes(3), passes(backward));
  }
  void comparison(const char* op, Tensor (*run)(const Tensor&, const Tensor&)) {
    add(
        op, {{s.matrix()}, {s.matrix()}}, [run](const Tensors& in) -> Tensors { return {run(in[0], in[1])}; },
        passes(2, 1));
  }

  const Sizes s;
  std::vector<OpBench> all;
};

void add_elementwise(Benches& to) {
#define WEFT_UNARY(Functor, function) to.unary(#function, function);
#define WEFT_BINARY(Functor, function) to.binary(#function, function);
#include "ops/op_list.def"
  to.comparison("eq", eq);
  to.comparison("ne", ne);
  to.comparison("lt", lt);
  to.comparison("le", le);
  to.comparison("gt", gt);
  to.comparison("ge", ge);
  const Shape matrix = to.s.matrix();
  // What is added is nothing and what is multiplied near 1, so that numbers stay where they are over many calls.
  to.add(
      "add_", {{matrix}, {matrix}}, [](const Tensors& in) -> Tensors { return {add_(in[0], in[1], 1e-9)}; },
      to.passes(3));
  to.add(
      "mul_", {{matrix}, {matrix, 0.9999, 1.0001}}, [](const Tensors& in) -> Tensors { return {mul_(in[0], in[1])}; },
      to.passes(3));
  to.add(
      "clamp", {{matrix}}, [](const Tensors& in) -> Tensors { return {clamp(in[0], -1, 1)}; }, to.passes(2),
      to.passes(3));
  to.add(
      "where", {{matrix}, {matrix}, {matrix, -1, 1, Kind::kBool}},
      [](const Tensors& in) -> Tensors { return {where(in[2], in[0], in[1])}; }, to.passes(3, 1), to.passes(3, 1));
  to.add(
      "masked_fill", {{matrix}, {matrix, -1, 1, Kind::kBool}},
      [](const Tensors& in) -> Tensors { return {masked_fill(in[0], in[1], -1)}; }, to.passes(2, 1), to.passes(2, 1));
  to.add(
      "dropout", {{matrix}},
      [](const Tensors& in) -> Tensors { return {dropout(in[0], 0.1, RandomStream(1, "bench dropout"))}; },
      to.passes(2), to.passes(2));
}

void add_rows(Benches& to) {
  const Shape matrix = to.s.matrix(), line = {to.s.channels};
  to.add("sum", {{matrix}}, [](const Tensors& in) -> Tensors { return {sum(in[0], {-1})}; }, to.passes(1));
  to.add("sum", {{matrix}}, [](const Tensors& in) -> Tensors { return {sum(in[0], {0})}; }, to.passes(1));
  to.all.back().size += " columns";
  to.add("mean", {{matrix}}, [](const Tensors& in) -> Tensors { return {mean(in[0], {-1})}; }, to.passes(1));
  to.add(
      "max", {{matrix}}, [](const Tensors& in) -> Tensors { return {max(in[0], {-1})}; }, to.passes(1), to.passes(1));
  to.add(
      "min", {{matrix}}, [](const Tensors& in) -> Tensors { return {min(in[0], {-1})}; }, to.passes(1), to.passes(1));
  to.add("argmax", {{matrix}}, [](const Tensors& in) -> Tensors { return {argmax(in[0])}; }, to.passes(1));
  to.add(
      "softmax", {{matrix}}, [](const Tensors& in) -> Tensors { return {softmax(in[0])}; }, to.passes(2), to.passes(3));
  to.add(
      "log_softmax", {{matrix}}, [](const Tensors& in) -> Tensors { return {log_softmax(in[0])}; }, to.passes(2),
      to.passes(3));
  to.add(
      "layer_norm", {{matrix}, {line}, {line}},
      [](const Tensors& in) -> Tensors { return {layer_norm(in[0], in[1], in[2])}; }, to.passes(2), to.passes(3));
  to.add(
      "rms_norm", {{matrix}, {line}}, [](const Tensors& in) -> Tensors { return {rms_norm(in[0], in[1])}; },
      to.passes(2), to.passes(3));
  // x and the residual in, the sum and its norm out; back: both gradients and the sum in, one gradient out for both.
  to.add(
      "residual_layer_norm", {{matrix}, {matrix}, {line}, {line}},
      [](const Tensors& in) -> Tensors {
        const ResidualNorm out = residual_layer_norm(in[0], in[1], in[2], in[3]);
        return {out.sum, out.normed};
      },
      to.passes(4), to.passes(4));
  // Eight bytes an index. The table's gradient is written whole.
  const double ids = 8 * static_cast<double>(to.s.rows), table = static_cast<double>(to.s.vocab * to.s.channels);
  to.add("embedding", {{{to.s.rows}, 0, static_cast<double>(to.s.vocab), Kind::kIndex}, {{to.s.vocab, to.s.channels}}},
         [](const Tensors& in) -> Tensors { return {embedding(in[0], in[1])}; }, {to.passes(2).bytes + ids},
         {to.passes(1).bytes + ids + table * to.s.element});
  to.add(
      "gather", {{matrix}, {matrix, 0, static_cast<double>(to.s.channels), Kind::kIndex}},
      [](const Tensors& in) -> Tensors { return {gather(in[0], 1, in[1])}; }, to.passes(2, 8), to.passes(2, 8));
  const int64_t rows = std::max<int64_t>(1, to.s.rows * to.s.channels / to.s.vocab);
  const double logits = static_cast<double>(rows * to.s.vocab) * to.s.element;
  to.add("cross_entropy", {{{rows, to.s.vocab}, -4, 4}, {{rows}, 0, static_cast<double>(to.s.vocab), Kind::kIndex}},
         [](const Tensors& in) -> Tensors { return {cross_entropy(in[0], in[1])}; }, {logits}, {2 * logits});
}

void add_products(Benches& to, int64_t peak) {
  const auto product = [](double factor, int64_t m, int64_t n, int64_t k) {
    return Work{.flops = factor * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k)};
  };
  const Sizes& s = to.s;
  to.add(
      "matmul", {{{peak, peak}}, {{peak, peak}}}, [](const Tensors& in) -> Tensors { return {matmul(in[0], in[1])}; },
      product(2, peak, peak, peak), product(4, peak, peak, peak));
  to.add(
      "linear", {{{s.tokens, s.channels}}, {{4 * s.channels, s.channels}}, {{4 * s.channels}}},
      [](const Tensors& in) -> Tensors { return {linear(in[0], in[1], in[2])}; },
      product(2, s.tokens, 4 * s.channels, s.channels), product(4, s.tokens, 4 * s.channels, s.channels));
  to.add(
      "gelu_linear", {{{s.tokens, 4 * s.channels}}, {{s.channels, 4 * s.channels}}, {{s.channels}}},
      [](const Tensors& in) -> Tensors { return {gelu_linear(in[0], in[1], in[2])}; },
      product(2, s.tokens, 4 * s.channels, s.channels), product(4, s.tokens, 4 * s.channels, s.channels));
  to.add(
      "linear_cross_entropy",
      {{{s.tokens, s.channels}},
       {{s.vocab, s.channels}, -0.05, 0.05},
       {{s.tokens}, 0, static_cast<double>(s.vocab), Kind::kIndex}},
      [](const Tensors& in) -> Tensors { return {linear_cross_entropy(in[0], in[1], in[2])}; },
      product(2, s.tokens, s.vocab, s.channels), product(6, s.tokens, s.vocab, s.channels), true);
  // Two products over half of the T^2 pairs forward, five backward.
  const auto attended = [&](double factor) { return product(factor, s.batch * s.context, s.context, s.channels); };
  to.add(
      "causal_attention", {{{s.batch, s.context, 3 * s.channels}}},
      [heads = s.heads](const Tensors& in) -> Tensors { return {causal_attention(in[0], heads)}; }, attended(2),
      attended(5));
  const Shape apart = {s.batch, s.context, s.channels};
  to.add(
      "attention", {{apart}, {apart}, {apart}},
      [heads = s.heads](const Tensors& in) -> Tensors { return {attention(in[0], in[1], in[2], {.heads = heads})}; },
      attended(2), attended(5));
}

}  // namespace

std::vector<OpBench> op_benches(Device device, DType dtype, bool tiny) {
  const bool cpu = device.kind == DeviceKind::cpu;
  Sizes sizes = cpu ? Sizes{.rows = 65536,
                            .channels = 768,
                            .vocab = 50304,
                            .batch = 1,
                            .heads = 12,
                            .context = 1024,
                            .tokens = 1024,
                            .element = 0}
                    : Sizes{.rows = 131072,
                            .channels = 768,
                            .vocab = 50304,
                            .batch = 16,
                            .heads = 12,
                            .context = 1024,
                            .tokens = 16384,
                            .element = 0};
  if (tiny)
    sizes = {.rows = 8, .channels = 32, .vocab = 48, .batch = 1, .heads = 2, .context = 16, .tokens = 16, .element = 0};
  sizes.element = static_cast<double>(size_of(dtype));
  Benches benches(sizes);
  add_elementwise(benches);
  add_rows(benches);
  add_products(benches, tiny ? 32 : models::peak_size(device));
  return std::move(benches.all);
}

std::vector<Tensor> make_arguments(const OpBench& bench, DType dtype, Device device) {
  std::vector<Tensor> made;
  for (size_t i = 0; i < bench.arguments.size(); ++i) {
    const BenchArgument& argument = bench.arguments[i];
    const RandomStream stream(i, bench.op);
    if (argument.kind == Kind::kIndex) {
      std::vector<int64_t> values(static_cast<size_t>(numel(argument.shape)));
      for (size_t j = 0; j < values.size(); ++j)
        values[j] = static_cast<int64_t>(stream.below(j, static_cast<uint64_t>(argument.high)));
      made.push_back(Tensor::from(values, argument.shape).to(device));
      continue;
    }
    const Tensor values = Tensor::empty(argument.shape, dtype, device);
    fill_uniform(values, stream, argument.low, argument.high);
    made.push_back(argument.kind == Kind::kBool ? gt(values, 0) : values);
  }
  return made;
}

}  // namespace weft::apps
