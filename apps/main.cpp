#include <iostream>
#include <string>
#include <vector>

#include "apps/command.h"
#include "apps/commands.h"

#ifndef WEFT_VERSION
#define WEFT_VERSION "(unversioned build)"
#endif

namespace {

using namespace weft::apps;

constexpr Command kCommands[] = {
    {"train", "trains a model", run_train},
    {"generate", "continues a text with a trained model", run_generate},
    {"eval", "measures a model's loss on a data set", run_eval},
    {"tokenize", "trains a tokenizer, encodes and decodes text", run_tokenize},
    {"data", "prepares and inspects token files", run_data},
    {"checkpoint", "lists, verifies and shows checkpoints", run_checkpoint},
    {"plan", "tells what a distributed run would do, before it runs", run_plan},
    {"bench", "measures the speed of operations and models on this machine", run_bench},
    {"doctor", "tells what this machine and this build can do", run_doctor},
};

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> args(argv + (argc > 0 ? 1 : 0), argv + argc);
  return run_program("Trains and runs transformer language models.", WEFT_VERSION, kCommands, args,
                     process_environment(), std::cout, std::cerr);
}
