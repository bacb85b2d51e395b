// What a profiler sees of a training step: the emulated device keeps the ranges.
#include <gtest/gtest.h>

#include <algorithm>

#include "emulation.h"
#include "models/trainer.h"
#include "optim/adam.h"

namespace weft::models {
namespace {

TEST(Ranges, AStepHoldsItsPassesAndThoseTheOpsThatAreQueued) {
  Gpt gpt({.layers = 1, .heads = 1, .width = 8, .context = 4, .vocab = 11}, Device::cuda());
  optim::Adam adam(gpt.parameters(), {.clip_norm = 1});
  text::Loader loader(std::make_shared<text::TokenVector>(std::vector<int32_t>(50, 3), 11),
                      {.batch = 1, .context = 4, .prefetch = 0});
  Trainer trainer(gpt, adam, loader, {.warmup = 1, .total = 9}, 2);
  trainer.use_graph(GraphUse::on);
  weft_emulation::keep_ranges();
  trainer.step();
  const std::vector<std::string> called = weft_emulation::take_ranges();
  std::vector<std::string> passes;
  std::copy_if(called.begin(), called.end(), std::back_inserter(passes),
               [](const std::string& range) { return range.substr(0, 2) != "  "; });
  EXPECT_EQ(passes, (std::vector<std::string>{"step", " forward", " backward", " forward", " backward", " optimizer"}));
  const auto op = [&](const char* name, const char* pass) {
    const auto found = std::find(called.begin(), called.end(), std::string("  ") + name);
    const auto last = std::find_if(std::make_reverse_iterator(found), called.rend(),
                                   [](const std::string& range) { return range.substr(0, 2) != "  "; });
    return found != called.end() && last != called.rend() && *last == std::string(" ") + pass;
  };
  EXPECT_TRUE(op("embedding", "forward"));
  EXPECT_TRUE(op("linear_cross_entropy", "forward"));
  EXPECT_TRUE(op("adam", "optimizer"));
  trainer.step();
  trainer.step();  // recorded
  weft_emulation::keep_ranges();
  trainer.step();
  EXPECT_EQ(weft_emulation::take_ranges(), std::vector<std::string>{"step"}) << "launched as one";
}

}  // namespace
}  // namespace weft::models
