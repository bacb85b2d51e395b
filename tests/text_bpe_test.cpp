#include "models/text/bpe.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/file.h"
#include "core/thread_pool.h"
#include "models/text/pretokenize.h"

namespace weft::text {
namespace {

using Ids = std::vector<int32_t>;

template <class Call>
std::string message_of(ErrorKind kind, Call call) {
  try {
    call();
  } catch (const Error& error) {
    EXPECT_EQ(to_string(error.kind()), std::string(to_string(kind))) << error.what();
    return error.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return "";
}

/// Words of a small made-up language with frequencies that fall as in a real one.
std::string sample_text(size_t words, unsigned seed) {
  std::mt19937 random(seed);
  static constexpr const char* kSyllables[] = {"th", "e", "an", "d", "in", "o", "ba", "na", "s", "er", "\u00e9", "st"};
  std::vector<std::string> vocabulary;
  for (int i = 0; i < 400; ++i) {
    std::string word;
    for (unsigned n = 1 + random() % 5; n > 0; --n) word += kSyllables[random() % 12];
    vocabulary.push_back(word);
  }
  std::string text;
  for (size_t i = 0; i < words; ++i) {
    text += vocabulary[random() % (1 + random() % vocabulary.size())];
    static constexpr const char* kAfter[] = {" ", " ", " ", ", ", ".\n", "'s "};
    text += kAfter[random() % 6];
  }
  return text;
}

/// Training by its definition: count all pairs anew for every merge.
std::vector<std::string> reference_tokens(const std::string& text, size_t vocab_size) {
  std::vector<std::string> tokens;
  for (int byte = 0; byte < 256; ++byte) tokens.emplace_back(1, static_cast<char>(byte));
  std::vector<Ids> words;
  for (const std::string_view piece : pretokenize(text)) {
    words.emplace_back();
    for (const char c : piece) words.back().push_back(static_cast<unsigned char>(c));
  }
  while (tokens.size() < vocab_size) {
    std::map<std::pair<int32_t, int32_t>, int64_t> counts;
    for (const Ids& word : words) {
      for (size_t i = 0; i + 1 < word.size(); ++i) ++counts[{word[i], word[i + 1]}];
    }
    if (counts.empty()) break;
    auto best = counts.begin();
    for (auto it = counts.begin(); it != counts.end(); ++it) {
      if (it->second > best->second) best = it;
    }
    const auto [left, right] = best->first;
    const auto made = static_cast<int32_t>(tokens.size());
    tokens.push_back(tokens[static_cast<size_t>(left)] + tokens[static_cast<size_t>(right)]);
    for (Ids& word : words) {
      Ids merged;
      for (size_t i = 0; i < word.size(); ++i) {
        const bool here = i + 1 < word.size() && word[i] == left && word[i + 1] == right;
        merged.push_back(here ? made : word[i]);
        i += here;
      }
      word = merged;
    }
  }
  return tokens;
}

/// Encoding by its definition. In a trained tokenizer a pair's rank is the id of what it makes.
Ids reference_encode(const Tokenizer& tokenizer, std::string_view text) {
  Ids all;
  for (const std::string_view piece : pretokenize(text)) {
    std::vector<std::string> parts;
    for (const char c : piece) parts.emplace_back(1, c);
    for (;;) {
      size_t best = parts.size();
      int32_t rank = INT32_MAX;
      for (size_t i = 0; i + 1 < parts.size(); ++i) {
        const auto id = tokenizer.find(parts[i] + parts[i + 1]);
        if (id && *id < rank) rank = *id, best = i;
      }
      if (best == parts.size()) break;
      parts[best] += parts[best + 1];
      parts.erase(parts.begin() + static_cast<ptrdiff_t>(best) + 1);
    }
    for (const std::string& part : parts) all.push_back(*tokenizer.find(part));
  }
  return all;
}

TEST(Bpe, LearnsTheMostFrequentPairFirst) {
  // "aaab" twice and "ab": (a, a) 4 times, (a, b) 3; then (aa, a) 2, (a, b) 3.
  const Tokenizer tokenizer = Tokenizer::train("aaab\naaab\nab", 258);
  EXPECT_EQ(tokenizer.token(256), "aa");
  EXPECT_EQ(tokenizer.token(257), "ab");
  EXPECT_EQ(tokenizer.encode("aaab"), (Ids{256, 257}));
}

TEST(Bpe, TrainsAsTheDefinitionSays) {
  for (const unsigned seed : {1u, 2u}) {
    const std::string text = sample_text(600, seed) + " aaaaaaa aaaa aaaaaaaaaaa aaa baaab";
    const auto expected = reference_tokens(text, 400);
    const Tokenizer tokenizer = Tokenizer::train(text, 400);
    ASSERT_EQ(tokenizer.vocab_size(), 400);
    for (int32_t id = 0; id < 400; ++id) ASSERT_EQ(tokenizer.token(id), expected[static_cast<size_t>(id)]) << id;
  }
}

TEST(Bpe, BreaksTiesByTheIdsOfThePair) {
  const Tokenizer tokenizer = Tokenizer::train("xy\nab\nxy\nab\nba\nba", 259);
  EXPECT_EQ(tokenizer.token(256), "ab");
  EXPECT_EQ(tokenizer.token(257), "ba");
  EXPECT_EQ(tokenizer.token(258), "xy");
}

TEST(Bpe, EncodesAsTheDefinitionSays) {
  const Tokenizer tokenizer = Tokenizer::train(sample_text(3000, 3), 500);
  const std::string text = sample_text(2000, 4);
  EXPECT_EQ(tokenizer.encode(text), reference_encode(tokenizer, text));
  // Pieces around the lengths where one way of merging takes over from another, and beyond what is remembered.
  std::mt19937 random(5);
  for (size_t length : {1u, 2u, 15u, 16u, 17u, 47u, 48u, 49u, 50u, 300u}) {
    std::string word;
    while (word.size() < length) word += "thandinobasner"[random() % 14];
    ASSERT_EQ(tokenizer.encode(word + word), reference_encode(tokenizer, word + word)) << word;
    ASSERT_EQ(tokenizer.encode(word), reference_encode(tokenizer, word)) << word;
  }
}

TEST(Bpe, RoundTripsAnyBytes) {
  const Tokenizer tokenizer = Tokenizer::train(sample_text(2000, 6), 400, {"<|endoftext|>"});
  std::mt19937 random(7);
  std::string every;
  for (int byte = 0; byte < 256; ++byte) every += static_cast<char>(byte);
  EXPECT_EQ(tokenizer.decode(tokenizer.encode(every)), every);
  for (int round = 0; round < 200; ++round) {
    std::string text;
    for (unsigned n = random() % 100; n > 0; --n)
      text += random() % 2 ? static_cast<char>(random()) : "the \n"[random() % 5];
    ASSERT_EQ(tokenizer.decode(tokenizer.encode(text)), text);
  }
  EXPECT_EQ(tokenizer.encode(""), Ids{});
  EXPECT_EQ(tokenizer.decode({}), "");
}

TEST(Bpe, BytesAreTheirOwnIds) {
  const Tokenizer tokenizer = Tokenizer::bytes();
  EXPECT_EQ(tokenizer.vocab_size(), 256);
  EXPECT_EQ(tokenizer.encode("Az\xff"), (Ids{65, 122, 255}));
  EXPECT_EQ(tokenizer.decode(Ids{65, 122, 255}), "Az\xff");
}

TEST(Bpe, SpecialTokensComeOnlyWhenAsked) {
  const Tokenizer tokenizer = Tokenizer::train(sample_text(500, 8), 300, {"<|a|>", "<|a|><|b|>"});
  const std::string text = "x<|a|>y<|a|><|b|>";
  for (const int32_t id : tokenizer.encode(text)) EXPECT_FALSE(tokenizer.is_special(id));
  EXPECT_EQ(tokenizer.encode(text, SpecialTokens::kParse), (Ids{'x', 298, 'y', 299}));  // the longest at a place
  EXPECT_EQ(tokenizer.decode(Ids{'x', 298, 'y', 299}), text);
  EXPECT_EQ(tokenizer.special("<|a|>"), 298);
  EXPECT_EQ(tokenizer.special_ids(), (Ids{298, 299}));
  EXPECT_EQ(tokenizer.find("<|a|>"), std::nullopt);
  EXPECT_NE(message_of(ErrorKind::kValue, [&] { tokenizer.special("<|z|>"); }).find("<|a|>"), std::string::npos);
}

TEST(Bpe, TrainingDoesNotLearnFromSpecialTokens) {
  std::string text;
  for (int i = 0; i < 50; ++i) text += "<|end|>ab";
  const Tokenizer tokenizer = Tokenizer::train(text, 258, {"<|end|>"});
  EXPECT_EQ(tokenizer.token(256), "ab");
  EXPECT_NE(message_of(ErrorKind::kValue, [&] { Tokenizer::train(text, 259, {"<|end|>"}); }).find("258"),
            std::string::npos);
}

TEST(Bpe, IdsDoNotDependOnThreads) {
  // More than two chunks, so that tasks are shared out, with special tokens and long words among them.
  std::string text;
  while (text.size() < 5'000'000) text += sample_text(20'000, static_cast<unsigned>(text.size())) + "<|endoftext|>\xff";
  const int before = num_threads();
  set_num_threads(1);
  const Tokenizer one = Tokenizer::train(text, 600, {"<|endoftext|>"});
  const Ids plain = one.encode(text), parsed = one.encode(text, SpecialTokens::kParse);
  set_num_threads(3);
  const Tokenizer three = Tokenizer::train(text, 600, {"<|endoftext|>"});
  EXPECT_EQ(three.to_json(), one.to_json());
  EXPECT_EQ(three.encode(text), plain);
  EXPECT_EQ(three.encode(text, SpecialTokens::kParse), parsed);
  set_num_threads(before);
  EXPECT_NE(plain, parsed);
  EXPECT_EQ(one.decode(plain), text);
  // Small pieces of the text take the path that is not shared out.
  Ids pieces;
  size_t begin = 0;
  for (size_t at; (at = text.find("<|endoftext|>", begin)) != std::string::npos; begin = at + 13) {
    one.encode_append(std::string_view(text).substr(begin, at + 13 - begin), pieces, SpecialTokens::kParse);
  }
  one.encode_append(std::string_view(text).substr(begin), pieces, SpecialTokens::kParse);
  EXPECT_EQ(pieces, parsed);
}

TEST(Bpe, OneWordOfAMegabyteTakesNoQuadraticTime) {
  // n^2 / 2 steps for n = 2^20 would be hours, so that finishing is the test.
  const std::string letters(1 << 20, 'a');
  const Tokenizer tokenizer = Tokenizer::train(letters, 256 + 10);
  EXPECT_EQ(tokenizer.encode(letters), Ids(1024, 265));
  std::mt19937 random(9);
  std::string word;
  for (int i = 0; i < 1 << 20; ++i) word += static_cast<char>('a' + random() % 4);
  const Tokenizer mixed = Tokenizer::train(word, 1500);
  EXPECT_EQ(mixed.decode(mixed.encode(word)), word);
  for (const char c : {' ', '\n', '\xff', '\''}) {
    const std::string same(1 << 20, c);
    ASSERT_EQ(mixed.decode(mixed.encode(same)), same);
  }
}

TEST(Bpe, TokenizerJsonKeepsEverything) {
  const Tokenizer tokenizer = Tokenizer::train(sample_text(3000, 10), 450, {"<|endoftext|>", "<|pad|>"});
  const Tokenizer read = Tokenizer::from_json(tokenizer.to_json());
  EXPECT_EQ(read.to_json(), tokenizer.to_json());
  const std::string text = sample_text(2000, 11) + "<|pad|>";
  EXPECT_EQ(read.encode(text, SpecialTokens::kParse), tokenizer.encode(text, SpecialTokens::kParse));

  const auto folder = std::filesystem::temp_directory_path() / concat("weft-bpe-", ::getpid());
  std::filesystem::create_directories(folder);
  tokenizer.save((folder / "tokenizer.json").string());
  EXPECT_EQ(Tokenizer::load(folder.string()).to_json(), tokenizer.to_json());
  std::filesystem::remove_all(folder);
}

/// A tokenizer.json of the 256 bytes and "ab", "abc", with `edit` made to its text.
std::string small_json(std::string_view from = "", std::string_view to = "") {
  std::string json = Tokenizer::train("abc\nabc\nab", 259, {"<|end|>"}).to_json();
  if (from.empty()) return json;
  const size_t at = json.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return json.replace(at, from.size(), to);
}

TEST(Bpe, ReadsMergesAsPairsToo) {
  const Tokenizer tokenizer = Tokenizer::from_json(small_json("\"a b\"", "[\"a\", \"b\"]"));
  EXPECT_EQ(tokenizer.encode("abc"), (Ids{257}));
}

TEST(Bpe, RefusesBrokenTokenizerFilesAndSaysWhy) {
  const struct {
    const char *from, *to, *says;
  } cases[] = {
      {"\"ab\": 256", "\"ab\": 255", "both have the id 255"},
      {"\"ab\": 256", "\"ab\": 300", "300"},
      {"\"ab\": 256", "\"ab\": -1", "-1"},
      {"\"ab\": 256", "\"ab\": 2.5", "whole number"},
      {"\"abc\": 257", "\"zz\": 257", "makes no token"},
      {"\"ab\": 256", "\"\u6771\": 256", "byte alphabet"},
      {"\"abc\": 257", "\"\": 257", "empty"},
      {"\"z\": 122", "\"zz\": 122", "no token for the byte \"z\""},
      {"\"ab c\"", "\"ab q2\"", "\"q2\" is not in the vocabulary"},
      {"\"ab c\"", "\"a b\"", "there twice"},
      {"\"ab c\"", "\"abc\"", "merge 1 must be two tokens"},
      {"\"ab c\"", "\"a b c\"", "merge 1 must be two tokens"},
      {"\"ab c\"", "7", "merge 1 must be two tokens"},
      {"\"type\": \"BPE\"", "\"type\": \"WordPiece\"", "WordPiece"},
      {"\"normalizer\": null", "\"normalizer\": {\"type\": \"NFC\"}", "NFC"},
      {"\"use_regex\": true", "\"use_regex\": false", "use_regex"},
      {"\"add_prefix_space\": false", "\"add_prefix_space\": true", "add_prefix_space"},
      {"\"type\": \"ByteLevel\"", "\"type\": \"Metaspace\"", "Metaspace"},
      {"\"byte_fallback\": false", "\"byte_fallback\": true", "byte_fallback"},
      {"\"post_processor\": null", "\"post_processor\": {\"type\": \"TemplateProcessing\"}", "TemplateProcessing"},
      {"\"dropout\": null", "\"dropout\": 0.1", "dropout"},
      {"\"special\": true", "\"special\": false", "special"},
      {"\"lstrip\": false", "\"lstrip\": true", "lstrip"},
      {"\"id\": 258", "\"id\": 257", "257"},
      {"\"model\": {", "\"model\": [], \"x\": {", "no model"},
      {"\"merges\": [", "\"merges\": 3, \"x\": [", "array"},
      {"\"added_tokens\": [", "\"added_tokens\": 3, \"x\": [", "array"},
      {"{", "[", "JSON"},
  };
  for (const auto& c : cases) {
    SCOPED_TRACE(c.to);
    const std::string message =
        message_of(ErrorKind::kData, [&] { Tokenizer::from_json(small_json(c.from, c.to), "some/file.json"); });
    EXPECT_NE(message.find(c.says), std::string::npos) << message;
    EXPECT_NE(message.find("some/file.json"), std::string::npos) << message;
  }
  const std::string deep = std::string(1 << 20, '[') + std::string(1 << 20, ']');
  for (const char* key : {"normalizer", "post_processor", "added_tokens", "model"}) {
    const std::string json = small_json(concat('"', key, "\": "), concat('"', key, "\": ", deep, ", \"x\": "));
    message_of(ErrorKind::kData, [&] { Tokenizer::from_json(json); });
  }
  for (const char* json : {"", "null", "[]", "{}", "{\"model\":null}", "\"\\ud800\""}) {
    message_of(ErrorKind::kData, [&] { Tokenizer::from_json(json); });
  }
}

TEST(Bpe, ReadsVocabAndMergesFiles) {
  // The vocabulary object of the JSON form is a vocab.json.
  const std::string json = small_json();
  const size_t begin = json.find('{', json.find("\"vocab\""));
  const std::string vocab = json.substr(begin, json.find("\n  }", begin) + 4 - begin);
  const Tokenizer tokenizer = Tokenizer::from_vocab_and_merges(vocab, "#version: 0.2\na b\r\nab c\n");
  EXPECT_EQ(tokenizer.encode("abc<|end|>", SpecialTokens::kParse), (Ids{257, 258}));
  EXPECT_EQ(tokenizer.to_json(), json);
  const std::string message =
      message_of(ErrorKind::kData, [&] { Tokenizer::from_vocab_and_merges(vocab, "a b\nq2 c\n", "v.json"); });
  EXPECT_NE(message.find("q2"), std::string::npos) << message;
}

TEST(Bpe, ReadsTiktokenFilesAndFindsTheMerges) {
  // base64 of the 256 bytes, then "ab" and "abc".
  static constexpr char kDigits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string bytes;
  for (int byte = 0; byte < 256; ++byte) {
    bytes += concat(kDigits[byte >> 2], kDigits[(byte & 3) << 4], "== ", byte, '\n');
  }
  const Tokenizer tokenizer = Tokenizer::from_tiktoken(bytes + "YWI= 256\nYWJj 257\n", {"<|end|>"});
  EXPECT_EQ(tokenizer.to_json(), small_json());
  EXPECT_EQ(tokenizer.encode("abcab"), (Ids{257, 256}));
  const auto refused = [&](const std::string& more) {
    return message_of(ErrorKind::kData, [&] { Tokenizer::from_tiktoken(bytes + more, {}); });
  };
  EXPECT_NE(refused("YWJj 256\n").find("consists of 3"), std::string::npos);
  EXPECT_NE(refused("YWI= 255\n").find("255"), std::string::npos);
  EXPECT_NE(refused("YWI= 300\n").find("300"), std::string::npos);
  EXPECT_NE(refused("YWI 256\n").find("base64"), std::string::npos);
  EXPECT_NE(refused("YW*= 256\n").find("base64"), std::string::npos);
  EXPECT_NE(refused("====\n").find("line 257"), std::string::npos);
  EXPECT_NE(refused("YWI= 99999999999999999999\n").find("line 257"), std::string::npos);
  EXPECT_NE(refused("YQ== 256\n").find("both"), std::string::npos);
  message_of(ErrorKind::kData, [] { Tokenizer::from_tiktoken("", {}); });
}

TEST(Bpe, RefusesBadArguments) {
  message_of(ErrorKind::kValue, [] { Tokenizer::train("text", 255); });
  message_of(ErrorKind::kValue, [] { Tokenizer::train("text", 256, {"<|x|>"}); });
  message_of(ErrorKind::kValue, [] { Tokenizer::train("text", 1000); });
  message_of(ErrorKind::kValue, [] { Tokenizer::train("text", 258, {"<|x|>", "<|x|>"}); });
  message_of(ErrorKind::kValue, [] { Tokenizer::train("text", 257, {""}); });
  message_of(ErrorKind::kValue, [] { Tokenizer::train("text", 257, {"a"}); });
  EXPECT_EQ(Tokenizer::train("", 256).vocab_size(), 256);
  const Tokenizer tokenizer = Tokenizer::bytes();
  EXPECT_NE(message_of(ErrorKind::kIndex, [&] { tokenizer.decode(Ids{1, 256}); }).find("position 1"),
            std::string::npos);
  message_of(ErrorKind::kIndex, [&] { tokenizer.decode(Ids{-1}); });
  message_of(ErrorKind::kIndex, [&] { tokenizer.token(256); });
  message_of(ErrorKind::kIo, [] { Tokenizer::load("/nonexistent/tokenizer.json"); });
  // A special token that the JSON form would mix up with the spelling of the space.
  message_of(ErrorKind::kValue, [] { Tokenizer::train("", 257, {"\u0120"}).to_json(); });
  message_of(ErrorKind::kValue, [] { Tokenizer::train("", 257, {"\xff\xff"}).to_json(); });
}

TEST(Bpe, Gpt2VocabularyGivesTheIdsOfTiktoken) {
  const char* folder = std::getenv("WEFT_TEST_DATA");
  if (folder == nullptr) GTEST_SKIP() << "WEFT_TEST_DATA names no folder with gpt2.tiktoken";
  const Tokenizer tokenizer = Tokenizer::load(std::string(folder) + "/gpt2.tiktoken");
  ASSERT_EQ(tokenizer.vocab_size(), 50257);
  EXPECT_EQ(tokenizer.special("<|endoftext|>"), 50256);
  // Written by the Python package tiktoken 0.14.0 with its "gpt2" encoding.
  const std::pair<const char*, Ids> cases[] = {
      {"Hello, world!", {15496, 11, 995, 0}},
      {"In the beginning God created the heaven and the earth.",
       {818, 262, 3726, 1793, 2727, 262, 9538, 290, 262, 4534, 13}},
      {"They'll say it's 12345 o'clock,\n\n  don't they?",
       {2990, 1183, 910, 340, 338, 17031, 2231, 267, 6, 15750, 11, 628, 220, 836, 470, 484, 30}},
      {"na\u00efve caf\u00e9 \u2014 \u6771\u4eac \U0001f600 \u00a0\u3000x",
       {2616, 38776, 40304, 851, 10545, 251, 109, 12859, 105, 30325, 222, 5624, 5099, 222, 87}},
      {" \t\n ", {220, 197, 198, 220}},
      {"<|endoftext|>", {27, 91, 437, 1659, 5239, 91, 29}},
  };
  for (const auto& [text, ids] : cases) {
    EXPECT_EQ(tokenizer.encode(text), ids) << text;
    EXPECT_EQ(tokenizer.decode(ids), text);
  }
  EXPECT_EQ(Tokenizer::from_json(tokenizer.to_json()).encode(cases[2].first), cases[2].second);
}

}  // namespace
}  // namespace weft::text
