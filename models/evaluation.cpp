#include "models/evaluation.h"

#include <numeric>

#include "core/autograd.h"

namespace weft::models {

MicroBatch to_tensors(const text::Batch& batch, Device device) {
  const MemoryScope scope(MemoryCategory::data);
  const Shape shape = {batch.rows, batch.context};
  return {Tensor::from(batch.inputs, shape, device), Tensor::from(batch.targets, shape, device)};
}

EvaluationResult evaluate(Gpt& gpt, const text::Evaluation& data, const std::function<bool(double)>& progress) {
  const autograd::NoGrad no_grad;
  const bool training = gpt.is_training();
  gpt.eval();
  const Device device = gpt.parameters().front().tensor.device();
  double nats = 0;
  EvaluationResult result;
  for (int64_t i = 0; i < data.batches(); ++i) {
    const text::Batch batch = data.batch(i);
    const auto [inputs, targets] = to_tensors(batch, device);
    nats += gpt.loss(inputs, targets).item() * static_cast<double>(batch.valid);
    result.tokens += batch.valid;
    if (progress && !progress(static_cast<double>(i + 1) / static_cast<double>(data.batches()))) break;
  }
  gpt.train(training);
  result.nats_per_token = nats / static_cast<double>(result.tokens);
  return result;
}

EvaluationResult evaluate(ParallelGpt& parallel, const text::Evaluation& data) {
  Gpt& gpt = parallel.gpt();
  const bool training = gpt.is_training();
  gpt.eval();
  const Device device = gpt.parameters().front().tensor.device();
  const std::vector<double> sums = parallel.loss_sums(data.batches(), [&](int64_t i) {
    const text::Batch batch = data.batch(i);
    return std::pair(to_tensors(batch, device), batch.valid);
  });
  gpt.train(training);
  EvaluationResult result;
  result.tokens = data.targets();
  const double nats = std::accumulate(sums.begin(), sums.end(), 0.0);
  result.nats_per_token = nats / static_cast<double>(result.tokens);
  return result;
}

}  // namespace weft::models
