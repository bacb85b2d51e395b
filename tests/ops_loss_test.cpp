#include "ops/loss.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "core/autograd.h"
#include "core/random.h"
#include "core/thread_pool.h"
#include "ops/matmul.h"
#include "tests/values.h"

namespace weft {
namespace {

using testing::distance;
using testing::leaf;
using testing::random;
using testing::same_bits;
using testing::Values;

/// Classes in [0, classes); every `every`-th row is ignored.
Tensor some_targets(int64_t rows, int64_t classes, int64_t every = 5, int64_t ignored = -100) {
  const RandomStream stream(7, "targets");
  std::vector<int64_t> values;
  for (int64_t i = 0; i < rows; ++i) {
    values.push_back(i % every == every - 1 ? ignored
                                            : static_cast<int64_t>(stream.below(static_cast<uint64_t>(i),
                                                                                static_cast<uint64_t>(classes))));
  }
  return Tensor::from(values, {rows});
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

struct Reference {
  double sum = 0;
  double valid = 0;
  Values dlogits;  ///< of the sum
};

/// The definition and its derivative, element by element in f64.
Reference reference(const Values& logits, const std::vector<int64_t>& targets, size_t classes, int64_t ignored = -100) {
  Reference out;
  out.dlogits.resize(logits.size());
  for (size_t n = 0; n < targets.size(); ++n) {
    if (targets[n] == ignored) continue;
    const double* row = logits.data() + n * classes;
    double largest = -INFINITY, sum = 0;
    for (size_t v = 0; v < classes; ++v) largest = std::max(largest, row[v]);
    for (size_t v = 0; v < classes; ++v) sum += std::exp(row[v] - largest);
    out.sum += largest + std::log(sum) - row[targets[n]];
    out.valid += 1;
    for (size_t v = 0; v < classes; ++v) {
      out.dlogits[n * classes + v] = std::exp(row[v] - largest) / sum - (static_cast<size_t>(targets[n]) == v ? 1 : 0);
    }
  }
  return out;
}

// f32: exponentials and a sum of up to a thousand of them. f16 and bf16: computed in f32 from rounded logits; the loss
// is f32, the gradient is rounded once.
struct Precision {
  DType dtype;
  double loss, gradient;
};
const Precision kPrecisions[] = {
    {DType::f64, 1e-14, 1e-14}, {DType::f32, 1e-6, 1e-6}, {DType::f16, 1e-6, 5e-4}, {DType::bf16, 1e-6, 4e-3}};

TEST(CrossEntropy, MatchesItsDefinitionAndDerivativeInEveryFloatType) {
  for (const auto& [dtype, loss_tolerance, gradient_tolerance] : kPrecisions) {
    for (const auto& [rows, classes] :
         std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {7, 2}, {13, 31}, {33, 64}, {6, 1009}}) {
      SCOPED_TRACE(concat(dtype, ' ', rows, " x ", classes));
      const Tensor logits = leaf(random({rows, classes}, dtype, "logits", -8, 8));
      const Tensor targets = some_targets(rows, classes);
      const Reference want =
          reference(logits.to_vector<double>(), targets.to_vector<int64_t>(), static_cast<size_t>(classes));
      const Tensor mean = cross_entropy(logits, targets);
      EXPECT_EQ(mean.dtype(), dtype == DType::f64 ? DType::f64 : DType::f32);
      EXPECT_LE(distance(mean, {want.sum / want.valid}), loss_tolerance);
      EXPECT_LE(distance(cross_entropy(logits, targets.to(DType::i32), {.reduction = Reduction::kSum}), {want.sum}),
                2 * loss_tolerance);
      autograd::backward({mean}, {Tensor::full({}, 2.5, mean.dtype())});
      Values scaled = want.dlogits;
      for (double& value : scaled) value *= 2.5 / want.valid;
      EXPECT_LE(distance(logits.grad(), scaled), gradient_tolerance);
    }
  }
}

TEST(CrossEntropy, TakesAnyLeadingDimensionsAndStrides) {
  const Tensor storage = random({11, 4, 3}, DType::f64, "logits");
  const Tensor logits = leaf(storage.permute({2, 1, 0})), targets = some_targets(12, 11).reshape({3, 4});
  const Tensor loss = cross_entropy(logits, targets);
  loss.backward();
  const Reference want = reference(logits.to_vector<double>(), targets.to_vector<int64_t>(), 11);
  EXPECT_LE(distance(loss, {want.sum / want.valid}), 1e-14);
  EXPECT_TRUE(logits.grad().shape() == Shape({3, 4, 11}));
}

TEST(CrossEntropy, StaysFiniteForExtremeLogits) {
  const float inf = std::numeric_limits<float>::infinity();
  const Tensor logits = leaf(Tensor::from(std::vector<float>{1e30f, -1e30f, 0, -inf, 3, 3, -200, 0, 100}, {3, 3}));
  const Tensor loss =
      cross_entropy(logits, Tensor::from(std::vector<int64_t>{0, 1, 2}, {3}), {.reduction = Reduction::kSum});
  EXPECT_NEAR(loss.item(), std::log(2.0), 1e-7);
  loss.backward();
  EXPECT_LE(distance(logits.grad(), {0, 0, 0, 0, -0.5, 0.5, 0, 0, 0}), 1e-7);
}

TEST(CrossEntropy, DoesNotHideANan) {
  for (const int64_t at : {0, 5, 16, 20}) {
    Tensor logits = random({1, 21}, DType::f32, "logits");
    logits.data<float>()[at] = NAN;
    const Tensor target = Tensor::from(std::vector<int64_t>{3}, {1});
    EXPECT_TRUE(std::isnan(cross_entropy(logits, target).item())) << at;
    const Tensor x = Tensor::ones({1, 1}), weight = logits.reshape({21, 1});
    EXPECT_TRUE(std::isnan(linear_cross_entropy(x, weight, target).item())) << at;
  }
}

TEST(CrossEntropy, NamesBadTargetsAndOptions) {
  const Tensor logits = Tensor::zeros({3, 5});
  const auto with = [&](std::vector<int64_t> targets) { return cross_entropy(logits, Tensor::from(targets, {3})); };
  expect_error(ErrorKind::kIndex,
               "[cross_entropy] the target of row 2 is 5 but must be from 0 to 4 (or ignore_index, -100)",
               [&] { with({0, 4, 5}); });
  expect_error(ErrorKind::kIndex, "the target of row 1 is -1", [&] { with({0, -1, 9}); });
  expect_error(ErrorKind::kValue, "none of the 3 targets is valid", [&] { with({-100, -100, -100}); });
  expect_error(ErrorKind::kShape, "needs [..., n] and targets [...]",
               [&] { cross_entropy(logits, Tensor::zeros({4}, DType::i64)); });
  expect_error(ErrorKind::kShape, "needs [..., n] and targets [...]",
               [&] { cross_entropy(Tensor::zeros({}), Tensor::zeros({}, DType::i64)); });
  expect_error(ErrorKind::kShape, "at least one class",
               [&] { cross_entropy(Tensor::zeros({3, 0}), Tensor::zeros({3}, DType::i64)); });
  expect_error(ErrorKind::kDType, "targets must be i64 or i32", [&] { cross_entropy(logits, Tensor::zeros({3})); });
  expect_error(ErrorKind::kDType, "takes f32",
               [&] { cross_entropy(logits.to(DType::i64), Tensor::zeros({3}, DType::i64)); });
  const Tensor targets = Tensor::zeros({3}, DType::i64);
  expect_error(ErrorKind::kValue, "valid_tokens must be",
               [&] { cross_entropy(logits, targets, {.valid_tokens = -1}); });
  expect_error(ErrorKind::kValue, "valid_tokens must be",
               [&] { cross_entropy(logits, targets, {.valid_tokens = NAN}); });
  expect_error(ErrorKind::kValue, "the reduction is a sum",
               [&] { cross_entropy(logits, targets, {.reduction = Reduction::kSum, .valid_tokens = 3}); });
}

TEST(CrossEntropy, OfNoValidTokenIsZeroAsASum) {
  const Tensor logits = leaf(random({2, 3}, DType::f32, "logits"));
  const Tensor ignored = Tensor::full({2}, -1, DType::i64);
  const Tensor loss = cross_entropy(logits, ignored, {.ignore_index = -1, .reduction = Reduction::kSum});
  loss.backward();
  EXPECT_EQ(loss.item(), 0);
  EXPECT_EQ(logits.grad().to_vector<double>(), Values(6, 0));
  EXPECT_EQ(cross_entropy(logits, ignored, {.ignore_index = -1, .valid_tokens = 7}).item(), 0);
  const Tensor none = Tensor::zeros({0, 3}), no_targets = Tensor::zeros({0}, DType::i64);
  EXPECT_EQ(cross_entropy(none, no_targets, {.reduction = Reduction::kSum}).item(), 0);
  const Tensor weight = leaf(Tensor::ones({4, 3}));
  linear_cross_entropy(none, weight, no_targets, {{.reduction = Reduction::kSum}}).backward();
  EXPECT_EQ(weight.grad().to_vector<double>(), Values(12, 0));
  expect_error(ErrorKind::kValue, "none of the 0 targets", [&] { linear_cross_entropy(none, weight, no_targets); });
}

// ---- the fused head ----

struct HeadResult {
  Tensor loss, dx, dweight;
};

HeadResult run_head(const Tensor& x_, const Tensor& weight_, const Tensor& targets,
                    const LinearCrossEntropyOptions& options, double gradient = 1) {
  const Tensor x = leaf(x_), weight = leaf(weight_);
  const Tensor loss = linear_cross_entropy(x, weight, targets, options);
  autograd::backward({loss}, {Tensor::full({}, gradient, loss.dtype())});
  return {loss, x.grad(), weight.grad()};
}

TEST(LinearCrossEntropy, IsTheCrossEntropyOfTheProductWhateverTheChunk) {
  constexpr int64_t kRows = 29, kChannels = 17, kClasses = 101;
  for (const DType dtype : {DType::f64, DType::f32}) {
    const Tensor x = random({kRows, kChannels}, dtype, "x"), weight = random({kClasses, kChannels}, dtype, "w");
    const Tensor targets = some_targets(kRows, kClasses);
    const Tensor plain_x = leaf(x), plain_weight = leaf(weight);
    const Tensor plain = cross_entropy(linear(plain_x, plain_weight), targets);
    autograd::backward({plain}, {Tensor::full({}, -1.5, dtype)});
    // f32: sums of 17 and 101 products in different orders.
    const double tolerance = dtype == DType::f64 ? 1e-14 : 5e-6;
    for (const int64_t chunk : {0, 1, 4, 28, 29, 1000}) {
      SCOPED_TRACE(concat(dtype, " chunk ", chunk));
      const HeadResult got = run_head(x, weight, targets, {{}, chunk}, -1.5);
      EXPECT_LE(distance(got.loss, plain.to_vector<double>()), tolerance);
      EXPECT_LE(distance(got.dx, plain_x.grad().to_vector<double>()), tolerance);
      EXPECT_LE(distance(got.dweight, plain_weight.grad().to_vector<double>()), tolerance);
      const autograd::NoGrad no_grad;
      EXPECT_LE(distance(linear_cross_entropy(x, weight, targets, {{}, chunk}), plain.to_vector<double>()), tolerance);
    }
  }
}

TEST(LinearCrossEntropy, WorksInHalfPrecision) {
  const Tensor targets = some_targets(13, 37);
  for (const DType dtype : {DType::bf16, DType::f16}) {
    const Tensor x = random({13, 24}, dtype, "x"), weight = random({37, 24}, dtype, "w");
    const HeadResult want = run_head(x.to(DType::f64), weight.to(DType::f64), targets, {});
    for (const int64_t chunk : {0, 5}) {
      SCOPED_TRACE(concat(dtype, " chunk ", chunk));
      const HeadResult got = run_head(x, weight, targets, {{}, chunk});
      EXPECT_EQ(got.loss.dtype(), DType::f32);
      EXPECT_EQ(got.dx.dtype(), dtype);
      EXPECT_EQ(got.dweight.dtype(), dtype);
      EXPECT_LE(distance(got.loss, want.loss.to_vector<double>()), 1e-5);  // f32 sums of exact products
      // bf16: each factor of the gradient's products and the result are rounded to 8 bits.
      EXPECT_LE(distance(got.dx, want.dx.to_vector<double>()), 4e-3);
      EXPECT_LE(distance(got.dweight, want.dweight.to_vector<double>()), 4e-3);
    }
  }
}

TEST(LinearCrossEntropy, AddsToTheGradientOfASharedWeight) {
  const Tensor x = random({10, 6}, DType::f64, "x"), targets = some_targets(10, 15);
  for (const int64_t chunk : {0, 3}) {
    const Tensor weight = leaf(random({15, 6}, DType::f64, "w"));
    linear_cross_entropy(x, weight, targets, {{}, chunk}).backward();
    Values twice = weight.grad().to_vector<double>();
    for (double& value : twice) value *= 2;
    linear_cross_entropy(x, weight, targets, {{}, chunk}).backward();
    EXPECT_LE(distance(weight.grad(), twice), 1e-15);
    // A weight that is used twice in one graph.
    const Tensor tied = leaf(weight.detach());
    const Tensor loss = linear_cross_entropy(linear(x, tied.narrow(0, 0, 6)), tied, targets, {{}, chunk});
    loss.backward();
    const Tensor a = leaf(weight.detach()), b = leaf(weight.detach());
    linear_cross_entropy(linear(x, a.narrow(0, 0, 6)), b, targets, {{}, chunk}).backward();
    Values sum = a.grad().to_vector<double>(), other = b.grad().to_vector<double>();
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += other[i];
    EXPECT_LE(distance(tied.grad(), sum), 1e-15);
  }
}

TEST(LinearCrossEntropy, CanRunBackwardTwiceOnOneGraph) {
  const Tensor x = leaf(random({10, 6}, DType::f64, "x")), weight = leaf(random({15, 6}, DType::f64, "w"));
  for (const int64_t chunk : {0, 3}) {
    x.clear_grad();
    weight.clear_grad();
    const Tensor loss = linear_cross_entropy(x, weight, some_targets(10, 15), {{}, chunk});
    loss.backward({}, true);
    Values twice = weight.grad().to_vector<double>();
    for (double& value : twice) value *= 2;
    loss.backward();
    EXPECT_LE(distance(weight.grad(), twice), 1e-15);
  }
}

TEST(LinearCrossEntropy, RaggedMicroBatchesAddUpToTheFullBatch) {
  const Tensor x = random({24, 9}, DType::f64, "x"), weight = random({31, 9}, DType::f64, "w");
  std::vector<int64_t> values = some_targets(24, 31).to_vector<int64_t>();
  for (size_t i = 0; i < 7; ++i) values[i] = -100;  // the first micro-batch of 8 has one or no valid token
  values[7] = 2;
  const Tensor targets = Tensor::from(values, {24});
  double valid = 0;
  for (const int64_t target : values) valid += target != -100;
  for (const int64_t chunk : {0, 3}) {
    const HeadResult full = run_head(x, weight, targets, {{}, chunk});
    const Tensor leaf_x = leaf(x), leaf_weight = leaf(weight), logits_x = leaf(x);
    double loss = 0, plain_loss = 0;
    for (int64_t begin = 0; begin < 24; begin += 8) {
      const Tensor part = targets.narrow(0, begin, 8);
      const Tensor micro =
          linear_cross_entropy(leaf_x.narrow(0, begin, 8), leaf_weight, part, {{.valid_tokens = valid}, chunk});
      micro.backward();
      loss += micro.item();
      const Tensor plain = cross_entropy(linear(logits_x.narrow(0, begin, 8), weight), part, {.valid_tokens = valid});
      plain.backward();
      plain_loss += plain.item();
    }
    EXPECT_NEAR(loss, full.loss.item(), 1e-13);
    EXPECT_NEAR(plain_loss, full.loss.item(), 1e-13);
    EXPECT_LE(distance(leaf_x.grad(), full.dx.to_vector<double>()), 1e-13);
    EXPECT_LE(distance(logits_x.grad(), full.dx.to_vector<double>()), 1e-13);
    EXPECT_LE(distance(leaf_weight.grad(), full.dweight.to_vector<double>()), 1e-13);
  }
}

TEST(LinearCrossEntropy, AnswersOnlyWhatIsAsked) {
  const Tensor x = random({7, 5}, DType::f64, "x"), weight = random({11, 5}, DType::f64, "w"),
               targets = some_targets(7, 11);
  for (const int64_t chunk : {0, 2}) {
    const HeadResult both = run_head(x, weight, targets, {{}, chunk});
    const Tensor only_x = leaf(x), only_weight = leaf(weight);
    linear_cross_entropy(only_x, weight, targets, {{}, chunk}).backward();
    linear_cross_entropy(x, only_weight, targets, {{}, chunk}).backward();
    EXPECT_TRUE(same_bits(only_x.grad(), both.dx));
    EXPECT_TRUE(same_bits(only_weight.grad(), both.dweight));
  }
}

TEST(LinearCrossEntropy, HoldsAllLogitsOnlyIfTheyAreSmallerThanTheGradientOfTheWeight) {
  EXPECT_EQ(linear_cross_entropy_rows(256, 768, 50257), 256);
  EXPECT_EQ(linear_cross_entropy_rows(1024, 768, 50257), 1024);
  EXPECT_EQ(linear_cross_entropy_rows(1025, 768, 50257), 256);
  EXPECT_EQ(linear_cross_entropy_rows(1 << 20, 128, 65), (16 << 20) / 4 / 65);
  EXPECT_EQ(linear_cross_entropy_rows(0, 128, 65), 0);

  const DryRun dry;
  const int64_t rows = 65536, channels = 64, classes = 32768;
  const Tensor x = Tensor::empty({rows, channels}).requires_grad_(),
               weight = Tensor::empty({classes, channels}).requires_grad_();
  const Tensor targets = Tensor::empty({rows}, DType::i64);
  Allocator& memory = allocator(Device::cpu());
  memory.reset_peak();
  const int64_t before = memory.statistics().total.current;
  linear_cross_entropy(x, weight, targets).backward();
  const int64_t taken = memory.statistics().total.peak - before;
  // 256 rows of logits, dx and dW twice (made forwards, scaled backwards) and small change: 8 GiB of logits are not
  // there.
  EXPECT_LE(taken, 4 * (256 * classes + 2 * (rows + classes) * channels) + (int64_t{2} << 20));
  EXPECT_GE(taken, 4 * 256 * classes);
}

TEST(LinearCrossEntropy, HasTheSameBitsOnAnyNumberOfThreads) {
  const Tensor x = random({300, 40}, DType::f32, "x"), weight = random({1009, 40}, DType::f32, "w"),
               targets = some_targets(300, 1009);
  const int before = num_threads();
  for (const int64_t chunk : {0, 128}) {
    set_num_threads(1);
    const HeadResult one = run_head(x, weight, targets, {{}, chunk});
    for (const int threads : {2, 3, 5}) {
      set_num_threads(threads);
      const HeadResult many = run_head(x, weight, targets, {{}, chunk});
      EXPECT_TRUE(same_bits(one.loss, many.loss)) << threads;
      EXPECT_TRUE(same_bits(one.dx, many.dx)) << threads;
      EXPECT_TRUE(same_bits(one.dweight, many.dweight)) << threads;
    }
  }
  set_num_threads(before);
}

TEST(LinearCrossEntropy, RefusesAWeightThatChangedBeforeBackward) {
  const Tensor x = leaf(random({4, 3}, DType::f32, "x")), weight = random({5, 3}, DType::f32, "w");
  const Tensor loss = linear_cross_entropy(x, weight, some_targets(4, 5));
  weight.detach().fill_(0);
  expect_error(ErrorKind::kState, "[fill_] changed in place", [&] { loss.backward(); });
}

TEST(LinearCrossEntropy, NamesWhatDoesNotFit) {
  const Tensor x = Tensor::zeros({3, 4}), weight = Tensor::zeros({5, 4}), targets = Tensor::zeros({3}, DType::i64);
  expect_error(ErrorKind::kShape,
               "needs x [..., C] and weight [V, C] with V >= 1, got x f32 [3, 4] and weight f32 [4, 5]",
               [&] { linear_cross_entropy(x, Tensor::zeros({4, 5}), targets); });
  expect_error(ErrorKind::kShape, "V >= 1", [&] { linear_cross_entropy(x, Tensor::zeros({0, 4}), targets); });
  expect_error(ErrorKind::kDType, "dtypes must be equal",
               [&] { linear_cross_entropy(x, weight.to(DType::f64), targets); });
  expect_error(ErrorKind::kShape, "and targets",
               [&] { linear_cross_entropy(x, weight, Tensor::zeros({4}, DType::i64)); });
  expect_error(ErrorKind::kValue, "chunk_rows must not be negative",
               [&] { linear_cross_entropy(x, weight, targets, {{}, -1}); });
  expect_error(ErrorKind::kIndex, "[linear_cross_entropy] the target of row 0 is 5",
               [&] { linear_cross_entropy(x, weight, Tensor::full({3}, 5, DType::i32)); });
}

}  // namespace
}  // namespace weft
