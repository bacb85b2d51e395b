#include <weft/weft.h>

#include <cstdio>
#include <memory>
#include <string>

int main() {
  using namespace weft;
  std::string words;
  for (int i = 0; i < 400; ++i) words += "the cat sat on the mat and the dog sat on the log. ";
  const text::Tokenizer tokenizer = text::Tokenizer::train(words, 270);
  const auto tokens = std::make_shared<text::TokenVector>(tokenizer.encode(words), tokenizer.vocab_size());

  const Device device = Device::best();  // CUDA if there is one, else the CPU
  std::printf("training on %s\n", to_string(device).c_str());
  models::Gpt gpt({.layers = 2, .heads = 2, .width = 32, .context = 16, .vocab = tokenizer.vocab_size()}, device);
  optim::Adam adam(gpt.parameters(), {.beta2 = 0.95, .weight_decay = 0.1, .clip_norm = 1.0});
  text::Loader loader(tokens, {.batch = 8, .context = 16, .seed = 1});
  const optim::CosineSchedule schedule{.peak = 1e-2, .warmup = 10, .total = 60};

  double first = 0, last = 0;
  for (int step = 0; step < 60; ++step) {
    const auto [inputs, targets] = models::to_tensors(loader.next(), device);
    const Tensor loss = gpt.loss(inputs, targets);  // mean over valid tokens
    loss.backward();
    adam.step(schedule.at(step));
    adam.zero_grad();
    last = loss.item();
    if (step == 0) first = last;
  }
  std::printf("loss %.3f -> %.3f\n", first, last);
  const std::vector<int32_t> ids = models::generate(gpt, tokenizer.encode("the cat"), 12, {.temperature = 0});
  std::printf("the cat%s\n", tokenizer.decode(ids).c_str());
  return last < first / 2 ? 0 : 1;
}
