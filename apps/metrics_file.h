#pragma once
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>

namespace weft::apps {

/// metrics.jsonl: one object a step, and one for each evaluation. A resumed run goes on behind the last step it keeps.
class MetricsFile {
 public:
  /// @param last  no step follows: the evaluation at the end is made again
  MetricsFile(const std::filesystem::path& path, int64_t first_step, bool last);
  /// @param entry  a JSON object on one line. @throws Error kIo if it cannot be written.
  void write(const std::string& entry);

 private:
  std::ofstream out_;
  std::string path_;
};

}  // namespace weft::apps
