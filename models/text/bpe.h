#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace weft::text {

struct BpeModel;

/// What encode() makes of the text of a special token, such as "<|endoftext|>".
enum class SpecialTokens : uint8_t {
  kAsText,  ///< plain text like any other: safe for text from anywhere
  kParse,   ///< the special token (leftmost, then longest match): for text that the program has put together itself
};

/// Byte-level byte-pair encoding (Sennrich et al. 2016; Radford et al. 2019). A text is cut by GPT-2's pre-tokenisation
/// (models/text/pretokenize.h); each piece begins as one token a byte, and the adjacent pair that was merged first in
/// training (leftmost among equals) is merged until none is left. All 256 bytes are tokens, so any bytes, valid UTF-8
/// or not, come back from decode(encode(bytes)). Special tokens never come out of plain text.
///
/// A Tokenizer is an immutable value: copies share the model, and any number of threads may use it.
class Tokenizer {
 public:
  /// Learns vocab_size - 256 - special_tokens.size() merges: again and again the pair of adjacent tokens that is most
  /// frequent over all pieces of `text`, the smaller (left id, right id) among equals. Ids are: the byte values, the
  /// merges in the order learnt, the special tokens. Where a special token's text stands in `text`, it separates and is
  /// not learnt from. The result depends on the arguments alone, not on the number of threads.
  /// @throws Error  kValue if vocab_size does not fit, special_tokens has duplicates or the text yields fewer merges.
  static Tokenizer train(std::string_view text, int64_t vocab_size,
                         const std::vector<std::string>& special_tokens = {});

  /// 256 tokens, each byte its value, no merges.
  static Tokenizer bytes();

  /// Reads a tokenizer from a `tokenizer.json`, a `.tiktoken` file (see from_tiktoken; its special token is GPT-2's
  /// "<|endoftext|>"), a `vocab.json` (with `merges.txt` beside it) or a directory that holds one of the JSON forms.
  /// @throws Error  kIo if a file cannot be read; kData if its content is refused.
  static Tokenizer load(const std::string& path);

  /// Hugging Face `tokenizer.json`: a BPE model over GPT-2's byte alphabet with the ByteLevel pre-tokenizer. Whatever
  /// would make other ids than ours (a normalizer, another pre-tokenizer, a template, byte fallback, ...) is refused by
  /// name. `truncation` and `padding` are not part of the ids and are ignored. @param name  of the file, for messages.
  /// @throws Error  kData: also for two tokens with one id, an unused id, a merge of tokens that are not in the
  /// vocabulary.
  static Tokenizer from_json(std::string_view json, const std::string& name = "tokenizer.json");

  /// GPT-2's original pair of files. A token that neither is a byte nor comes from a merge is a special token.
  static Tokenizer from_vocab_and_merges(std::string_view vocab_json, std::string_view merges,
                                         const std::string& name = "vocab.json");

  /// tiktoken's file: lines of a token in base64, a space and its rank, which is its id. The merges are found again: a
  /// token's two parts are what the merges of lower rank make of its bytes. Special tokens get the next ids. The file
  /// does not say which expression cuts the text: only vocabularies made with GPT-2's encode as their makers meant.
  static Tokenizer from_tiktoken(std::string_view content, const std::vector<std::string>& special_tokens,
                                 const std::string& name = "tiktoken file");

  /// The content of a `tokenizer.json` from which Hugging Face tokenizers gives the same ids (there, special tokens are
  /// always parsed). @throws Error  kValue if a special token is no valid UTF-8.
  std::string to_json() const;

  /// Writes to_json() (atomically). @throws Error  kIo.
  void save(const std::string& path) const;

  /// The ids of `text`. Long texts are encoded on the threads of core/thread_pool.h; the ids do not depend on them.
  /// Time O(n log n) for any content.
  std::vector<int32_t> encode(std::string_view text, SpecialTokens specials = SpecialTokens::kAsText) const;
  /// The same, appended to `ids`.
  void encode_append(std::string_view text, std::vector<int32_t>& ids,
                     SpecialTokens specials = SpecialTokens::kAsText) const;

  /// The bytes of the tokens put together (any bytes: a cut may fall inside a UTF-8 character); a special token gives
  /// its text. @throws Error  kIndex if an id is not in [0, vocab_size()).
  std::string decode(std::span<const int32_t> ids) const;

  /// Tokens, special ones included; ids are [0, vocab_size()).
  int64_t vocab_size() const;
  /// The bytes of one token. @throws Error  kIndex.
  std::string_view token(int32_t id) const;
  /// The token with exactly these bytes, special tokens not counted.
  std::optional<int32_t> find(std::string_view bytes) const;
  /// The id of a special token. @throws Error  kValue if there is none of that text.
  int32_t special(std::string_view text) const;
  bool is_special(int32_t id) const;
  /// Ids of all special tokens, ascending.
  std::vector<int32_t> special_ids() const;

 private:
  explicit Tokenizer(std::shared_ptr<const BpeModel> model) : model_(std::move(model)) {}

  std::shared_ptr<const BpeModel> model_;
};

}  // namespace weft::text
