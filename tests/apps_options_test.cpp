#include "apps/options.h"

#include <gtest/gtest.h>
#include <unistd.h>
#include <bit>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>
#include <random>
#include <sstream>
#include <string>
#include <vector>

namespace {

using namespace weft;
using namespace weft::apps;
using Args = std::vector<std::string>;

enum class Optimizer : uint8_t { kAdamW, kMuon, kSgd };

struct TestOptions {
  int64_t layers = 4;
  int64_t steps = 1000;
  std::optional<int64_t> top_k;
  double lr = 1e-3;
  std::optional<double> clip = 1.0;
  bool tie = true;
  bool compile = false;
  std::string name = "run";
  std::string device = "auto";
  std::filesystem::path data = "in.txt";
  Optimizer optimizer = Optimizer::kAdamW;
  std::vector<double> betas = {0.9, 0.95};
  std::vector<int64_t> shape = {};
  std::vector<std::string> files = {};
  bool dry_run = false;
};

/// A command with an option of each type.
struct Fixture {
  TestOptions o;
  Options options{"train", "Trains a model."};

  Fixture() : Fixture(TestOptions{}) {}
  explicit Fixture(TestOptions defaults) : o(std::move(defaults)) {
    options.add("name", &o.name, TextRule{}, "what to call the run");
    options.action("dry_run", &o.dry_run, "prints the options and stops");
    options.section("model", "The model");
    options.add("layers", &o.layers, {.min = 1, .max = 1000}, "transformer blocks");
    options.add("tie", &o.tie, "one matrix for embedding and head");
    options.add("compile", &o.compile, "fuses kernels");
    options.section("optim", "The optimizer");
    options.add("lr", &o.lr, {.max = 10, .above = 0}, "learning rate");
    options.add("clip", &o.clip, {.above = 0}, "largest gradient norm");
    options.add("betas", &o.betas, {.min = 0, .below = 1}, {.min = 2, .max = 2}, "decay of the moments");
    options.add("optimizer", &o.optimizer,
                {{"adamw", Optimizer::kAdamW}, {"muon", Optimizer::kMuon}, {"sgd", Optimizer::kSgd}}, "update rule");
    options.add("steps", &o.steps, {.min = 0}, "updates");
    options.section("data", "The data");
    options.add("data", &o.data, PathRule{}, "token file");
    options.add("shape", &o.shape, IntRule{}, ListSize{}, "mesh");
    options.add("files", &o.files, TextRule{}, ListSize{}, "more files");
    options.add("device", &o.device, TextRule{.choices = {"auto", "cpu", "cuda"}}, "where to run");
    options.add("top_k", &o.top_k, {.min = 1}, "tokens to sample from");
  }
  void parse(const Args& args, const Environment& environment = {}) {
    std::ostringstream out;
    EXPECT_TRUE(options.parse(args, environment, out));
    EXPECT_EQ(out.str(), "");
  }
};

/// A directory of the test's own.
class Scratch {
 public:
  Scratch() {
    std::string name = (std::filesystem::temp_directory_path() / "weft-options-XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("no scratch directory");
    path_ = name;
  }
  ~Scratch() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  std::string file(const std::string& content, const std::string& name = "c.toml") const {
    std::ofstream(path_ / name, std::ios::binary) << content;
    return (path_ / name).string();
  }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

/// The message of the usage error that parsing gives, or "" if it succeeds.
std::string refusal(const Args& args, const Environment& environment = {}) {
  Fixture fixture;
  std::ostringstream out;
  try {
    (void)fixture.options.parse(args, environment, out);
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::kUsage) << error.what();
    return error.what();
  }
  return "";
}

std::string refusal_of_file(const std::string& content) {
  Scratch scratch;
  std::string message = refusal({"--config", scratch.file(content)});
  const std::string path = scratch.path().string() + "/";
  for (size_t at; (at = message.find(path)) != std::string::npos;) message.erase(at, path.size());
  return message;
}

#define EXPECT_HAS(text, part) EXPECT_NE((text).find(part), std::string::npos) << (text)

TEST(Options, KeepsTheDefaultsOfTheFields) {
  Fixture f;
  f.parse({});
  EXPECT_EQ(f.o.layers, 4);
  EXPECT_EQ(f.o.lr, 1e-3);
  EXPECT_FALSE(f.options.given("lr"));
  EXPECT_EQ(f.options.origin("lr").place, "default");
}

TEST(Options, ReadsEverySpellingOfTheCommandLine) {
  Fixture f;
  f.parse({"--layers",    "6",           "--lr=3e-4", "--no-tie", "--compile=true", "--name", "two words",
           "--optimizer", "muon",        "--betas",   "0.8,0.99", "--top_k",        "40",     "--shape",
           "2,4",         "--files=a,b", "--data",    "x/y.bin",  "--dry-run",      "--clip", "none"});
  EXPECT_EQ(f.o.layers, 6);
  EXPECT_EQ(f.o.lr, 3e-4);
  EXPECT_FALSE(f.o.tie);
  EXPECT_TRUE(f.o.compile);
  EXPECT_EQ(f.o.name, "two words");
  EXPECT_EQ(f.o.optimizer, Optimizer::kMuon);
  EXPECT_EQ(f.o.betas, (std::vector<double>{0.8, 0.99}));
  EXPECT_EQ(f.o.top_k, 40);
  EXPECT_EQ(f.o.clip, std::nullopt);
  EXPECT_EQ(f.o.shape, (std::vector<int64_t>{2, 4}));
  EXPECT_EQ(f.o.files, (Args{"a", "b"}));
  EXPECT_EQ(f.o.data, "x/y.bin");
  EXPECT_TRUE(f.o.dry_run);
}

TEST(Options, TakesValuesThatLookLikeOptionsAfterAnEqualsSign) {
  Fixture f;
  f.parse({"--name=--weird", "--shape", "-1"});
  EXPECT_EQ(f.o.name, "--weird");
  EXPECT_EQ(f.o.shape, std::vector<int64_t>{-1});
  Fixture g;
  g.parse({"--name="});
  EXPECT_EQ(g.o.name, "");
}

TEST(Options, PrefersCommandLineToEnvironmentToFileToDefault) {
  Scratch scratch;
  const std::string file = scratch.file("[optim]\nlr = 0.1\nsteps = 5\n[model]\nlayers = 7\n");
  Fixture f;
  f.parse({"--lr", "0.3", "--config", file}, {{"WEFT_TRAIN_LR", "0.2"}, {"WEFT_TRAIN_STEPS", "6"}});
  EXPECT_EQ(f.o.lr, 0.3);
  EXPECT_EQ(f.o.steps, 6);
  EXPECT_EQ(f.o.layers, 7);
  EXPECT_EQ(f.o.device, "auto");
  EXPECT_EQ(f.options.origin("lr").source, Source::kCommandLine);
  EXPECT_EQ(f.options.origin("steps").place, "environment WEFT_TRAIN_STEPS");
  EXPECT_EQ(f.options.origin("layers").place, file + ":5:10");
  const std::string shown = f.options.toml(true);
  EXPECT_HAS(shown, "lr = 0.3  # command line\n");
  EXPECT_HAS(shown, "steps = 6  # environment WEFT_TRAIN_STEPS\n");
  EXPECT_HAS(shown, "layers = 7  # " + file + ":5:10\n");
  EXPECT_HAS(shown, "device = \"auto\"  # default\n");
}

TEST(Options, LoadedFileIsBelowTheConfigFile) {
  Scratch scratch;
  Fixture f;
  f.options.load(scratch.file("[optim]\nlr = 0.1\nsteps = 5\n", "saved.toml"));
  f.parse({"--config", scratch.file("[optim]\nlr = 0.2\n")});
  EXPECT_EQ(f.o.lr, 0.2);
  EXPECT_EQ(f.o.steps, 5);
}

TEST(Options, RefusesUnknownNamesAndSuggestsTheNearest) {
  EXPECT_HAS(refusal({"--layesr", "6"}), "[command line] unknown option \"--layesr\"; did you mean \"--layers\"?");
  EXPECT_HAS(refusal({"--no-ty"}), "did you mean \"--no-tie\"?");
  EXPECT_HAS(refusal({"--model.layers=6"}), "did you mean \"--layers\"?");
  EXPECT_HAS(refusal({"-lr", "6"}), "unknown option \"-lr\"; did you mean \"--lr\"?");
  EXPECT_HAS(refusal({"--no-layers"}), "unknown option");
  EXPECT_HAS(refusal({"--=5"}), "unknown option");
  EXPECT_HAS(refusal({"layers=6"}), "unexpected argument \"layers=6\"; did you mean \"--layers\"?");
  EXPECT_HAS(refusal({"--", "--lr"}), "unexpected argument \"--lr\"");
  EXPECT_HAS(refusal({"--compile", "true"}), "unexpected argument \"true\"");
}

TEST(Options, RefusesMissingAndRepeatedValues) {
  EXPECT_HAS(refusal({"--lr"}), "--lr needs a value: a number > 0 and <= 10");
  EXPECT_HAS(refusal({"--lr", "--layers", "6"}), "found \"--layers\". Write --lr=--layers if that is the value");
  EXPECT_HAS(refusal({"--lr", "1", "--lr=2"}), "--lr is given twice: --lr \"1\" and --lr \"2\"");
  EXPECT_HAS(refusal({"--tie", "--no-tie"}), "--tie is given twice: --tie and --no-tie");
  EXPECT_HAS(refusal({"--no-tie=true"}), "--no-tie takes no value");
  EXPECT_HAS(refusal({"--config", "a", "--config", "b"}), "given twice");
}

TEST(Options, RefusesValuesOutsideTheRule) {
  EXPECT_EQ(refusal({"--lr", "-1"}), "[command line] --lr \"-1\": must be a number > 0 and <= 10");
  EXPECT_EQ(refusal({"--layers", "0"}), "[command line] --layers \"0\": must be an integer from 1 to 1,000");
  EXPECT_HAS(refusal({"--lr", "0"}), "> 0");
  EXPECT_HAS(refusal({"--lr", "10.000001"}), "<= 10");
  EXPECT_HAS(refusal({"--lr", "nan"}), "(it is NaN)");
  EXPECT_HAS(refusal({"--lr", "inf"}), "(it is infinite)");
  EXPECT_HAS(refusal({"--lr", "1e999"}), "outside the range of a 64-bit number");
  EXPECT_HAS(refusal({"--optimizer", "adam"}), "must be one of adamw, muon, sgd (did you mean \"adamw\"?)");
  EXPECT_HAS(refusal({"--device", "gpu"}), "must be one of auto, cpu, cuda");
  EXPECT_HAS(refusal({"--betas", "0.9"}), "must be a list of 2 elements, each a number >= 0 and < 1 (it has 1)");
  EXPECT_HAS(refusal({"--betas", "0.9,1"}), "(element 2 is \"1\")");
  EXPECT_HAS(refusal({"--betas", "0.9,"}), "(element 2 is \"\")");
  EXPECT_HAS(refusal({"--compile=yes"}), "must be true or false");
  EXPECT_HAS(refusal({"--name", "a\xff"}), "(it is not valid UTF-8)");
  EXPECT_HAS(refusal({"--top-k", "0"}), "must be an integer >= 1, or none");
  EXPECT_HAS(refusal({"--config", ""}), "--config");
}

TEST(Options, RefusesWrongFilesWithLineAndColumn) {
  EXPECT_EQ(refusal_of_file("[optim]\nlr = \"fast\"\n"),
            "[c.toml:2:6] lr = \"fast\": must be a number > 0 and <= 10 (it is a string)");
  EXPECT_EQ(refusal_of_file("[optim]\nlr = 11\n"), "[c.toml:2:6] lr = 11: must be a number > 0 and <= 10");
  EXPECT_HAS(refusal_of_file("[optim]\n  lrr = 1\n"),
             "[c.toml:2:3] unknown key \"lrr\" in [optim]; did you mean \"lr\"?");
  EXPECT_HAS(refusal_of_file("[model]\nlr = 1\n"), "[c.toml:2:1] lr belongs in [optim], not in [model]");
  EXPECT_HAS(refusal_of_file("layers = 1\n"), "layers belongs in [model], not above the first [section]");
  EXPECT_HAS(refusal_of_file("[model]\nname = \"x\"\n"), "name belongs above the first [section], not in [model]");
  EXPECT_HAS(refusal_of_file("\n[modle]\nlayers = 1\n"), "unknown section [modle]; did you mean \"model\"?");
  EXPECT_HAS(refusal_of_file("[modle]\n"), "unknown section [modle]");
  EXPECT_HAS(refusal_of_file("[[model]]\nlayers = 1\n"), "unknown key \"model\"");
  EXPECT_HAS(refusal_of_file("[model.layers]\nx = 1\n"), "must be an integer from 1 to 1,000 (it is a table)");
  EXPECT_HAS(refusal_of_file("[layers]\nx = 1\n"), "layers belongs in [model]");
  EXPECT_HAS(refusal_of_file("data = \"x\"\n"), "data belongs in [data]");
  EXPECT_HAS(refusal_of_file("[optim]\nlr = nan\n"), "(it is NaN)");
  EXPECT_HAS(refusal_of_file("[optim]\nlr = inf\n"), "(it is infinite)");
  EXPECT_HAS(refusal_of_file("[optim]\nlr = true\n"), "(it is a boolean)");
  EXPECT_HAS(refusal_of_file("[model]\ntie = 1\n"), "must be true or false (it is an integer)");
  EXPECT_HAS(refusal_of_file("[model]\nlayers = 1.5\n"), "(it is not a whole number)");
  EXPECT_HAS(refusal_of_file("[model]\nlayers = \"6\"\n"), "(it is a string)");
  EXPECT_HAS(refusal_of_file("[model]\nlayers = 2020-01-01\n"), "(it is a date)");
  EXPECT_HAS(refusal_of_file("[optim]\nbetas = [0.9, [1]]\n"), "an array that holds an array");
  EXPECT_HAS(refusal_of_file("[optim]\nbetas = [0.9, \"x\"]\n"), "(element 2 is \"x\": it is a string)");
  EXPECT_HAS(refusal_of_file("[optim]\nbetas = \"0.9,0.95\"\n"), "(it is a string)");
  EXPECT_HAS(refusal_of_file("name = \"a\\u0000b\"\n"), "NUL");
  EXPECT_HAS(refusal_of_file("dry_run = true\n"), "dry_run is for the command line only");
  EXPECT_HAS(refusal_of_file("config = \"x\"\n"), "config is for the command line only");
  EXPECT_HAS(refusal_of_file("[model]\nlayers = 1\nlayers = 2\n"), "[c.toml:3:");
  EXPECT_HAS(refusal_of_file("[model]\nlayers = \n"), "not valid TOML");
  EXPECT_HAS(refusal_of_file("name = \"\xff\"\n"), "not valid TOML");
  EXPECT_HAS(refusal_of_file(std::string(100000, '[')), "not valid TOML");
  EXPECT_HAS(refusal_of_file("[=]\n"), "[c.toml:1:2] not valid TOML");
  EXPECT_HAS(refusal_of_file("\xc3\xa9 = 1\n"), "[c.toml:1:1] not valid TOML");
  EXPECT_HAS(refusal_of_file("[optim]\nbetas = [1,}\n"), "not valid TOML");
  EXPECT_HAS(refusal_of_file("[optim]\nlr = 1979-05-27Tx\n"), "not valid TOML");
  EXPECT_HAS(refusal_of_file(std::string((1 << 20) + 1, '\n')), "larger than 1,048,576 bytes");
}

TEST(Options, SpeaksOfTheFirstMistakeInAFile) {
  EXPECT_HAS(refusal_of_file("[optim]\nzz = 1\n[model]\naa = 1\n"), "[c.toml:2:1] unknown key \"zz\"");
}

TEST(Options, ReadsEveryFormOfTomlThatMeansTheSame) {
  Scratch scratch;
  for (const char* text : {"[model]\nlayers = 6\n", "model.layers = 6\n", "model = {layers = 6}\n",
                           "[model]\nlayers = 6.0\n", "[model]\r\nlayers = 0x6\r\n", "[model]\nlayers = 6e0 # six"}) {
    Fixture f;
    f.parse({"--config", scratch.file(text)});
    EXPECT_EQ(f.o.layers, 6) << text;
  }
}

TEST(Options, KeepsLettersAfterALineEndingBackslash) {
  Scratch scratch;
  Fixture f;
  f.parse({"--config", scratch.file("name = \"\"\"\\\n  \xc3\xa9t\xc3\xa9\"\"\"\n")});
  EXPECT_EQ(f.o.name, "\xc3\xa9t\xc3\xa9");
}

TEST(Options, ReportsFilesThatCannotBeRead) {
  Scratch scratch;
  for (const std::string& path : {scratch.path().string(), scratch.path().string() + "/absent.toml"}) {
    Fixture f;
    std::ostringstream out;
    try {
      (void)f.options.parse(Args{"--config", path}, {}, out);
      FAIL() << path << " was read";
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::kIo);
      EXPECT_HAS(std::string(error.what()), path);
    }
  }
}

TEST(Options, RefusesWrongVariables) {
  EXPECT_HAS(
      refusal({}, {{"WEFT_TRAIN_LAYESR", "6"}}),
      "[environment] WEFT_TRAIN_LAYESR=\"6\": weft train has no such option; did you mean \"WEFT_TRAIN_LAYERS\"?");
  EXPECT_EQ(refusal({}, {{"WEFT_TRAIN_LR", "fast"}}),
            "[environment] WEFT_TRAIN_LR=\"fast\": must be a number > 0 and <= 10");
  EXPECT_HAS(refusal({}, {{"WEFT_TRAIN_LR", ""}}), "WEFT_TRAIN_LR=\"\"");
  EXPECT_HAS(refusal({}, {{"WEFT_TRAIN_DRY_RUN", "1"}}), "no such option");
  EXPECT_EQ(refusal({}, {{"WEFT_GENERATE_LR", "x"}, {"WEFT_NUM_THREADS", "2"}}), "") << "not this command's affair";
  Fixture f;
  f.parse({}, {{"WEFT_TRAIN_TIE", "0"}, {"WEFT_TRAIN_BETAS", "0.5,0.6"}, {"WEFT_TRAIN_TOP_K", "1k"}});
  EXPECT_FALSE(f.o.tie);
  EXPECT_EQ(f.o.betas, (std::vector<double>{0.5, 0.6}));
  EXPECT_EQ(f.o.top_k, 1000);
}

TEST(Options, ResolvedFileReadsBackBitForBit) {
  TestOptions odd;
  odd.layers = 999;
  odd.steps = INT64_MAX;
  odd.top_k = 7;
  odd.lr = 0.1 + 0.2;
  odd.clip = std::nullopt;
  odd.tie = false;
  odd.name = "quotes \" \\ line\nbreak\ttab \x01\x7f \xc3\xa9 \xf0\x9f\x98\x80 # = [x]";
  odd.data = "dir with space/\xe2\x82\xac.bin";
  odd.optimizer = Optimizer::kSgd;
  odd.betas = {std::nextafter(1.0, 0.0), 5e-324};
  odd.shape = {INT64_MIN, -1, 0};
  odd.files = {"", "a,b", "none"};
  Fixture written(odd);
  Scratch scratch;
  const std::string text = written.options.toml(true);
  Fixture read;
  read.parse({"--config", scratch.file(text)});
  EXPECT_EQ(read.o.layers, odd.layers);
  EXPECT_EQ(read.o.steps, odd.steps);
  EXPECT_EQ(read.o.top_k, odd.top_k);
  EXPECT_EQ(std::bit_cast<uint64_t>(read.o.lr), std::bit_cast<uint64_t>(odd.lr));
  EXPECT_EQ(read.o.clip, odd.clip);
  EXPECT_EQ(read.o.tie, odd.tie);
  EXPECT_EQ(read.o.name, odd.name);
  EXPECT_EQ(read.o.data, odd.data);
  EXPECT_EQ(read.o.optimizer, odd.optimizer);
  EXPECT_EQ(read.o.betas, odd.betas);
  EXPECT_EQ(read.o.shape, odd.shape);
  EXPECT_EQ(read.o.files, odd.files);
  EXPECT_EQ(read.options.toml(false), written.options.toml(false));
}

TEST(Options, AnyDoubleSurvivesTheResolvedFile) {
  Scratch scratch;
  std::mt19937_64 random(1);
  std::vector<double> values = {
      0.0, -0.0, 1.0, 1e22, 1e23, 5e-324, DBL_MAX, -DBL_MAX, DBL_MIN, 9007199254740993.0, 1e15, 123456789012345680.0};
  while (values.size() < 2000) {
    const double value = std::bit_cast<double>(random());
    if (std::isfinite(value)) values.push_back(value);
  }
  std::vector<double> out = values, in;
  Options writer("a", "");
  writer.add("values", &out, NumberRule{}, ListSize{}, "");
  Options reader("a", "");
  reader.add("values", &in, NumberRule{}, ListSize{}, "");
  reader.load(scratch.file(writer.toml(false)));
  ASSERT_EQ(in.size(), values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    EXPECT_EQ(std::bit_cast<uint64_t>(in[i]), std::bit_cast<uint64_t>(values[i])) << shortest(values[i]);
  }
}

TEST(Options, HelpTellsEveryOptionItsRuleAndItsDefault) {
  Fixture f;
  std::ostringstream out;
  EXPECT_FALSE(f.options.parse(Args{"--lr", "-1", "-h"}, {{"WEFT_TRAIN_NONSENSE", "1"}}, out));
  const std::string help = out.str();
  EXPECT_HAS(help, "usage: weft train [options]\n\nTrains a model.\n");
  EXPECT_HAS(help, "The model [model]:\n");
  EXPECT_HAS(help, "--layers INT");
  EXPECT_HAS(help, "transformer blocks; an integer from 1 to 1,000 (default 4)");
  EXPECT_HAS(help, "--[no-]tie");
  EXPECT_HAS(help, "--dry-run");
  EXPECT_HAS(help, "(default 0.9,0.95)");
  EXPECT_HAS(help, "one of adamw, muon, sgd (default adamw)");
  EXPECT_HAS(help, "--config FILE");
  std::istringstream lines(f.options.help(70));
  for (std::string line; std::getline(lines, line);) EXPECT_LE(line.size(), 70u) << line;
}

TEST(Options, MarkdownHasARowForEachOption) {
  Fixture f;
  const std::string page = f.options.markdown();
  EXPECT_HAS(page, "## weft train\n");
  EXPECT_HAS(page, "### `[model]` The model\n");
  EXPECT_HAS(page, "| `--layers` | `WEFT_TRAIN_LAYERS` | an integer from 1 to 1,000 | `4` | transformer blocks |\n");
  EXPECT_HAS(page, "| `--dry-run` |  |");
}

TEST(Options, HelpIsAValueWhereAValueIsDue) {
  Fixture f;
  f.parse({"--name", "-h"});
  EXPECT_EQ(f.o.name, "-h");
}

TEST(Options, RejectNamesTheSourceOfTheValue) {
  Fixture f;
  f.parse({"--layers", "6"});
  try {
    f.options.reject("layers", "must divide ", 8);
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::kUsage);
    EXPECT_STREQ(error.what(), "[command line] --layers 6: must divide 8");
  }
}

TEST(Options, TakesPositionalsInOrder) {
  std::string first, second;
  std::vector<std::string> rest;
  bool flag = false;
  const auto declare = [&](Options& options) {
    options.positional("input_file", &first, "what to read");
    options.positional("output", &second, "what to write");
    options.positional_list("more", &rest, {.min = 1}, "the rest");
    options.add("flag", &flag, "a flag");
  };
  {
    Options options("data pack", "Packs.");
    declare(options);
    ASSERT_TRUE(options.parse(Args{"a", "--flag", "-", "--", "--c", "d,e"}, {}, std::cout));
    EXPECT_EQ(first, "a");
    EXPECT_EQ(second, "-");
    EXPECT_EQ(rest, (Args{"--c", "d,e"}));
    EXPECT_TRUE(flag);
    EXPECT_HAS(options.help(), "usage: weft data pack [options] INPUT-FILE OUTPUT MORE...\n");
    EXPECT_HAS(options.markdown(), "`WEFT_DATA_PACK_FLAG`");
  }
  first = second = "", rest.clear();
  Options options("data pack", "Packs.");
  declare(options);
  try {
    (void)options.parse(Args{"a", "b"}, {}, std::cout);
    FAIL() << "the list may not be empty";
  } catch (const Error& error) {
    EXPECT_HAS(std::string(error.what()), "missing argument MORE: the rest");
  }
}

TEST(Options, TakesAnActionWithAValueFromTheCommandLineOnly) {
  std::string resume;
  bool dry_run = false;
  const auto declare = [&](Options& options) {
    options.add("dry_run", &dry_run, "a saved one, to compare with");
    options.action("resume", &resume, "DIR", "goes on with a run");
  };
  for (const Args& args : {Args{"--resume", "out"}, Args{"--resume=out"}}) {
    resume.clear();
    Options options("train", "");
    declare(options);
    EXPECT_TRUE(options.parse(args, {}, std::cout));
    EXPECT_EQ(resume, "out");
    EXPECT_TRUE(options.given("resume"));
    EXPECT_HAS(options.help(), "--resume DIR");
    EXPECT_EQ(options.toml(false).find("resume"), std::string::npos) << options.toml(false);
  }
  Scratch scratch;
  const std::vector<std::pair<Args, Environment>> refused = {
      {{"--resume"}, {}},
      {{"--resume", "--dry-run"}, {}},
      {{"--config", scratch.file("resume = \"out\"\n")}, {}},
      {{}, {{"WEFT_TRAIN_RESUME", "out"}}},
  };
  for (const auto& [args, environment] : refused) {
    Options options("train", "");
    declare(options);
    try {
      (void)options.parse(args, environment, std::cout);
      ADD_FAILURE() << "resume was taken from where it may not come from";
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::kUsage) << error.what();
    }
  }
}

TEST(Options, RequiresWhatHasNoDefault) {
  std::filesystem::path data;
  Options options("train", "");
  options.section("data", "Data");
  options.add("tokens", &data, {.required = true}, "token file");
  try {
    (void)options.parse(Args{}, {}, std::cout);
    FAIL() << "--tokens was not required";
  } catch (const Error& error) {
    EXPECT_HAS(std::string(error.what()), "--tokens is required: token file");
    EXPECT_HAS(std::string(error.what()), "WEFT_TRAIN_TOKENS");
  }
  EXPECT_TRUE(options.parse(Args{}, {{"WEFT_TRAIN_TOKENS", "x"}}, std::cout));
}

TEST(Options, RefusesWrongDeclarations) {
  const auto kind_of = [](auto declare) {
    Options options("num", "");
    try {
      declare(options);
    } catch (const Error& error) {
      return error.kind();
    }
    return ErrorKind::kIndex;
  };
  static int64_t integer = 0;
  static double number = std::numeric_limits<double>::quiet_NaN();
  static bool flag = false;
  static auto odd = static_cast<Optimizer>(9);
  static std::string word;
  const std::vector<std::function<void(Options&)>> wrong = {
      [](Options& o) { o.add("a", &flag, ""), o.add("a", &flag, ""); },
      [](Options& o) { o.add("no_a", &flag, ""); },
      [](Options& o) { o.add("help", &flag, ""); },
      [](Options& o) { o.add("config", &flag, ""); },
      [](Options& o) { o.add("Upper", &flag, ""); },
      [](Options& o) { o.add("a-b", &flag, ""); },
      [](Options& o) { o.add("", &flag, ""); },
      [](Options& o) { o.add("a", &integer, {.min = 1}, ""); },
      [](Options& o) { o.add("a", &number, {}, ""); },
      [](Options& o) { o.add("a", &odd, {{"adamw", Optimizer::kAdamW}}, ""); },
      [](Options& o) { o.add("threads", &flag, ""); },  // WEFT_NUM_THREADS speaks to the process
      [](Options& o) { o.section("s", ""), o.section("s", ""); },
      [](Options& o) { o.positional("a", &word, "", false), o.positional("b", &word, ""); },
      [](Options& o) { (void)o.given("absent"); },
  };
  for (size_t i = 0; i < wrong.size(); ++i) EXPECT_EQ(kind_of(wrong[i]), ErrorKind::kState) << "case " << i;
}

TEST(Options, AnyArgumentsAndFilesGiveValuesOrAnErrorAndNothingElse) {
  Scratch scratch;
  std::mt19937 random(7);
  const Args pieces = {"--lr",
                       "--layers",
                       "=",
                       "-",
                       "--",
                       "1",
                       "0.5",
                       "e",
                       "_",
                       ",",
                       "Ki",
                       "nan",
                       "--no-",
                       "tie",
                       "--name",
                       "\xff",
                       std::string(1, '\0'),
                       "--betas",
                       " ",
                       "[optim]\n",
                       "lr = ",
                       "\"",
                       "betas = [",
                       "]",
                       "\n",
                       "[model]\n",
                       "{",
                       "}",
                       "--config",
                       "9999999999999999999",
                       "'''",
                       "#",
                       "\\u",
                       ".",
                       "--help"};
  int accepted = 0;
  for (int trial = 0; trial < 3000; ++trial) {
    Args args;
    std::string text;
    for (uint32_t n = random() % 5; n > 0; --n) {
      std::string word;
      for (uint32_t k = random() % 3 + 1; k > 0; --k) word += pieces[random() % pieces.size()];
      args.push_back(word);
      text += word;
    }
    Fixture f;
    std::ostringstream out;
    try {
      if (trial % 2 == 0) f.options.load(scratch.file(text));
      if (trial % 2 == 1) (void)f.options.parse(args, {}, out);
      ++accepted;
      EXPECT_TRUE(f.o.layers >= 1 && f.o.layers <= 1000 && f.o.lr > 0 && f.o.lr <= 10 && f.o.betas.size() == 2);
    } catch (const Error& error) {
      EXPECT_TRUE(error.kind() == ErrorKind::kUsage || error.kind() == ErrorKind::kIo) << error.what();
    }
  }
  EXPECT_GT(accepted, 100);
}

}  // namespace
