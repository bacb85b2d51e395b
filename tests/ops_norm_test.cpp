#include "ops/norm.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "core/autograd.h"
#include "core/random.h"
#include "core/thread_pool.h"
#include "tests/values.h"

namespace weft {
namespace {

using testing::distance;
using testing::leaf;
using testing::random;
using testing::same_bits;
using testing::Values;

struct Reference {
  Values y, dx, dweight, dbias;
};

/// The definition and its derivative, element by element in f64.
Reference reference(const Values& x, const Values& weight, const Values& bias, const Values& dy, size_t columns,
                    double eps, bool centered) {
  const size_t rows = x.size() / columns;
  const double n = static_cast<double>(columns);
  Reference out{Values(x.size()), Values(x.size()), Values(columns), Values(columns)};
  for (size_t r = 0; r < rows; ++r) {
    const double* row = x.data() + r * columns;
    double mean = 0, variance = 0, plain = 0, weighted = 0;
    if (centered) {
      for (size_t c = 0; c < columns; ++c) mean += row[c] / n;
    }
    for (size_t c = 0; c < columns; ++c) variance += (row[c] - mean) * (row[c] - mean) / n;
    const double rstd = 1 / std::sqrt(variance + eps);
    for (size_t c = 0; c < columns; ++c) {
      const double normal = (row[c] - mean) * rstd, g = dy[r * columns + c];
      out.y[r * columns + c] = normal * weight[c] + (bias.empty() ? 0 : bias[c]);
      out.dweight[c] += g * normal;
      out.dbias[c] += g;
      plain += g * weight[c] / n;
      weighted += g * weight[c] * normal / n;
    }
    for (size_t c = 0; c < columns; ++c) {
      const double normal = (row[c] - mean) * rstd;
      out.dx[r * columns + c] = rstd * (dy[r * columns + c] * weight[c] - (centered ? plain : 0) - normal * weighted);
    }
  }
  return out;
}

struct Precision {
  DType dtype;
  double tolerance;  ///< of values; sums over rows and divisions by a small deviation get a multiple of it
};
// f64 and f32: a few roundings of numbers around 1 to 10. f16 and bf16: computed in f32 from rounded inputs, one
// rounding.
const Precision kPrecisions[] = {{DType::f64, 1e-13}, {DType::f32, 5e-6}, {DType::f16, 1e-3}, {DType::bf16, 8e-3}};
const Shape kShapes[] = {{1, 1}, {3, 7}, {2, 3, 16}, {5, 64}, {17, 131}, {131, 17}, {2, 768}, {0, 5}};

TEST(LayerNorm, MatchesItsDefinitionAndDerivativeInEveryFloatType) {
  for (const auto& [dtype, tolerance] : kPrecisions) {
    for (const Shape& shape : kShapes) {
      SCOPED_TRACE(concat(dtype, ' ', shape));
      const int64_t columns = shape.back();
      const Tensor x = leaf(random(shape, dtype, "x")), weight = leaf(random({columns}, dtype, "w"));
      const Tensor bias = leaf(random({columns}, dtype, "b")), dy = random(shape, dtype, "dy");
      const Tensor y = layer_norm(x, weight, bias, 1e-2);
      autograd::backward({y}, {dy});
      const Reference want = reference(x.to_vector<double>(), weight.to_vector<double>(), bias.to_vector<double>(),
                                       dy.to_vector<double>(), static_cast<size_t>(columns), 1e-2, true);
      EXPECT_LE(distance(y, want.y), tolerance);
      EXPECT_LE(distance(x.grad(), want.dx), 4 * tolerance);
      EXPECT_LE(distance(weight.grad(), want.dweight), 4 * tolerance);
      EXPECT_LE(distance(bias.grad(), want.dbias), 4 * tolerance);
    }
  }
}

TEST(LayerNorm, TakesNoBias) {
  const Tensor x = leaf(random({5, 19}, DType::f64, "x")), weight = leaf(random({19}, DType::f64, "w"));
  const Tensor dy = random({5, 19}, DType::f64, "dy");
  const Tensor y = layer_norm(x, weight, {});
  autograd::backward({y}, {dy});
  const Reference want =
      reference(x.to_vector<double>(), weight.to_vector<double>(), {}, dy.to_vector<double>(), 19, 1e-5, true);
  EXPECT_LE(distance(y, want.y), 1e-13);
  EXPECT_LE(distance(x.grad(), want.dx), 1e-12);
  EXPECT_LE(distance(weight.grad(), want.dweight), 1e-12);
}

TEST(LayerNorm, KeepsItsAccuracyWhenTheMeanIsLarge) {
  // E[x^2] - E[x]^2 in f32 would lose everything: the mean is 4096 deviations from zero.
  const Tensor offset = random({4, 512}, DType::f64, "x", 4095, 4097).to(DType::f32);
  const Tensor weight = Tensor::ones({512}), bias = Tensor::zeros({512});
  const Reference want = reference(offset.to_vector<double>(), Values(512, 1), {}, Values(4 * 512, 0), 512, 1e-5, true);
  // The mean is rounded to f32: an error of 2^-12 * 2^-1 in units of x, whose deviation is about 0.6.
  EXPECT_LE(distance(layer_norm(offset, weight, bias), want.y), 1e-3);
}

TEST(RmsNorm, MatchesItsDefinitionAndDerivativeInEveryFloatType) {
  for (const auto& [dtype, tolerance] : kPrecisions) {
    for (const Shape& shape : kShapes) {
      SCOPED_TRACE(concat(dtype, ' ', shape));
      const int64_t columns = shape.back();
      const Tensor x = leaf(random(shape, dtype, "x")), weight = leaf(random({columns}, dtype, "w"));
      const Tensor dy = random(shape, dtype, "dy");
      const Tensor y = rms_norm(x, weight, 1e-2);
      autograd::backward({y}, {dy});
      const Reference want = reference(x.to_vector<double>(), weight.to_vector<double>(), {}, dy.to_vector<double>(),
                                       static_cast<size_t>(columns), 1e-2, false);
      EXPECT_LE(distance(y, want.y), tolerance);
      EXPECT_LE(distance(x.grad(), want.dx), 4 * tolerance);
      EXPECT_LE(distance(weight.grad(), want.dweight), 4 * tolerance);
    }
  }
}

TEST(ResidualLayerNorm, HasTheBitsOfTheSumFollowedByTheNorm) {
  for (const DType dtype : {DType::f64, DType::f32, DType::f16, DType::bf16}) {
    const Tensor x = random({9, 45}, dtype, "x"), residual = random({9, 45}, dtype, "r");
    const Tensor weight = random({45}, dtype, "w"), bias = random({45}, dtype, "b");
    const ResidualNorm got = residual_layer_norm(x, residual, weight, bias);
    Values sums = x.to_vector<double>(), others = residual.to_vector<double>();
    for (size_t i = 0; i < sums.size(); ++i) sums[i] += others[i];
    EXPECT_TRUE(same_bits(got.sum, Tensor::from(sums, {9, 45}).to(dtype)));
    EXPECT_TRUE(same_bits(got.normed, layer_norm(got.sum, weight, bias)));
  }
}

TEST(ResidualLayerNorm, AddsTheGradientsOfBothOutputs) {
  const Tensor x = leaf(random({6, 21}, DType::f64, "x")), residual = leaf(random({6, 21}, DType::f64, "r"));
  const Tensor weight = leaf(random({21}, DType::f64, "w")), bias = leaf(random({21}, DType::f64, "b"));
  const Tensor dsum = random({6, 21}, DType::f64, "dsum"), dnormed = random({6, 21}, DType::f64, "dnormed");
  ResidualNorm out = residual_layer_norm(x, residual, weight, bias);
  Reference want = reference(out.sum.to_vector<double>(), weight.to_vector<double>(), bias.to_vector<double>(),
                             dnormed.to_vector<double>(), 21, 1e-5, true);
  const auto clear = [&] {
    for (const Tensor& tensor : {x, residual, weight, bias}) tensor.clear_grad();
  };
  const auto check = [&](const Values& dx) {
    EXPECT_LE(distance(x.grad(), dx), 1e-12);
    EXPECT_LE(distance(residual.grad(), dx), 1e-12);
  };
  autograd::backward({out.normed}, {dnormed}, true);
  check(want.dx);
  EXPECT_LE(distance(weight.grad(), want.dweight), 1e-12);
  EXPECT_LE(distance(bias.grad(), want.dbias), 1e-12);
  clear();
  autograd::backward({out.sum}, {dsum}, true);
  check(dsum.to_vector<double>());
  EXPECT_FALSE(weight.grad().defined());
  clear();
  autograd::backward({out.sum, out.normed}, {dsum, dnormed});
  const Values added = dsum.to_vector<double>();
  for (size_t i = 0; i < added.size(); ++i) want.dx[i] += added[i];
  check(want.dx);
  EXPECT_LE(distance(weight.grad(), want.dweight), 1e-12);
  EXPECT_FALSE(x.grad().storage() == residual.grad().storage()) << "two leaves must not share a gradient";
}

TEST(Norms, AddToAGradientThatIsThereAlready) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const Tensor x = random({37, 24}, dtype, "x"), weight = leaf(random({24}, dtype, "w")),
                 bias = leaf(random({24}, dtype, "b"));
    const Tensor dy = random({37, 24}, dtype, "dy");
    for (int pass = 0; pass < 2; ++pass) autograd::backward({layer_norm(x, weight, bias)}, {dy});
    const Tensor twice = weight.grad().clone();
    weight.clear_grad();
    autograd::backward({layer_norm(x, weight, bias)}, {dy});
    Values want = weight.grad().to_vector<double>();
    for (double& value : want) value *= 2;
    EXPECT_LE(distance(twice, want),
              dtype == DType::f32 ? 0 : 4e-3);  // doubling is exact; bf16 rounds the sum, also exactly
  }
}

TEST(Norms, ReadAnyStrides) {
  const Tensor storage = random({13, 10}, DType::f32, "x");
  const Tensor weight = random({26}, DType::f32, "w").slice(0, 0, 26, 2), bias = random({13}, DType::f32, "b");
  const Tensor x = storage.transpose(0, 1);
  EXPECT_TRUE(same_bits(layer_norm(x, weight, bias), layer_norm(x.clone(), weight.clone(), bias)));
  const Tensor strided = leaf(x), dy = storage.transpose(0, 1);
  autograd::backward({layer_norm(strided, weight, bias)}, {dy});
  const Tensor plain = leaf(x);
  autograd::backward({layer_norm(plain, weight, bias)}, {dy.clone()});
  EXPECT_TRUE(same_bits(strided.grad(), plain.grad()));
}

TEST(Norms, HaveTheSameBitsOnAnyNumberOfThreads) {
  const auto run = [](int threads) {
    set_num_threads(threads);
    const Tensor x = leaf(random({1037, 96}, DType::f32, "x")), residual = leaf(random({1037, 96}, DType::f32, "r"));
    const Tensor weight = leaf(random({96}, DType::f32, "w")), bias = leaf(random({96}, DType::f32, "b"));
    const ResidualNorm out = residual_layer_norm(x, residual, weight, bias);
    const Tensor dy = random({1037, 96}, DType::f32, "dy");
    autograd::backward({out.normed, out.sum}, {dy, dy});
    return std::vector<Tensor>{out.sum, out.normed, x.grad(), weight.grad(), bias.grad()};
  };
  const int before = num_threads();
  const std::vector<Tensor> one = run(1);
  for (const int threads : {2, 3, 5}) {
    const std::vector<Tensor> many = run(threads);
    for (size_t i = 0; i < one.size(); ++i)
      EXPECT_TRUE(same_bits(one[i], many[i])) << threads << " threads, tensor " << i;
  }
  set_num_threads(before);
}

TEST(Norms, HaveTheSameBitsInATensorLargerThanTheCache) {
  // Large results are written past the caches by kernels of their own.
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const int64_t rows = dtype == DType::f32 ? 12000 : 24000;
    const auto repeated = [&](const char* name) {
      return random({1, 60, 768}, dtype, name).expand({rows / 60, 60, 768}).reshape({rows, 768});
    };
    const Tensor x = leaf(repeated("x")), residual = repeated("r");
    const Tensor weight = random({768}, dtype, "w"), bias = random({768}, dtype, "b");
    const ResidualNorm whole = residual_layer_norm(x, residual, weight, bias);
    autograd::backward({whole.normed, whole.sum}, {residual, residual});
    for (const int64_t row : {int64_t{0}, int64_t{5001}, rows - 33}) {
      const Tensor part = leaf(x.detach().narrow(0, row, 33)), added = residual.narrow(0, row, 33);
      const ResidualNorm some = residual_layer_norm(part, added, weight, bias);
      autograd::backward({some.normed, some.sum}, {added, added});
      EXPECT_TRUE(same_bits(whole.sum.narrow(0, row, 33), some.sum)) << dtype;
      EXPECT_TRUE(same_bits(whole.normed.narrow(0, row, 33), some.normed)) << dtype;
      EXPECT_TRUE(same_bits(x.grad().narrow(0, row, 33), part.grad())) << dtype;
    }
  }
}

TEST(Norms, CarryANanToItsRowOnly) {
  Tensor x = random({3, 40}, DType::f32, "x");
  x.data<float>()[40 + 7] = NAN;
  const Values y = layer_norm(x, Tensor::ones({40}), Tensor::zeros({40})).to_vector<double>();
  for (size_t i = 0; i < y.size(); ++i) EXPECT_EQ(std::isnan(y[i]), i / 40 == 1) << i;
}

void expect_error(ErrorKind kind, const std::string& text, const std::function<void()>& call) {
  try {
    call();
    ADD_FAILURE() << "no error; wanted " << text;
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), kind) << error.what();
    EXPECT_NE(std::string(error.what()).find(text), std::string::npos) << error.what();
  }
}

TEST(Norms, NameWhatDoesNotFit) {
  const Tensor x = Tensor::zeros({2, 8}), c = Tensor::zeros({8});
  expect_error(
      ErrorKind::kShape,
      "[rms_norm] weight must match the last dimension of x: x is f32 [2, 8], weight is f32 [5]; expected weight [8]",
      [&] { rms_norm(x, Tensor::zeros({5})); });
  expect_error(ErrorKind::kShape, "bias must match", [&] { layer_norm(x, c, Tensor::zeros({1})); });
  expect_error(ErrorKind::kDType, "[layer_norm] dtypes must be equal", [&] { layer_norm(x, c.to(DType::bf16), c); });
  expect_error(ErrorKind::kDType, "takes f32", [&] { rms_norm(x.to(DType::i32), c.to(DType::i32)); });
  expect_error(ErrorKind::kShape, "must have an element", [&] { rms_norm(Tensor::zeros({3, 0}), Tensor::zeros({0})); });
  expect_error(ErrorKind::kShape, "must have an element", [&] { rms_norm(Tensor::zeros({}), c); });
  expect_error(ErrorKind::kValue, "eps must be positive", [&] { layer_norm(x, c, c, 0); });
  expect_error(ErrorKind::kValue, "eps must be positive", [&] { layer_norm(x, c, c, NAN); });
  expect_error(ErrorKind::kShape, "their shapes must be equal",
               [&] { residual_layer_norm(x, Tensor::zeros({1, 8}), c, c); });
}

TEST(Norms, RunDry) {
  const DryRun dry;
  const Tensor x = leaf(Tensor::empty({4, 8})), weight = leaf(Tensor::empty({8})), bias = leaf(Tensor::empty({8}));
  const ResidualNorm out = residual_layer_norm(x, Tensor::empty({4, 8}), weight, bias);
  autograd::backward({out.normed}, {Tensor::empty({4, 8})});
  EXPECT_TRUE(x.grad().shape() == Shape({4, 8}));
  EXPECT_TRUE(weight.grad().shape() == Shape({8}));
}

}  // namespace
}  // namespace weft
