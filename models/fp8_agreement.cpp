#include "models/fp8_agreement.h"

#include <algorithm>

namespace weft::models {
namespace {

/// "attn.qkv" of "h.3.attn.qkv", and 3.
std::pair<std::string, size_t> layer_and_block(const std::string& name) {
  const size_t dot = name.find('.', 2);
  return {name.substr(dot + 1), std::stoul(name.substr(2, dot - 2))};
}

}  // namespace

optim::DelayedScaling::Counts agree_on_fp8(optim::DelayedScaling& scaling, int64_t blocks, dist::Group& ranks) {
  std::vector<std::string> layers;  // of a block
  for (const std::string& name : scaling.names()) {
    const std::string layer = layer_and_block(name).first;
    if (std::find(layers.begin(), layers.end(), layer) == layers.end()) layers.push_back(layer);
  }
  std::vector<std::string> model;
  for (int64_t block = 0; block < blocks; ++block) {
    for (const std::string& layer : layers) model.push_back(concat("h.", block, '.', layer));
  }
  std::vector<size_t> places;  // of this rank's tensors among the model's
  for (const std::string& name : scaling.names()) {
    const auto [layer, block] = layer_and_block(name);
    const auto in_block = static_cast<size_t>(std::find(layers.begin(), layers.end(), layer) - layers.begin());
    for (size_t role = 0; role < kFp8Roles; ++role)
      places.push_back((block * layers.size() + in_block) * kFp8Roles + role);
  }

  std::vector<Fp8Stats> own = scaling.seen();
  std::vector<int64_t> amaxes(model.size() * kFp8Roles), counts(2 * amaxes.size());
  for (size_t i = 0; i < own.size(); ++i) {
    amaxes[places[i]] = static_cast<int64_t>(own[i].amax);
    if (!scaling.layer(i / kFp8Roles)->counts[i % kFp8Roles]) continue;
    counts[2 * places[i]] = static_cast<int64_t>(own[i].saturated);
    counts[2 * places[i] + 1] = static_cast<int64_t>(own[i].converted);
  }
  const auto tensor_of = [&](const std::vector<int64_t>& values) {
    return Tensor::from(values, {static_cast<int64_t>(values.size())}, ranks.device());
  };
  const Tensor largest = tensor_of(amaxes), sums = tensor_of(counts);
  ranks.all_reduce_(largest, dist::Reduction::max);
  ranks.all_reduce_(sums);
  amaxes = largest.to_vector<int64_t>(), counts = sums.to_vector<int64_t>();

  std::vector<Fp8Stats> all(amaxes.size());
  for (size_t i = 0; i < all.size(); ++i) {
    all[i] = {.amax = static_cast<unsigned long long>(amaxes[i]),
              .saturated = static_cast<unsigned long long>(counts[2 * i]),
              .converted = static_cast<unsigned long long>(counts[2 * i + 1])};
  }
  for (size_t i = 0; i < own.size(); ++i) own[i] = all[places[i]];
  scaling.see(own);
  return optim::DelayedScaling::total(model, all);
}

}  // namespace weft::models
