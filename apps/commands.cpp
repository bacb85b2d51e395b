#include "apps/commands.h"

namespace weft::apps {
namespace {

constexpr Command kCommands[] = {
    {"train", "trains a model", run_train},
    {"generate", "continues a text with a trained model", run_generate},
    {"eval", "measures a model's loss on a data set", run_eval},
    {"tokenize", "trains a tokenizer, encodes and decodes text", run_tokenize},
    {"data", "prepares and inspects token files", run_data},
    {"checkpoint", "lists, verifies and shows checkpoints", run_checkpoint},
    {"plan", "tells what a distributed run would do, before it runs", run_plan},
    {"verify", "proves that a layout of ranks trains as one rank does", run_verify},
    {"launch", "starts the ranks of a run on one or several machines", run_launch},
    {"bench", "measures the speed of operations and models on this machine", run_bench},
    {"doctor", "tells what this machine and this build can do", run_doctor},
};

}  // namespace

std::span<const Command> commands() { return kCommands; }

}  // namespace weft::apps
