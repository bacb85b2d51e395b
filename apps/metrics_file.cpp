#include "apps/metrics_file.h"

#include <nlohmann/json.hpp>

#include "core/error.h"
#include "core/file.h"

namespace weft::apps {

MetricsFile::MetricsFile(const std::filesystem::path& path, int64_t first_step, bool last) : path_(path.string()) {
  std::string kept;
  if (std::ifstream in(path); first_step > 0 && in) {
    for (std::string line; std::getline(in, line);) {
      const nlohmann::json entry = nlohmann::json::parse(line, nullptr, false);
      if (!entry.is_object() || !entry.contains("step") || !entry["step"].is_number_integer()) continue;
      const auto step = entry["step"].get<int64_t>();
      const bool made_again = last && step + 1 == first_step && entry.contains("held_out_loss");
      if (step < first_step && !made_again) kept += line + "\n";
    }
  }
  write_file_atomic(path_, as_bytes(kept));
  out_.open(path, std::ios::app);
}

void MetricsFile::write(const std::string& entry) {
  out_ << entry << '\n';
  out_.flush();
  if (!out_) fail(ErrorKind::kIo, "train", "could not write to ", path_, ": is the disk full?");
}

}  // namespace weft::apps
