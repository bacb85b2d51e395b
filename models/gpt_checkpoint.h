#pragma once
#include <memory>
#include <optional>

#include "models/checkpoint/shared_check.h"
#include "models/gpt.h"
#include "models/text/bpe.h"

namespace weft::models {

/// What a checkpoint says of the model in it, as entries "gpt.layers", "gpt.width", ... of its state. How a run saved
/// memory is the run's own affair, and not among them.
std::map<std::string, std::string> to_state(const GptConfig& config);
/// @throws Error kData naming `where` and the entry that is missing or makes no sense.
GptConfig gpt_config_from_state(const std::map<std::string, std::string>& state, const std::string& where);

/// A trained model and what is needed to use it.
struct LoadedGpt {
  std::unique_ptr<Gpt> gpt;
  std::optional<text::Tokenizer> tokenizer;  ///< if the checkpoint has a tokenizer.json
  std::string path;                          ///< of the checkpoint
  int64_t step = 0;
};

/// Opens a checkpoint directory, or the newest complete one of a run's directory; what was refused on the way is
/// reported through `warn`. @throws Error kData if there is none.
LoadedGpt load_gpt(const std::string& path, Device device, const std::function<void(const std::string&)>& warn = {});

/// The checkpoint directory that `path` means: itself if it is one, else the newest complete one below it.
/// All of `ranks` look for it together; of one that is found below `path` every file has been read and is intact.
/// @throws Error kData if there is none, with the reasons for which others were refused.
std::string resolve_checkpoint(const std::string& path, const std::function<void(const std::string&)>& warn = {},
                               const CheckingRanks& ranks = {});

}  // namespace weft::models
