#include "dist/store.h"

#include <unistd.h>

#include <chrono>
#include <fstream>
#include <iterator>
#include <thread>

#include "core/error.h"

namespace weft::dist {
namespace {

/// Keys may hold slashes; file names do not.
std::filesystem::path file_of(const std::filesystem::path& directory, std::string key) {
  for (char& c : key) {
    if (c == '/') c = '.';
  }
  return directory / key;
}

}  // namespace

FileStore::FileStore(std::filesystem::path directory) : directory_(std::move(directory)) {
  std::error_code error;
  // What is in it lets a process join the run: its owner alone may read it.
  if (std::filesystem::create_directories(directory_, error)) {
    std::filesystem::permissions(directory_, std::filesystem::perms::owner_all, error);
  }
  if (error) fail(ErrorKind::kIo, "store", directory_.string(), ": cannot be made: ", error.message());
}

void FileStore::set(const std::string& key, const std::string& value) {
  // Written under another name first: a reader sees nothing or all of it.
  const std::filesystem::path file = file_of(directory_, key);
  const std::filesystem::path temporary = concat(file.string(), ".", ::getpid(), ".tmp");
  std::ofstream out(temporary, std::ios::binary);
  out << value;
  out.close();
  std::error_code error;
  if (out) std::filesystem::rename(temporary, file, error);
  if (!out || error) {
    fail(ErrorKind::kIo, "store", file.string(), ": cannot be written", error ? ": " + error.message() : "");
  }
}

std::optional<std::string> FileStore::find(const std::string& key) {
  std::ifstream in(file_of(directory_, key), std::ios::binary);
  if (!in) return std::nullopt;
  return std::string(std::istreambuf_iterator<char>(in), {});
}

std::string FileStore::get(const std::string& key, double timeout) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(timeout);
  for (;;) {
    if (std::optional<std::string> value = find(key)) return *std::move(value);
    if (std::chrono::steady_clock::now() > deadline) {
      fail(ErrorKind::kIo, "store", "nobody has set ", quoted(key), " in ", directory_.string(), " for ", timeout,
           " s");
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
}

}  // namespace weft::dist
