// Delayed scaling against the recipe written again: histories, scales, what is stored.
#include "optim/delayed_scaling.h"

#include <gtest/gtest.h>

#include <deque>
#include <limits>

#include "core/random.h"
#include "tests/error_of.h"
#include "tests/fp8_reference.h"

namespace weft::optim {
namespace {

using testing::error_of;

/// Writes what a step has seen into one tensor of a layer.
void see(DelayedScaling& scaling, size_t layer, int role, float amax, int64_t converted = 100, int64_t saturated = 0) {
  int64_t* words = scaling.layer(layer)->stats.data<int64_t>() + role * kFp8StatsWords;
  words[0] = std::bit_cast<uint32_t>(amax), words[1] = saturated, words[2] = converted;
}
float scale_of(const DelayedScaling& scaling, size_t layer, int role) {
  const float* both = scaling.layer(layer)->scales.data<float>() + role * kFp8ScaleFloats;
  EXPECT_EQ(both[0] * both[1], 1.0f) << "the inverse";
  return both[1];
}

TEST(DelayedScaling, ScalesFollowTheLargestAmaxOfSixteenSteps) {
  DelayedScaling scaling({"a", "b"}, Device::cpu());
  const RandomStream random(3, "amax");
  std::vector<std::deque<double>> history(6);
  for (uint64_t step = 0; step < 60; ++step) {
    scaling.begin_step();
    for (size_t i = 0; i < history.size(); ++i) {
      // Over 60 binades, with a spike now and then, so that the oldest entry often decides.
      const double power = random.uniform(2 * (6 * step + i)) * 60 - 30;
      const auto amax = static_cast<float>(std::exp2(power));
      see(scaling, i / 3, static_cast<int>(i % 3), amax);
      history[i].push_front(static_cast<double>(amax));
      if (history[i].size() > 16) history[i].pop_back();
    }
    scaling.update();
    for (size_t i = 0; i < history.size(); ++i) {
      const double most = *std::max_element(history[i].begin(), history[i].end());
      const Fp8Format format = i % 3 == 2 ? Fp8Format::kE5M2 : Fp8Format::kE4M3;
      ASSERT_EQ(scale_of(scaling, i / 3, static_cast<int>(i % 3)), testing::reference_scale(most, format))
          << "step " << step << ", tensor " << i << ", amax " << most;
    }
  }
  EXPECT_EQ(scaling.updates(), 60);
}

TEST(DelayedScaling, AScaleLeavesRoomForATensorToDouble) {
  for (const auto& [amax, e4m3, e5m2] :
       std::vector<std::tuple<float, float, float>>{{448.0f, 0.5f, 64},
                                                    {std::nextafter(448.0f, 1e9f), 0.25f, 32},
                                                    {1.0f, 128, 16384},
                                                    {1.75f, 128, 16384},
                                                    {1.7578125f, 64, 8192},
                                                    {57344.0f, 0x1p-8f, 0.5f},
                                                    {1e-38f, 0x1p63f, 0x1p63f},
                                                    {1e-45f, 0x1p63f, 0x1p63f},
                                                    {3e38f, 0x1p-63f, 0x1p-63f}}) {
    EXPECT_EQ(fp8_scale_for(amax, Fp8Format::kE4M3, 7), e4m3) << amax;
    EXPECT_EQ(fp8_scale_for(amax, Fp8Format::kE5M2, 7), e5m2) << amax;
  }
  for (const float none : {0.0f, std::numeric_limits<float>::infinity(), std::nanf("")})
    EXPECT_EQ(fp8_scale_for(none, Fp8Format::kE4M3, 7), 7);
}

TEST(DelayedScaling, ATensorThatWasNotSeenKeepsHistoryAndScale) {
  DelayedScaling scaling({"a"}, Device::cpu());
  scaling.begin_step();
  see(scaling, 0, 0, 2);
  see(scaling, 0, 1, 0);  // seen, and all zero
  scaling.update();
  EXPECT_EQ(scale_of(scaling, 0, 0), 64);
  EXPECT_EQ(scale_of(scaling, 0, 1), 1) << "no number to go by";
  for (int i = 0; i < 20; ++i) {
    scaling.begin_step();
    scaling.update();
  }
  EXPECT_EQ(scale_of(scaling, 0, 0), 64);
  EXPECT_EQ(scaling.state()[0].second.to_vector<float>()[0], 2);
}

TEST(DelayedScaling, CountsAddUpAndBeginAnew) {
  DelayedScaling scaling({"a", "b"}, Device::cpu());
  scaling.begin_step();
  see(scaling, 0, 0, 1, 100, 3);
  see(scaling, 1, 2, 1, 50, 4);
  EXPECT_EQ(scaling.counts().converted, 150);
  EXPECT_EQ(scaling.counts().saturated, 7);
  scaling.begin_step();
  EXPECT_EQ(scaling.counts().converted, 0);
  EXPECT_EQ(scaling.counts().saturated, 0);
}

TEST(DelayedScaling, AnInfinityIsAnErrorThatNamesTheTensor) {
  for (const float amax : {std::numeric_limits<float>::infinity(), std::nanf("")}) {
    DelayedScaling scaling({"h.0.attn.qkv", "h.0.mlp.fc"}, Device::cpu());
    scaling.begin_step();
    see(scaling, 1, 2, amax);
    const std::string message = error_of(ErrorKind::kValue, [&] { scaling.counts(); });
    EXPECT_NE(message.find("the gradient of \"h.0.mlp.fc\""), std::string::npos) << message;
  }
}

NamedTensors copy_of(const NamedTensors& tensors) {
  NamedTensors copy;
  for (const auto& [name, tensor] : tensors) copy.emplace_back(name, tensor.clone());
  return copy;
}

TEST(DelayedScaling, AStoredStateGoesOnWithTheSameBits) {
  DelayedScaling straight({"a", "b"}, Device::cpu()), again({"a", "b"}, Device::cpu());
  const auto step = [](DelayedScaling& scaling, float amax) {
    scaling.begin_step();
    for (size_t i = 0; i < 6; ++i) see(scaling, i / 3, static_cast<int>(i % 3), amax * static_cast<float>(i + 1));
    scaling.update();
  };
  for (int i = 0; i < 20; ++i) step(straight, static_cast<float>(40 - i));
  again.load_state(copy_of(straight.state()));
  EXPECT_TRUE(again.layer(0)->has_history);
  for (int i = 0; i < 20; ++i) {
    step(straight, static_cast<float>(i)), step(again, static_cast<float>(i));
    const NamedTensors a = straight.state(), b = again.state();
    ASSERT_EQ(a.size(), 5u);
    for (size_t t = 0; t < a.size(); ++t) {
      EXPECT_TRUE(DelayedScaling::owns(a[t].first));
      ASSERT_EQ(a[t].first, b[t].first);
      ASSERT_EQ(a[t].second.to_vector<double>(), b[t].second.to_vector<double>()) << a[t].first;
    }
  }
}

TEST(DelayedScaling, RefusesAStateThatIsNotItsOwnAndKeepsWhatItHas) {
  DelayedScaling scaling({"a"}, Device::cpu());
  const NamedTensors good = copy_of(scaling.state());
  const auto refused = [&](const char* part, const std::function<void(NamedTensors&)>& spoil) {
    NamedTensors state = copy_of(good);
    spoil(state);
    const std::string message = error_of(ErrorKind::kData, [&] { scaling.load_state(state); });
    EXPECT_NE(message.find(part), std::string::npos) << message;
  };
  refused("no tensor \"fp8.a.scale\"", [](NamedTensors& s) { s.erase(s.begin() + 1); });
  refused("two tensors", [](NamedTensors& s) { s.push_back(s[0]); });
  refused("that these layers do not have", [](NamedTensors& s) { s.emplace_back("fp8.b.scale", s[1].second); });
  refused("expected f32 [3, 16]", [](NamedTensors& s) { s[0].second = Tensor::zeros({3, 8}); });
  refused("power of two", [](NamedTensors& s) { s[1].second.fill_(3); });
  refused("power of two", [](NamedTensors& s) { s[1].second.fill_(0); });
  refused("power of two", [](NamedTensors& s) { s[1].second.fill_(-2); });
  refused("power of two", [](NamedTensors& s) { s[1].second.fill_(0x1p64); });
  refused("not negative", [](NamedTensors& s) { s[0].second.fill_(-1); });
  refused("not negative", [](NamedTensors& s) { s[0].second.fill_(INFINITY); });
  refused("fp8.updates", [](NamedTensors& s) { s[2].second.fill_(-1); });
  EXPECT_EQ(scaling.updates(), 0);
  EXPECT_EQ(scale_of(scaling, 0, 0), 1);
}

}  // namespace
}  // namespace weft::optim
