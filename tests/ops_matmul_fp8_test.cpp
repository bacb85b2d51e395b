// linear_fp8 against the same arithmetic in f64: conversion, products, gradients, counts.
#include "ops/matmul_fp8.h"

#include <gtest/gtest.h>

#include "core/autograd.h"
#include "core/thread_pool.h"
#include "ops/elementwise.h"
#include "tests/error_of.h"
#include "tests/fp8_reference.h"
#include "tests/values.h"

namespace weft {
namespace {

using testing::error_of;
using testing::leaf;
using testing::make_layer;
using testing::reference_of;
using testing::Values;

Fp8Stats stats_of(const Tensor& stats, Fp8Role role) {
  const std::vector<int64_t> words = stats.to_vector<int64_t>();
  const size_t at = static_cast<size_t>(role) * kFp8StatsWords;
  return {static_cast<unsigned long long>(words[at]), static_cast<unsigned long long>(words[at + 1]),
          static_cast<unsigned long long>(words[at + 2])};
}
float amax_of(const Fp8Stats& stats) { return std::bit_cast<float>(static_cast<uint32_t>(stats.amax)); }

// ---- conversion ----

struct Converted {
  std::vector<uint8_t> y, transposed;
  Fp8Stats stats;
};
Converted convert(const Tensor& x, Fp8Format format, float scale, int64_t ld) {
  const Fp8Scale both{.inverse = 1 / scale, .scale = scale};
  Converted out;
  out.y.resize(static_cast<size_t>(x.numel()), 0xee);
  out.transposed.resize(static_cast<size_t>(x.size(1) * ld), 0xee);
  fp8_quantise(Cpu{}, {.x = x.data<BFloat16>(),
                       .rows = x.size(0),
                       .columns = x.size(1),
                       .format = format,
                       .scale = &both,
                       .y = out.y.data(),
                       .transposed = out.transposed.data(),
                       .transposed_ld = ld,
                       .stats = &out.stats});
  return out;
}

/// Every finite bf16, in an order that mixes magnitudes, and rows that fill no tile.
Tensor every_finite_bf16() {
  std::vector<BFloat16> values(65024);  // 127 rows of 512
  for (size_t i = 0; i < values.size(); ++i) {
    uint32_t bits = static_cast<uint32_t>(i * 40503u) & 0xffffu;
    if ((bits & 0x7f80u) == 0x7f80u) bits &= 0x807fu;
    values[i].bits = static_cast<uint16_t>(bits);
  }
  return Tensor::from(values, {127, 512});
}

TEST(Fp8Quantise, EveryFiniteBf16IsConvertedTransposedAndCounted) {
  const Tensor x = every_finite_bf16();
  const Values values = x.to_vector<double>();
  for (const Fp8Format format : {Fp8Format::kE4M3, Fp8Format::kE5M2}) {
    for (const float scale : {1.0f, 0x1p-9f, 0x1p63f, 0x1p-63f}) {
      const Converted got = convert(x, format, scale, 128);
      double amax = 0;
      uint64_t saturated = 0, wrong = 0;
      for (size_t i = 0; i < values.size(); ++i) {
        const uint8_t want = reference_of(format).code(values[i] * static_cast<double>(scale));
        wrong += got.y[i] != want || got.transposed[i % 512 * 128 + i / 512] != want;
        amax = std::max(amax, std::abs(values[i]));
        saturated += std::abs(values[i] * static_cast<double>(scale)) > reference_of(format).largest();
      }
      for (size_t c = 0; c < 512; ++c) wrong += got.transposed[c * 128 + 127] != 0;  // behind the rows
      EXPECT_EQ(wrong, 0u) << "scale " << scale;
      EXPECT_EQ(amax_of(got.stats), amax);
      EXPECT_EQ(got.stats.saturated, saturated) << "scale " << scale;
      EXPECT_EQ(got.stats.converted, values.size());
    }
  }
}

TEST(Fp8Quantise, AnInfinityOrNaNIsTheAmax) {
  Tensor x = Tensor::ones({3, 16}, DType::bf16);
  x.data<BFloat16>()[17] = BFloat16(std::numeric_limits<float>::infinity());
  const Converted with_infinity = convert(x, Fp8Format::kE4M3, 1, 16);
  EXPECT_EQ(with_infinity.y[17], 0x7e) << "an infinity becomes the largest number";
  EXPECT_EQ(with_infinity.stats.saturated, 1u);
  EXPECT_TRUE(std::isinf(amax_of(with_infinity.stats)));
  x.data<BFloat16>()[18] = BFloat16(-std::nanf(""));
  const Converted with_nan = convert(x, Fp8Format::kE4M3, 1, 16);
  EXPECT_EQ(with_nan.y[18] & 0x7f, 0x7f);
  EXPECT_EQ(with_nan.stats.saturated, 1u) << "a NaN stays what it is";
  EXPECT_TRUE(std::isnan(amax_of(with_nan.stats)));
}

// ---- the op ----

constexpr int64_t kRows = 21, kIn = 48, kOut = 32;  // rows are no multiple of 16
constexpr float kScales[] = {64, 128, 0x1p12f};     // some inputs saturate, all gradients are normal

struct Problem {
  Tensor x = testing::random({3, 7, kIn}, DType::bf16, "x", -8, 8);
  Tensor weight = testing::random({kOut, kIn}, DType::bf16, "weight", -2, 2);
  Tensor bias = testing::random({kOut}, DType::bf16, "bias");
  Tensor gradient = testing::random({3, 7, kOut}, DType::bf16, "gradient", -1e-2, 1e-2);
};

struct Results {
  Tensor y, dx, dweight, dbias;
};
Results run(const Problem& p, const std::shared_ptr<Fp8Layer>& layer) {
  const Tensor x = leaf(p.x), weight = leaf(p.weight), bias = leaf(p.bias);
  const Tensor y = linear_fp8(x, weight, bias, layer);
  y.backward(p.gradient);
  return {y.detach(), x.grad(), weight.grad(), bias.grad()};
}

/// How the reference converts its three operands; a test plants errors here.
struct Recipe {
  Values scales = {kScales[0], kScales[1], kScales[2]};
  Values divisors = scales;  // what products are divided by
  Fp8Format gradient = Fp8Format::kE5M2;
  bool convert[3] = {true, true, true};
  double operator()(Fp8Role role, double x) const {
    const auto i = static_cast<size_t>(role);
    if (!convert[i]) return x;
    const Fp8Format format = role == Fp8Role::kGradient ? gradient : Fp8Format::kE4M3;
    return reference_of(format).rounded(x, scales[i]) * scales[i] / divisors[i];
  }
};

/// Largest error beyond what rounding explains, as a fraction of it: results are sums in f32 of at most 64 exact
/// products (64 * 2^-24 of the sum of magnitudes), rounded once to 8 bits (2^-8 of the result). At most 1 is right.
double worst(const Tensor& got, const Values& want, const Values& magnitudes) {
  const Values values = got.to_vector<double>();
  EXPECT_EQ(values.size(), want.size());
  double most = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double bound = 0x1.02p-8 * std::abs(want[i]) + 64 * 0x1p-24 * magnitudes[i];
    const double error = std::abs(values[i] - want[i]) / bound;
    if (!(error <= most)) most = error;
  }
  return most;
}

struct Errors {
  double y, dx, dweight, dbias;
};
Errors errors(const Problem& p, const Results& got, const Recipe& recipe) {
  const auto converted = [&](const Tensor& tensor, Fp8Role role) {
    Values values = tensor.to_vector<double>();
    for (double& value : values) value = recipe(role, value);
    return values;
  };
  const Values x = converted(p.x, Fp8Role::kInput), w = converted(p.weight, Fp8Role::kWeight),
               g = converted(p.gradient, Fp8Role::kGradient), bias = p.bias.to_vector<double>(),
               raw = p.gradient.to_vector<double>();
  struct Sums {
    Values value, magnitude;
    explicit Sums(int64_t count) : value(static_cast<size_t>(count)), magnitude(value) {}
    void add(int64_t i, double term) {
      value[static_cast<size_t>(i)] += term, magnitude[static_cast<size_t>(i)] += std::abs(term);
    }
  };
  Sums y(kRows * kOut), dx(kRows * kIn), dweight(kOut * kIn), dbias(kOut);
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t o = 0; o < kOut; ++o) {
      const double gradient = g[static_cast<size_t>(r * kOut + o)];
      y.add(r * kOut + o, bias[static_cast<size_t>(o)]);
      dbias.add(o, raw[static_cast<size_t>(r * kOut + o)]);
      for (int64_t i = 0; i < kIn; ++i) {
        const double input = x[static_cast<size_t>(r * kIn + i)], weight = w[static_cast<size_t>(o * kIn + i)];
        y.add(r * kOut + o, input * weight);
        dx.add(r * kIn + i, gradient * weight);
        dweight.add(o * kIn + i, gradient * input);
      }
    }
  }
  return {worst(got.y, y.value, y.magnitude), worst(got.dx, dx.value, dx.magnitude),
          worst(got.dweight, dweight.value, dweight.magnitude), worst(got.dbias, dbias.value, dbias.magnitude)};
}

std::vector<float> scales() { return {std::begin(kScales), std::end(kScales)}; }

TEST(LinearFp8, ValueAndGradientsAreThoseOfTheConvertedNumbersInF64) {
  const Problem p;
  const Errors e = errors(p, run(p, make_layer(scales())), {});
  EXPECT_LE(e.y, 1);
  EXPECT_LE(e.dx, 1);
  EXPECT_LE(e.dweight, 1);
  EXPECT_LE(e.dbias, 1);
}

TEST(LinearFp8, TheReferenceRejectsAWrongScaleFormatOrOperand) {
  const Problem p;
  const Results got = run(p, make_layer(scales()));
  for (size_t role = 0; role < kFp8Roles; ++role) {
    const bool in_y = role != 2, in_dx = role != 0, in_dweight = role != 1;
    Recipe other_scale, unequal, unconverted;
    other_scale.scales[role] = other_scale.divisors[role] = role == 2 ? 0x1p-4 : 0x1p-8;  // the grid is elsewhere
    unequal.divisors[role] *= 2;
    unconverted.convert[role] = false;
    for (const Recipe& planted : {other_scale, unequal, unconverted}) {
      const Errors e = errors(p, got, planted);
      EXPECT_EQ(e.y > 1, in_y) << "role " << role << ": " << e.y;
      EXPECT_EQ(e.dx > 1, in_dx) << "role " << role << ": " << e.dx;
      EXPECT_EQ(e.dweight > 1, in_dweight) << "role " << role << ": " << e.dweight;
    }
  }
  Recipe other_format;
  other_format.gradient = Fp8Format::kE4M3;
  EXPECT_GT(errors(p, got, other_format).dx, 1);
  EXPECT_GT(errors(p, got, other_format).dweight, 1);
}

TEST(LinearFp8, CountsWhatItConvertsAndWhatSaturates) {
  const Problem p;
  const auto layer = make_layer(scales());
  run(p, layer);
  const Tensor* tensors[] = {&p.x, &p.weight, &p.gradient};
  for (int role = 0; role < kFp8Roles; ++role) {
    const Fp8Stats stats = stats_of(layer->stats, static_cast<Fp8Role>(role));
    const double limit =
        reference_of(fp8_format(static_cast<Fp8Role>(role))).largest() / static_cast<double>(kScales[role]);
    uint64_t beyond = 0;
    double amax = 0;
    for (const double value : tensors[role]->to_vector<double>()) {
      beyond += std::abs(value) > limit;
      amax = std::max(amax, std::abs(value));
    }
    EXPECT_EQ(stats.converted, static_cast<uint64_t>(tensors[role]->numel()));
    EXPECT_EQ(stats.saturated, beyond) << role;
    EXPECT_EQ(amax_of(stats), amax) << role;
  }
  EXPECT_GT(stats_of(layer->stats, Fp8Role::kInput).saturated, 0u) << "the case is to have some";
}

TEST(LinearFp8, WithoutAHistoryEachTensorIsScaledByItsOwnAmax) {
  const Problem p;
  const auto layer = make_layer({});
  const Results got = run(p, layer);
  Recipe own;
  const Tensor* tensors[] = {&p.x, &p.weight, &p.gradient};
  for (int role = 0; role < kFp8Roles; ++role) {
    const Fp8Stats stats = stats_of(layer->stats, static_cast<Fp8Role>(role));
    EXPECT_EQ(stats.saturated, 0u);
    EXPECT_EQ(stats.converted, static_cast<uint64_t>(tensors[role]->numel()));
    own.scales[static_cast<size_t>(role)] =
        testing::reference_scale(static_cast<double>(amax_of(stats)), fp8_format(static_cast<Fp8Role>(role)));
  }
  own.divisors = own.scales;
  const Errors e = errors(p, got, own);
  EXPECT_LE(e.y, 1);
  EXPECT_LE(e.dx, 1);
  EXPECT_LE(e.dweight, 1);
}

TEST(LinearFp8, NoBitDependsOnTheNumberOfThreads) {
  const int before = num_threads();
  const Tensor x = testing::random({300, 128}, DType::bf16, "x"),
               weight = testing::random({144, 128}, DType::bf16, "w"),
               gradient = testing::random({300, 144}, DType::bf16, "g");
  std::vector<std::vector<Tensor>> all;
  for (const int threads : {1, 2, 5}) {
    set_num_threads(threads);
    const auto layer = make_layer({});
    const Tensor a = leaf(x), b = leaf(weight);
    const Tensor y = linear_fp8(a, b, {}, layer);
    y.backward(gradient);
    all.push_back({y.detach(), a.grad(), b.grad(), layer->stats});
  }
  set_num_threads(before);
  for (size_t run = 1; run < all.size(); ++run) {
    for (size_t i = 0; i < all[run].size(); ++i) EXPECT_TRUE(testing::same_bits(all[0][i], all[run][i])) << run << i;
  }
}

TEST(LinearFp8, AWeightIsConvertedOnceUntilItOrItsScaleChanges) {
  const Problem p;
  const auto layer = make_layer(scales());
  const Tensor weight = leaf(p.weight);
  const auto conversions = [&] {
    linear_fp8(p.x, weight, {}, layer);
    return stats_of(layer->stats, Fp8Role::kWeight).converted / static_cast<uint64_t>(kOut * kIn);
  };
  EXPECT_EQ(conversions(), 1u);
  EXPECT_EQ(conversions(), 1u);
  {
    const autograd::NoGrad no_grad;
    Tensor(weight).fill_(1);
  }
  EXPECT_EQ(conversions(), 2u);
  layer->scales.begin_change("test");
  EXPECT_EQ(conversions(), 3u);
  EXPECT_EQ(conversions(), 3u);
  linear_fp8(p.x, leaf(p.weight), {}, layer);
  EXPECT_EQ(stats_of(layer->stats, Fp8Role::kWeight).converted, 4u * kOut * kIn) << "another weight";
}

TEST(LinearFp8, RecomputationHasTheSameBitsAndCountsOnce) {
  const Problem p;
  for (const std::vector<float>& history : {scales(), std::vector<float>()}) {
    const auto plain_layer = make_layer(history), saving_layer = make_layer(history);
    const Results plain = run(p, plain_layer);
    const Tensor x = leaf(p.x), weight = leaf(p.weight), bias = leaf(p.bias);
    const Tensor y = autograd::checkpoint(
        [&](const std::vector<Tensor>& in) -> std::vector<Tensor> {
          return {linear_fp8(in[0], weight, bias, saving_layer)};
        },
        {x})[0];
    y.backward(p.gradient);
    EXPECT_TRUE(testing::same_bits(y.detach(), plain.y));
    EXPECT_TRUE(testing::same_bits(x.grad(), plain.dx));
    EXPECT_TRUE(testing::same_bits(weight.grad(), plain.dweight));
    EXPECT_TRUE(testing::same_bits(saving_layer->stats, plain_layer->stats));
  }
  EXPECT_FALSE(autograd::recomputing());
}

TEST(LinearFp8, ADeferredGradientOfTheWeightHasTheSameBits) {
  const Problem p;
  const Results at_once = run(p, make_layer(scales()));
  const Tensor x = leaf(p.x), weight = leaf(p.weight);
  autograd::DeferredGradients later;
  {
    const autograd::DeferredGradients::Scope scope(later);
    linear_fp8(x, weight, p.bias, make_layer(scales())).backward(p.gradient);
  }
  EXPECT_FALSE(later.empty());
  EXPECT_TRUE(testing::same_bits(x.grad(), at_once.dx));
  later.run();
  EXPECT_TRUE(testing::same_bits(weight.grad(), at_once.dweight));
}

TEST(LinearFp8, GradientsOfMicroBatchesAddUpAndTheAmaxIsTheLargest) {
  Problem p;
  const auto layer = make_layer(scales());
  const Tensor weight = leaf(p.weight);
  linear_fp8(p.x, weight, {}, layer).backward(p.gradient);
  const Values once = weight.grad().to_vector<double>();
  const Fp8Stats first = stats_of(layer->stats, Fp8Role::kInput);
  {
    const autograd::NoGrad no_grad;
    p.x = p.x * 0.5;
  }
  linear_fp8(p.x, weight, {}, layer).backward(p.gradient);
  EXPECT_LE(testing::distance(weight.grad(),
                              [&] {
                                Values both = once;
                                const Tensor alone = leaf(p.weight);
                                linear_fp8(p.x, alone, {}, make_layer(scales())).backward(p.gradient);
                                const Values second = alone.grad().to_vector<double>();
                                for (size_t i = 0; i < both.size(); ++i) both[i] += second[i];
                                return both;
                              }()),
            0x1p-7)
      << "two roundings to bf16";
  const Fp8Stats both = stats_of(layer->stats, Fp8Role::kInput);
  EXPECT_EQ(both.amax, first.amax) << "the smaller batch has no say";
  EXPECT_EQ(both.converted, 2 * first.converted);
}

TEST(LinearFp8, ABatchWithoutRowsGivesAZeroGradient) {
  const auto layer = make_layer({});
  const Tensor x = leaf(Tensor::empty({0, kIn}, DType::bf16)), weight = leaf(Problem().weight);
  const Tensor y = linear_fp8(x, weight, {}, layer);
  EXPECT_EQ(y.shape(), (Shape{0, kOut}));
  y.backward(Tensor::empty({0, kOut}, DType::bf16));
  for (const double value : weight.grad().to_vector<double>()) ASSERT_EQ(value, 0);
}

TEST(LinearFp8, RefusesOtherDtypesAndSizesThatProductsCannotRead) {
  const auto layer = make_layer(scales());
  const auto bf16 = [](const Shape& shape) { return Tensor::zeros(shape, DType::bf16); };
  EXPECT_NE(error_of(ErrorKind::kDType, [&] { linear_fp8(Tensor::zeros({2, 16}), Tensor::zeros({16, 16}), {}, layer); })
                .find("takes bf16, got f32"),
            std::string::npos);
  EXPECT_NE(error_of(ErrorKind::kShape, [&] { linear_fp8(bf16({2, 24}), bf16({16, 24}), {}, layer); })
                .find("multiples of 16"),
            std::string::npos);
  EXPECT_NE(error_of(ErrorKind::kShape, [&] { linear_fp8(bf16({2, 16}), bf16({24, 16}), {}, layer); })
                .find("multiples of 16"),
            std::string::npos);
  EXPECT_NE(
      error_of(ErrorKind::kShape, [&] { linear_fp8(bf16({2, 32}), bf16({16, 16}), {}, layer); }).find("last dimension"),
      std::string::npos);
  EXPECT_NE(error_of(ErrorKind::kShape, [&] { linear_fp8(bf16({2, 16}), bf16({16, 16}), bf16({3}), layer); })
                .find("expected bias [16]"),
            std::string::npos);
}

TEST(LinearFp8, ScalesThatChangeBeforeTheBackwardPassAreAnError) {
  const Problem p;
  const auto layer = make_layer(scales());
  const Tensor weight = leaf(p.weight);
  const Tensor y = linear_fp8(p.x, weight, {}, layer);
  layer->scales.begin_change("delayed_scaling");
  EXPECT_NE(error_of(ErrorKind::kState, [&] { y.backward(p.gradient); }).find("delayed_scaling"), std::string::npos);
}

}  // namespace
}  // namespace weft
