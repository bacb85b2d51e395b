#pragma once
#include <filesystem>
#include <string>

namespace weft::apps {

/// The content of a file, or of standard input for "-". @throws Error kIo.
std::string read_input(const std::string& path);

/// Makes a directory and those above it, as far as they are missing. @throws Error kIo naming the path and why.
void make_directories(const std::filesystem::path& directory);

/// Checks that a file can be made at `path`, before the long work whose result goes there.
/// @throws Error kIo if its directory is missing or not writable, or if `path` is there and no regular file.
void check_writable(const std::string& path);

/// Seconds of a clock that never goes back.
double steady_seconds();

/// A number with that many digits after the point.
std::string fixed(double value, int digits);

/// "12.3 MB/s" for bytes handled in a time, decimal megabytes.
std::string megabytes_per_second(size_t bytes, double seconds);

}  // namespace weft::apps
