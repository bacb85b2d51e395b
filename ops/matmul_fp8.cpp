#include "ops/matmul_fp8.h"

#include <algorithm>

#include "core/autograd.h"
#include "ops/launch.h"
#include "ops/reduce.h"

namespace weft {
namespace {

using autograd::BackwardContext;

constexpr const char* kOp = "linear_fp8";
constexpr int64_t kUnit = 16;  // bytes of a row that 8-bit products read at a time

int64_t whole_units(int64_t count) { return std::max<int64_t>((count + kUnit - 1) / kUnit, 1) * kUnit; }

Fp8Scale* scale_of(const Tensor& tensor) { return reinterpret_cast<Fp8Scale*>(tensor.data<float>()); }
Fp8Stats* stats_of(const Tensor& tensor) { return reinterpret_cast<Fp8Stats*>(tensor.data<int64_t>()); }

/// The scale that a tensor has by itself.
Tensor own_scale(const Tensor& x, const Fp8Layer& layer, Fp8Role role) {
  const Tensor scale = Tensor::full({kFp8ScaleFloats}, 1, DType::f32, x.device());
  const Tensor stats = Tensor::zeros({kFp8StatsWords}, DType::i64, x.device());
  const Tensor history = Tensor::zeros({1}, DType::f32, x.device());
  launch(x.device(), kOp, [&](auto device) {
    fp8_quantise(device, {.x = x.data<BFloat16>(), .rows = x.size(0), .columns = x.size(1), .stats = stats_of(stats)});
  });
  if (const auto& raise = layer.raise_amax[static_cast<size_t>(role)]) raise(stats);
  launch(x.device(), kOp, [&](auto device) {
    fp8_update(device, {.stats = stats_of(stats),
                        .history = history.data<float>(),
                        .scales = scale_of(scale),
                        .count = 1,
                        .length = 1,
                        .first_role = static_cast<int>(role)});
  });
  return scale;
}

/// @param x  bf16 [rows, columns], contiguous
Fp8Operand convert(const Tensor& x, Fp8Layer& layer, Fp8Role role, bool values, bool transposed) {
  const Fp8Format format = fp8_format(role);
  const DType dtype = format == Fp8Format::kE4M3 ? DType::f8e4m3 : DType::f8e5m2;
  const int64_t rows = x.size(0), columns = x.size(1);
  Fp8Operand out;
  out.scale = layer.has_history ? layer.scales.select(0, static_cast<int64_t>(role)) : own_scale(x, layer, role);
  if (values) out.values = Tensor::empty({rows, columns}, dtype, x.device());
  if (transposed) out.transposed = Tensor::empty({columns, whole_units(rows)}, dtype, x.device());
  launch(x.device(), kOp, [&](auto device) {
    fp8_quantise(device,
                 {.x = x.data<BFloat16>(),
                  .rows = rows,
                  .columns = columns,
                  .format = format,
                  .scale = scale_of(out.scale),
                  .y = values ? static_cast<uint8_t*>(out.values.raw()) : nullptr,
                  .transposed = transposed ? static_cast<uint8_t*>(out.transposed.raw()) : nullptr,
                  .transposed_ld = transposed ? out.transposed.size(1) : 0,
                  .stats = autograd::recomputing() ? nullptr : stats_of(layer.stats) + static_cast<int64_t>(role)});
  });
  return out;
}

/// The weight in 8 bits: converted anew where it or its scale has changed.
const Fp8Operand& converted_weight(const Tensor& weight, Fp8Layer& layer) {
  const uint64_t version = weight.storage()->version(), scales = layer.scales.storage()->version();
  const bool known = layer.weight_source.lock() == weight.storage() && layer.weight_version == version &&
                     layer.scales_version == scales;
  if (known) return layer.weight;
  const MemoryScope scope(MemoryCategory::workspace);
  layer.weight = {};  // its memory first
  layer.weight = convert(weight.contiguous(), layer, Fp8Role::kWeight, true, true);
  layer.weight_source = weight.storage();
  layer.weight_version = version, layer.scales_version = scales;
  return layer.weight;
}

Fp8Matrix matrix(const Tensor& x, const Tensor& scale) {
  return {.data = static_cast<const uint8_t*>(x.raw()),
          .ld = x.size(1),
          .format = x.dtype() == DType::f8e4m3 ? Fp8Format::kE4M3 : Fp8Format::kE5M2,
          .scale = scale_of(scale)};
}

/// c[m, n] = a[m, k] b[n, k]^T (+ c) + bias
void product(const Fp8Matrix& a, const Fp8Matrix& b, int64_t k, const Tensor& c, bool accumulate = false,
             const Tensor& bias = {}) {
  const int64_t m = c.size(0), n = c.size(1);
  const MemoryScope scope(MemoryCategory::workspace);
  const int64_t bytes = ask(c.device(), [&](auto device) { return fp8_gemm_workspace(device, m, n, k); });
  const Tensor workspace = Tensor::empty({bytes}, DType::u8, c.device());
  launch(c.device(), kOp, [&](auto device) {
    fp8_gemm(device, {.m = m,
                      .n = n,
                      .k = k,
                      .a = a,
                      .b = b,
                      .c = static_cast<uint16_t*>(c.raw()),
                      .bias = bias.defined() ? static_cast<const uint16_t*>(bias.raw()) : nullptr,
                      .accumulate = accumulate,
                      .workspace = workspace.raw()});
  });
}

void check(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  check_same(kOp, {&x, &weight, &bias});
  if (x.dtype() != DType::bf16) {
    fail(ErrorKind::kDType, kOp, "takes bf16, got ", x.describe(), ". Hint: cast with .to(DType::bf16)");
  }
  if (weight.rank() != 2 || x.rank() < 1 || x.size(-1) != weight.size(1)) {
    fail(ErrorKind::kShape, kOp, "the last dimension of x must be the weight's second: x is ", x.describe(),
         ", weight is ", weight.describe());
  }
  if (weight.size(0) % kUnit != 0 || weight.size(1) % kUnit != 0 || weight.numel() == 0) {
    fail(ErrorKind::kShape, kOp, "both sizes of the weight must be multiples of ", kUnit,
         ", in which products read rows of 8-bit numbers; got ", weight.describe(),
         ". Hint: a width that is one, or bf16");
  }
  if (bias.defined() && !(bias.shape() == Shape{weight.size(0)})) {
    fail(ErrorKind::kShape, kOp, "weight is ", weight.describe(), ", bias is ", bias.describe(), "; expected bias [",
         weight.size(0), "]");
  }
}

}  // namespace

Tensor linear_fp8(const Tensor& x, const Tensor& weight, const Tensor& bias, const std::shared_ptr<Fp8Layer>& layer) {
  check(x, weight, bias);
  const int64_t in = weight.size(1), out_features = weight.size(0), rows = x.numel() / in;
  Shape shape = x.shape();
  shape[x.rank() - 1] = out_features;
  Tensor out = Tensor::empty(shape, DType::bf16, x.device());
  const bool recorded = autograd::needed({&x, &weight, &bias});
  Fp8Operand input;
  Fp8Operand weights;
  {
    const autograd::NoGrad no_grad;
    input = convert(x.contiguous().reshape({rows, in}), *layer, Fp8Role::kInput, true, recorded);
    weights = converted_weight(weight, *layer);
    product(matrix(input.values, input.scale), matrix(weights.values, weights.scale), in,
            out.detach().reshape({rows, out_features}), false, bias.defined() ? bias.detach().contiguous() : bias);
  }
  autograd::record(
      kOp, {x, weight, bias}, {out}, {input.transposed, input.scale, weights.transposed, weights.scale},
      [layer, rows, in, out_features, input_shape = x.shape()](BackwardContext& context) {
        const Tensor x = context.saved(0), x_scale = context.saved(1), weight = context.saved(2),
                     weight_scale = context.saved(3);
        const Tensor incoming = context.grad().contiguous().reshape({rows, out_features});
        if (context.needs(0) || context.needs(1)) {
          const Fp8Operand gradient = convert(incoming, *layer, Fp8Role::kGradient, context.needs(0), context.needs(1));
          if (context.needs(0)) {
            const Tensor dx = Tensor::empty(input_shape, DType::bf16, incoming.device());
            product(matrix(gradient.values, gradient.scale), matrix(weight, weight_scale), out_features,
                    dx.reshape({rows, in}));
            context.set(0, dx);
          }
          if (context.needs(1)) {
            context.compute(1, [transposed = gradient.transposed, scale = gradient.scale, x, x_scale, out_features,
                                in](const std::optional<BackwardContext::Sink>& sink) {
              const Tensor dw = sink ? sink->tensor : Tensor::empty({out_features, in}, DType::bf16, x.device());
              product(matrix(transposed, scale), matrix(x, x_scale), x.size(1), dw, sink && sink->accumulate);
              return dw;
            });
          }
        }
        if (context.needs(2)) context.set(2, sum(incoming, {0}));
      });
  return out;
}

}  // namespace weft
