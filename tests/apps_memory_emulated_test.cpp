// weft train on a device with little memory: what it refuses, and what it says would fit, which then does.
#include <gtest/gtest.h>

#include <sstream>

#include "apps/commands.h"
#include "apps/memory_plan.h"
#include "core/backend.h"
#include "cuda_emulation/emulation.h"
#include "tests/apps_process.h"
#include "tests/error_of.h"

namespace weft::apps {
namespace {

/// Options as weft train reads them, over a model whose step takes some hundred MiB.
TrainOptions options_of(std::vector<std::string> args) {
  TrainOptions o;
  Options options("train", "");
  o.declare(options);
  for (const char* each : {"--data=none", "--device=cuda", "--layers=8", "--width=256", "--heads=4", "--context=256",
                           "--batch=16", "--accumulate=2"}) {
    const std::string name = std::string(each).substr(0, std::string(each).find('='));
    const bool given = std::any_of(args.begin(), args.end(), [&](const auto& arg) { return arg.starts_with(name); });
    if (!given) args.emplace_back(each);
  }
  std::ostringstream out;
  EXPECT_TRUE(options.parse(args, {}, out));
  return o;
}

constexpr int64_t kVocab = 512;

PlannedData planned() {
  static const auto tokens = std::make_shared<text::TokenVector>(std::vector<int32_t>(20000, 1), kVocab);
  return {tokens, kVocab};
}

int64_t needs(const std::vector<std::string>& args) {
  return plan_memory(options_of(args), Device::cuda(), planned()).needs();
}

/// The words of the line that begins with `option`.
std::string line_of(const std::string& text, const std::string& option) {
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) {
    if (line.starts_with("  " + option + "  ")) return line;
  }
  ADD_FAILURE() << "no line for " << option << " in\n" << text;
  return "";
}

TEST(MemoryPlan, TellsTheLargestMicroBatchThatFitsWithTheSameTokens) {
  const int64_t limit = needs({"--batch=4", "--accumulate=8"});
  const std::string text = what_would_fit(options_of({}), Device::cuda(), planned(), limit);
  const std::string line = line_of(text, "--batch 4 --accumulate 8");
  EXPECT_NE(line.find(human_bytes(limit)), std::string::npos) << line;
  EXPECT_NE(line.find("fits, with the same 8,192 tokens a step"), std::string::npos) << line;
  EXPECT_EQ(text.find("--batch 8"), std::string::npos) << text;
  const std::string none = what_would_fit(options_of({}), Device::cuda(), planned(), 1 << 20);
  EXPECT_NE(none.find("no smaller micro-batch"), std::string::npos) << none;
}

TEST(MemoryPlan, TellsOfEachSaverWhatItNeedsAndWhetherItFits) {
  const std::vector<std::string> savers[] = {{"--recompute", "norm,activation,attention"},
                                             {"--recompute", "block"},
                                             {"--offload", "optimizer"},
                                             {"--offload", "activations"},
                                             {"--offload", "optimizer,activations"},
                                             {"--recompute", "block", "--offload", "optimizer,activations"},
                                             {"--precision", "bf16"}};
  const int64_t limit = needs({"--recompute=block"});
  const std::string text = what_would_fit(options_of({}), Device::cuda(), planned(), limit);
  for (const auto& args : savers) {
    std::string option;
    for (const std::string& arg : args) option += (option.empty() ? "" : " ") + arg;
    const std::string line = line_of(text, option);
    const int64_t bytes = needs(args);
    EXPECT_NE(line.find(human_bytes(bytes)), std::string::npos) << line;
    EXPECT_TRUE(line.ends_with(bytes <= limit ? "  fits" : "  does not fit")) << line;
  }
  const std::string on = what_would_fit(options_of({"--recompute=block"}), Device::cuda(), planned(), limit);
  EXPECT_EQ(on.find("--recompute block  "), std::string::npos) << "it is on already\n" << on;
}

TEST(MemoryPlan, TheTableTellsSavingsAndCosts) {
  const TrainOptions o = options_of({});
  const std::string text = savers_table(o, Device::cuda(), planned());
  const double tokens = 16 * 2 * 256;
  const auto has = [&](const std::string& option, const std::string& part) {
    EXPECT_NE(line_of(text, option).find(part), std::string::npos) << text;
  };
  // 17 norms, 8 GELUs of four times the width, f32, each read and written.
  has("--recompute norm", human_bytes(static_cast<int64_t>(2 * 17 * tokens * 256 * 4)) + " read and written");
  has("--recompute activation", human_bytes(static_cast<int64_t>(2 * 32 * tokens * 256 * 4)) + " read and written");
  char flops[32];
  std::snprintf(flops, sizeof flops, "%.1f GFLOP", 2.0 * 8 * 256 * 256 * tokens * 1e-9);
  has("--recompute attention", flops);
  const int64_t parameters = o.model(kVocab).parameter_count();
  has("--offload optimizer", human_bytes(2 * 8 * parameters) + " copied");
  // Six of eight blocks, sixteen tensors of the width a block, out and in, for each micro-batch; attention's logarithms
  // stay.
  has("--offload activations", human_bytes(static_cast<int64_t>(2 * 6 * 16 * tokens * 256 * 4)) + " copied");
  EXPECT_EQ(savers_table(options_of({"--device=cpu"}), Device::cpu(), planned()).find("offload"), std::string::npos);
}

TEST(MemoryPlan, OfMoreThanThereAreAddressesIsWhatTheyHold) {
  EXPECT_GT(needs({"--layers=2000", "--width=65536", "--heads=1", "--batch=1"}), int64_t{100} << 40);
}

class SmallDevice : public ::testing::Test {
 protected:
  void SetUp() override { backend(Device::cuda()); }
  void TearDown() override { weft_emulation::set_memory(size_t{4} << 30); }
  /// As much beside what is taken already.
  static void leave_free(int64_t bytes) {
    weft_emulation::set_memory(size_t{4} << 30);
    const MemorySize size = backend(Device::cuda()).memory();
    weft_emulation::set_memory(static_cast<size_t>(size.total - size.free + bytes));
  }
};

TEST_F(SmallDevice, RefusesAStepThatDoesNotFitBeforeItStarts) {
  using apps_test::Scratch;
  const Scratch scratch;
  const std::string text = (scratch.path() / "text.txt").string(), data = (scratch.path() / "data").string();
  apps_test::write_content(text, apps_test::small_text());
  EXPECT_EQ(run_data(std::vector<std::string>{"prepare", "--text", text, "--out", data, "--vocab", "300"}), 0);
  leave_free(200 << 20);
  const std::string out = (scratch.path() / "out").string();
  const std::vector<std::string> args = {"--data",  data,  "--device", "cuda", "--layers",     "8",
                                         "--width", "256", "--heads",  "4",    "--context",    "64",
                                         "--batch", "64",  "--out",    out,    "--accumulate", "2"};
  const std::string message = testing::error_of(ErrorKind::kMemory, [&] { run_train(args); });
  for (const char* part : {"[train] a step takes ", "on cuda:0, which has 200.0 MiB free of ", "activations",
                           "What would fit into 200.0 MiB", "--batch ", "tokens a step", "--recompute block"}) {
    EXPECT_NE(message.find(part), std::string::npos) << message;
  }
  EXPECT_FALSE(std::filesystem::exists(out));
}

TEST_F(SmallDevice, WhatIsSaidToFitDoes) {
  const auto train = [](const TrainOptions& o) {
    const PlannedData data = planned();
    models::Gpt gpt(o.model(data.vocab), Device::cuda(), 0, o.dtype());
    optim::Adam adam(gpt.parameters(), o.adam());
  };
  // A state that is larger than the buffers through which it streams.
  const TrainOptions plain = options_of({"--layers=24", "--batch=4"}),
                     o = options_of({"--layers=24", "--batch=4", "--offload=optimizer"});
  allocator(Device::cuda()).release_cached();
  leave_free(plan_memory(o, Device::cuda(), planned()).needs());
  EXPECT_NO_THROW(refuse_if_it_cannot_fit(o, Device::cuda(), planned()));
  EXPECT_THROW(refuse_if_it_cannot_fit(plain, Device::cuda(), planned()), Error);
  EXPECT_NO_THROW(train(o));
}

TEST_F(SmallDevice, AnAllocationThatFailsLaterComesWithTheSameAdvice) {
  const TrainOptions o = options_of({});
  leave_free(100 << 20);
  const std::string message = testing::error_of(ErrorKind::kMemory, [&] {
    advise_if_memory_ends(o, Device::cuda(), planned(),
                          [] { Tensor::empty({int64_t{1} << 28}, DType::f32, Device::cuda()); });
  });
  for (const char* part : {"[allocate] 1,073,741,824 bytes", "category", "What would fit into ", "--batch "})
    EXPECT_NE(message.find(part), std::string::npos) << message;
  EXPECT_THROW(advise_if_memory_ends(o, Device::cuda(), planned(), [] { fail(ErrorKind::kValue, "else", "x"); }),
               Error);
}

}  // namespace
}  // namespace weft::apps
