#pragma once
#include <filesystem>
#include <memory>
#include <string>

#include "models/text/bpe.h"
#include "models/text/shard.h"

namespace weft::apps {

/// The files of a prepared data directory.
inline constexpr const char* kTrainTokens = "train.tokens";
inline constexpr const char* kHeldOutTokens = "heldout.tokens";
inline constexpr const char* kTokenizerJson = "tokenizer.json";

/// What `weft data prepare` left in a directory, opened and checked.
struct DataDirectory {
  std::shared_ptr<text::Shard> train, held_out;
  std::string tokenizer_json;  ///< the file's content
  text::Tokenizer tokenizer;

  /// @throws Error kIo, kData: also if the vocabulary of a token file is not the tokenizer's.
  static DataDirectory open(const std::filesystem::path& directory);
};

}  // namespace weft::apps
