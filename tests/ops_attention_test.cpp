#include "ops/attention.h"

#include <gtest/gtest.h>
#include <hwy/highway.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "core/autograd.h"
#include "core/memory.h"
#include "core/random.h"
#include "core/thread_pool.h"
#include "ops/gemm.h"
#include "tests/error_of.h"
#include "tests/values.h"

namespace weft {
namespace {

using testing::distance;
using testing::random;
using testing::Values;

std::string bytes_of(const Tensor& x) {
  return {static_cast<const char*>(x.raw()), static_cast<size_t>(x.numel() * size_of(x.dtype()))};
}

/// Causal attention and its gradient by the textbook's loops in f64: no tile, no vector, no exponential of ours.
struct Loops {
  int64_t batch, tokens, heads, head_size;
  Values y, dqkv;

  Loops(const Tensor& qkv_, const Tensor& dy_, int64_t heads_)
      : batch(qkv_.size(0)), tokens(qkv_.size(1)), heads(heads_), head_size(qkv_.size(2) / 3 / heads_) {
    const Values qkv = qkv_.to_vector<double>(), dy = dy_.to_vector<double>();
    y.assign(dy.size(), 0);
    dqkv.assign(qkv.size(), 0);
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t i = 0; i < tokens; ++i) row(qkv, dy, b, h, i);
      }
    }
  }

 private:
  size_t packed(int64_t b, int64_t t, int64_t part, int64_t h) const {
    return static_cast<size_t>(((b * tokens + t) * 3 + part) * heads * head_size + h * head_size);
  }
  size_t out(int64_t b, int64_t t, int64_t h) const {
    return static_cast<size_t>((b * tokens + t) * heads * head_size + h * head_size);
  }

  void row(const Values& qkv, const Values& dy, int64_t b, int64_t h, int64_t i) {
    const auto columns = static_cast<size_t>(head_size);
    const double scale = 1 / std::sqrt(static_cast<double>(head_size));
    Values p(static_cast<size_t>(i + 1)), dp(p.size());
    double high = -INFINITY, sum = 0, delta = 0;
    const double* q = &qkv[packed(b, i, 0, h)];
    const double* g = &dy[out(b, i, h)];
    for (size_t j = 0; j < p.size(); ++j) {
      const double* k = &qkv[packed(b, static_cast<int64_t>(j), 1, h)];
      for (size_t c = 0; c < columns; ++c) p[j] += q[c] * k[c] * scale;
      high = std::max(high, p[j]);
    }
    for (double& value : p) sum += value = std::exp(value - high);
    for (size_t j = 0; j < p.size(); ++j) {
      p[j] /= sum;
      const double* v = &qkv[packed(b, static_cast<int64_t>(j), 2, h)];
      for (size_t c = 0; c < columns; ++c) {
        y[out(b, i, h) + c] += p[j] * v[c];
        dqkv[packed(b, static_cast<int64_t>(j), 2, h) + c] += p[j] * g[c];
        dp[j] += g[c] * v[c];
      }
      delta += p[j] * dp[j];
    }
    for (size_t j = 0; j < p.size(); ++j) {
      const double ds = p[j] * (dp[j] - delta) * scale;
      for (size_t c = 0; c < columns; ++c) {
        dqkv[packed(b, i, 0, h) + c] += ds * qkv[packed(b, static_cast<int64_t>(j), 1, h) + c];
        dqkv[packed(b, static_cast<int64_t>(j), 1, h) + c] += ds * q[c];
      }
    }
  }
};

struct Case {
  int64_t batch, tokens, heads, head_size;
};

/// Distances of the result and of the gradient from the loops.
std::pair<double, double> compare(const Case& c, DType dtype) {
  const int64_t channels = c.heads * c.head_size;
  const Tensor qkv = random({c.batch, c.tokens, 3 * channels}, dtype, "qkv").requires_grad_();
  const Tensor dy = random({c.batch, c.tokens, channels}, dtype, "dy", -1, 1);
  const Tensor y = causal_attention(qkv, c.heads);
  y.backward(dy);
  const Loops want(qkv, dy, c.heads);
  return {distance(y, want.y), distance(qkv.grad(), want.dqkv)};
}

TEST(Attention, AgreesWithLoopsInF64) {
  for (const Case& c : {Case{1, 1, 1, 1},
                        {2, 5, 3, 8},
                        {1, 63, 2, 7},
                        {1, 64, 1, 16},
                        {1, 65, 2, 17},
                        {1, 200, 2, 33},
                        {3, 131, 1, 64}}) {
    const auto [y, dqkv] = compare(c, DType::f64);
    // Roundings of 1e-16, of scores up to 100, in sums of 200 terms.
    EXPECT_LT(y, 1e-12) << c.tokens << " tokens, head size " << c.head_size;
    EXPECT_LT(dqkv, 1e-11) << c.tokens << " tokens, head size " << c.head_size;
  }
}

TEST(Attention, AgreesWithLoopsInF32AtSizesAroundATile) {
  for (const Case& c :
       {Case{1, 1, 2, 64}, {2, 4, 2, 32}, {1, 5, 2, 16}, {1, 64, 2, 64}, {1, 129, 1, 80}, {2, 200, 3, 64}}) {
    const auto [y, dqkv] = compare(c, DType::f32);
    // A score is a sum of up to 80 products below 4, rounded at 6e-8; its error is a relative error of a weight.
    EXPECT_LT(y, 1e-5) << c.tokens << " tokens, head size " << c.head_size;
    EXPECT_LT(dqkv, 3e-5) << c.tokens << " tokens, head size " << c.head_size;
  }
}

TEST(Attention, RoundsHalfPrecisionOnce) {
  ASSERT_TRUE(set_gemm_isa("portable"));  // no pairs of bfloat16
  for (const DType dtype : {DType::bf16, DType::f16}) {
    for (const Case& c : {Case{1, 3, 2, 16}, {2, 70, 2, 32}, {1, 130, 1, 24}}) {
      const auto [y, dqkv] = compare(c, dtype);
      // Half a unit in the last place is 2^-9 (bf16), 2^-12 (f16). The gradient has y, rounded once, in it: delta = dy
      // . y.
      const double unit = dtype == DType::bf16 ? std::ldexp(1, -8) : std::ldexp(1, -11);
      EXPECT_LT(y, 0.55 * unit) << dtype << ", " << c.tokens << " tokens";
      EXPECT_LT(dqkv, 4 * unit) << dtype << ", " << c.tokens << " tokens";
    }
  }
  set_gemm_isa("");
}

TEST(Attention, RoundsWeightsOnceMoreWhereBfloat16IsMultipliedInPairs) {
  if (!set_gemm_isa("avx512bf16")) GTEST_SKIP() << "this machine or build has no avx512bf16";
  // Tokens and head sizes around a tile, odd ones among them: half pairs, rows in place and copied.
  for (const Case& c : {Case{1, 5, 2, 16},
                        {1, 63, 2, 7},
                        {1, 64, 1, 16},
                        {1, 65, 2, 17},
                        {2, 70, 2, 32},
                        {1, 130, 1, 24},
                        {1, 200, 2, 33},
                        {3, 131, 1, 64}}) {
    const auto [y, dqkv] = compare(c, DType::bf16);
    // Weights, of sum 1, err by half a unit each, and meet values of up to 2; then y is rounded. The gradient has
    // products of such weights in it.
    const double unit = std::ldexp(1, -8);
    EXPECT_LT(y, 1.55 * unit) << c.tokens << " tokens, head size " << c.head_size;
    EXPECT_LT(dqkv, 4 * unit) << c.tokens << " tokens, head size " << c.head_size;
  }
  set_gemm_isa("");
}

TEST(Attention, InPairsOfBfloat16EveryQuerySeesALastOddKey) {
  if (!set_gemm_isa("avx512bf16")) GTEST_SKIP() << "this machine or build has no avx512bf16";
  AttentionOptions all;
  all.causal = false;
  for (const int64_t queries : {11, 64, 75}) {
    for (const int64_t keys : {1, 11, 63, 64, 75, 83, 139}) {
      const Tensor dy = random({1, queries, 16}, DType::bf16, "dy");
      const auto run = [&](DType dtype) {
        const auto input = [&](const char* name, int64_t tokens) {
          return testing::leaf(random({1, tokens, 16}, DType::bf16, name).to(dtype));
        };
        const Tensor q = input("q", queries), k = input("k", keys), v = input("v", keys);
        const Tensor y = attention(q, k, v, all);
        y.backward(dy.to(dtype));
        return std::vector<Tensor>{y.detach(), q.grad(), k.grad(), v.grad()};
      };
      const std::vector<Tensor> got = run(DType::bf16), want = run(DType::f64);
      for (size_t i = 0; i < want.size(); ++i) {
        // As above; dk and dv are sums over up to 75 queries of products of weights that err by half a unit.
        EXPECT_LT(distance(got[i], want[i].to_vector<double>()), (i == 0 ? 1.55 : 8) * std::ldexp(1, -8))
            << "result " << i << ", " << queries << " queries, " << keys << " keys";
      }
    }
  }
  set_gemm_isa("");
}

TEST(Attention, EveryInstructionSetAgreesWithTheLoops) {
  const int64_t supported = hwy::SupportedTargets();
  for (const int64_t target : {HWY_AVX3, HWY_AVX2, HWY_STATIC_TARGET}) {
    if ((supported & target) == 0) continue;
    hwy::SetSupportedTargetsForTest(target | HWY_STATIC_TARGET);
    for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16}) {
      for (const Case& c : {Case{1, 2, 2, 16}, {1, 70, 2, 24}}) {
        const auto [y, dqkv] = compare(c, dtype);
        const double tolerance = dtype == DType::f64 ? 1e-12 : dtype == DType::f32 ? 1e-5 : 2e-2;
        EXPECT_LT(y, tolerance) << hwy::TargetName(target) << ' ' << dtype;
        EXPECT_LT(dqkv, 3 * tolerance) << hwy::TargetName(target) << ' ' << dtype;
      }
    }
  }
  hwy::SetSupportedTargetsForTest(0);
}

TEST(Attention, GivesTheSameBitsOnAnyNumberOfThreads) {
  const int before = num_threads();
  for (const DType dtype : {DType::f32, DType::bf16}) {
    // Many heads, few heads whose queries are dealt out, and few queries.
    for (const Case& c : {Case{4, 64, 8, 16}, {1, 500, 1, 24}, {2, 200, 3, 32}, {2, 3, 4, 8}}) {
      const Tensor qkv = random({c.batch, c.tokens, 3 * c.heads * c.head_size}, dtype, "qkv");
      const Tensor dy = random({c.batch, c.tokens, c.heads * c.head_size}, dtype, "dy");
      std::vector<std::string> first;
      for (const int threads : {1, 2, 3}) {
        set_num_threads(threads);
        const Tensor leaf = qkv.clone().requires_grad_();
        const Tensor y = causal_attention(leaf, c.heads);
        y.backward(dy);
        const std::vector<std::string> bytes = {bytes_of(y), bytes_of(leaf.grad())};
        if (threads == 1) first = bytes;
        EXPECT_TRUE(bytes == first) << dtype << ", " << threads << " threads, " << c.tokens << " tokens";
      }
    }
  }
  set_num_threads(before);
}

/// Most bytes held at once during a forward and backward pass over one head.
int64_t peak_bytes(int64_t tokens) {
  Allocator& memory = allocator(Device::cpu());
  const int64_t before = memory.statistics().total.current;
  memory.reset_peak();
  const Tensor qkv = random({1, tokens, 3 * 32}, DType::f32, "qkv").requires_grad_();
  const Tensor y = causal_attention(qkv, 1);
  y.backward(Tensor::ones(y.shape()));
  return memory.statistics().total.peak - before;
}

TEST(Attention, MemoryGrowsWithTheTokensNotWithTheirSquare) {
  // Eight times the tokens; blocks of the allocator and the number of parts that the backward pass is dealt out to make
  // up the rest. One matrix of scores alone would hold 64 times as much.
  const int64_t small = peak_bytes(1024), large = peak_bytes(8192);
  EXPECT_LT(large, 10 * small);
  EXPECT_LT(large, int64_t{8192} * 8192 * 4 / 4);
}

TEST(Attention, ASecondPassAsksTheSystemForNothing) {
  const Tensor qkv = random({2, 300, 3 * 32}, DType::f32, "qkv").requires_grad_();
  const auto pass = [&] {
    qkv.clear_grad();
    const Tensor y = causal_attention(qkv, 2);
    y.backward(Tensor::ones(y.shape()));
  };
  pass();
  pass();
  const int64_t before = allocator(Device::cpu()).statistics().system_allocations;
  pass();
  EXPECT_EQ(allocator(Device::cpu()).statistics().system_allocations, before);
}

TEST(Attention, TheFutureDoesNotReachThePast) {
  const Tensor qkv = random({1, 150, 3 * 16}, DType::f32, "qkv");
  Tensor changed = qkv.clone();
  for (const int64_t first : {1, 64, 100}) {
    changed.copy_(qkv);
    changed.narrow(1, first, 150 - first).fill_(1e3);
    const Tensor y = causal_attention(qkv, 2).narrow(1, 0, first),
                 y_changed = causal_attention(changed, 2).narrow(1, 0, first);
    EXPECT_EQ(bytes_of(y.clone()), bytes_of(y_changed.clone())) << "change at token " << first;
  }
}

TEST(Attention, ACacheGivesWhatTheWholeSequenceGives) {
  constexpr int64_t kTokens = 90, kHeads = 2, kChannels = 32;
  const Tensor qkv = random({2, kTokens, 3 * kChannels}, DType::f32, "qkv");
  const std::vector<Tensor> parts = qkv.split(kChannels, -1);
  const Values whole = causal_attention(qkv, kHeads).to_vector<double>();
  for (const int64_t step : {1, 3, 7, 90}) {
    std::vector<Tensor> pieces;
    for (int64_t at = 0; at < kTokens; at += step) {
      const int64_t count = std::min(step, kTokens - at);
      pieces.push_back(attention(parts[0].narrow(1, at, count), parts[1].narrow(1, 0, at + count),
                                 parts[2].narrow(1, 0, at + count), {.heads = kHeads, .query_offset = at}));
    }
    // Sums of up to 90 terms in another order.
    EXPECT_LT(distance(cat(pieces, 1), whole), 5e-6) << step << " tokens at a time";
  }
}

TEST(Attention, PackedAndSeparateGiveTheSameBits) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const Tensor qkv = random({2, 70, 3 * 24}, dtype, "qkv").requires_grad_();
    const Tensor dy = random({2, 70, 24}, dtype, "dy");
    const std::vector<Tensor> parts = qkv.split(24, -1);
    const Tensor packed = causal_attention(qkv, 3), separate = attention(parts[0], parts[1], parts[2], {.heads = 3});
    EXPECT_EQ(bytes_of(packed), bytes_of(separate));
    const Tensor a = autograd::gradients({packed}, {qkv}, {dy})[0], b = autograd::gradients({separate}, {qkv}, {dy})[0];
    EXPECT_EQ(bytes_of(a.contiguous()), bytes_of(b.contiguous()));
  }
}

TEST(Attention, HugeScoresDoNotOverflow) {
  for (const int64_t tokens : {3, 100}) {
    const Tensor qkv = (random({1, tokens, 3 * 16}, DType::f32, "qkv", -1e4, 1e4)).requires_grad_();
    const Tensor y = causal_attention(qkv, 1);
    y.backward(Tensor::ones(y.shape()));
    for (const double value : y.to_vector<double>()) ASSERT_LE(std::abs(value), 1e4 * (1 + 1e-6));
    for (const double value : qkv.grad().to_vector<double>()) ASSERT_TRUE(std::isfinite(value));
  }
}

TEST(Attention, ANaNReachesEveryQueryThatSeesItAndNoOther) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16}) {
    for (const int64_t tokens : {4, 100}) {
      for (const double value : {nan, -nan}) {  // both signs: exponent arithmetic treats them differently
        const Tensor qkv = random({1, tokens, 3 * 16}, dtype, "qkv");
        qkv.select(1, 2).narrow(1, 16, 1).fill_(value);  // a key's first element
        const Tensor y = causal_attention(qkv, 1);
        for (int64_t i = 0; i < tokens; ++i) {
          for (const double got : y.select(1, i).to_vector<double>()) {
            ASSERT_EQ(std::isnan(got), i >= 2) << "query " << i << " of " << tokens << ", " << dtype;
          }
        }
      }
    }
  }
}

TEST(Attention, NothingIsReadOutsideTheTensors) {
  // Columns around the packed ones and tokens after the cache's are NaN: they must not be seen.
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const int64_t head_size : {5, 16, 22}) {
      for (const int64_t tokens : {2, 37, 70}) {
        const int64_t channels = 2 * head_size;
        const Tensor buffer = Tensor::full({2, tokens + 3, channels + 7}, nan, dtype);
        Tensor x = buffer.narrow(1, 1, tokens).narrow(2, 3, channels);
        x.copy_(random({2, tokens, channels}, dtype, "x"));
        const Tensor plain = x.contiguous();
        Tensor leaf = x.detach().requires_grad_(), plain_leaf = plain.detach().requires_grad_();
        const Tensor y = attention(leaf, leaf, leaf, {.heads = 2}),
                     want = attention(plain_leaf, plain_leaf, plain_leaf, {.heads = 2});
        EXPECT_EQ(bytes_of(y), bytes_of(want));
        for (const double value : y.to_vector<double>()) ASSERT_TRUE(std::isfinite(value));
        y.backward(Tensor::ones(y.shape(), dtype));
        want.backward(Tensor::ones(y.shape(), dtype));
        EXPECT_EQ(bytes_of(leaf.grad().contiguous()), bytes_of(plain_leaf.grad().contiguous()));
      }
    }
  }
}

TEST(Attention, RefusesWhatDoesNotFit) {
  const Tensor qkv = Tensor::zeros({2, 5, 24});
  EXPECT_ERROR(ErrorKind::kShape, "[causal_attention] heads must divide C: qkv is f32 [2, 5, 24], so C = 8; heads = 3",
               causal_attention(qkv, 3));
  EXPECT_ERROR(ErrorKind::kValue, "heads must be at least 1, got 0", causal_attention(qkv, 0));
  EXPECT_ERROR(ErrorKind::kShape, "qkv must be [B, T, 3 C], got f32 [2, 5, 8]",
               causal_attention(qkv.narrow(2, 0, 8), 2));
  EXPECT_ERROR(ErrorKind::kShape, "qkv must be [B, T, 3 C]", causal_attention(qkv.select(0, 0), 2));
  EXPECT_ERROR(ErrorKind::kDType, "[causal_attention] takes f32, f64, f16 or bf16, got i64",
               causal_attention(qkv.to(DType::i64), 2));

  const Tensor q = Tensor::zeros({2, 5, 24}), k = Tensor::zeros({2, 7, 12});
  const AttentionOptions grouped = {.heads = 4, .kv_heads = 2};
  EXPECT_EQ(attention(q, k, k, grouped).shape(), (Shape{2, 5, 24}));
  EXPECT_ERROR(ErrorKind::kShape, "q is f32 [2, 5, 24] with 4 heads of 6, k is f32 [2, 7, 12] with 4 heads of 3",
               attention(q, k, k, {.heads = 4}));
  EXPECT_ERROR(ErrorKind::kValue, "kv_heads must divide heads, got kv_heads = 3 and heads = 4",
               attention(q, k, k, {.heads = 4, .kv_heads = 3}));
  EXPECT_ERROR(ErrorKind::kValue, "at least 1, got 4 and -1", attention(q, k, k, {.heads = 4, .kv_heads = -1}));
  EXPECT_ERROR(ErrorKind::kShape, "q must be [B, T, heads * D] or [B, heads, T, D] with 5 heads",
               attention(q, k, k, {.heads = 5}));
  EXPECT_ERROR(ErrorKind::kShape, "k and v must have the same shape", attention(q, k, k.narrow(1, 0, 6), grouped));
  EXPECT_ERROR(ErrorKind::kShape, "same number of dimensions, batch",
               attention(q, k.narrow(0, 0, 1), k.narrow(0, 0, 1), grouped));
  EXPECT_ERROR(ErrorKind::kShape, "there must be a key to attend to",
               attention(q, k.narrow(1, 0, 0), k.narrow(1, 0, 0), grouped));
  EXPECT_ERROR(ErrorKind::kDType, "dtypes must be equal", attention(q, k.to(DType::f64), k, grouped));
  EXPECT_ERROR(ErrorKind::kValue, "query_offset must not be negative, got -1",
               attention(q, k, k, {.heads = 4, .kv_heads = 2, .query_offset = -1}));
  EXPECT_ERROR(ErrorKind::kValue, "scale must be finite",
               attention(q, k, k, {.heads = 4, .kv_heads = 2, .scale = INFINITY}));
}

TEST(Attention, PartsThatDoNotFitAreNamed) {
  const Tensor q = Tensor::zeros({1, 5, 4, 8}), k = Tensor::zeros({1, 7, 2, 8}), lse = Tensor::zeros({1, 4, 5});
  const auto part = [&](const Tensor& keys, const AttentionPart& how, const Tensor& out, const Tensor& sums) {
    attention_part(q, keys, keys, how, out, sums);
  };
  EXPECT_ERROR(ErrorKind::kShape, "kv_heads dividing H", part(Tensor::zeros({1, 7, 3, 8}), {}, q.clone(), lse));
  EXPECT_ERROR(ErrorKind::kValue, "query_offset must not be negative, got -1",
               part(k, {.causal = true, .query_offset = -1}, q.clone(), lse));
  EXPECT_ERROR(ErrorKind::kShape, "lse must be row-major f32 [B, H, Tq]",
               part(k, {}, q.clone(), Tensor::zeros({4, 5})));
  EXPECT_ERROR(ErrorKind::kShape, "out must be f32 [1, 5, 4, 8]", part(k, {}, q.to(DType::f64), lse));
  EXPECT_ERROR(ErrorKind::kShape, "unit stride",
               part(Tensor::zeros({1, 7, 2, 16}).slice(3, 0, 16, 2), {}, q.clone(), lse));
  EXPECT_ERROR(ErrorKind::kShape, "the first part must have a key",
               part(Tensor::zeros({1, 0, 2, 8}), {}, q.clone(), lse));
  EXPECT_ERROR(ErrorKind::kShape, "dk must be f32 [1, 7, 2, 8]",
               attention_part_backward(q, k, k, {}, q, lse, q, q.clone(), q.clone(), k.clone()));
}

TEST(Attention, AQueryMayStandFarBeyondTheKeys) {
  const Tensor q = random({1, 5, 8}, DType::f32, "q"), k = random({1, 6, 8}, DType::f32, "k");
  const Tensor far = attention(q, k, k, {.heads = 1, .query_offset = std::numeric_limits<int64_t>::max()});
  EXPECT_EQ(bytes_of(far), bytes_of(attention(q, k, k, {.heads = 1, .causal = false})));
}

}  // namespace
}  // namespace weft
