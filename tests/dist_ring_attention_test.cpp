// A sequence that is shared out over ranks is attended to as one process attends to it: values, gradients, traffic.
#include "dist/ring_attention.h"

#include <gtest/gtest.h>

#include <cmath>
#include <mutex>

#include "core/autograd.h"
#include "core/random.h"
#include "dist/threads.h"
#include "ops/elementwise.h"
#include "ops/reduce.h"
#include "tests/error_of.h"
#include "tests/values.h"

namespace weft::dist {
namespace {

using testing::leaf;

struct Case {
  int ranks;
  int64_t batch, tokens, heads, kv_heads, head_size;
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << c.ranks << " ranks, [" << c.batch << ", " << c.tokens << "], " << c.heads << " heads, " << c.kv_heads
             << " of keys, D = " << c.head_size;
}

/// Chunks of several tiles, of a few tokens, uneven ones and empty ones.
const std::vector<Case> kCases = {{1, 2, 11, 3, 1, 5},   {2, 2, 16, 2, 2, 8}, {2, 1, 300, 2, 1, 16},
                                  {2, 3, 7, 1, 1, 3},    {2, 2, 3, 2, 2, 4},  {3, 2, 29, 4, 2, 6},
                                  {3, 1, 500, 1, 1, 20}, {3, 2, 2, 2, 1, 7},  {4, 2, 37, 3, 3, 16},
                                  {4, 1, 530, 2, 2, 5},  {4, 1, 1, 1, 1, 2},  {4, 2, 5, 4, 1, 9}};

struct Tensors {
  Tensor q, k, v, dy;
};

Tensors inputs(const Case& c, DType dtype) {
  const auto make = [&](const char* name, int64_t heads) {
    return testing::random({c.batch, c.tokens, heads * c.head_size}, dtype, name);
  };
  return {make("q", c.heads), make("k", c.kv_heads), make("v", c.kv_heads), make("dy", c.heads)};
}

AttentionOptions options_of(const Case& c) { return {.heads = c.heads, .kv_heads = c.kv_heads}; }

/// y, dq, dk, dv.
using Results = std::vector<Tensor>;

Results alone(const Case& c, const Tensors& in) {
  const Tensor q = leaf(in.q), k = leaf(in.k), v = leaf(in.v);
  const Tensor y = attention(q, k, v, options_of(c));
  y.backward(in.dy);
  return {y.detach(), q.grad(), k.grad(), v.grad()};
}

/// The same on threads, put together again.
Results shared_out(const Case& c, const Tensors& in, autograd::Keep keep = autograd::Keep::kValue) {
  const SequenceLayout layout(c.tokens, c.ranks);
  Results whole;
  for (const Tensor* like : {&in.q, &in.q, &in.k, &in.v})
    whole.push_back(Tensor::full(like->shape(), NAN, like->dtype()));
  std::mutex mutex;
  run_threads(c.ranks, [&](Group& world) {
    const auto take = [&](const Tensor& x) { return layout.take(x, 1, world.rank()); };
    const Tensor q = leaf(take(in.q)), k = leaf(take(in.k)), v = leaf(take(in.v));
    const Tensor y = ring_attention(q, k, v, options_of(c), world, layout, keep);
    // A function that saves y: with a recipe, it is made again.
    (y * y).backward(take(in.dy).clone());
    const Results mine = {y.detach(), q.grad(), k.grad(), v.grad()};
    const std::lock_guard lock(mutex);
    for (size_t i = 0; i < mine.size(); ++i) {
      int64_t begin = 0;
      for (const IndexRange& range : layout.ranges(world.rank())) {
        whole[i].narrow(1, range.begin, range.count()).copy_(mine[i].narrow(1, begin, range.count()));
        begin += range.count();
      }
    }
  });
  return whole;
}

/// alone() with the cotangent that shared_out() has.
Results expected(const Case& c, const Tensors& in) {
  const Tensor y = attention(in.q, in.k, in.v, options_of(c));
  return alone(c, {in.q, in.k, in.v, 2 * y * in.dy});
}

double norm(const std::vector<double>& x) {
  double sum = 0;
  for (const double value : x) sum += value * value;
  return std::sqrt(sum);
}

/// |got - want| / |want| by Euclidean norms; NaN stays one.
double relative_error(const Tensor& got, const Tensor& want) {
  std::vector<double> a = got.to_vector<double>(), b = want.to_vector<double>();
  EXPECT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) a[i] -= b[i];
  const double size = norm(b);
  return size == 0 ? norm(a) : norm(a) / size;
}

constexpr const char* kNames[] = {"y", "dq", "dk", "dv"};

TEST(RingAttention, IsPlainAttentionInF64) {
  for (const Case& c : kCases) {
    const Tensors in = inputs(c, DType::f64);
    const Results want = expected(c, in), got = shared_out(c, in);
    for (size_t i = 0; i < want.size(); ++i)
      EXPECT_LE(relative_error(got[i], want[i]), 1e-12) << kNames[i] << ": " << c;
  }
}

/// What rounding may do, relative to the norm of a result. In f32 a score, a sum of D products, errs by up to D units
/// of its terms' sizes, which is a relative error of a weight; of the sums over T tokens the roundings are as likely up
/// as down: sqrt(T) units. The storage type rounds y, y * y, the cotangent, weights and their gradients where they are
/// multiplied in pairs, and the result: six roundings, of half of the largest (2^-8 in bf16) in a norm; in gradients,
/// which are differences of such, twice that, and four times where there are so few tokens that these are small.
double bound(const Case& c, DType dtype) {
  const double sums = (std::sqrt(static_cast<double>(c.tokens)) + static_cast<double>(c.head_size)) * 0x1p-24;
  const double unit = dtype == DType::f32 ? 0x1p-24 : dtype == DType::f16 ? 0x1p-12 : 0x1p-9;
  return 6 * (c.tokens < 8 ? 4 : 2) * unit + 4 * sums;
}

TEST(RingAttention, IsPlainAttentionToRoundingInF32AndSixteenBits) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const Case& c : kCases) {
      const Tensors in = inputs(c, dtype);
      const Results got = shared_out(c, in);
      const Tensors wide = {in.q.to(DType::f64), in.k.to(DType::f64), in.v.to(DType::f64), in.dy.to(DType::f64)};
      const Results want = expected(c, wide);
      for (size_t i = 0; i < want.size(); ++i) {
        EXPECT_EQ(got[i].dtype(), dtype);
        EXPECT_LE(relative_error(got[i], want[i]), bound(c, dtype)) << dtype << ' ' << kNames[i] << ": " << c;
      }
    }
  }
}

TEST(RingAttention, InSixteenBitsPartsAreMergedUnrounded) {
  // Four ranks merge four parts: with y rounded between them, it would be further from f64 than plain attention's is.
  const Case c = {4, 1, 512, 1, 1, 16};
  const Tensors in = inputs(c, DType::bf16);
  const Tensor want = attention(in.q.to(DType::f64), in.k.to(DType::f64), in.v.to(DType::f64), options_of(c));
  const Tensor plain = attention(in.q, in.k, in.v, options_of(c));
  // Rounding each of the four would add to its square: a factor of 1.4 and more.
  EXPECT_LE(relative_error(shared_out(c, in)[0], want), 1.1 * relative_error(plain, want));
}

TEST(RingAttention, TwoRunsHaveTheSameBits) {
  const Case c = {4, 2, 150, 2, 1, 12};
  const Tensors in = inputs(c, DType::f32);
  const Results first = shared_out(c, in), second = shared_out(c, in);
  for (size_t i = 0; i < first.size(); ++i) EXPECT_TRUE(testing::same_bits(first[i], second[i])) << kNames[i];
}

TEST(RingAttention, WithARecipeTheResultIsMadeAgainWithTheSameBits) {
  const Case c = {3, 2, 50, 2, 2, 8};
  const Tensors in = inputs(c, DType::f32);
  const Results kept = shared_out(c, in), again = shared_out(c, in, autograd::Keep::kRecipe);
  for (size_t i = 0; i < kept.size(); ++i) EXPECT_TRUE(testing::same_bits(kept[i], again[i])) << kNames[i];
}

TEST(RingAttention, GradientsAreThoseOfFiniteDifferences) {
  const Case c = {2, 1, 6, 2, 1, 3};
  const Tensors in = inputs(c, DType::f64);
  const SequenceLayout layout(c.tokens, c.ranks);
  const auto loss = [&](const Tensors& at) {
    double total = 0;
    std::mutex mutex;
    run_threads(c.ranks, [&](Group& world) {
      const auto take = [&](const Tensor& x) { return layout.take(x, 1, world.rank()); };
      const Tensor y = ring_attention(take(at.q), take(at.k), take(at.v), options_of(c), world, layout);
      const double mine = sum(y * y * take(at.dy)).item();
      const std::lock_guard lock(mutex);
      total += mine;
    });
    return total;
  };
  // d(sum y^2 dy) has the cotangent 2 y dy, which is what shared_out() gives y.
  const Results got = shared_out(c, in);
  for (size_t which = 1; which <= 3; ++which) {
    const std::vector<double> gradient = got[which].to_vector<double>();
    for (size_t i = 0; i < gradient.size(); ++i) {
      const auto moved = [&](double by) {
        Tensors at = {in.q.clone(), in.k.clone(), in.v.clone(), in.dy};
        (which == 1 ? at.q : which == 2 ? at.k : at.v).data<double>()[i] += by;
        return loss(at);
      };
      constexpr double kStep = 1e-5;  // truncation 1e-10, cancellation 1e-16 / 1e-5, times values up to 100
      const double difference = (moved(kStep) - moved(-kStep)) / (2 * kStep);
      EXPECT_NEAR(gradient[i], difference, 1e-7) << kNames[which] << ' ' << i;
    }
  }
}

TEST(RingAttention, SendsTheBytesOfTheFormula) {
  for (const DType dtype : {DType::bf16, DType::f32, DType::f64}) {
    for (const Case& c : kCases) {
      const SequenceLayout layout(c.tokens, c.ranks);
      const Tensors in = inputs(c, dtype);
      run_threads(c.ranks, [&](Group& world) {
        const auto take = [&](const Tensor& x) { return leaf(layout.take(x, 1, world.rank())); };
        const int64_t e = size_of(dtype), a = dtype == DType::f64 ? 8 : 4, n = c.ranks, r = world.rank(),
                      w = c.kv_heads * c.head_size;
        const int64_t others = c.tokens - layout.count(static_cast<int>(r)),
                      but_next = c.tokens - layout.count(static_cast<int>((r + 1) % n));
        const int64_t there = 2 * c.batch * w * e * but_next, back = there + 2 * c.batch * w * a * others;
        const Tensor y = ring_attention(take(in.q), take(in.k), take(in.v), options_of(c), world, layout);
        EXPECT_EQ(world.traffic(Collective::send).bytes_sent, there) << c;
        y.backward(layout.take(in.dy, 1, world.rank()));
        EXPECT_EQ(world.traffic(Collective::send).bytes_sent, there + back) << c;
        EXPECT_EQ(world.traffic(Collective::send).calls, 3 * (n - 1)) << c;
      });
    }
  }
}

TEST(RingAttention, ARecipeCostsOneMoreTripForward) {
  const Case c = {3, 2, 29, 4, 2, 6};
  const SequenceLayout layout(c.tokens, c.ranks);
  const Tensors in = inputs(c, DType::f32);
  run_threads(c.ranks, [&](Group& world) {
    const auto take = [&](const Tensor& x) { return leaf(layout.take(x, 1, world.rank())); };
    const auto sent = [&] { return world.traffic(Collective::send).bytes_sent; };
    const auto run = [&](autograd::Keep keep) {
      const int64_t before = sent();
      const Tensor y = ring_attention(take(in.q), take(in.k), take(in.v), options_of(c), world, layout, keep);
      const int64_t forward = sent() - before;
      (y * y).backward(layout.take(in.dy, 1, world.rank()));  // y is saved twice, and made again once
      return std::pair{forward, sent() - before};
    };
    const auto [forward, all] = run(autograd::Keep::kValue);
    EXPECT_EQ(run(autograd::Keep::kRecipe).second, all + forward);
  });
}

TEST(RingAttention, PartsOfAPackedTensorAreReadWhereTheyLie) {
  const Case c = {2, 2, 21, 2, 2, 4};
  const Tensors in = inputs(c, DType::f64);
  const Results want = expected(c, in);
  const SequenceLayout layout(c.tokens, c.ranks);
  run_threads(c.ranks, [&](Group& world) {
    const auto take = [&](const Tensor& x) { return layout.take(x, 1, world.rank()); };
    const Tensor qkv = leaf(cat({take(in.q), take(in.k), take(in.v)}, 2));
    const std::vector<Tensor> parts = qkv.split(c.heads * c.head_size, 2);
    const Tensor y = ring_attention(parts[0], parts[1], parts[2], options_of(c), world, layout);
    (y * y).backward(take(in.dy).clone());
    const Tensor gradient = cat({take(want[1]), take(want[2]), take(want[3])}, 2);
    EXPECT_LE(relative_error(y.detach(), take(want[0])), 1e-12);
    EXPECT_LE(relative_error(qkv.grad(), gradient), 1e-12);
  });
}

TEST(RingAttention, WhatDoesNotFitIsNamed) {
  const auto run = [](const Shape& q, const Shape& kv, const AttentionOptions& options, const SequenceLayout& layout) {
    run_threads(2, [&](Group& world) {
      ring_attention(Tensor::zeros(q), Tensor::zeros(kv), Tensor::zeros(kv), options, world, layout);
    });
  };
  const Shape shape = {1, 4, 6};
  EXPECT_ERROR(ErrorKind::kValue, "the layout is for 3 ranks, the group has 2", run(shape, shape, {}, {8, 3}));
  EXPECT_ERROR(ErrorKind::kValue, "attends causally", run(shape, shape, {.causal = false}, {8, 2}));
  EXPECT_ERROR(ErrorKind::kValue, "query_offset = 2", run(shape, shape, {.query_offset = 2}, {8, 2}));
  EXPECT_ERROR(ErrorKind::kValue, "kv_heads must divide heads", run(shape, shape, {.heads = 3, .kv_heads = 2}, {8, 2}));
  EXPECT_ERROR(ErrorKind::kShape, "with the 5 tokens of rank", run(shape, shape, {}, {10, 2}));
  EXPECT_ERROR(ErrorKind::kShape, "heads = 4", run(shape, shape, {.heads = 4}, {8, 2}));
  EXPECT_ERROR(ErrorKind::kShape, "k and v must be [1, 4, 6]", run(shape, {1, 4, 3}, {.heads = 2}, {8, 2}));
}

}  // namespace
}  // namespace weft::dist
