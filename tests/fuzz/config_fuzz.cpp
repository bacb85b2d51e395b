// Fuzz target for the TOML files of the commands.
#include "apps/config_file.h"
#include "tests/fuzz/fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const weft::fuzz::InputFile file(data, size);
  return weft::fuzz::accepts_or_refuses(weft::ErrorKind::kUsage, [&] { weft::apps::read_config_file(file.path()); });
}

namespace weft::fuzz {

std::vector<std::string> seeds() {
  return {
      "# a run\n[model]\nlayers = 4\nwidth = 0x80\nlr = 4e-3\ndropout = inf\nrecompute = \"block\"\n[run]\nout = "
      "\"a\\u00e9\"\nlist = [1, 2.5, 'x']\ntext = \"\"\"\nlong\"\"\"\nat = 1979-05-27T07:32:00Z\n"};
}

std::vector<std::string> words() {
  return {"[",       "]",     "[[",          "]]",     "=",
          ".",       "\"",    "'",           "\"\"\"", "'''",
          "\n",      "#",     "{",           "}",      ",",
          "-",       "+",     "_",           "0x",     "nan",
          "1e999",   "\\u",   "\\UFFFFFFFF", "\xff",   std::string(1, '\0'),
          "[model]", "layers"};
}

std::string repaired(std::string mutated, const std::string&) { return mutated; }

}  // namespace weft::fuzz
