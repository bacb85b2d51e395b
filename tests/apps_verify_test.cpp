// weft verify as a user runs it, and random layouts against one rank.
#include <algorithm>
#include <set>

#include "apps/environment.h"
#include "apps/verify_options.h"
#include "tests/apps_process.h"
#include "tests/error_of.h"

namespace weft::apps {
namespace {

using namespace weft::apps_test;

std::string joined(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += ' ' + word;
  return text;
}

void expect_equal(int64_t seed, int64_t count) {
  for (int64_t number = 0; number < count; ++number) {
    const std::vector<std::string> arguments = random_arguments(seed, number);
    const ::testing::ScopedTrace trace(__FILE__, __LINE__, "weft verify" + joined(arguments));
    const models::Verification verification = verification_of(arguments);
    const models::VerifyReport report = models::verify(verification);
    if (report.equal()) continue;
    std::ostringstream text;
    models::print_report(text, verification, report, false);
    ADD_FAILURE() << text.str();
  }
}

TEST(Verify, ThirtyRandomLayoutsTrainAsOneRankDoes) { expect_equal(11, 30); }
TEST(SlowVerify, TwoHundredRandomLayoutsTrainAsOneRankDoes) { expect_equal(12, 200); }

TEST(Verify, RandomLayoutsAreAFunctionOfTheirNumberAndReachEveryOption) {
  EXPECT_EQ(random_arguments(1, 7), random_arguments(1, 7));
  EXPECT_NE(random_arguments(1, 7), random_arguments(2, 7));
  std::set<std::string> options;
  std::string all;
  for (int64_t number = 0; number < 200; ++number) {
    const std::vector<std::string> arguments = random_arguments(1, number);
    for (const std::string& argument : arguments) {
      if (argument.starts_with("--")) options.insert(argument);
    }
    all += joined(arguments) + "\n";
    const models::Verification v = verification_of(arguments);  // fits
    EXPECT_GE(v.layouts.front().mesh.size(), 2);
    for (const models::ParallelOptions& layout : v.layouts) EXPECT_LE(layout.mesh.size(), 8);
  }
  VerifyOptions o;
  Options declared("verify", "");
  o.declare(declared);
  for (std::string name : declared.names()) {
    std::replace(name.begin(), name.end(), '_', '-');
    EXPECT_TRUE(options.contains("--" + name)) << name;
  }
  for (const char* part : {"dp=",      "pp=",      "cp=",      "tp=",         "--zero 0",
                           "--zero 1", "--zero 2", "--zero 3", "interleaved", "zero-bubble",
                           "gpipe",    "1f1b",     "f64",      "f32",         "bf16",
                           "f16",      "fp8",      "lamb",     "adamw",       "--recompute block"}) {
    EXPECT_NE(all.find(part), std::string::npos) << part;
  }
}

TEST(Verify, PrintsWhatWasComparedAndAnswersWithItsExitCode) {
  const Args small = {"--layers", "2", "--width", "8", "--context", "3", "--accumulate", "4", "--steps", "1"};
  const Outcome equal = run_weft(workplace(), Args{"verify", "--mesh", "dp=2,pp=2"} + small);
  EXPECT_EQ(equal.code, 0) << equal.out << equal.err;
  EXPECT_NE(equal.out.find("equal in every bit"), std::string::npos) << equal.out;
  const Outcome bounded = run_weft(workplace(), Args{"verify", "--mesh", "tp=2", "--tensors"} + small);
  EXPECT_EQ(bounded.code, 0) << bounded.out << bounded.err;
  EXPECT_NE(bounded.out.find("gradient h.1.mlp.fc.weight"), std::string::npos) << bounded.out;
  const Outcome fuzz = run_weft(workplace(), {"verify", "--fuzz", "2", "--seed", "3"});
  EXPECT_EQ(fuzz.code, 0) << fuzz.out << fuzz.err;
  EXPECT_NE(fuzz.out.find("weft verify" + joined(random_arguments(3, 1))), std::string::npos) << fuzz.out;
}

TEST(Verify, RefusesWhatDoesNotFit) {
  const auto refused = [](const Args& arguments, const std::string& text) {
    const Outcome result = run_weft(workplace(), Args{"verify"} + arguments);
    EXPECT_EQ(result.code, 2) << joined(arguments);
    EXPECT_NE(result.err.find(text), std::string::npos) << result.err;
  };
  refused({"--mesh", "xp=2"}, "xp");
  refused({"--mesh", "dp=3", "--accumulate", "4", "--zero", "2"}, "as many for each with --zero 2, got 4");
  refused({"--mesh", "dp=9"}, "at least one for each of 9 data-parallel ranks");
  refused({"--mesh", "tp=2", "--precision", "fp8"}, "heads = 2 and width = 24 do not make such parts");
  refused({"--mesh", "pp=5"}, "a pipeline of 5 stages");
  refused({"--mesh", "tp=3"}, "more tp ranks than there are heads");
  refused({"--mesh", "dp=128", "--accumulate", "128"}, "64 ranks");
  refused({"--mesh", "pp=2", "--pipeline-split", "1,1"}, "2 stages that add up to 4, got 2 that add up to 2");
  refused({"--mesh", "pp=2", "--pipeline-chunks", "2"}, "--pipeline interleaved");
  refused({"--heads", "5"}, "must divide the width");
  refused({"--fuzz", "3", "--mesh", "dp=2"}, "--fuzz makes its own");
}

}  // namespace
}  // namespace weft::apps
