#include "apps/command.h"

#include <gtest/gtest.h>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/error.h"

namespace {

using namespace weft;
using namespace weft::apps;
using Span = std::span<const std::string>;

std::vector<std::string> got;  // a command is a plain function: what it was called with is kept here

int run_train(Span args) {
  got.assign(args.begin(), args.end());
  return 7;
}
int run_usage(Span) { fail(ErrorKind::kUsage, "command line", "bad option"); }
int run_data(Span) { fail(ErrorKind::kData, "file", "bad byte \x1b[2J"); }
int run_memory(Span) { throw std::bad_alloc(); }
int run_standard(Span) { throw std::logic_error("broken"); }
int run_other(Span) { throw 5; }

constexpr Command kCommands[] = {{"train", "trains a model", run_train},
                                 {"usage", "", run_usage},
                                 {"data", "", run_data},
                                 {"memory", "", run_memory},
                                 {"standard", "", run_standard},
                                 {"other", "", run_other}};

struct Outcome {
  int code;
  std::string out, err;
};

Outcome run(const std::vector<std::string>& args, const Environment& environment = {}) {
  std::ostringstream out, err;
  const int code = run_program("Does things.", "1.2.3", kCommands, args, environment, out, err);
  return {code, out.str(), err.str()};
}

TEST(Command, ListsTheCommandsWithoutArgumentsAndForHelp) {
  for (const auto& args : std::vector<std::vector<std::string>>{{}, {"--help"}, {"-h"}, {"help"}}) {
    const Outcome outcome = run(args);
    EXPECT_EQ(outcome.code, 0);
    EXPECT_NE(outcome.out.find("usage: weft COMMAND [options]\n\nDoes things.\n"), std::string::npos) << outcome.out;
    EXPECT_NE(outcome.out.find("  train      trains a model\n"), std::string::npos) << outcome.out;
    EXPECT_EQ(outcome.err, "");
  }
}

TEST(Command, PrintsTheVersion) { EXPECT_EQ(run({"--version"}).out, "weft 1.2.3\n"); }

TEST(Command, PassesTheArgumentsAndTheExitCode) {
  EXPECT_EQ(run({"train", "--lr", "1"}).code, 7);
  EXPECT_EQ(got, (std::vector<std::string>{"--lr", "1"}));
  EXPECT_EQ(run({"help", "train"}).code, 7);
  EXPECT_EQ(got, std::vector<std::string>{"--help"});
}

TEST(Command, SuggestsTheNearestCommand) {
  const Outcome outcome = run({"trian"});
  EXPECT_EQ(outcome.code, 2);
  EXPECT_EQ(outcome.out, "");
  EXPECT_EQ(outcome.err,
            "weft: error: [command line] unknown command \"trian\"; did you mean \"train\"? weft --help lists the "
            "commands\n");
  EXPECT_EQ(run({"--trace"}).code, 2);
  EXPECT_EQ(run({"help", "trian"}).code, 2);
  EXPECT_EQ(run({""}).code, 2);
}

TEST(Command, TurnsEveryExceptionIntoAMessageAndACode) {
  EXPECT_EQ(run({"usage"}).code, 2);
  EXPECT_EQ(run({"usage"}).err, "weft: error: [command line] bad option\n");
  EXPECT_EQ(run({"data"}).code, 1);
  EXPECT_EQ(run({"data"}).err, "weft: error: [file] bad byte \\x1b[2J\n");
  EXPECT_EQ(run({"memory"}).code, 1);
  EXPECT_EQ(run({"memory"}).err, "weft: error: out of memory\n");
  EXPECT_EQ(run({"standard"}).code, 1);
  EXPECT_EQ(run({"standard"}).err, "weft: error: broken\n");
  EXPECT_EQ(run({"other"}).code, 1);
}

TEST(Command, FailsIfItsOutputIsLost) {
  std::ostringstream err;
  std::ostream nowhere(nullptr);
  EXPECT_EQ(run_program("", "1", kCommands, std::vector<std::string>{"--version"}, {}, nowhere, err), 1);
  EXPECT_EQ(err.str(), "weft: error: standard output could not be written\n");
}

TEST(Command, RefusesVariablesOfNoCommand) {
  const Outcome typo = run({"train"}, {{"WEFT_TRIAN_LR", "1"}});
  EXPECT_EQ(typo.code, 2);
  EXPECT_NE(typo.err.find("WEFT_TRIAN_LR=\"1\": no such variable; did you mean \"WEFT_TRAIN_LR\"?"), std::string::npos)
      << typo.err;
  const Outcome process = run({"train"}, {{"WEFT_NUM_THREAD", "1"}});
  EXPECT_NE(process.err.find("did you mean \"WEFT_NUM_THREADS\"?"), std::string::npos) << process.err;
  EXPECT_EQ(run({"train"}, {{"WEFT_NUM_THREADS", "1"}, {"WEFT_DATA_X", "1"}, {"WEFT_TRAIN_LR", "1"}}).code, 7);
  EXPECT_EQ(run({"train"}, {{"WEFT_TRAIN", "1"}}).code, 2);
  EXPECT_EQ(run({"--help"}, {{"WEFT_TRIAN_LR", "1"}}).code, 0) << "help is always there";
}

TEST(Command, NestsCommands) {
  std::ostringstream out;
  const auto nested = [&](const std::vector<std::string>& args, const Environment& environment) {
    return dispatch("weft checkpoint", "Checkpoints.", kCommands, args, environment, out);
  };
  EXPECT_EQ(nested({"train", "x"}, {{"WEFT_CHECKPOINT_TRAIN_A", ""}, {"WEFT_ELSEWHERE_X", ""}}), 7);
  EXPECT_EQ(got, std::vector<std::string>{"x"});
  EXPECT_THROW(nested({"train"}, {{"WEFT_CHECKPOINT_TRIAN_A", ""}}), Error);
  EXPECT_EQ(nested({}, {}), 0);
  EXPECT_NE(out.str().find("usage: weft checkpoint COMMAND [options]"), std::string::npos);
}

}  // namespace
