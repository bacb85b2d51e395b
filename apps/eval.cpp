// weft eval: a model's loss on held-out text beside that of an n-gram model on the same tokens.
#include <iostream>
#include <iterator>

#include "apps/commands.h"
#include "apps/data_directory.h"
#include "apps/device_option.h"
#include "apps/files.h"
#include "apps/held_out.h"
#include "apps/options.h"
#include "apps/progress.h"
#include "apps/stop_signal.h"
#include "core/log.h"
#include "models/gpt_checkpoint.h"

namespace weft::apps {
namespace {

struct EvalOptions {
  std::string checkpoint;
  std::filesystem::path data;
  int64_t kneser_ney = 5, batch = 32;
  DeviceOption device;

  void declare(Options& o) {
    o.add("checkpoint", &checkpoint, {.placeholder = "DIR"},
          "a checkpoint, or the directory of a run: then its newest complete one; without it, the n-gram model alone");
    o.add("data", &data, {.required = true, .placeholder = "DIR"}, "what `weft data prepare` wrote");
    o.add("kneser_ney", &kneser_ney, {.min = 0, .max = 32},
          "order of the interpolated Kneser-Ney model to compare with; 0: none");
    o.add("batch", &batch, {.min = 1, .max = 1 << 20, .unit = "sequences"}, "rows of a batch");
    device.declare(o);
  }
};

/// One model of the table.
struct Row {
  std::string name;
  HeldOutLoss loss;
};

void print_table(const std::vector<Row>& rows) {
  size_t widest = 5;
  for (const Row& row : rows) widest = std::max(widest, row.name.size());
  const auto right = [](const std::string& text, size_t width) {
    return std::string(width > text.size() ? width - text.size() : 0, ' ') + text;
  };
  const auto left = [&](const std::string& text) { return text + std::string(widest - text.size(), ' '); };
  std::cout << left("model") << right("nats per token", 17) << right("bits per byte", 16) << right("parameters", 16)
            << '\n';
  for (const Row& row : rows) {
    std::cout << left(row.name) << right(fixed(row.loss.nats_per_token, 4), 17)
              << right(fixed(row.loss.bits_per_byte(), 4), 16) << right(grouped(row.loss.parameters), 16) << '\n';
  }
}

HeldOutLoss model_loss(const EvalOptions& o, Device device, const DataDirectory& data, std::string& name) {
  const models::LoadedGpt model =
      models::load_gpt(o.checkpoint, device, [](const std::string& line) { log::warn(line); });
  if (!model.tokenizer.has_value()) {
    fail(ErrorKind::kData, "eval", model.path, " has no tokenizer.json: whether it fits ", o.data.string(),
         " cannot be told");
  }
  if (model.tokenizer->to_json() != data.tokenizer.to_json()) {
    fail(ErrorKind::kData, "eval", "the tokenizer of ", model.path, " (", grouped(model.tokenizer->vocab_size()),
         " tokens) is not that of ", o.data.string(), " (", grouped(data.tokenizer.vocab_size()),
         " tokens): the same ids mean other text. Hint: weft data prepare --tokenizer ", model.path, "/tokenizer.json");
  }
  if (model.gpt->config().vocab != data.tokenizer.vocab_size()) {
    fail(ErrorKind::kData, "eval", "the model of ", model.path, " has a vocabulary of ",
         grouped(model.gpt->config().vocab), ", its tokenizer one of ", grouped(data.tokenizer.vocab_size()));
  }
  name = concat("GPT after step ", grouped(model.step));
  constexpr int64_t kParts = 1000;
  Progress progress({.title = "eval", .total = kParts});
  const StopSignal stop;
  const HeldOutLoss loss = held_out_loss(*model.gpt, data.held_out, data.tokenizer, o.batch, [&](double done) {
    progress.update(static_cast<int64_t>(done * kParts), "");
    return !stop.requested();
  });
  if (stop.requested()) fail(ErrorKind::kState, "eval", "ended by ", stop.name(), " before all held-out text was seen");
  return loss;
}

}  // namespace

int run_eval(std::span<const std::string> args) {
  EvalOptions o;
  Options options("eval", "Measures the loss on held-out text: of a model, and of an n-gram model on the same tokens.");
  o.declare(options);
  if (!options.parse(args)) return 0;
  if (o.checkpoint.empty() && o.kneser_ney == 0) {
    options.reject("kneser_ney", "with neither a checkpoint nor an n-gram model there is nothing to measure");
  }
  const Device device = o.device.device(options);
  const DataDirectory data = DataDirectory::open(o.data);
  std::vector<Row> rows;
  if (!o.checkpoint.empty()) {
    Row row;
    row.loss = model_loss(o, device, data, row.name);
    rows.push_back(std::move(row));
    o.device.report(device);
  }
  if (o.kneser_ney > 0) {
    const double begin = steady_seconds();
    rows.push_back({concat("Kneser-Ney ", o.kneser_ney, "-gram"),
                    kneser_ney_loss(*data.train, *data.held_out, data.tokenizer, static_cast<int>(o.kneser_ney))});
    log::info("n-gram model in ", fixed(steady_seconds() - begin, 1), " s");
  }
  std::cout << "held out: " << grouped(rows[0].loss.tokens) << " tokens, " << grouped(rows[0].loss.bytes)
            << " bytes of " << o.data.string() << '\n';
  print_table(rows);
  if (rows.size() == 2) {
    const double difference = rows[0].loss.bits_per_byte() - rows[1].loss.bits_per_byte();
    std::cout << "the " << (difference < 0 ? "GPT" : "n-gram model") << " is better by "
              << fixed(std::abs(difference), 4) << " bits per byte ("
              << fixed(100 * std::abs(difference) / rows[1].loss.bits_per_byte(), 1) << "% of the n-gram model's)\n";
  }
  return 0;
}

}  // namespace weft::apps
