#include "optim/delayed_scaling.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <map>

#include "core/autograd.h"
#include "ops/launch.h"

namespace weft::optim {
namespace {

constexpr const char* kOp = "delayed_scaling";
constexpr const char* kUpdates = "fp8.updates";
constexpr const char* kRoleNames[] = {"input", "weight", "gradient"};

std::string history_name(const std::string& layer) { return "fp8." + layer + ".amax_history"; }
std::string scale_name(const std::string& layer) { return "fp8." + layer + ".scale"; }

void check_scale(const std::string& name, float scale) {
  const double largest = std::ldexp(1.0, kFp8LargestPower);
  int exponent = 0;
  if (std::frexp(scale, &exponent) == 0.5f && scale <= largest && scale >= 1 / largest) return;
  fail(ErrorKind::kData, kOp, "stored state ", quoted(name), " has a scale of ", scale,
       "; expected a power of two from 2^-63 to 2^63");
}

void check_amax(const std::string& name, float amax) {
  if (amax >= 0 && std::isfinite(amax)) return;
  fail(ErrorKind::kData, kOp, "stored state ", quoted(name), " has an amax of ", amax,
       "; expected finite numbers that are not negative");
}

}  // namespace

DelayedScaling::DelayedScaling(std::vector<std::string> layers, Device device) : names_(std::move(layers)) {
  launch(device, "fp8", [](auto on) { fp8_check_device(on); });
  const MemoryScope scope(MemoryCategory::optimizer);
  const auto count = static_cast<int64_t>(names_.size());
  history_ = Tensor::zeros({kFp8Roles * count, kHistory}, DType::f32, device);
  scales_ = Tensor::ones({kFp8Roles * count, kFp8ScaleFloats}, DType::f32, device);
  stats_ = Tensor::zeros({kFp8Roles * count, kFp8StatsWords}, DType::i64, device);
  for (int64_t i = 0; i < count; ++i) {
    auto layer = std::make_shared<Fp8Layer>();
    layer->scales = scales_.narrow(0, kFp8Roles * i, kFp8Roles);
    layer->stats = stats_.narrow(0, kFp8Roles * i, kFp8Roles);
    layers_.push_back(std::move(layer));
  }
}

void DelayedScaling::begin_step() { stats_.zero_(); }

std::vector<Fp8Stats> DelayedScaling::seen() const {
  const std::vector<int64_t> words = stats_.to_vector<int64_t>();
  const auto word = [&](size_t i) { return static_cast<unsigned long long>(words[i]); };
  std::vector<Fp8Stats> stats;
  for (size_t i = 0; i < words.size(); i += kFp8StatsWords) stats.push_back({word(i), word(i + 1), word(i + 2)});
  return stats;
}

void DelayedScaling::see(std::span<const Fp8Stats> stats) {
  if (stats.size() != kFp8Roles * names_.size()) {
    fail(ErrorKind::kValue, kOp, names_.size(), " layers have ", kFp8Roles * names_.size(), " tensors, got what of ",
         stats.size(), " was seen");
  }
  std::vector<int64_t> words;
  for (const Fp8Stats& each : stats) {
    for (const unsigned long long word : {each.amax, each.saturated, each.converted})
      words.push_back(static_cast<int64_t>(word));
  }
  stats_.copy_(Tensor::from(words, stats_.shape(), stats_.device()));
}

DelayedScaling::Counts DelayedScaling::total(std::span<const std::string> layers, std::span<const Fp8Stats> stats) {
  Counts counts;
  for (size_t i = 0; i < stats.size(); ++i) {
    const auto amax = std::bit_cast<float>(static_cast<uint32_t>(stats[i].amax));
    if (!std::isfinite(amax)) {
      fail(ErrorKind::kValue, "fp8", "the ", kRoleNames[i % kFp8Roles], " of ", quoted(layers[i / kFp8Roles]),
           " has an element that is ", amax, ", which 8 bits cannot hold. Hint: a lower learning rate or more warm-up");
    }
    counts.saturated += static_cast<int64_t>(stats[i].saturated);
    counts.converted += static_cast<int64_t>(stats[i].converted);
  }
  return counts;
}

Tensor DelayedScaling::verdict() const {
  const Tensor verdict = Tensor::empty({1}, DType::f32, stats_.device());
  launch(stats_.device(), kOp, [&](auto device) {
    fp8_verdict(device, {.stats = reinterpret_cast<const Fp8Stats*>(stats_.data<int64_t>()),
                         .count = stats_.size(0),
                         .verdict = verdict.data<float>()});
  });
  return verdict;
}

void DelayedScaling::update() {
  scales_.begin_change(kOp);
  history_.begin_change(kOp);
  launch(scales_.device(), kOp, [&](auto device) {
    fp8_update(device, {.stats = reinterpret_cast<const Fp8Stats*>(stats_.data<int64_t>()),
                        .history = history_.data<float>(),
                        .scales = reinterpret_cast<Fp8Scale*>(scales_.data<float>()),
                        .count = history_.size(0),
                        .length = kHistory});
  });
  ++updates_;
  for (const auto& layer : layers_) layer->has_history = true;
}

void DelayedScaling::forget_weights() {
  for (const auto& layer : layers_) layer->weight = {}, layer->weight_source.reset();
}

NamedTensors DelayedScaling::state() const {
  const autograd::NoGrad no_grad;
  NamedTensors tensors;
  for (size_t i = 0; i < names_.size(); ++i) {
    const auto first = kFp8Roles * static_cast<int64_t>(i);
    tensors.emplace_back(history_name(names_[i]), history_.narrow(0, first, kFp8Roles));
    tensors.emplace_back(scale_name(names_[i]), layers_[i]->scales.select(1, 1).contiguous());
  }
  tensors.emplace_back(kUpdates, Tensor::from(std::vector<int64_t>{updates_}, {1}));
  return tensors;
}

void DelayedScaling::load_state(const NamedTensors& tensors) {
  std::map<std::string, Tensor> given;
  for (const auto& [name, tensor] : tensors) {
    if (!given.emplace(name, tensor).second)
      fail(ErrorKind::kData, kOp, "the stored state has two tensors ", quoted(name));
  }
  std::vector<std::string> names;
  for (const auto& [name, tensor] : state()) {
    names.push_back(name);
    const auto found = given.find(name);
    if (found == given.end()) fail(ErrorKind::kData, kOp, "the stored state has no tensor ", quoted(name));
    if (!(found->second.shape() == tensor.shape()) || found->second.dtype() != tensor.dtype()) {
      fail(ErrorKind::kData, kOp, "stored state ", quoted(name), " is ", found->second.describe(), "; expected ",
           tensor.describe());
    }
  }
  for (const auto& [name, tensor] : given) {
    if (std::find(names.begin(), names.end(), name) != names.end()) continue;
    fail(ErrorKind::kData, kOp, "the stored state has a tensor ", quoted(name), " that these layers do not have",
         did_you_mean(name, names));
  }
  const auto updates = static_cast<int64_t>(given.at(kUpdates).item());
  if (updates < 0) fail(ErrorKind::kData, kOp, "stored state ", quoted(kUpdates), " is ", updates);

  std::vector<float> history, scales;
  for (const std::string& layer : names_) {
    for (const float amax : given.at(history_name(layer)).to_vector<float>()) {
      check_amax(history_name(layer), amax);
      history.push_back(amax);
    }
    for (const float scale : given.at(scale_name(layer)).to_vector<float>()) {
      check_scale(scale_name(layer), scale);
      const Fp8Scale both{.inverse = 1 / scale, .scale = scale};
      scales.insert(scales.end(), {both.inverse, both.scale, 0, 0});
    }
  }
  history_.copy_(Tensor::from(history, history_.shape(), history_.device()));
  scales_.copy_(Tensor::from(scales, scales_.shape(), scales_.device()));
  updates_ = updates;
  for (const auto& layer : layers_) layer->has_history = updates > 0;
}

}  // namespace weft::optim
