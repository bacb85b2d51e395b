#include "models/stage_costs.h"

#include <algorithm>
#include <chrono>
#include <functional>

#include "core/autograd.h"

namespace weft::models {
namespace {

double median_seconds(const std::function<void()>& run) {
  std::vector<double> seconds;
  for (int i = 0; i < 6; ++i) {
    const auto start = std::chrono::steady_clock::now();
    run();
    const double taken = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (i > 0) seconds.push_back(taken);  // the first one takes memory from the system
  }
  std::nth_element(seconds.begin(), seconds.begin() + 2, seconds.end());
  return seconds[2];
}

std::vector<double> costs_of(const GptConfig& config, double layer, double head) {
  std::vector<double> costs(static_cast<size_t>(config.layers), layer);
  costs.back() += head;
  return costs;
}

}  // namespace

std::vector<double> counted_layer_costs(const GptConfig& config) {
  GptConfig one = config, none = config;
  one.layers = 1, none.layers = 0;
  const double head = none.flops_per_token();
  return costs_of(config, one.flops_per_token() - head, head);
}

std::vector<double> measured_layer_costs(const GptConfig& config, const Shape& ids, Device device, DType dtype) {
  GptConfig one = config;
  one.layers = 1, one.offload_from.reset();
  const Gpt gpt(one, device, 0, dtype);
  const Tensor tokens = Tensor::zeros(ids, DType::i32, device);
  const Tensor stream = Tensor::full({ids[0], ids[1], config.width}, 0.5, dtype, device);
  // item() waits for the device.
  const double layer = median_seconds([&] {
    const Tensor x = stream.detach().requires_grad_();
    const GptStream out = gpt.blocks({x, x}, 0, 1);
    autograd::backward({out.x, out.branch}, {stream, stream});
    x.grad().select(0, 0).select(0, 0).select(0, 0).item();
  });
  const double head = median_seconds([&] {
    const Tensor x = stream.detach().requires_grad_();
    gpt.finish({x, x}, tokens).backward();
    x.grad().select(0, 0).select(0, 0).select(0, 0).item();
  });
  return costs_of(config, layer, head);
}

}  // namespace weft::models
