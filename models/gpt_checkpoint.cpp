#include "models/gpt_checkpoint.h"

#include <sys/stat.h>
#include <array>
#include <charconv>

namespace weft::models {
namespace {

/// Shortest text that reads back as the same number.
template <class T>
std::string text_of(T value) {
  std::array<char, 32> buffer;
  return {buffer.data(), std::to_chars(buffer.data(), buffer.data() + buffer.size(), value).ptr};
}

/// The entries of a state under "gpt.", each of which must be read.
class StateReader {
 public:
  StateReader(const std::map<std::string, std::string>& state, const std::string& where)
      : state_(state), where_(where) {}

  template <class T>
  void read(const std::string& name, T& value) const {
    const auto found = state_.find("gpt." + name);
    if (found == state_.end()) {
      fail(ErrorKind::kData, "gpt_checkpoint", where_, ": the state has no entry \"gpt.", name,
           "\": it is no checkpoint of a GPT");
    }
    const std::string& text = found->second;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc{} || end != text.data() + text.size()) {
      fail(ErrorKind::kData, "gpt_checkpoint", where_, ": the state entry \"gpt.", name, "\" is ", weft::quoted(text),
           "; must be a number");
    }
  }

 private:
  const std::map<std::string, std::string>& state_;
  const std::string& where_;
};

bool exists(const std::string& path) {
  struct stat info{};
  return ::stat(path.c_str(), &info) == 0;
}

/// A configuration is believed only if the stored tensors are as many numbers as it says: nothing is allocated for a
/// size that only the manifest names.
void check_count(const GptConfig& config, const CheckpointTensors& model) {
  int64_t stored = 0;
  for (const CheckpointTensor& entry : model.tensors()) stored += numel(entry.shape);
  const double width = static_cast<double>(config.width);
  const double estimate = 12 * width * width * static_cast<double>(config.layers) +
                          width * (static_cast<double>(config.vocab) + static_cast<double>(config.context));
  constexpr double kBeyondAnyFile = 1e15;  // far below where parameter_count() would overflow
  if (estimate < kBeyondAnyFile && config.parameter_count() == stored) return;
  fail(ErrorKind::kData, "gpt_checkpoint", model.source(), ": holds ", grouped(stored), " numbers; a GPT of ",
       config.layers, " layers, width ", config.width, ", context ", config.context, " and vocabulary ", config.vocab,
       " has ", estimate < kBeyondAnyFile ? grouped(config.parameter_count()) : concat("about ", estimate),
       ": the manifest's state and the tensors do not belong together");
}

}  // namespace

std::map<std::string, std::string> to_state(const GptConfig& config) {
  return {{"gpt.layers", text_of(config.layers)},    {"gpt.heads", text_of(config.heads)},
          {"gpt.width", text_of(config.width)},      {"gpt.context", text_of(config.context)},
          {"gpt.vocab", text_of(config.vocab)},      {"gpt.dropout", text_of(config.dropout)},
          {"gpt.norm_eps", text_of(config.norm_eps)}};
}

GptConfig gpt_config_from_state(const std::map<std::string, std::string>& state, const std::string& where) {
  const StateReader reader(state, where);
  GptConfig config;
  reader.read("layers", config.layers);
  reader.read("heads", config.heads);
  reader.read("width", config.width);
  reader.read("context", config.context);
  reader.read("vocab", config.vocab);
  reader.read("dropout", config.dropout);
  reader.read("norm_eps", config.norm_eps);
  try {
    config.check();
  } catch (const Error& error) {
    fail(ErrorKind::kData, "gpt_checkpoint", where, ": the state describes no GPT: ", error.what());
  }
  return config;
}

std::string resolve_checkpoint(const std::string& path, const std::function<void(const std::string&)>& warn,
                               const CheckingRanks& ranks) {
  if (!exists(path)) fail(ErrorKind::kIo, "gpt_checkpoint", weft::quoted(path), ": there is no such directory");
  if (exists(path + "/manifest.json")) return path;
  const LatestCheckpoint latest = find_latest_checkpoint(path, ranks);
  if (latest.path.has_value()) {
    for (const std::string& line : latest.messages()) {
      if (warn) warn(line);
    }
    return *latest.path;
  }
  std::string reasons;
  for (const RejectedCheckpoint& each : latest.rejected) reasons += concat("\n", each.path, ": ", each.reason);
  fail(ErrorKind::kData, "gpt_checkpoint", path,
       latest.rejected.empty() ? " is no checkpoint (no manifest.json) and holds none (no step_...)"
                               : " holds no intact checkpoint:",
       reasons);
}

LoadedGpt load_gpt(const std::string& path, Device device, const std::function<void(const std::string&)>& warn) {
  LoadedGpt loaded;
  loaded.path = resolve_checkpoint(path, warn);
  const bool verified = loaded.path != path;
  const OpenCheckpoint open = verified ? open_verified_checkpoint(loaded.path) : open_checkpoint(loaded.path);
  const GptConfig config = gpt_config_from_state(open.manifest.state, loaded.path);
  check_count(config, open.model);
  const DType dtype = open.model.entry("wte.weight").dtype;
  if (!is_float(dtype)) {
    fail(ErrorKind::kData, "gpt_checkpoint", open.model.source(), ": weights must be of a float type, are ", dtype);
  }
  if (const auto json = open.text_files.find("tokenizer.json"); json != open.text_files.end()) {
    loaded.tokenizer = text::Tokenizer::from_json(json->second, loaded.path + "/tokenizer.json");
    if (loaded.tokenizer->vocab_size() != config.vocab) {
      fail(ErrorKind::kData, "gpt_checkpoint", loaded.path, ": the model has a vocabulary of ", grouped(config.vocab),
           ", its tokenizer one of ", grouped(loaded.tokenizer->vocab_size()));
    }
  }
  loaded.gpt = std::make_unique<Gpt>(config, device, 0, dtype);
  const MemoryScope scope(MemoryCategory::workspace);
  loaded.gpt->load(open.model.load_all(device));
  loaded.gpt->eval();
  loaded.step = open.manifest.step;
  return loaded;
}

}  // namespace weft::models
