#include <iostream>
#include <string>
#include <vector>

#include "apps/command.h"
#include "apps/commands.h"

#ifndef WEFT_VERSION
#define WEFT_VERSION "(unversioned build)"
#endif

int main(int argc, char** argv) {
  using namespace weft::apps;
  const std::vector<std::string> args(argv + (argc > 0 ? 1 : 0), argv + argc);
  return run_program("Trains and runs transformer language models.", WEFT_VERSION, commands(), args,
                     process_environment(), std::cout, std::cerr);
}
