#pragma once
#include <span>
#include <string>

#include "apps/command.h"

/// The commands of the `weft` program, one per apps/<name>.cpp. Each takes the arguments after its name and returns the
/// exit code; failures are thrown.
namespace weft::apps {

int run_train(std::span<const std::string> args);
int run_generate(std::span<const std::string> args);
int run_eval(std::span<const std::string> args);
int run_tokenize(std::span<const std::string> args);
int run_data(std::span<const std::string> args);
int run_checkpoint(std::span<const std::string> args);
int run_plan(std::span<const std::string> args);
int run_verify(std::span<const std::string> args);
int run_launch(std::span<const std::string> args);
int run_bench(std::span<const std::string> args);
int run_doctor(std::span<const std::string> args);

/// All of them, with a line on each.
std::span<const Command> commands();

}  // namespace weft::apps
