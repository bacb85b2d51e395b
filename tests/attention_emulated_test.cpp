// The choice between our own attention and cuDNN's where cuDNN is not as one would have it: emulated alone.
#include <gtest/gtest.h>

#include "core/backend.h"
#include "emulation.h"
#include "ops/attention.h"
#include "ops/attention_library.h"
#include "tests/error_of.h"
#include "tests/values.h"

namespace weft {
namespace {

class AttentionChoices : public ::testing::Test {
 protected:
  void SetUp() override { backend(kDevice); }
  void TearDown() override {
    weft_emulation::set_cudnn(true);
    use_attention(kDevice, AttentionChoice::flash);
  }
  static Tensor attend(int64_t tokens, int64_t head_size) {
    return causal_attention(testing::random({1, tokens, 3 * head_size}, DType::bf16, "qkv").to(kDevice), 1)
        .to(Device::cpu());
  }
  static constexpr int64_t kTokens = kAttentionAutomaticFrom;
  static inline const Device kDevice = Device::cuda();
};

TEST_F(AttentionChoices, WithoutCudnnAutomaticHasTheBitsOfOurOwnAndCudnnIsAnError) {
  const Tensor own = attend(kTokens, 16);
  weft_emulation::set_cudnn(false);
  EXPECT_ERROR(ErrorKind::kDevice, "cuDNN was asked for and cannot be had: the emulated cuDNN is put away",
               use_attention(kDevice, AttentionChoice::cudnn));
  use_attention(kDevice, AttentionChoice::automatic);
  const AttentionUse before = attention_use(kDevice);
  EXPECT_TRUE(testing::same_bits(attend(kTokens, 16), own));
  EXPECT_EQ(attention_use(kDevice).own, before.own + 1);
  EXPECT_EQ(attention_use(kDevice).why_own.back(), "the emulated cuDNN is put away");
}

TEST_F(AttentionChoices, AShapeWithoutAPlanIsOurOwnOrAnErrorInCudnnsWords) {
  const Tensor own = attend(kTokens, 136);
  use_attention(kDevice, AttentionChoice::automatic);
  EXPECT_TRUE(testing::same_bits(attend(kTokens, 136), own));
  EXPECT_NE(attention_use(kDevice).why_own.back().find("heads of at most 128 columns, got 136"), std::string::npos);
  use_attention(kDevice, AttentionChoice::cudnn);
  EXPECT_ERROR(ErrorKind::kDevice, "heads of at most 128 columns, got 136", attend(kTokens, 136));
}

TEST_F(AttentionChoices, NoPlanIsMadeWhileAStepIsRecorded) {
  use_attention(kDevice, AttentionChoice::cudnn);
  const Tensor qkv = testing::random({1, 24, 3 * 8}, DType::bf16, "qkv").to(kDevice);
  EXPECT_ERROR(ErrorKind::kState, "asks cuDNN for a plan of attention",
               backend(kDevice).capture([&] { causal_attention(qkv, 1); }));
  causal_attention(qkv, 1);
  EXPECT_NE(backend(kDevice).capture([&] { causal_attention(qkv, 1); }), nullptr);
}

}  // namespace
}  // namespace weft
