#include "apps/data_directory.h"

#include "core/error.h"
#include "core/file.h"

namespace weft::apps {

DataDirectory DataDirectory::open(const std::filesystem::path& directory) {
  std::error_code ignored;
  const std::filesystem::path tokenizer = directory / kTokenizerJson;
  for (const char* name : {kTokenizerJson, kTrainTokens, kHeldOutTokens}) {
    if (std::filesystem::exists(directory / name, ignored)) continue;
    fail(ErrorKind::kIo, "data", directory.string(), " has no ", name,
         ": it is no directory that `weft data prepare` completed. Hint: weft data prepare --text FILE --vocab 1024 "
         "--out ",
         directory.string());
  }
  const auto shard = [&](const char* name) {
    return std::make_shared<text::Shard>(text::Shard::open((directory / name).string()));
  };
  const std::string json = read_file(tokenizer.string());
  DataDirectory data{shard(kTrainTokens), shard(kHeldOutTokens), json,
                     text::Tokenizer::from_json(json, tokenizer.string())};
  for (const auto& each : {data.train, data.held_out}) {
    if (each->vocab_size() != data.tokenizer.vocab_size()) {
      fail(ErrorKind::kData, "data", each->path(), " was made with a vocabulary of ", grouped(each->vocab_size()),
           ", the tokenizer beside it has ", grouped(data.tokenizer.vocab_size()), ". Hint: prepare the data again");
    }
  }
  return data;
}

}  // namespace weft::apps
