// weft bench gemm --tune: which of the library's algorithms is the fastest for each product of a training step.
#include "apps/tune_gemm.h"

#include <iostream>
#include <memory>
#include <vector>

#include "apps/data_directory.h"
#include "apps/files.h"
#include "apps/gemm_algorithms_file.h"
#include "apps/train_options.h"
#include "core/random.h"
#include "models/speed_of_light.h"
#include "models/trainer.h"
#include "ops/gemm_algorithms.h"
#include "ops/matmul.h"
#include "optim/adam.h"
#include "optim/loss_scale.h"

namespace weft::apps {
namespace {

void take_steps(const TunedStep& step, Device device) {
  constexpr int kSteps = 2;
  std::optional<AllowTf32> tf32;
  if (step.tf32) tf32.emplace();
  const RandomStream stream(1, "tuning tokens");
  std::vector<int32_t> tokens(static_cast<size_t>(kSteps * step.batch * step.model.context + 1));
  for (size_t i = 0; i < tokens.size(); ++i)
    tokens[i] = static_cast<int32_t>(stream.below(i, static_cast<uint64_t>(step.model.vocab)));
  models::Gpt gpt(step.model, device, 1, step.dtype);
  optim::Adam optimizer(gpt.parameters(), {});
  text::Loader loader(std::make_shared<text::TokenVector>(std::move(tokens), step.model.vocab),
                      {.batch = step.batch, .context = step.model.context, .prefetch = 0});
  models::Trainer trainer(gpt, optimizer, loader, {.peak = 1e-4, .floor = 1e-5, .warmup = 1, .total = 1000}, 1);
  if (step.dtype == DType::f16) trainer.scale_loss(optim::LossScale());
  if (step.fp8) trainer.scale_fp8(gpt.use_fp8());
  for (int i = 0; i < kSteps; ++i) trainer.step();
}

}  // namespace

TunedStep tuned_step_of(const std::filesystem::path& training) {
  TrainOptions o;
  Options options("train", "Trains a GPT on prepared data.");
  o.declare(options);
  options.load(training);
  if (!options.parse({})) return {};
  o.check(options);
  return {.model = o.model(DataDirectory::open(o.data).tokenizer.vocab_size()),
          .batch = o.batch,
          .dtype = o.dtype(),
          .tf32 = o.precision == Precision::tf32,
          .fp8 = o.precision == Precision::fp8};
}

void tune_training_step(const TunedStep& step, Device device, const std::string& path, bool quick) {
  const GemmLibrary library = gemm_library(device);
  const double peak = models::speed_now(device, step.dtype, quick).gemm_flops;
  std::cout << library.device << ", " << library.version << ", " << step.dtype << "; GEMM peak measured now "
            << fixed(peak * 1e-9, 1) << " GFLOP/s\n"
            << "first us  chosen us  of peak  candidates  product" << std::endl;
  double first = 0, chosen = 0;
  const auto right = [](const std::string& text, size_t width) {
    return std::string(width > text.size() ? width - text.size() : 0, ' ') + text;
  };
  const std::vector<GemmAlgorithm> all = tune_gemm(
      device, [&] { take_steps(step, device); },
      [&](const GemmAlgorithm& each) {
        first += each.first_choice_seconds;
        chosen += each.seconds;
        std::cout << right(fixed(each.first_choice_seconds * 1e6, 1), 8) << right(fixed(each.seconds * 1e6, 1), 11)
                  << right(fixed(100 * each.flops / each.seconds / peak, 1) + "%", 9)
                  << right(concat(each.candidates), 12) << "  " << each.product << std::endl;
      });
  write_gemm_algorithms_file(path, library, all, peak);
  std::cout << all.size() << " products, once each: " << fixed(first * 1e6, 1) << " us by the first choices, "
            << fixed(chosen * 1e6, 1) << " us by those of " << path << std::endl;
}

}  // namespace weft::apps
