#pragma once
#include <filesystem>
#include <string>

namespace weft::dist {

/// Where processes that do not know each other yet leave and find short messages: their addresses. Keys are set once.
/// One run has one store; a second run needs another (an empty directory, another prefix).
class Store {
 public:
  virtual ~Store() = default;
  /// @throws Error  kIo.
  virtual void set(const std::string& key, const std::string& value) = 0;
  /// Waits for the key up to `timeout` seconds. @throws Error  kIo if it has not come by then.
  virtual std::string get(const std::string& key, double timeout) = 0;
};

/// A store in a directory that all processes see: on one machine, or on a shared file system. The directory is made if
/// it is not there; who made it for this purpose removes it.
class FileStore : public Store {
 public:
  explicit FileStore(std::filesystem::path directory);
  void set(const std::string& key, const std::string& value) override;
  std::string get(const std::string& key, double timeout) override;

 private:
  std::filesystem::path directory_;
};

}  // namespace weft::dist
