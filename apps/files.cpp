#include "apps/files.h"

#include <chrono>
#include <cstdio>
#include <iostream>
#include <iterator>

#include "core/error.h"
#include "core/file.h"

namespace weft::apps {

std::string read_input(const std::string& path) {
  if (path != "-") return read_file(path);
  std::string content{std::istreambuf_iterator<char>(std::cin), std::istreambuf_iterator<char>()};
  if (std::cin.bad()) fail(ErrorKind::kIo, "read_input", "standard input could not be read");
  return content;
}

void make_directories(const std::filesystem::path& directory) {
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  if (!error && !std::filesystem::is_directory(directory, error) && !error) {
    error = std::make_error_code(std::errc::not_a_directory);
  }
  if (error) fail(ErrorKind::kIo, "make_directory", directory.string(), ": cannot be made: ", error.message());
}

void check_writable(const std::string& path) { const AtomicFile probe(path); }

double steady_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::string fixed(double value, int digits) {
  char text[512];  // the largest double has 309 digits before the point
  std::snprintf(text, sizeof text, "%.*f", digits, value);
  return text;
}

std::string megabytes_per_second(size_t bytes, double seconds) {
  return fixed(static_cast<double>(bytes) * 1e-6 / (seconds > 0 ? seconds : 1e-9), 1) + " MB/s";
}

}  // namespace weft::apps
