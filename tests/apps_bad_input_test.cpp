// What the program does with input that it must refuse: one line that says what is wrong and where, the right exit
// code, in no time, and nothing left behind.
#include <cstring>
#include <functional>
#include <map>
#include <sstream>

#include "models/checkpoint/checkpoint.h"
#include "models/gpt_checkpoint.h"
#include "models/text/shard.h"
#include "tests/apps_process.h"

namespace {

using namespace weft;
using namespace weft::apps_test;

constexpr int kUsage = 2, kData = 1;

/// A prepared directory with a run of two steps, made once: what each case then breaks a copy of.
const fs::path& model_place() {
  static const Scratch scratch;
  static const bool made = [] {
    const fs::path& place = scratch.path();
    write_content(place / "text.txt", small_text());
    write_content(place / "empty.txt", "");
    must_run(place, {"data", "prepare", "--text", "text.txt", "--out", "data", "--vocab", "300"});
    must_run(place, Args{"train", "--data", "data", "--out", "run", "--steps", "2", "--warmup", "0"} + kSmallModel);
    return true;
  }();
  (void)made;
  return scratch.path();
}

/// Every file and directory with its content.
std::map<std::string, std::string> snapshot(const fs::path& place) {
  std::map<std::string, std::string> all;
  for (const auto& entry : fs::recursive_directory_iterator(place)) {
    const std::string name = entry.path().lexically_relative(place).string();
    all[name] = entry.is_regular_file() ? content_of(entry.path()) : "(no file)";
  }
  return all;
}

using Place = const fs::path&;
using Break = std::function<void(Place)>;

struct Case {
  const char* name;
  int code;
  Args args;
  Args fragments;
  Break prepare = {};
  Args environment = {};
};

void check(const std::vector<Case>& cases) {
  for (const Case& each : cases) {
    SCOPED_TRACE(each.name);
    const Scratch scratch;
    fs::copy(model_place(), scratch.path(), fs::copy_options::recursive);
    if (each.prepare) each.prepare(scratch.path());
    const auto before = snapshot(scratch.path());
    constexpr double kSeconds = 20;  // sanitizers and a busy machine included; without them it is some milliseconds
    const Outcome outcome = run_weft(scratch.path(), each.args, each.environment, "", kSeconds);
    EXPECT_FALSE(outcome.timed_out);
    EXPECT_EQ(outcome.code, each.code) << outcome.out << outcome.err;
    EXPECT_NE(outcome.err.find("weft: error: ["), std::string::npos) << outcome.err;
    for (const std::string& fragment : each.fragments) {
      EXPECT_NE(outcome.err.find(fragment), std::string::npos) << "no " << fragment << " in " << outcome.err;
    }
    EXPECT_EQ(outcome.err.find("basic_string"), std::string::npos) << "a bare library message: " << outcome.err;
    const auto after = snapshot(scratch.path());
    for (const auto& [name, content] : after) {
      const auto found = before.find(name);
      if (found == before.end()) {
        ADD_FAILURE() << "left behind: " << name;
      } else {
        EXPECT_TRUE(found->second == content) << "changed: " << name;
      }
    }
    EXPECT_EQ(before.size(), after.size()) << "something is gone";
  }
}

Break with_config(const std::string& content) {
  return [content](Place place) { write_content(place / "c.toml", content); };
}

Break patch(const std::string& file, size_t offset, const std::string& bytes) {
  return [=](Place place) {
    std::string content = content_of(place / file);
    if (offset + bytes.size() > content.size()) throw std::runtime_error("the file is shorter than the patch");
    write_content(place / file, content.replace(offset, bytes.size(), bytes));
  };
}

Break flip(const std::string& file, double where) {
  return [=](Place place) {
    std::string content = content_of(place / file);
    content[static_cast<size_t>(where * static_cast<double>(content.size() - 1))] ^= 4;
    write_content(place / file, content);
  };
}

Break truncate(const std::string& file, double share) {
  return [=](Place place) {
    fs::resize_file(place / file, static_cast<uintmax_t>(share * static_cast<double>(fs::file_size(place / file))));
  };
}

Break replace(const std::string& file, const std::string& from, const std::string& to) {
  return [=](Place place) {
    std::string content = content_of(place / file);
    const size_t at = content.find(from);
    if (at == std::string::npos) throw std::runtime_error(from + " is not in " + file);
    write_content(place / file, content.replace(at, from.size(), to));
  };
}

Break erase(const std::string& file) {
  return [=](Place place) { fs::remove_all(place / file); };
}

Break put(const std::string& file, const std::string& content) {
  return [=](Place place) { write_content(place / file, content); };
}

std::string little_endian(uint64_t value, size_t size) { return {reinterpret_cast<const char*>(&value), size}; }

const Args kTrain = {"train", "--data",  "data", "--out",   "new", "--steps",   "2", "--warmup", "0", "--layers",
                     "1",     "--width", "8",    "--heads", "2",   "--context", "8", "--batch",  "2"};
const Args kGenerate = {"generate", "--checkpoint", "run", "--prompt", "the king", "--tokens", "2"};
const Args kEval = {"eval", "--checkpoint", "run", "--data", "data"};
const Args kPrepare = {"data", "prepare", "--text", "text.txt", "--out", "new"};

TEST(BadInput, CommandsAndOptionsAreRefused) {
  check({
      {"unknown command", kUsage, {"trian"}, {"unknown command \"trian\"", "did you mean \"train\""}},
      {"unknown inner command", kUsage, {"data", "prepair"}, {"prepair", "did you mean \"prepare\""}},
      {"option for a command", kUsage, {"--layers"}, {"unknown option"}},
      {"unknown option", kUsage, kTrain + Args{"--layer", "2"}, {"unknown option \"--layer\"", "--layers"}},
      {"option without value", kUsage, {"train", "--data"}, {"--data needs a value"}},
      {"option for a value", kUsage, {"train", "--data", "--out", "x"}, {"--data needs a value", "--out"}},
      {"given twice", kUsage, kTrain + Args{"--batch", "4"}, {"--batch is given twice"}},
      {"stray argument", kUsage, kTrain + Args{"extra"}, {"unexpected argument \"extra\""}},
      {"not a number", kUsage, {"train", "--lr", "fast"}, {"--lr \"fast\"", "must be a number"}},
      {"NaN", kUsage, {"train", "--lr", "nan"}, {"--lr", "NaN"}},
      {"negative", kUsage, {"train", "--layers", "-1"}, {"--layers", "from 1 to 10,000"}},
      {"fraction", kUsage, {"train", "--layers", "1.5"}, {"not a whole number"}},
      {"overflow", kUsage, {"train", "--steps", "99999999999999999999"}, {"64-bit"}},
      {"unknown choice", kUsage, {"train", "--optimizer", "adamx"}, {"adamw, lamb", "did you mean"}},
      {"value for a flag", kUsage, {"train", "--dry-run=maybe"}, {"true or false"}},
      {"recompute was a flag", kUsage, {"train", "--recompute=true"}, {"--recompute \"true\"", "\"block\" now"}},
      {"recompute without value", kUsage, {"train", "--recompute"}, {"--recompute needs a value", "none or some of"}},
      {"unknown part", kUsage, {"train", "--recompute", "norm,atention"}, {"did you mean \"attention\""}},
      {"none and a part", kUsage, {"train", "--recompute", "none,norm"}, {"must be none or some of"}},
      {"empty set", kUsage, {"train", "--recompute="}, {"it is empty"}},
      {"cuDNN on a CPU",
       kUsage,
       kTrain + Args{"--device", "cpu", "--attention", "cudnn"},
       {"attention", "the device is cpu"}},
      {"offload on a CPU", kUsage, kTrain + Args{"--device", "cpu", "--offload", "optimizer"}, {"the host's already"}},
      {"dropout of one", kUsage, {"train", "--dropout", "1"}, {"< 1"}},
      {"invalid UTF-8", kUsage, {"train", "--sample-prompt", "\xff"}, {"UTF-8"}},
      {"a graph on a CPU",
       kUsage,
       kTrain + Args{"--device", "cpu", "--cuda-graph", "on"},
       {"cuda_graph = on", "the device is cpu", "auto"}},
      {"no data", kUsage, {"train"}, {"data", "must be given", "weft data prepare"}},
      {"generate without checkpoint", kUsage, {"generate", "--prompt", "x"}, {"--checkpoint is required"}},
      {"generate without prompt", kUsage, {"generate", "--checkpoint", "run"}, {"prompt", "must be given"}},
      {"two prompts", kUsage, kGenerate + Args{"--prompt_file", "text.txt"}, {"together with --prompt"}},
      {"temperature below 0", kUsage, kGenerate + Args{"--temperature=-1"}, {"--temperature", ">= 0"}},
      {"top_p of 0", kUsage, kGenerate + Args{"--top_p", "0"}, {"--top_p", "> 0"}},
      {"top_p above 1", kUsage, kGenerate + Args{"--top_p", "1.1"}, {"<= 1"}},
      {"no tokens", kUsage, {"generate", "--checkpoint", "run", "--prompt", "x", "--tokens", "0"}, {"--tokens"}},
      {"eval without data", kUsage, {"eval", "--checkpoint", "run"}, {"--data is required"}},
      {"eval of nothing", kUsage, {"eval", "--data", "data", "--kneser-ney", "0"}, {"nothing to measure"}},
      {"order too high", kUsage, {"eval", "--data", "data", "--kneser-ney", "33"}, {"from 0 to 32"}},
      {"prepare without vocabulary", kUsage, kPrepare, {"vocab", "--tokenizer FILE"}},
      {"vocabulary and tokenizer",
       kUsage,
       kPrepare + Args{"--vocab", "300", "--tokenizer", "data/tokenizer.json"},
       {"together"}},
      {"vocabulary below bytes", kUsage, kPrepare + Args{"--vocab", "255"}, {"from 256"}},
      {"all held out", kUsage, kPrepare + Args{"--vocab", "300", "--held-out", "1"}, {"--held-out", "< 1"}},
      {"prepare over data",
       kUsage,
       {"data", "prepare", "--text", "text.txt", "--out", "data", "--vocab", "300"},
       {"train.tokens", "--overwrite"}},
      {"inspect what", kUsage, {"data", "inspect"}, {"missing argument FILE"}},
      {"verify what", kUsage, {"checkpoint", "verify"}, {"missing argument DIR"}},
      {"train over a run", kUsage, {"train", "--data", "data", "--out", "run", "--steps", "2"}, {"warmup"}},
      {"train among checkpoints",
       kUsage,
       {"train", "--data", "data", "--out", "run", "--warmup", "0", "--heads", "2", "--width", "8"},
       {"weft train --resume run"}},
      {"doctor with an argument", kUsage, {"doctor", "now"}, {"unexpected argument \"now\". See weft doctor --help"}},
      {"several stages of a rank in a schedule that has one",
       kUsage,
       {"plan", "schedule", "--schedule", "gpipe", "--chunks", "2"},
       {"--chunks 2", "gpipe has one on each", "Hint: --schedule interleaved"}},
      {"a schedule that would take hours and all memory",
       kUsage,
       {"plan", "schedule", "--ranks", "4096", "--micro-batches", "65536"},
       {"268,435,456 forwards", "at most 1,048,576"}},
      {"times whose sum is infinite",
       kUsage,
       {"plan", "schedule", "--forward", "1e308", "--backward-input", "1e308"},
       {"a step of no finite length"}},
      {"layers without costs",
       kUsage,
       {"plan", "schedule", "--layer-costs", "0,0,0,0"},
       {"a step of no length", "costs"}},
  });
}

TEST(BadInput, TomlFilesAreRefusedWithThePlace) {
  const Args args = {"train", "--config", "c.toml"};
  check({
      {"not TOML", kUsage, args, {"c.toml:2:", "not valid TOML"}, with_config("[model]\nlayers 4\n")},
      {"unknown key",
       kUsage,
       args,
       {"c.toml:2:1", "unknown key \"layer\"", "did you mean \"layers\""},
       with_config("[model]\nlayer = 4\n")},
      {"unknown section",
       kUsage,
       args,
       {"c.toml:1:", "unknown section [modle]", "did you mean \"model\""},
       with_config("[modle]\nlayers = 4\n")},
      {"wrong section",
       kUsage,
       args,
       {"c.toml:2:1", "lr belongs in [optimizer], not in [model]"},
       with_config("[model]\nlr = 1e-3\n")},
      {"no section", kUsage, args, {"c.toml:1:1", "belongs in [model]"}, with_config("layers = 4\n")},
      {"wrong type",
       kUsage,
       args,
       {"c.toml:2:10", "layers = \"four\"", "it is a string"},
       with_config("[model]\nlayers = \"four\"\n")},
      {"boolean for a number", kUsage, args, {"c.toml:2:", "it is a boolean"}, with_config("[optimizer]\nlr = true\n")},
      {"array for a number", kUsage, args, {"it is an array"}, with_config("[optimizer]\nlr = [1.0]\n")},
      {"out of range", kUsage, args, {"c.toml:3:", "from 1 to 10,000"}, with_config("[model]\n\nlayers = 0\n")},
      {"duplicate key",
       kUsage,
       args,
       {"c.toml:3:", "not valid TOML"},
       with_config("[model]\nlayers = 1\nlayers = 2\n")},
      {"infinite", kUsage, args, {"it is infinite"}, with_config("[optimizer]\nlr = inf\n")},
      {"for one call only", kUsage, args, {"for the command line only"}, with_config("[run]\ndry_run = true\n")},
      {"resume in a file", kUsage, args, {"for the command line only"}, with_config("[run]\nresume = \"run\"\n")},
      {"no file", kUsage, {"train", "--config", ""}, {"--config"}},
      {"missing file", kData, {"train", "--config", "none.toml"}, {"none.toml", "No such file"}},
      {"a directory", kData, {"train", "--config", "data"}, {"data"}},
  });
}

TEST(BadInput, VariablesAreRefusedByName) {
  check({
      {"unknown option",
       kUsage,
       kTrain,
       {"WEFT_TRAIN_LAYER", "did you mean \"WEFT_TRAIN_LAYERS\""},
       {},
       {"WEFT_TRAIN_LAYER=2"}},
      {"unknown command", kUsage, kTrain, {"WEFT_TRIAN_LAYERS", "no such variable"}, {}, {"WEFT_TRIAN_LAYERS=2"}},
      {"bad value", kUsage, kTrain, {"WEFT_TRAIN_DROPOUT=\"2\"", "< 1"}, {}, {"WEFT_TRAIN_DROPOUT=2"}},
      {"bad level", kUsage, kTrain, {"WEFT_LOG_LEVEL"}, {}, {"WEFT_LOG_LEVEL=loud"}},
      {"bad threads", kUsage, kTrain, {"WEFT_NUM_THREADS", "from 1 to 1024"}, {}, {"WEFT_NUM_THREADS=zero"}},
      {"action in a variable", kUsage, kTrain, {"WEFT_TRAIN_DRY_RUN"}, {}, {"WEFT_TRAIN_DRY_RUN=1"}},
  });
}

TEST(BadInput, TextsThatCannotBeLearntFromAreRefused) {
  const auto prepare = [](const std::string& text, const std::string& vocab) {
    return Args{"data", "prepare", "--text", text, "--out", "new", "--vocab", vocab};
  };
  check({
      {"missing text", kData, prepare("none.txt", "300"), {"none.txt", "No such file"}},
      {"directory for text", kData, prepare("data", "300"), {"data", "directory"}},
      {"empty text", kData, prepare("empty.txt", "300"), {"empty.txt is empty"}},
      {"empty input", kData, prepare("-", "300"), {"is empty"}},
      {"one byte", kData, prepare("one.txt", "256"), {"too short"}, put("one.txt", "a")},
      {"a few bytes", kData, prepare("few.txt", "256"), {"too short", "held-out"}, put("few.txt", "in the beginning")},
      {"vocabulary beyond the text", kData, prepare("few.txt", "4000"), {"4000"}, put("few.txt", small_text(900))},
      {"output is a file",
       kData,
       {"data", "prepare", "--text", "text.txt", "--out", "text.txt", "--vocab", "300"},
       {"text.txt"}},
      {"output below a file",
       kData,
       {"data", "prepare", "--text", "text.txt", "--out", "text.txt/x", "--vocab", "300"},
       {"text.txt/x"}},
      {"missing tokenizer", kData, kPrepare + Args{"--tokenizer", "none.json"}, {"none.json"}},
      {"tokenizer train without directory",
       kData,
       {"tokenize", "train", "--text", "text.txt", "--vocab", "300", "--out", "no/dir/t.json"},
       {"no/dir/t.json"}},
      {"tokenizer over a directory",
       kData,
       {"tokenize", "train", "--text", "text.txt", "--vocab", "300", "--out", "data"},
       {"data"}},
      {"special token twice",
       kData,
       {"tokenize", "train", "--text", "text.txt", "--vocab", "300", "--out", "t.json", "--special", "<a>,<a>"},
       {"<a>"}},
      {"encode to nowhere",
       kData,
       {"tokenize", "encode", "--tokenizer", "data/tokenizer.json", "--text", "text.txt", "--out", "no/x.tokens"},
       {"no/x.tokens"}},
      {"decode words",
       kData,
       {"tokenize", "decode", "--tokenizer", "data/tokenizer.json", "words.txt"},
       {"word 2", "\"two\""},
       put("words.txt", "1 two 3")},
      {"decode beyond the vocabulary",
       kData,
       {"tokenize", "decode", "--tokenizer", "data/tokenizer.json", "ids.txt"},
       {"300", "vocabulary"},
       put("ids.txt", "1 2 300")},
      {"decode a negative id",
       kData,
       {"tokenize", "decode", "--tokenizer", "data/tokenizer.json", "ids.txt"},
       {"-1"},
       put("ids.txt", "-1")},
      {"decode a huge id",
       kData,
       {"tokenize", "decode", "--tokenizer", "data/tokenizer.json", "ids.txt"},
       {"99999999999"},
       put("ids.txt", "99999999999")},
  });
}

TEST(BadInput, DamagedTokenFilesAreRefused) {
  const Args inspect = {"data", "inspect", "data/train.tokens"};
  const std::string file = "data/train.tokens";
  check({
      {"missing", kData, {"data", "inspect", "data/none.tokens"}, {"none.tokens"}},
      {"a directory", kData, {"data", "inspect", "data"}, {"is a directory"}},
      {"not a shard", kData, {"data", "inspect", "text.txt"}, {"is no token shard"}},
      {"empty", kData, {"data", "inspect", "empty.txt"}, {"is no token shard", "64 bytes"}},
      {"only a header's half",
       kData,
       inspect,
       {"is no token shard"},
       [](Place p) { fs::resize_file(p / "data/train.tokens", 40); }},
      {"truncated", kData, inspect, {"is truncated"}, truncate(file, 0.7)},
      {"trailing bytes",
       kData,
       inspect,
       {"trailing"},
       [](Place p) { write_content(p / "data/train.tokens", content_of(p / "data/train.tokens") + "xy"); }},
      {"bit flipped in a token", kData, inspect, {"damaged"}, flip(file, 0.8)},
      {"other version", kData, inspect, {"has version 7", "reads version 1"}, patch(file, 8, little_endian(7, 4))},
      {"token width", kData, inspect, {"3 bytes"}, patch(file, 12, little_endian(3, 4))},
      {"count that overflows", kData, inspect, {"truncated"}, patch(file, 16, little_endian(~uint64_t{0}, 8))},
      {"vocabulary of 0", kData, inspect, {"vocabulary of 0"}, patch(file, 24, little_endian(0, 8))},
      {"ids beyond the vocabulary",
       kData,
       inspect,
       {"is not in the vocabulary of 40"},
       patch(file, 24, little_endian(40, 8))},
      {"other vocabulary than the tokenizer",
       kData,
       inspect,
       {"do not belong together"},
       patch(file, 24, little_endian(301, 8))},
      {"train on it",
       kData,
       kTrain,
       {"was made with a vocabulary of 301", "300"},
       patch(file, 24, little_endian(301, 8))},
      {"train on a damaged one", kData, kTrain, {"damaged"}, flip(file, 0.5)},
      {"train on truncated held-out text",
       kData,
       kTrain,
       {"heldout.tokens", "truncated"},
       truncate("data/heldout.tokens", 0.9)},
      {"eval on a damaged one", kData, kEval, {"damaged"}, flip("data/heldout.tokens", 0.9)},
      {"train without held-out text",
       kData,
       kTrain,
       {"has no heldout.tokens", "weft data prepare"},
       erase("data/heldout.tokens")},
      {"train without tokenizer", kData, kTrain, {"has no tokenizer.json"}, erase("data/tokenizer.json")},
      {"train without directory", kData, {"train", "--data", "nowhere"}, {"nowhere has no tokenizer.json"}},
      {"a tokenizer that is a directory",
       kData,
       kTrain,
       {"tokenizer.json"},
       [](Place p) { fs::remove(p / "data/tokenizer.json"), fs::create_directory(p / "data/tokenizer.json"); }},
  });
}

TEST(BadInput, BrokenTokenizersAreRefused) {
  const Args encode = {"tokenize", "encode", "--tokenizer", "data/tokenizer.json", "--text", "text.txt"};
  const std::string file = "data/tokenizer.json";
  std::string deep;
  for (int i = 0; i < 100000; ++i) deep += "[";
  check({
      {"not JSON", kData, encode, {"tokenizer.json", "no valid JSON"}, put(file, "{")},
      {"empty", kData, encode, {"no valid JSON"}, put(file, "")},
      {"an array", kData, encode, {"must hold an object"}, put(file, "[]")},
      {"truncated", kData, encode, {"no valid JSON"}, truncate(file, 0.5)},
      {"nested without end", kData, encode, {"no valid JSON"}, put(file, deep)},
      {"other model", kData, encode, {"WordPiece", "\"BPE\""}, replace(file, "\"BPE\"", "\"WordPiece\"")},
      {"other pre-tokenizer", kData, encode, {"pre_tokenizer"}, replace(file, "\"ByteLevel\"", "\"Whitespace\"")},
      {"byte fallback",
       kData,
       encode,
       {"byte_fallback"},
       replace(file, "\"byte_fallback\": false", "\"byte_fallback\": true")},
      {"id twice", kData, encode, {"id"}, replace(file, "\"!\": 33", "\"!\": 34")},
      {"id beyond", kData, encode, {"3300000000"}, replace(file, "\"!\": 33", "\"!\": 3300000000")},
      {"id is text", kData, encode, {"whole number"}, replace(file, "\"!\": 33", "\"!\": \"33\"")},
      {"byte missing", kData, encode, {"tokenizer.json"}, replace(file, "\"!\": 33", "\"!!!!!\": 33")},
      {"merge of three", kData, encode, {"merge 0"}, replace(file, "\"merges\": [", "\"merges\": [ \"a b c\",")},
      {"merge of unknown tokens",
       kData,
       encode,
       {"not in the vocabulary"},
       replace(file, "\"merges\": [", "\"merges\": [ \"a zzzz\",")},
      {"training with it", kData, kTrain, {"no valid JSON"}, truncate(file, 0.9)},
      {"directory without tokenizer",
       kData,
       {"tokenize", "encode", "--tokenizer", "run", "--text", "text.txt"},
       {"neither tokenizer.json nor"}},
  });
}

TEST(BadInput, ShapesThatDoNotFitAreRefused) {
  const Args train = {"train",    "--data", "data",     "--out", "new",     "--steps", "2",
                      "--warmup", "0",      "--layers", "1",     "--batch", "2"};
  check({
      {"heads do not divide the width",
       kUsage,
       train + Args{"--width", "10", "--heads", "3"},
       {"--heads 3", "must divide width = 10"}},
      {"heads from a file",
       kUsage,
       {"train", "--data", "data", "--config", "c.toml"},
       {"c.toml:2:", "heads = 3", "must divide width = 128"},
       with_config("[model]\nheads = 3\n")},
      {"context longer than the data",
       kData,
       train + Args{"--width", "8", "--heads", "2", "--context", "100000"},
       {"100000", "tokens; the data has", "Hint"}},
      {"batch beyond 31 bits",
       kData,
       {"train", "--data", "data", "--out", "new", "--width", "8", "--heads", "2", "--context", "2100", "--batch",
        "1048576"},
       {"2^31"}},
      {"least rate above the highest",
       kUsage,
       train + Args{"--lr", "1e-3", "--min-lr", "1e-2"},
       {"min-lr", "at most lr"}},
      {"all steps warm-up",
       kUsage,
       {"train", "--data", "data", "--steps", "5", "--warmup", "5"},
       {"warmup", "below steps = 5"}},
      {"more memory than there is",
       kData,
       train + Args{"--width", "1048576", "--heads", "2", "--context", "8"},
       {"memory", "--dry-run"}},
      {"more parameters than can be counted",
       kData,
       {"train", "--data", "data", "--dry-run", "--layers", "10000", "--heads", "1", "--width", "16777216"},
       {"beyond any machine's memory"}},
      {"resume with another width",
       kData,
       {"train", "--resume", "run", "--steps", "3", "--width", "32"},
       {"\"wte.weight\" is f32 [300, 16]; the program expects one [300, 32]"}},
      {"resume with another depth",
       kData,
       {"train", "--resume", "run", "--steps", "3", "--layers", "3"},
       {"no tensor \"h.2."}},
      {"resume with fewer steps", kUsage, {"train", "--resume", "run", "--steps", "1"}, {"has taken 2 steps"}},
  });
}

TEST(BadInput, DamagedCheckpointsAreRefused) {
  const std::string step = "run/step_00000002/";
  const Args verify = {"checkpoint", "verify", "run"}, show = {"checkpoint", "show", "run"};
  const Args resume = {"train", "--resume", "run", "--steps", "3"};
  const auto with_state = [](std::map<std::string, std::string> changed) {
    return [changed](Place place) {
      CheckpointContent content = load_checkpoint((place / "run/step_00000002").string());
      for (const auto& [name, value] : changed) {
        content.state[name] = value;
        if (value == "(none)") content.state.erase(name);
      }
      save_checkpoint((place / "run").string(), content);
    };
  };
  check({
      {"missing run", kData, {"generate", "--checkpoint", "none", "--prompt", "x"}, {"\"none\"", "no such directory"}},
      {"no run",
       kData,
       {"generate", "--checkpoint", "data", "--prompt", "x"},
       {"data", "no checkpoint", "manifest.json"}},
      {"a file", kData, {"generate", "--checkpoint", "text.txt", "--prompt", "x"}, {"text.txt"}},
      {"verify a file", kData, {"checkpoint", "verify", "text.txt"}, {"is no directory"}},
      {"list nowhere", kData, {"checkpoint", "list", "none"}, {"no such directory"}},
      {"show data", kData, {"checkpoint", "show", "data"}, {"no checkpoint"}},
      {"verify an empty run", kData, verify, {"holds no intact checkpoint"}, erase("run/step_00000002")},
      {"resume an empty run", kData, resume, {"no checkpoint"}, erase("run/step_00000002")},
      {"weights truncated", kData, verify, {"no intact checkpoint"}, truncate(step + "model.safetensors", 0.6)},
      {"generate from truncated weights",
       kData,
       kGenerate,
       {"model.safetensors", "truncated"},
       truncate(step + "model.safetensors", 0.6)},
      {"weights empty", kData, kGenerate, {"model.safetensors", "truncated"}, truncate(step + "model.safetensors", 0)},
      {"weights with a flipped bit",
       kData,
       kGenerate,
       {"model.safetensors", "damaged"},
       flip(step + "model.safetensors", 0.9)},
      {"header with a flipped bit", kData, kGenerate, {"damaged"}, flip(step + "model.safetensors", 0.001)},
      {"optimizer with a flipped bit",
       kData,
       resume,
       {"optimizer.safetensors", "damaged"},
       flip(step + "optimizer.safetensors", 0.5)},
      {"weights missing", kData, kEval, {"model.safetensors"}, erase(step + "model.safetensors")},
      {"optimizer missing", kData, resume, {"optimizer.safetensors"}, erase(step + "optimizer.safetensors")},
      {"tokenizer missing", kData, kGenerate, {"tokenizer.json"}, erase(step + "tokenizer.json")},
      {"configuration changed",
       kData,
       resume,
       {"config.toml"},
       replace(step + "config.toml", "width = 16", "width = 32")},
      {"manifest missing", kData, kGenerate, {"manifest.json"}, erase(step + "manifest.json")},
      {"manifest truncated", kData, kGenerate, {"manifest.json"}, truncate(step + "manifest.json", 0.5)},
      {"manifest empty", kData, show, {"manifest.json"}, truncate(step + "manifest.json", 0)},
      {"manifest without JSON", kData, verify, {"no intact"}, put(step + "manifest.json", "steps: 2")},
      {"manifest of another step",
       kData,
       kGenerate,
       {"manifest"},
       replace(step + "manifest.json", "\"step\": 2", "\"step\": 3")},
      {"no GPT", kData, kGenerate, {"gpt.layers", "no checkpoint of a GPT"}, with_state({{"gpt.layers", "(none)"}})},
      {"layers are text",
       kData,
       kGenerate,
       {"gpt.layers", "\"two\"", "must be a number"},
       with_state({{"gpt.layers", "two"}})},
      {"negative width", kData, kGenerate, {"width", "-16"}, with_state({{"gpt.width", "-16"}})},
      {"huge width", kData, kGenerate, {"do not belong together"}, with_state({{"gpt.width", "16777216"}})},
      {"huge depth", kData, kGenerate, {"do not belong together"}, with_state({{"gpt.layers", "10000"}})},
      {"huge context", kData, kGenerate, {"do not belong together"}, with_state({{"gpt.context", "16777216"}})},
      {"other vocabulary", kData, kGenerate, {"do not belong together"}, with_state({{"gpt.vocab", "301"}})},
      {"heads that do not divide", kData, kGenerate, {"heads must divide width"}, with_state({{"gpt.heads", "3"}})},
      {"dropout is NaN", kData, kGenerate, {"dropout"}, with_state({{"gpt.dropout", "nan"}})},
      {"tokenizer of other data",
       kData,
       kEval,
       {"is not that of data", "--tokenizer"},
       [](Place place) {
         must_run(place, {"data", "prepare", "--text", "text.txt", "--out", "data", "--vocab", "290", "--overwrite"});
       }},
      {"prompt file missing", kData, {"generate", "--checkpoint", "run", "--prompt-file", "none.txt"}, {"none.txt"}},
      {"prompt file empty",
       kData,
       {"generate", "--checkpoint", "run", "--prompt-file", "empty.txt"},
       {"empty.txt is empty"}},
  });
}

TEST(BadInput, OutputThatCannotBeWrittenIsAnError) {
  check({
      {"output is a file", kData, {"train", "--data", "data", "--out", "text.txt", "--warmup", "0"}, {"text.txt"}},
      {"output below a file",
       kData,
       {"train", "--data", "data", "--out", "text.txt/run", "--warmup", "0"},
       {"text.txt/run"}},
  });
  if (geteuid() != 0) {
    const Break locked = [](Place place) {
      fs::create_directory(place / "locked");
      fs::permissions(place / "locked", fs::perms::owner_read | fs::perms::owner_exec);
    };
    check({
        {"locked directory",
         kData,
         {"train", "--data", "data", "--out", "locked/run", "--warmup", "0"},
         {"locked/run", "denied"},
         locked},
        {"locked data",
         kData,
         {"data", "prepare", "--text", "text.txt", "--out", "locked/d", "--vocab", "300"},
         {"locked/d", "denied"},
         locked},
    });
  }
  // A full disk at standard output.
  const Scratch scratch;
  const std::string command = std::string(WEFT_BINARY) + " --help > /dev/full 2> " + (scratch.path() / "err").string();
  const int status = std::system(command.c_str());
  EXPECT_EQ(WEXITSTATUS(status), 1);
  EXPECT_NE(content_of(scratch.path() / "err").find("standard output could not be written"), std::string::npos);
}

}  // namespace
