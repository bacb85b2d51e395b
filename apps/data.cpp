// weft data: text -> training tokens, held-out tokens and the tokenizer between them.
#include <algorithm>
#include <iostream>
#include <optional>

#include "apps/command.h"
#include "apps/commands.h"
#include "apps/data_directory.h"
#include "apps/files.h"
#include "apps/options.h"
#include "core/file.h"
#include "core/log.h"

namespace weft::apps {
namespace {

namespace fs = std::filesystem;

/// Where the held-out part begins: at the line end nearest to the place that `share` asks for, if one is within a
/// quarter of the held-out part; else between two characters.
size_t split_point(std::string_view text, double share) {
  const auto size = static_cast<double>(text.size());
  const size_t wanted = std::min(static_cast<size_t>(size * (1 - share)), text.size());
  const size_t reach = static_cast<size_t>(size * share / 4);
  const size_t after = text.find('\n', wanted == 0 ? 0 : wanted - 1);  // npos + 1 is 0: out of reach as well
  const size_t before = wanted == 0 ? std::string_view::npos : text.rfind('\n', wanted - 1);
  const auto distance = [&](size_t newline) {
    if (newline == std::string_view::npos || newline + 1 >= text.size()) return std::string_view::npos;
    return newline + 1 > wanted ? newline + 1 - wanted : wanted - newline - 1;
  };
  const size_t nearest = distance(after) < distance(before) ? after : before;
  if (distance(nearest) <= reach) return nearest + 1;
  size_t at = wanted;
  while (at > 0 && at < text.size() && wanted - at < 4 && (static_cast<unsigned char>(text[at]) & 0xc0) == 0x80) --at;
  return at;
}

/// Removes what an attempt has made, unless it was completed.
class Undo {
 public:
  explicit Undo(fs::path directory) : directory_(std::move(directory)) {
    std::error_code ignored;
    for (fs::path at = directory_; !at.empty() && !fs::exists(at, ignored); at = at.parent_path()) made_.push_back(at);
  }
  ~Undo() {
    if (done_) return;
    std::error_code ignored;
    for (const fs::path& file : files_) fs::remove(file, ignored);
    for (const fs::path& directory : made_) fs::remove(directory, ignored);  // only if it is empty
  }
  void add(const fs::path& file) { files_.push_back(file); }
  void done() { done_ = true; }

 private:
  fs::path directory_;
  std::vector<fs::path> files_, made_;
  bool done_ = false;
};

text::Tokenizer make_tokenizer(std::string_view training, std::optional<int64_t> vocab, const std::string& path) {
  if (!path.empty()) return text::Tokenizer::load(path);
  log::info("learning a vocabulary of ", grouped(*vocab), " from ", grouped(static_cast<int64_t>(training.size())),
            " bytes");
  const double begin = steady_seconds();
  text::Tokenizer tokenizer = text::Tokenizer::train(training, *vocab);
  const double seconds = steady_seconds() - begin;
  log::info("learnt in ", fixed(seconds, 2), " s (", megabytes_per_second(training.size(), seconds), ")");
  return tokenizer;
}

void print_part(const char* name, size_t bytes, size_t tokens) {
  std::cout << name << grouped(static_cast<int64_t>(bytes)) << " bytes, " << grouped(static_cast<int64_t>(tokens))
            << " tokens, " << fixed(static_cast<double>(bytes) / static_cast<double>(tokens), 3)
            << " bytes per token\n";
}

int data_prepare(std::span<const std::string> args) {
  std::string text_path, tokenizer_path;
  fs::path out;
  std::optional<int64_t> vocab;
  double held_out = 0.05;
  bool overwrite = false;
  Options options("data prepare", "Cuts a text into a training and a held-out part and turns both into token files.");
  options.add("text", &text_path, {.required = true, .placeholder = "FILE"},
              "the text, any bytes; - is standard input");
  options.add("out", &out, {.required = true, .placeholder = "DIR"},
              "where train.tokens, heldout.tokens and tokenizer.json go");
  options.add("vocab", &vocab, {.min = 256, .max = INT32_MAX, .unit = "tokens"},
              "learn a vocabulary of this size from the training part");
  options.add("tokenizer", &tokenizer_path, {.placeholder = "FILE"}, "or take this tokenizer");
  options.add("held_out", &held_out, {.above = 0, .below = 1}, "share of the text, at its end, that is held out");
  options.action("overwrite", &overwrite, "replace what an earlier call left in DIR");
  if (!options.parse(args)) return 0;
  if (vocab.has_value() && !tokenizer_path.empty()) {
    options.reject("tokenizer", "cannot be given together with vocab = ", *vocab, ": one of the two makes the tokens");
  }
  if (!vocab.has_value() && tokenizer_path.empty()) {
    options.reject("vocab", "must be given (a vocabulary is learnt), or --tokenizer FILE. Hint: --vocab 1024");
  }
  const fs::path files[] = {out / kTrainTokens, out / kHeldOutTokens, out / kTokenizerJson};
  std::error_code ignored;
  for (const fs::path& file : files) {
    if (overwrite || !fs::exists(file, ignored)) continue;
    fail(ErrorKind::kUsage, "data prepare", file.string(), " is there already. Give another --out, or --overwrite");
  }

  const std::string text = read_input(text_path);
  if (text.empty()) fail(ErrorKind::kData, "data prepare", text_path, " is empty: there is nothing to learn from");
  log::info(text_path, ": ", grouped(static_cast<int64_t>(text.size())), " bytes, ",
            valid_utf8(text) ? "valid UTF-8" : "not valid UTF-8 (taken as bytes)");
  const size_t cut = split_point(text, held_out);
  const std::string_view training = std::string_view(text).substr(0, cut), rest = std::string_view(text).substr(cut);
  const auto too_short = [&](const char* part, size_t tokens) {
    fail(ErrorKind::kData, "data prepare", text_path, ": ", text.size(), " bytes are too short: with ", held_out,
         " held out, the ", part, " part has ", tokens,
         " tokens; it needs at least 2. Hint: a longer text, or another ", "--held-out");
  };
  if (training.size() < 2) too_short("training", training.size());
  if (rest.size() < 2) too_short("held-out", rest.size());

  const text::Tokenizer tokenizer = make_tokenizer(training, vocab, tokenizer_path);
  const double begin = steady_seconds();
  const std::vector<int32_t> train_ids = tokenizer.encode(training), held_out_ids = tokenizer.encode(rest);
  const double seconds = steady_seconds() - begin;
  log::info("encoded in ", fixed(seconds, 2), " s (", megabytes_per_second(text.size(), seconds), ")");
  if (train_ids.size() < 2) too_short("training", train_ids.size());
  if (held_out_ids.size() < 2) too_short("held-out", held_out_ids.size());

  // tokenizer.json comes last and goes first: without it a directory does not open, so that files of two calls are
  // never taken together.
  Undo undo(out);
  make_directories(out);
  text::ShardWriter train_writer(files[0].string(), tokenizer.vocab_size());
  text::ShardWriter held_out_writer(files[1].string(), tokenizer.vocab_size());
  train_writer.append(train_ids);
  held_out_writer.append(held_out_ids);
  fs::remove(files[2], ignored);
  undo.add(files[0]);
  train_writer.finish();
  undo.add(files[1]);
  held_out_writer.finish();
  tokenizer.save(files[2].string());
  undo.done();

  print_part("training: ", training.size(), train_ids.size());
  print_part("held out: ", rest.size(), held_out_ids.size());
  std::cout << "vocabulary: " << grouped(tokenizer.vocab_size()) << "\nwritten: " << files[0].string() << ", "
            << files[1].string() << ", " << files[2].string() << "\n";
  return 0;
}

int data_inspect(std::span<const std::string> args) {
  fs::path file;
  int64_t show = 64;
  Options options("data inspect", "Checks a token file and tells what is in it.");
  options.positional("file", &file, "a token file");
  options.add("show", &show, {.min = 0, .max = 1 << 20, .unit = "tokens"}, "first tokens to print");
  if (!options.parse(args)) return 0;
  const text::Shard shard = text::Shard::open(file.string());
  const std::vector<int32_t> ids = shard.tokens();
  std::vector<bool> used(static_cast<size_t>(shard.vocab_size()));
  for (const int32_t id : ids) used[static_cast<size_t>(id)] = true;
  std::cout << file.string() << ": token file, version 1, complete, hash and ids checked\n"
            << "tokens:        " << grouped(shard.size()) << " of " << static_cast<uint32_t>(shard.type())
            << " bytes each\n"
            << "vocabulary:    " << grouped(shard.vocab_size()) << "\n"
            << "different ids: " << grouped(std::count(used.begin(), used.end(), true)) << "\n"
            << "largest id:    " << (ids.empty() ? 0 : *std::max_element(ids.begin(), ids.end())) << "\n";
  const std::vector<int32_t> first(ids.begin(), ids.begin() + std::min(show, shard.size()));
  if (first.empty()) return 0;
  std::cout << "first ids:    ";
  for (const int32_t id : first) std::cout << ' ' << id;
  std::cout << '\n';
  const fs::path json = file.parent_path() / kTokenizerJson;
  std::error_code ignored;
  if (!fs::exists(json, ignored)) {
    std::cout << "no " << kTokenizerJson << " beside it: the text is not shown\n";
    return 0;
  }
  const text::Tokenizer tokenizer = text::Tokenizer::load(json.string());
  if (tokenizer.vocab_size() != shard.vocab_size()) {
    fail(ErrorKind::kData, "data inspect", json.string(), " has a vocabulary of ", grouped(tokenizer.vocab_size()),
         ", ", file.string(), " was made with one of ", grouped(shard.vocab_size()), ": they do not belong together");
  }
  const std::string text = tokenizer.decode(ids);
  std::cout << "bytes:         " << grouped(static_cast<int64_t>(text.size())) << " ("
            << fixed(static_cast<double>(text.size()) / static_cast<double>(ids.size()), 3) << " a token)\n"
            << "first text:    " << weft::quoted(tokenizer.decode(first), 1 << 20) << '\n';
  return 0;
}

}  // namespace

int run_data(std::span<const std::string> args) {
  static constexpr Command kCommands[] = {
      {"prepare", "turns a text into training and held-out tokens", data_prepare},
      {"inspect", "checks a token file and tells what is in it", data_inspect},
  };
  return dispatch("weft data", "Prepares and inspects token files.", kCommands, args, process_environment(), std::cout);
}

}  // namespace weft::apps
