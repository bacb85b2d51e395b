#pragma once
#include <filesystem>
#include <optional>
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
  /// The value of a key if it is set.
  virtual std::optional<std::string> find(const std::string& key) = 0;
  /// Why `rank` will not come any more, if the store knows who belongs to the run and that it has ended: "" otherwise.
  virtual std::string gone([[maybe_unused]] int rank) const { return ""; }
};

/// A store in a directory that all processes see: on one machine, or on a shared file system. The directory is made if
/// it is not there; who made it for this purpose removes it.
class FileStore : public Store {
 public:
  explicit FileStore(std::filesystem::path directory);
  void set(const std::string& key, const std::string& value) override;
  std::string get(const std::string& key, double timeout) override;
  std::optional<std::string> find(const std::string& key) override;

 private:
  std::filesystem::path directory_;
};

}  // namespace weft::dist
