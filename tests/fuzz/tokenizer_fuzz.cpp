// Fuzz target for the tokenizer files: tokenizer.json, vocab.json with merges, tiktoken. What is accepted must bring
// back the bytes that it encodes.
#include "models/text/bpe.h"
#include "tests/fuzz/fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using weft::text::Tokenizer;
  const std::string_view input = weft::fuzz::text_of(data, size);
  const auto check = [](const Tokenizer& tokenizer) {
    const std::string text = "the then \xff\xc3\xa9 thee";
    if (tokenizer.decode(tokenizer.encode(text)) != text) __builtin_trap();
  };
  const auto refuses = [](auto&& parse) { weft::fuzz::accepts_or_refuses(weft::ErrorKind::kData, parse); };
  refuses([&] { check(Tokenizer::from_json(input, "fuzz")); });
  const size_t cut = input.find('\x1f');  // separates the two files of the older form
  if (cut != std::string_view::npos) {
    refuses([&] { check(Tokenizer::from_vocab_and_merges(input.substr(0, cut), input.substr(cut + 1), "fuzz")); });
  }
  refuses([&] { check(Tokenizer::from_tiktoken(input, {"<|endoftext|>"}, "fuzz")); });
  return 0;
}

namespace weft::fuzz {

std::vector<std::string> seeds() {
  // Small files are whole files without their 256 bytes' tokens: the checks before that one are what they reach. The
  // whole one would be too long to flip bit by bit here; tests/text_bpe_test.cpp reads it.
  return {
      R"({"version":"1.0","truncation":null,"padding":null,"added_tokens":[{"id":258,"content":"<|e|>","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}],"normalizer":null,"pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true},"post_processor":null,"decoder":{"type":"ByteLevel"},"model":{"type":"BPE","dropout":null,"unk_token":null,"continuing_subword_prefix":null,"end_of_word_suffix":null,"fuse_unk":false,"byte_fallback":false,"vocab":{"t":0,"h":1,"th":2},"merges":[["t","h"]]}})",
      "{\"t\":0,\"h\":1,\"th\":2,\"<|e|>\":3}\x1f#version: 0.2\nt h\n", "dA== 0\naA== 1\ndGg= 2\n"};
}

std::vector<std::string> words() {
  return {"{",    "}",    "[",       "]",       ",",    ":",    "\"", "0", "-1",   "1e99",   "4294967296",
          "null", "true", "\\ud800", "\\u0120", "\xff", "\x1f", "\n", "=", "QQ==", "merges", "vocab"};
}

std::string repaired(std::string mutated, const std::string&) { return mutated; }

}  // namespace weft::fuzz
