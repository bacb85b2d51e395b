// Attention by cuDNN against the definition in f64 and against our own kernels. Runs on a real device with cuDNN and on
// the emulated one, whose cuDNN is a few loops.
#include <gtest/gtest.h>

#include <cmath>

#include "core/autograd.h"
#include "core/backend.h"
#include "models/trainer.h"
#include "ops/attention.h"
#include "ops/attention_library.h"
#include "optim/adam.h"
#include "tests/error_of.h"
#include "tests/values.h"

namespace weft {
namespace {

using testing::error_of;
using testing::random;
using testing::Values;

class CudnnAttention : public ::testing::Test {
 protected:
  void SetUp() override {
    if (*why_no_cuda() != '\0') GTEST_SKIP() << why_no_cuda();
    try {
      use_attention(Device::cuda(), AttentionChoice::cudnn);
    } catch (const Error& error) {
      GTEST_SKIP() << error.what();
    }
    before_ = attention_use(Device::cuda());
  }
  void TearDown() override {
    if (*why_no_cuda() == '\0') use_attention(Device::cuda(), AttentionChoice::flash);
  }
  static void use(AttentionChoice choice) { use_attention(Device::cuda(), choice); }
  int64_t by_cudnn() const { return attention_use(Device::cuda()).cudnn - before_.cudnn; }
  int64_t by_own() const { return attention_use(Device::cuda()).own - before_.own; }

  AttentionUse before_;
};

/// The result and the gradients of a call.
struct Result {
  Tensor y;
  std::vector<Tensor> gradients;
};

bool operator==(const Result& a, const Result& b) {
  bool same = testing::same_bits(a.y, b.y);
  for (size_t i = 0; i < a.gradients.size(); ++i) same = same && testing::same_bits(a.gradients[i], b.gradients[i]);
  return same;
}

Result call(const std::vector<Tensor>& inputs, const std::function<Tensor(const std::vector<Tensor>&)>& f,
            const Tensor& dy, AttentionChoice forward = AttentionChoice::cudnn,
            AttentionChoice backward = AttentionChoice::cudnn, Device device = Device::cuda()) {
  std::vector<Tensor> leaves;
  for (const Tensor& each : inputs) leaves.push_back(each.to(device).requires_grad_());
  if (device.kind == DeviceKind::cuda) use_attention(device, forward);
  const Tensor y = f(leaves);
  if (device.kind == DeviceKind::cuda) use_attention(device, backward);
  Result result{y.detach().to(Device::cpu()), {}};
  for (const Tensor& each : autograd::gradients({y}, leaves, {dy.to(device)}))
    result.gradients.push_back(each.to(Device::cpu()));
  return result;
}

/// Weights, results and gradients are rounded to the dtype, of 8 bits in bf16 and 11 in f16: a weight and the result
/// are off by half a unit each, sums over weights by less; gradients by the same of the larger sums on their way. The
/// bound is four units of 1 + |want|.
double bound_of(DType dtype) { return dtype == DType::bf16 ? 4 * 0x1p-8 : 4 * 0x1p-11; }

void expect_near(const Result& got, const Result& want, double bound) {
  EXPECT_LE(testing::distance(got.y, want.y.to_vector<double>()), bound);
  ASSERT_EQ(got.gradients.size(), want.gradients.size());
  for (size_t i = 0; i < got.gradients.size(); ++i)
    EXPECT_LE(testing::distance(got.gradients[i], want.gradients[i].to_vector<double>()), bound) << "gradient " << i;
}

struct Shape3 {
  int64_t batch, tokens, heads, head_size;
};

Tensor packed(const Shape3& s, DType dtype) {
  return random({s.batch, s.tokens, 3 * s.heads * s.head_size}, dtype, "qkv", -1, 1);
}
Tensor cotangent(const Shape3& s, DType dtype) {
  return random({s.batch, s.tokens, s.heads * s.head_size}, dtype, "dy", -1, 1);
}
std::function<Tensor(const std::vector<Tensor>&)> causal(int64_t heads) {
  return [heads](const std::vector<Tensor>& in) { return causal_attention(in[0], heads); };
}

TEST_F(CudnnAttention, MatchesTheDefinitionForwardAndBackward) {
  for (const DType dtype : {DType::bf16, DType::f16}) {
    for (const Shape3& s : {Shape3{2, 70, 3, 64}, Shape3{1, 128, 2, 16}, Shape3{1, 33, 2, 128}}) {
      const Tensor qkv = packed(s, dtype), dy = cotangent(s, dtype);
      const Result want = call({qkv.to(DType::f64)}, causal(s.heads), dy.to(DType::f64), {}, {}, Device::cpu());
      expect_near(call({qkv}, causal(s.heads), dy), want, bound_of(dtype));
    }
  }
  EXPECT_EQ(by_cudnn(), 12);
  EXPECT_EQ(by_own(), 0);
}

TEST_F(CudnnAttention, TakesGroupedQueriesAllKeysAndAScale) {
  const Tensor q = random({2, 48, 4 * 32}, DType::bf16, "q", -1, 1),
               k = random({2, 48, 2 * 32}, DType::bf16, "k", -1, 1),
               v = random({2, 48, 2 * 32}, DType::bf16, "v", -1, 1),
               dy = random({2, 48, 4 * 32}, DType::bf16, "dy", -1, 1);
  for (const bool causal : {true, false}) {
    const auto f = [causal](const std::vector<Tensor>& in) {
      return attention(in[0], in[1], in[2], {.heads = 4, .kv_heads = 2, .causal = causal, .scale = 0.3});
    };
    const Result want =
        call({q.to(DType::f64), k.to(DType::f64), v.to(DType::f64)}, f, dy.to(DType::f64), {}, {}, Device::cpu());
    // A gradient of a key is a sum over 48 queries of two heads, whose roundings add up.
    expect_near(call({q, k, v}, f, dy), want, 2 * bound_of(DType::bf16));
  }
  EXPECT_EQ(by_cudnn(), 4);
}

TEST_F(CudnnAttention, EitherDoesTheBackwardPassOfTheOther) {
  const Shape3 s{2, 70, 3, 64};
  const Tensor qkv = packed(s, DType::f16), dy = cotangent(s, DType::f16);
  const Result want = call({qkv.to(DType::f64)}, causal(s.heads), dy.to(DType::f64), {}, {}, Device::cpu());
  expect_near(call({qkv}, causal(s.heads), dy, AttentionChoice::flash, AttentionChoice::cudnn), want,
              bound_of(DType::f16));
  expect_near(call({qkv}, causal(s.heads), dy, AttentionChoice::cudnn, AttentionChoice::flash), want,
              bound_of(DType::f16));
  EXPECT_EQ(by_cudnn(), 2);
  EXPECT_EQ(by_own(), 2);
}

TEST_F(CudnnAttention, HasTheSameBitsEveryTime) {
  const Shape3 s{2, 200, 4, 64};
  const Tensor qkv = packed(s, DType::bf16), dy = cotangent(s, DType::bf16);
  const Result first = call({qkv}, causal(s.heads), dy);
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(call({qkv}, causal(s.heads), dy) == first);
}

TEST_F(CudnnAttention, IsRefusedByNameWhereItWasAskedForAndIsNotForThat) {
  const auto run = [](const Tensor& qkv, int64_t heads) { return causal_attention(qkv.to(Device::cuda()), heads); };
  const std::string f32 = error_of(ErrorKind::kDevice, [&] { run(packed({1, 8, 2, 16}, DType::f32), 2); });
  EXPECT_NE(f32.find("cuDNN's attention is for f16 and bf16, this is in f32"), std::string::npos) << f32;
  EXPECT_NE(f32.find("--attention auto"), std::string::npos) << f32;
  EXPECT_ERROR(ErrorKind::kDevice, "in steps of 16 bytes; heads are of 12 columns",
               run(packed({1, 8, 2, 12}, DType::bf16), 2));
  const Tensor q = Tensor::zeros({1, 8, 2, 16}, DType::bf16, Device::cuda());
  const Tensor out = Tensor::zeros({1, 8, 2, 16}, DType::f32, Device::cuda()),
               lse = Tensor::zeros({1, 2, 8}, DType::f32, Device::cuda());
  EXPECT_ERROR(ErrorKind::kDevice, "keys come in parts", attention_part(q, q, q, {.causal = true}, out, lse));
  EXPECT_EQ(by_cudnn() + by_own(), 0);
}

TEST_F(CudnnAttention, AutomaticTakesLongSequencesInSixteenBitsAndSaysWhyNotOthers) {
  use(AttentionChoice::automatic);
  const auto run = [](int64_t tokens, int64_t head_size, DType dtype) {
    causal_attention(packed({1, tokens, 1, head_size}, dtype).to(Device::cuda()), 1);
  };
  run(kAttentionAutomaticFrom, 64, DType::bf16);
  EXPECT_EQ(by_cudnn(), 1);
  run(kAttentionAutomaticFrom - 1, 64, DType::bf16);
  run(kAttentionAutomaticFrom, 64, DType::f32);
  run(kAttentionAutomaticFrom, 12, DType::bf16);
  EXPECT_EQ(by_cudnn(), 1);
  EXPECT_EQ(by_own(), 3);
  const std::vector<std::string> why = attention_use(Device::cuda()).why_own;
  const auto said = [&](const char* part) {
    for (const std::string& each : why) {
      if (each.find(part) != std::string::npos) return true;
    }
    return false;
  };
  EXPECT_TRUE(said("fewer than 128 tokens"));
  EXPECT_TRUE(said("this is in f32"));
  EXPECT_TRUE(said("heads are of 12 columns"));
}

TEST_F(CudnnAttention, NewTokensOverACacheAreAlwaysOurOwn) {
  const Tensor q = random({1, 3, 32}, DType::bf16, "q"), k = random({1, 12, 32}, DType::bf16, "k");
  const Tensor device_k = k.to(Device::cuda());
  attention(q.to(Device::cuda()), device_k, device_k, {.heads = 2, .query_offset = 9});
  EXPECT_EQ(by_cudnn() + by_own(), 0);
}

TEST_F(CudnnAttention, IsDescribedForAShapeBeforeItRuns) {
  AttentionShape shape{.batch = 2, .heads = 2, .kv_heads = 2};
  shape.queries = shape.keys = 256, shape.head_size = 64, shape.scale = 0.125;
  const Device device = Device::cuda();
  EXPECT_TRUE(describe_attention(device, shape, DType::bf16).starts_with("cuDNN "));
  use(AttentionChoice::automatic);
  EXPECT_TRUE(describe_attention(device, shape, DType::bf16).starts_with("cuDNN "));
  EXPECT_EQ(describe_attention(device, shape, DType::f32),
            "our own kernels: cuDNN's attention is for f16 and bf16, this is in f32");
  use(AttentionChoice::flash);
  EXPECT_EQ(describe_attention(device, shape, DType::bf16), "our own kernels");
}

/// Losses and norms of a few steps of a small GPT, and its weights.
std::vector<Values> training(models::GraphUse graph, AttentionChoice choice) {
  use_attention(Device::cuda(), choice);
  models::Gpt gpt({.layers = 2, .heads = 2, .width = 32, .context = 16, .vocab = 37}, Device::cuda(), 1, DType::bf16);
  optim::Adam adam(gpt.parameters(), {.weight_decay = 0.1, .clip_norm = 0.5});
  std::vector<int32_t> tokens(500);
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int32_t>(RandomStream(5, "tokens").below(i, 37));
  text::Loader loader(std::make_shared<text::TokenVector>(tokens, 37),
                      {.batch = 2, .context = 16, .seed = 2, .prefetch = 0});
  models::Trainer trainer(gpt, adam, loader, {.peak = 1e-2, .warmup = 3, .total = 20}, 1);
  trainer.use_graph(graph);
  std::vector<Values> all;
  for (int i = 0; i < 6; ++i) {
    const models::StepMetrics m = trainer.step();
    all.push_back({m.loss, m.grad_norm});
  }
  for (const auto& [name, tensor] : gpt.named_tensors()) all.push_back(tensor.to_vector<double>());
  return all;
}

TEST_F(CudnnAttention, TrainsWithTheSameBitsRecordedOrNotAndNearOurOwn) {
  const std::vector<Values> called = training(models::GraphUse::off, AttentionChoice::cudnn);
  EXPECT_EQ(by_cudnn(), 6 * 2 * 2);
  EXPECT_EQ(by_own(), 0);
  EXPECT_EQ(training(models::GraphUse::on, AttentionChoice::cudnn), called);
  const std::vector<Values> own = training(models::GraphUse::off, AttentionChoice::flash);
  // Losses are near ln 37 and in f32; bf16 results of attention differ in their last bit here and there.
  for (size_t i = 0; i < 6; ++i) EXPECT_NEAR(called[i][0], own[i][0], 0.02) << "step " << i;
}

}  // namespace
}  // namespace weft
