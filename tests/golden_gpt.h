#pragma once
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "core/safetensors.h"
#include "models/gpt.h"
#include "optim/adam.h"

namespace weft::models {

inline constexpr int kSteps = 10;

/// The tiny GPT-2 of tests/golden with the weights, tokens and steps that PyTorch had.
struct Golden {
  Device device;
  SafetensorsFile file{WEFT_SOURCE_DIR "/tests/golden/tiny_gpt2.safetensors"};
  Gpt gpt;
  Tensor inputs = file.load("inputs").to(device), targets = file.load("targets").to(device);
  std::vector<double> loss = file.load("loss").to_vector<double>(), norm = file.load("grad_norm").to_vector<double>(),
                      lr = file.load("lr").to_vector<double>();

  explicit Golden(Device on = Device::cpu(), DType dtype = DType::f32)
      : device(on), gpt({.layers = 2, .heads = 2, .width = 16, .context = 12, .vocab = 29}, on, 0, dtype) {
    NamedTensors tensors;
    for (const Parameter& parameter : gpt.parameters())
      tensors.emplace_back(parameter.name, file.load("init." + parameter.name).to(dtype));
    gpt.load(tensors);
    // Behind the weights, of which it may keep a copy.
    adam.emplace(gpt.parameters(),
                 optim::AdamOptions{.beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1, .clip_norm = 1.0});
  }

  double step(int i) {
    const Tensor value = gpt.loss(inputs, targets);
    value.backward();
    last_norm = adam->step(lr.at(static_cast<size_t>(i))).grad_norm;
    adam->zero_grad();
    return value.item();
  }
  std::optional<optim::Adam> adam;
  double last_norm = 0;
};

/// Largest difference; NaN if there is one.
inline double worst(const std::vector<double>& got, const std::vector<double>& want) {
  EXPECT_EQ(got.size(), want.size());
  double most = 0;
  for (size_t i = 0; i < got.size() && i < want.size(); ++i) {
    const double error = std::abs(got[i] - want[i]);
    if (!(error <= most)) most = error;  // NaN sticks
  }
  return most;
}

inline double largest(const std::vector<double>& values) {
  double most = 0;
  for (const double value : values) most = std::max(most, std::abs(value));
  return most;
}

}  // namespace weft::models
