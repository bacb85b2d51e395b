// weft tokenize: trains a tokenizer, turns text into ids and ids into text.
#include <algorithm>
#include <charconv>
#include <iostream>

#include "apps/command.h"
#include "apps/commands.h"
#include "apps/files.h"
#include "apps/options.h"
#include "core/file.h"
#include "core/log.h"
#include "models/text/bpe.h"
#include "models/text/shard.h"

namespace weft::apps {
namespace {

/// "12,345 bytes in 0.12 s (1.2 MB/s): 5,432 tokens, 2.27 bytes per token".
std::string speed_line(size_t bytes, size_t tokens, double seconds) {
  const double per_token = tokens > 0 ? static_cast<double>(bytes) / static_cast<double>(tokens) : 0;
  return concat(grouped(static_cast<int64_t>(bytes)), " bytes in ", fixed(seconds, 2), " s (",
                megabytes_per_second(bytes, seconds), "): ", grouped(static_cast<int64_t>(tokens)), " tokens, ",
                fixed(per_token, 3), " bytes per token");
}

int tokenize_train(std::span<const std::string> args) {
  std::string text_path, out = "tokenizer.json";
  int64_t vocab = 1024;
  std::vector<std::string> special;
  Options options("tokenize train", "Learns a byte-level BPE vocabulary from a text.");
  options.add("text", &text_path, {.required = true, .placeholder = "FILE"},
              "the text, any bytes; - is standard input");
  options.add("vocab", &vocab, {.min = 256, .max = INT32_MAX, .unit = "tokens"},
              "size of the vocabulary: 256 bytes, the merges, the special tokens");
  options.add("out", &out, {.placeholder = "FILE"}, "where the tokenizer goes, in Hugging Face's JSON form");
  options.add("special", &special, {}, {}, "special tokens, such as \"<|endoftext|>\"; they get the last ids");
  if (!options.parse(args)) return 0;
  check_writable(out);
  const std::string text = read_input(text_path);
  log::info("learning ", grouped(vocab), " tokens from ", grouped(static_cast<int64_t>(text.size())), " bytes");
  const double begin = steady_seconds();
  const text::Tokenizer tokenizer = text::Tokenizer::train(text, vocab, special);
  const double seconds = steady_seconds() - begin;
  tokenizer.save(out);
  log::info("learnt in ", fixed(seconds, 2), " s (", megabytes_per_second(text.size(), seconds), ")");
  std::cout << "written: " << out << ", " << grouped(tokenizer.vocab_size()) << " tokens\n";
  return 0;
}

int tokenize_encode(std::span<const std::string> args) {
  std::string tokenizer_path, text_path = "-", out;
  bool parse_special = false;
  Options options("tokenize encode", "Turns text into token ids.");
  options.add("tokenizer", &tokenizer_path, {.required = true, .placeholder = "FILE"},
              "tokenizer.json, a .tiktoken file, or vocab.json with merges.txt beside it");
  options.add("text", &text_path, {.placeholder = "FILE"}, "the text; - is standard input");
  options.add("out", &out, {.placeholder = "FILE"}, "a token file to write; without it, ids go to standard output");
  options.add("parse_special", &parse_special, "read special tokens in the text as such; else they are plain text");
  if (!options.parse(args)) return 0;
  const text::Tokenizer tokenizer = text::Tokenizer::load(tokenizer_path);
  if (!out.empty()) check_writable(out);
  const std::string text = read_input(text_path);
  const double begin = steady_seconds();
  const std::vector<int32_t> ids =
      tokenizer.encode(text, parse_special ? text::SpecialTokens::kParse : text::SpecialTokens::kAsText);
  const double seconds = steady_seconds() - begin;
  if (!out.empty()) {
    text::write_shard(out, ids, tokenizer.vocab_size());
  } else {
    constexpr size_t kPerLine = 16;
    std::string lines;
    for (size_t i = 0; i < ids.size(); ++i) {
      lines += std::to_string(ids[i]) + (i % kPerLine + 1 == kPerLine || i + 1 == ids.size() ? '\n' : ' ');
    }
    std::cout << lines;
  }
  log::info("encoded ", speed_line(text.size(), ids.size(), seconds));
  return 0;
}

/// Whole numbers with white space between them.
std::vector<int32_t> parse_ids(std::string_view content, const std::string& name) {
  constexpr std::string_view kSpace = " \t\r\n";
  std::vector<int32_t> ids;
  for (size_t at = content.find_first_not_of(kSpace); at != std::string_view::npos;) {
    const size_t end = std::min(content.find_first_of(kSpace, at), content.size());
    const std::string_view word = content.substr(at, end - at);
    int32_t id = 0;
    const auto [stop, error] = std::from_chars(word.data(), word.data() + word.size(), id);
    if (error != std::errc{} || stop != word.data() + word.size()) {
      fail(ErrorKind::kData, "tokenize decode", name, ": word ", ids.size() + 1, " is ", weft::quoted(word),
           "; must be a token id, a whole number of 32 bits");
    }
    ids.push_back(id);
    at = content.find_first_not_of(kSpace, end);
  }
  return ids;
}

int tokenize_decode(std::span<const std::string> args) {
  std::string tokenizer_path, input = "-";
  Options options("tokenize decode", "Turns token ids back into the text they stand for, byte for byte.");
  options.add("tokenizer", &tokenizer_path, {.required = true, .placeholder = "FILE"},
              "tokenizer.json, a .tiktoken file, or vocab.json with merges.txt beside it");
  options.positional("file", &input, "ids with white space between them, or a token file; - is standard input", false);
  if (!options.parse(args)) return 0;
  const text::Tokenizer tokenizer = text::Tokenizer::load(tokenizer_path);
  const std::string content = read_input(input);
  const bool shard = content.starts_with("WEFTTOK") && input != "-";
  const std::vector<int32_t> ids = shard ? text::Shard::open(input).tokens() : parse_ids(content, input);
  const double begin = steady_seconds();
  const std::string text = tokenizer.decode(ids);
  const double seconds = steady_seconds() - begin;
  std::cout << text;
  log::info("decoded ", speed_line(text.size(), ids.size(), seconds));
  return 0;
}

}  // namespace

int run_tokenize(std::span<const std::string> args) {
  static constexpr Command kCommands[] = {
      {"train", "learns a vocabulary from a text", tokenize_train},
      {"encode", "turns text into token ids", tokenize_encode},
      {"decode", "turns token ids into text", tokenize_decode},
  };
  return dispatch("weft tokenize", "Trains a tokenizer, encodes and decodes text.", kCommands, args,
                  process_environment(), std::cout);
}

}  // namespace weft::apps
