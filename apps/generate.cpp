// weft generate: continues a text token by token, printed as it comes.
#include "models/generate.h"

#include <unistd.h>
#include <iostream>

#include "apps/commands.h"
#include "apps/device_option.h"
#include "apps/files.h"
#include "apps/options.h"
#include "apps/stop_signal.h"
#include "apps/text_stream.h"
#include "core/log.h"
#include "models/gpt_checkpoint.h"

namespace weft::apps {
namespace {

struct GenerateOptions {
  std::string checkpoint, prompt, prompt_file, stop_at;
  int64_t tokens = 200;
  double temperature = 0.8, top_p = 0.95;
  int64_t top_k = 0, seed = 1;
  bool echo = true;
  DeviceOption device;

  void declare(Options& o) {
    o.add("checkpoint", &checkpoint, {.required = true, .placeholder = "DIR"},
          "a checkpoint, or the directory of a run: then its newest complete one");
    o.add("prompt", &prompt, {}, "the text to continue");
    o.add("prompt_file", &prompt_file, {.placeholder = "FILE"}, "or a file with it; - is standard input");
    o.add("tokens", &tokens, {.min = 1, .max = int64_t{1} << 40, .unit = "tokens"}, "most tokens to add");
    o.add("temperature", &temperature, {.min = 0, .max = 1e6},
          "logits are divided by it; 0 always takes the most likely token");
    o.add("top_k", &top_k, {.min = 0, .unit = "tokens"}, "choose among so many of the most likely; 0: all");
    o.add("top_p", &top_p, {.max = 1, .above = 0}, "choose among the most likely that reach this probability together");
    o.add("seed", &seed, {.min = 0}, "of the random choice: the same seed gives the same text");
    o.add("stop_at", &stop_at, {}, "end where this text would come");
    o.add("echo", &echo, "print the prompt before its continuation");
    device.declare(o);
  }

  std::string prompt_text(const Options& o) const {
    if (!prompt.empty() && !prompt_file.empty()) o.reject("prompt_file", "cannot be given together with --prompt");
    const std::string text = prompt_file.empty() ? prompt : read_input(prompt_file);
    if (!text.empty()) return text;
    if (!prompt_file.empty())
      fail(ErrorKind::kData, "generate", prompt_file, " is empty: there is no text to continue");
    o.reject("prompt", "must be given and not be empty, or --prompt-file FILE. Hint: --prompt \"In the beginning\"");
  }
};

/// Text for standard output; on a terminal without what the terminal would obey.
void show(const std::string& text) {
  static const bool terminal = isatty(STDOUT_FILENO) == 1;
  std::cout << (terminal ? log::printable(text) : text) << std::flush;
}

}  // namespace

int run_generate(std::span<const std::string> args) {
  GenerateOptions o;
  Options options("generate", "Continues a text with a trained model.");
  o.declare(options);
  if (!options.parse(args)) return 0;
  const std::string prompt = o.prompt_text(options);
  const Device device = o.device.device(options);
  const models::LoadedGpt model =
      models::load_gpt(o.checkpoint, device, [](const std::string& line) { log::warn(line); });
  if (!model.tokenizer.has_value()) {
    fail(ErrorKind::kData, "generate", model.path, " has no tokenizer.json: its model knows ids but no text");
  }
  const text::Tokenizer& tokenizer = *model.tokenizer;
  log::info(model.path, ": step ", grouped(model.step), ", ", grouped(model.gpt->parameter_count()), " parameters");

  models::SamplingOptions sampling;
  sampling.temperature = o.temperature, sampling.top_k = o.top_k, sampling.top_p = o.top_p;
  sampling.seed = static_cast<uint64_t>(o.seed);
  const std::vector<int32_t> ids = tokenizer.encode(prompt);
  TextStream stream(o.stop_at);
  const StopSignal stop;
  if (o.echo) show(prompt);
  const double begin = steady_seconds();
  const std::vector<int32_t> made = models::generate(*model.gpt, ids, o.tokens, sampling, [&](int32_t id) {
    show(stream.push(tokenizer.token(id)));
    return !stream.stopped() && !stop.requested() && std::cout.good();
  });
  show(stream.finish() + "\n");
  const double seconds = steady_seconds() - begin;
  log::info(grouped(static_cast<int64_t>(made.size())), " tokens in ", fixed(seconds, 2), " s (",
            fixed(static_cast<double>(made.size()) / std::max(seconds, 1e-9), 1), " tokens/s, a prompt of ",
            grouped(static_cast<int64_t>(ids.size())), ")", stream.stopped() ? ", ended by the stop text" : "",
            stop.requested() ? concat(", ended by ", stop.name()) : "");
  o.device.report(device);
  return 0;
}

}  // namespace weft::apps
